"""The command ``llm-ray``: thin click commands that parse, call a use case, and print."""
