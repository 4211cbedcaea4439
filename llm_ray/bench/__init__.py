"""Load tests of an endpoint, for `llm-ray bench serve` and, through :func:`llm_ray.bench.load.run_load`, for other
benchmarks.

:mod:`~llm_ray.bench.load` sends the requests and measures, :mod:`~llm_ray.bench.report` writes the results as a table,
JSON and a plot, :mod:`~llm_ray.bench.prompts` holds built-in prompts.
"""
