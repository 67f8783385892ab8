"""`python -m halfbyte` is `halfbyte`."""

from halfbyte.cli import main

main()
