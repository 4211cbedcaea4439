"""Load tests of an endpoint, for `llm-ray bench serve`, and for other benchmarks through
:func:`llm_ray.bench.load.run_load`.

:mod:`~llm_ray.bench.load` loads the endpoint and measures, :mod:`~llm_ray.bench.report` turns the measurements into
figures, a table, JSON and a plot, :mod:`~llm_ray.bench.prompts` has built-in prompts.
"""
