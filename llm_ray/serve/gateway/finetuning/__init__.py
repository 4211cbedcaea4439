"""OpenAI's fine-tuning API at the gateway: `/v1/files` and `/v1/fine_tuning/jobs`, over use cases that it is given.

`service.py` says what those use cases are (`llm_ray.app.api_service` has them), `objects.py` how their results are
written, `upload.py` takes a file in, `routes.py` has the operations.
"""
