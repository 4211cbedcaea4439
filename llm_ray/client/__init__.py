"""Client of a deployed model, for `llm-ray infer`: one prompt or a file of prompts.

:mod:`~llm_ray.client.endpoint` parses the URL and finds the API key, :mod:`~llm_ray.client.ask` sends prompts,
:mod:`~llm_ray.client.connections` keeps HTTP clients between requests, :mod:`~llm_ray.client.prompts` reads prompt
files, :mod:`~llm_ray.client.batch` answers a whole file and stores the answers, and :mod:`~llm_ray.client.errors` turns
HTTP and network errors into messages for the user.
"""
