"""Use cases, one function each, shared by all clients: command line, web UI, jobs API.

Functions take plain values and confs and return dataclasses or pydantic models, not text. They report progress to a
:class:`~llm_ray.progress.Reporter` and raise :class:`~llm_ray.errors.LlmRayError`. They do not print, read the
environment or depend on a terminal, so threads of one process may call them concurrently for different users. A process
has one Ray connection: threads that want the same one share it, others wait (`llm_ray.cluster`). A finetune therefore
belongs in its own process.

Modules by subject: finetune, runs, data, models, serving, keys, cluster, ask, bench, quickstart.
"""
