"""Models by name, from Hugging Face or ModelScope into a cache, checked byte for byte.

A listing per hub, one client that fetches, one cache layout. Only data is fetched, never pickles or
code, and every file is hashed against what the hub said of it: SHA-256, or git's SHA-1 for small
files. An interrupted transfer goes on where it stopped. With HF_HUB_OFFLINE=1 the cache alone
answers.
"""

from __future__ import annotations

from halfbyte.formats.hub.pulling import HUBS, HubId, cached, outlined, pull, verify_hub

__all__ = ["HUBS", "HubId", "cached", "outlined", "pull", "verify_hub"]
