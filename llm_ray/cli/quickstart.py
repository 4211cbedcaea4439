"""``llm-ray quickstart``: from a base model to answers of a finetuned one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from llm_ray.cli.foreground import until_interrupted
from llm_ray.cli.options import set_option
from llm_ray.cli.terminal import Terminal
from llm_ray.conf import section
from llm_ray.errors import LlmRayError

if TYPE_CHECKING:
    from llm_ray.app.quickstart import Done


@click.command()
@click.option(
    "--home",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of models and runs. Default: $LLM_RAY_HOME, else ~/.llm-ray.",
)
@set_option("Set a key of the finetune's conf (dotted, as training.epochs=2). Repeat for more.")
@click.option("--force", is_flag=True, help="Finetune again, even if already done.")
@click.option("--keep-serving", is_flag=True, help="Keep serving both models until Ctrl-C.")
def quickstart(home: Path | None, overrides: tuple[str, ...], force: bool, keep_serving: bool) -> None:
    """Finetune a small model on bundled data, deploy it, and ask it questions.

    Imports SmolLM2-135M-Instruct, finetunes it with two Ray Train workers on 300 questions and answers about a
    made-up company, deploys it next to the base model on Ray Serve, and asks both the same 30 questions that were
    not trained on. Finished steps are not repeated. Exit code 1 if the finetuned model gets fewer than 85 % right.

    \b
    Examples:
      llm-ray quickstart
      llm-ray quickstart --home /data/llm-ray --keep-serving
      llm-ray quickstart --force --set tuning.lora.r=4 --set training.learning_rate=0.001
    """
    from llm_ray.app import quickstart as whole_way

    reporter = Terminal()
    with whole_way.quickstart(home.absolute() if home else section.home(), reporter, force, overrides) as done:
        _show(done)
        if keep_serving:
            reporter.line(f"Both models answer at {done.url}.", kind="heading")
            until_interrupted(reporter)
    if not done.result.good:
        raise LlmRayError(
            f"the finetuned model answers less than {whole_way.ENOUGH:.0%} of the questions correctly: llm-ray "
            f"quickstart --force finetunes it again{', without --set as shipped' if overrides else ''}"
        )


def _show(done: Done) -> None:
    """Prints the table of answers and a summary to stdout."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    conf, result = done.conf, done.result
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160
    base, finetuned = result.score("base"), result.score("finetuned")
    table = Table(show_lines=True, expand=True)
    table.add_column("question")
    table.add_column(f"{conf.model.base}: {base['right']} of {base['of']} correct")
    table.add_column(f"{conf.name}: {finetuned['right']} of {finetuned['of']} correct")
    marks = {which: result.marks(which) for which in ("base", "finetuned")}
    for at, question in enumerate(result.questions):
        cells = [
            Text(
                f"{'✓' if marks[which][at] else '✗'} {' '.join(result.answers[which][at].split())}",
                style="green" if marks[which][at] else "red",
            )
            for which in ("base", "finetuned")
        ]
        table.add_row(Text(question.prompt), *cells)
    console.print(table)
    shares = [f"{score['right'] / score['of']:.0%}" for score in (base, finetuned)]
    for line in (
        f"Correct answers: base model {shares[0]}, finetuned model {shares[1]}.",
        "Time: " + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in done.seconds.items()) + ".",
        f"The run is in {conf.run_dir}: the model in output/, the figures above in quickstart.json, the answers in "
        "answers.jsonl.",
        f"Next: llm-ray serve deploy --model {conf.name} serves it; llm-ray finetune --config lora --set train=FILE "
        "trains on your data.",
    ):
        console.print(Text(line))
