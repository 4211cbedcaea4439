"""Serving: models deployed on Ray Serve with the OpenAI API, run by vLLM's CPU engine, OpenVINO or transformers."""
