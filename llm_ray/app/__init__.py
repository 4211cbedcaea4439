"""Use cases, one function each, for every client: the command line, the page, a jobs API.

Arguments are plain values and confs, results are dataclasses and pydantic models with figures in place of text.
Progress goes to the :class:`~llm_ray.progress.Reporter` that is given, what goes wrong is an
:class:`~llm_ray.errors.LlmRayError`. Nothing here prints, reads the environment or knows of a terminal, so that threads
of one process may call it at the same time, for different users. What a process can have only once, a connection to
Ray, is shared by threads that want the same, and waited for by others (`llm_ray.cluster`): a finetune belongs into a
process of its own.

The functions are found by subject: finetune, runs, data, models, serving, keys, cluster, ask, bench, quickstart.
"""
