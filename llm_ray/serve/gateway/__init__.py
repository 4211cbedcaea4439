"""The gateway: one application before all models, with OpenAI's API, keys, limits and metrics."""
