"""A replica: the process in which one model answers, with Ray's LLMServer before an engine."""
