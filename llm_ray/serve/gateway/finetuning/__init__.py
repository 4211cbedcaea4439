"""OpenAI's fine-tuning API at the gateway: `/v1/files` and `/v1/fine_tuning/jobs`, on top of use cases passed in.

`service.py` defines the interface of the use cases (implemented in `llm_ray.app.api_service`), `objects.py` the API's
objects, `upload.py` receives files, `routes.py` holds the operations.
"""
