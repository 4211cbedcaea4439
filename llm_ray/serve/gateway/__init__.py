"""The gateway: one application in front of all models, with OpenAI's API, keys, limits and metrics."""
