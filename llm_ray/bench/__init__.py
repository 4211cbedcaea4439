"""An endpoint under load: what `llm-ray bench serve` does, and other benchmarks through
:func:`llm_ray.bench.load.run_load`.

:mod:`~llm_ray.bench.load` loads the endpoint and measures, :mod:`~llm_ray.bench.report` makes figures, a table, JSON
and a plot of what was measured, :mod:`~llm_ray.bench.prompts` has prompts for those who bring none.
"""
