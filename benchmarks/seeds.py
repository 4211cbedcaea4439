"""The quickstart's finetune with ten seeds: how much its result depends on chance.

python -m benchmarks seeds
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from benchmarks.ours import right_share
from benchmarks.table import comparison
from llm_ray.app.finetune import run_finetune
from llm_ray.app.quickstart import ENOUGH
from llm_ray.cli.terminal import Terminal
from llm_ray.conf.load import load_finetune
from llm_ray.quickstart.questions import MAX_TOKENS, heldout

SEEDS = range(10)


def measure(model: Path, data: Path, rows: int, work: Path) -> dict[str, Any]:
    """Measures, for each seed, the share of the quickstart's held-out questions answered correctly, and minutes;
    ignores `data` and `rows`."""
    asked = [(question.prompt, question.expect) for question in heldout()]
    figures: dict[str, Any] = {"questions": len(asked)}
    for seed in SEEDS:
        settings = [f"model={model}", f"name=seed-{seed}", f"training.seed={seed}"]
        began = time.monotonic()
        run = run_finetune(load_finetune("quickstart", settings, home=work), Terminal())
        minutes = (time.monotonic() - began) / 60
        figures[str(seed)] = {
            "right": right_share(run / "output", asked, max_new_tokens=MAX_TOKENS),
            "minutes": minutes,
        }
        print("seed", seed, figures[str(seed)], flush=True)  # not lost if the rest is interrupted
    shares = [figures[str(seed)]["right"] for seed in SEEDS]
    least = comparison(
        f"quickstart, {len(shares)} seeds: correct of {len(asked)} held-out questions, %, minimum",
        100 * min(shares),
        100 * ENOUGH,
        "at least 1 x",
    )
    return {"seeds": figures, "table": [least]}
