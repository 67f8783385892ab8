"""One fuzz target per file; see run.py."""
