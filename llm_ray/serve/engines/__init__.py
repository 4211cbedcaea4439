"""Engines: tokens in, tokens out, each in a thread of the replica, behind vLLM's own front end."""
