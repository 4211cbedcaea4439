"""``llm-ray quickstart``: the whole way, from a base model to answers of a finetuned one."""

from __future__ import annotations

import os
from pathlib import Path

import click


@click.command()
@click.option(
    "--home", type=click.Path(file_okay=False, path_type=Path), help="Folder of models and runs. Default: $LLM_RAY_HOME, else ~/.llm-ray."
)
@click.option("--force", is_flag=True, help="Finetune again, also when it is done.")
@click.option("--keep-serving", is_flag=True, help="Go on serving both models until Ctrl-C.")
def quickstart(home: Path | None, force: bool, keep_serving: bool) -> None:
    """Finetune a small model on bundled data, deploy it, ask it: the whole way.

    Imports SmolLM2-135M-Instruct, finetunes it with two Ray Train workers on 300 questions and answers about a made-up company,
    deploys it beside the base model on Ray Serve, and asks both the same 30 questions that were not trained on. What is done
    already is not done again. Exit code 1 when the finetuned model answers less than 85 % right.

    \b
    Examples:
      llm-ray quickstart
      llm-ray quickstart --home /data/llm-ray --keep-serving
    """
    from llm_ray.console import Reporter
    from llm_ray.errors import LlmRayError
    from llm_ray.quickstart.run import ENOUGH, quickstart

    if home:
        os.environ["LLM_RAY_HOME"] = str(home.absolute())
    result = quickstart(Reporter(), force=force, keep_serving=keep_serving)
    if not result.good:
        raise LlmRayError(
            f"the finetuned model answers less than {ENOUGH:.0%} of the questions right: llm-ray quickstart --force finetunes it again"
        )
