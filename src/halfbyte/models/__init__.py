"""The one decoder, its cache, and how a source becomes a running model."""
