"""Optional number fields; Gradio's own number field shows 0 when empty."""

from __future__ import annotations

import gradio as gr

from llm_ray.errors import ConfError


def optional(label: str, info: str, value: str = "") -> gr.Textbox:
    """Returns the field; parse its text with `whole` or `decimal`."""
    return gr.Textbox(label=label, info=info, value=value, max_lines=1)


def whole(text: str | None, label: str, least: int = 1) -> int | None:
    """Returns the integer in the field, None if it is empty. Raises ConfError if it is invalid or below `least`."""
    value = decimal(text, label, least)
    if value is not None and value != int(value):
        raise ConfError(f"{label}: {value:g} is not an integer.")
    return None if value is None else int(value)


def decimal(text: str | None, label: str, least: float = 0, most: float = 1e12) -> float | None:
    """Like `whole`, but for a decimal number between `least` and `most`."""
    if not text or not text.strip():
        return None
    try:
        value = float(text)
    except ValueError:
        raise ConfError(f"{label}: {text.strip()} is not a number. Leave it empty for the default.") from None
    if not least <= value <= most:
        raise ConfError(f"{label}: {text.strip()} is not between {least:g} and {most:g}.")
    return value
