"""Client of a deployed model, for `llm-ray infer`: one prompt or a file of them.

:mod:`~llm_ray.client.endpoint` tells the two kinds of URL apart and finds the API key, :mod:`~llm_ray.client.ask` asks,
:mod:`~llm_ray.client.connections` keeps clients between questions, :mod:`~llm_ray.client.prompts` reads files of
prompts, :mod:`~llm_ray.client.batch` asks them all and keeps the answers, and :mod:`~llm_ray.client.errors` says in words what an endpoint or the way to it refused.
"""
