"""halfbyte: a language model in half a byte per weight, proved to behave like the original."""

__version__ = "0.1.0"
