"""Inference engines: tokens in, tokens out, each in a thread of the replica process, behind vLLM's front end."""
