"""A server for the clients there are: wire formats in, the same engine behind, a page to look at.

Text, JSON and sockets; no tensor is touched here. The event loop never computes: what takes long is
done by the engine's thread, or by a thread of its own.
"""
