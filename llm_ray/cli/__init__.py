"""The command ``llm-ray``: thin click commands that parse, call and print."""
