"""`engine: auto`: selects the fastest engine that supports what a deployment asks for, and gives the reason.

choice = choose_engine(conf.models["support-bot"], folder, conf.paths.models)
choice.engine, choice.reason      # "openvino", "the fastest on CPUs"

Loads and converts nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llm_ray.conf.engines import FASTEST, WIDEST, EngineName
from llm_ray.conf.serve import ModelServing
from llm_ray.errors import ModelError
from llm_ray.models.convert import check_environment, find_conversion
from llm_ray.models.openvino import is_openvino
from llm_ray.serve.models import writes


@dataclass(frozen=True)
class Choice:
    """An engine and the reason for choosing it."""

    engine: EngineName
    reason: str


def choose_engine(asked: ModelServing, source: Path, registry: Path) -> Choice:
    """Returns the engine for the model in the folder `source`: the conf's, or for `auto` the fastest that supports all
    settings.

    `registry` is the folder of converted models.
    """
    if asked.engine != "auto":
        return Choice(asked.engine, "set in the conf")
    if is_openvino(source):
        return Choice(FASTEST, "the model is in OpenVINO form")
    if asked.weights:
        return Choice(FASTEST, f"for {asked.weights} weights")
    for key in ("adapters", "compile", "trust_remote_code", "engine_options"):
        if getattr(asked, key):
            return Choice(WIDEST, f"for {key}")
    if asked.precision != "auto":
        return Choice(WIDEST, f"for precision {asked.precision} with the weights as they are")
    if not writes(source, asked.engine_options):
        return Choice(WIDEST, "for embeddings")
    if find_conversion(source, None, registry):
        return Choice(FASTEST, "the fastest on CPUs, and the model is converted")
    try:
        check_environment()
    except ModelError:
        return Choice(WIDEST, f"{FASTEST} is faster, but nothing here converts models to it: see `make setup-convert`")
    return Choice(FASTEST, "the fastest on CPUs")
