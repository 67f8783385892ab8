"""Checkpoints in and out: safetensors, GGUF, manifests, the hub.

Everything here works on files and `QTensor`s, one tensor at a time; reading needs no torch. Files
are untrusted: every number in a header is checked before it is used.
"""
