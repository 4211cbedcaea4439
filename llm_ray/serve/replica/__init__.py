"""A replica: the process that serves one model, with Ray's LLMServer in front of an engine."""
