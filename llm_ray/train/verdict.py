"""Whether a run has learned, reported at its end, with suggestions if it has not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

FALLEN = 0.99
"""A loss has fallen if it is below this fraction of its initial value."""
UNCHANGED = 0.9
"""If at least this fraction of answers is unchanged, the model has hardly changed."""
FEW_ANSWERS = 5


def not_learned(
    metrics: Sequence[Mapping[str, Any]], evaluation: Mapping[str, Any], params: Mapping[str, Any]
) -> list[str]:
    """Returns a sentence per sign that the model has not learned; empty if it has.

    `metrics`: rows of metrics.jsonl; `evaluation`: that section of result.json, empty if there is none; `params`:
    params.json.
    """
    found = []
    validated = [row["validation_loss"] for row in metrics if row.get("validation_loss") is not None]
    losses = [row["loss"] for row in metrics if "loss" in row]
    rate, epochs = params.get("learning_rate", 0.0), params.get("epochs", 0.0)
    more = f"raise training.epochs ({epochs:.3g}) or training.learning_rate ({rate:g})"
    if len(validated) > 1 and min(validated[1:]) > FALLEN * validated[0]:
        rose = validated[-1] > validated[0] / FALLEN
        less = (
            f"lower training.learning_rate ({rate:g}), and check that validation and training data are of the same kind"
        )
        found.append(
            f"the validation loss has not fallen: {validated[0]:.4f} before training, {min(validated[1:]):.4f} at "
            f"best: {less if rose else more}"
        )
    tenth = max(1, len(losses) // 10)
    if not validated and losses:
        first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
        if len(losses) == 1 or last > FALLEN * first:
            found.append(f"the training loss has not fallen: {first:.4f} at first, {last:.4f} at last: {more}")
    rows, unchanged = evaluation.get("rows", 0), evaluation.get("unchanged", 0)
    if rows >= FEW_ANSWERS and unchanged >= UNCHANGED * rows:
        found.append(f"{unchanged} of {rows} answers are unchanged (evaluation.md): {more}")
    return found
