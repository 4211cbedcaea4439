"""Builds the conf of a finetune from a job of the fine-tuning API; defines which keys a client may set.

conf = conf_of(asked, run="ft-bot-0a1b", base="smollm2-135m-instruct", train=path, rows=120, …)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llm_ray.app.api_files import reads_of
from llm_ray.conf.finetune import FinetuneConf
from llm_ray.conf.keys import FINETUNE
from llm_ray.conf.section import Paths
from llm_ray.errors import DataError
from llm_ray.runs.folder import flat
from llm_ray.serve.gateway.finetuning.service import Asked, Problem

_WHERE = "where jobs run is settled on the machine"
_FILES = "it names files of the machine: upload what is to be learned from, and name its file"
_MODEL = "the job's `model` says what is finetuned"
_CODE = "it would run code"
_TASKS = "a job runs no tasks of lm-eval"
_STAGES = "a job makes a model and has it served: its stages are settled"

REFUSED: Mapping[str, str] = {
    "name": "the job's `suffix` names its run and its model",
    "stages": _STAGES,
    "convert": _STAGES,
    "paths": _WHERE,
    "runtime.mode": _WHERE,
    "runtime.address": _WHERE,
    "runtime.nodes": _WHERE,
    "runtime.hosts": _WHERE,
    "runtime.interface": _WHERE,
    "model.base": _MODEL,
    "model.gguf_file": _MODEL,
    "model.revision": _MODEL,
    "model.tokenizer": _MODEL,
    "model.chat_template": _FILES,
    "model.trust_remote_code": _CODE,
    "model.trusted_models": _CODE,
    "model.upload": _WHERE,
    "data.train": _FILES,
    "data.upload": _WHERE,
    "data.processor": _CODE,
    "data.processor_args": _CODE,
    "evaluation.data": _FILES,
    "evaluation.tasks": _FILES,
    "evaluation.task_limit": _TASKS,
    "evaluation.task_fewshot": _TASKS,
    "evaluation.task_chat_template": _TASKS,
    "training.accelerator": _WHERE,
    "training.compile": "it would have a compiler run",
}
"""Keys that a job must not set, including their subkeys, with the reason."""
ALLOWED = (
    "runtime.workers",
    "runtime.min_workers",
    "runtime.cpus_per_worker",
    "runtime.placement",
    "runtime.max_failures",
    "model.dtype",
    "model.weights",
    "data.validation",
    "data.test",
    "data.format",
    "data.columns",
    "data.system",
    "data.max_length",
    "data.packing",
    "data.max_rows",
    "data.special_tokens_in_text",
    "data.on_bad_row",
    "tuning",
    "training",
    "checkpoint",
    "evaluation",
    "tracking",
)
"""Keys that a job may set, including subkeys not in `REFUSED`. Keys in neither list are refused."""
_MAX_LENGTH = 1024  # same as the shipped template lora


def conf_of(
    asked: Asked,
    *,
    run: str,
    base: str,
    paths: Paths,
    train: Path,
    form: str,
    rows: int,
    validation: Path | None,
    validation_form: str | None = None,
) -> FinetuneConf:
    """Returns the conf of the finetune that a job requests. `form` and `rows` describe the checked file `train`,
    `validation_form` the file `validation`. Raises Problem, which names the field."""
    given = _nested(asked.conf or {})
    for name, value in flat(given).items():
        if value != {}:  # skip empty sections
            _check_key(name)
    held_out = given.get("data", {}).get("validation", "auto") if isinstance(given.get("data"), dict) else "auto"
    if held_out is not None and held_out != "auto" and not isinstance(held_out, int | float):
        raise Problem(
            400,
            f"conf.data.validation: {_FILES} (validation_file), or a fraction of the rows",
            param="conf.data.validation",
        )
    fields: dict[str, Any] = {
        "training.epochs": asked.epochs,
        "training.global_batch_size": asked.batch_size,
        "training.seed": asked.seed,
        "tuning.dpo.beta": asked.beta,
        "tuning.objective": "dpo" if asked.method == "dpo" else None,
        "data.validation": [str(validation)] if validation else None,
    }
    for name, value in fields.items():
        if value is not None and name in flat(given):
            raise Problem(400, f"conf.{name}: a field of the job says it already: leave one out", param=f"conf.{name}")
    settled = {
        "name": run,
        "paths": paths.model_dump(mode="json"),
        "model": {"base": base},
        "data": {"train": [str(train)], "max_length": _MAX_LENGTH},
        "tuning": {"objective": "pretrain" if form == "text" else "sft"},
    }
    whole = _merged(settled, _merged(given, _nested({k: v for k, v in fields.items() if v is not None})))
    conf = _validated(whole)
    for param, of in (("training_file", form), ("validation_file", validation_form)):
        if of and reads_of(of) != conf.objective.reads:
            raise Problem(400, _unfit(param, of, conf), "invalid_file", param=param)
    if asked.learning_rate_multiplier is not None:
        if conf.training.learning_rate != "auto":
            raise Problem(
                400,
                "conf.training.learning_rate: learning_rate_multiplier is there, too: leave one out",
                param="conf.training.learning_rate",
            )
        rate = _automatic_rate(conf, rows) * asked.learning_rate_multiplier
        conf = conf.model_copy(update={"training": conf.training.model_copy(update={"learning_rate": rate})})
    return conf


def _unfit(param: str, form: str, conf: FinetuneConf) -> str:
    """Returns the error message for a file that the objective cannot use."""
    held = f"{param}: its rows have the format {form}"
    if reads_of(form) == "pairs":
        return f"{held}, preference pairs, which the method dpo learns from: set method.type to dpo"
    if conf.objective.reads == "pairs":
        return f"{held}, but {conf.tuning.objective} learns from preference pairs: chosen and rejected answers"
    if conf.objective.reads == "ratings":
        return f"{param}: a job cannot learn from rated answers (tuning.objective {conf.tuning.objective})"
    return f"{held}, but tuning.objective {conf.tuning.objective} learns from {conf.objective.reads}"


def _check_key(name: str) -> None:
    """Raises Problem if a job must not set the key, or if the key does not exist."""
    for refused, why in REFUSED.items():
        if name == refused or name.startswith(f"{refused}.") or refused.startswith(f"{name}."):
            raise Problem(
                400, f"conf.{name}: a job cannot set it: {why}", "unsupported_parameter", param=f"conf.{name}"
            )
    if not any(name == allowed or name.startswith(f"{allowed}.") for allowed in ALLOWED) or not FINETUNE.known(
        tuple(name.split("."))
    ):
        nearest = FINETUNE.nearest(tuple(name.split(".")))
        hint = f"; did you mean {nearest}?" if nearest else ""
        raise Problem(400, f"conf.{name[:100]}: a job has no such key{hint}", param=f"conf.{name[:100]}")


def _nested(given: Mapping[str, Any]) -> dict[str, Any]:
    """Expands dotted keys into nested sections. Raises Problem if a key is given twice."""
    made: dict[str, Any] = {}
    for dotted, value in given.items():
        part: Any = value
        for name in reversed(dotted.split(".")):
            part = {name: part}
        if twice := flat(part).keys() & flat(made).keys():
            raise Problem(400, f"conf.{min(twice)}: it stands there twice", param=f"conf.{min(twice)}")
        made = _merged(made, part)
    return made


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `below` with `above` merged over it, section by section."""
    made = dict(below)
    for name, value in above.items():
        old = made.get(name)
        made[name] = _merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return made


def _validated(whole: dict[str, Any]) -> FinetuneConf:
    try:
        return FinetuneConf.model_validate(whole)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        at: Any = whole
        path: list[str] = []
        for part in first["loc"]:  # keep only the conf's own keys, without pydantic's union branches
            if not isinstance(at, dict) or part not in at:
                break
            path.append(str(part))
            at = at[part]
        place = ".".join(["conf", *path])
        message = first["msg"].removeprefix("Value error, ").splitlines()[0]
        raise Problem(400, f"{place}: {message}", param=place) from error


def _automatic_rate(conf: FinetuneConf, rows: int) -> float:
    """Returns the learning rate that `auto` would choose for `rows` rows."""
    from llm_ray.data.prepare import held_out
    from llm_ray.models.load import find_base, load_config, width_of
    from llm_ray.train.auto import rate_for

    rows = min(rows, conf.data.max_rows or rows)
    try:
        kept_back, _ = held_out(conf.data.validation, rows)
    except DataError as error:
        raise Problem(400, f"conf.{error}", param="conf.data.validation") from error
    return rate_for(conf, width_of(load_config(find_base(conf.model, conf.paths))), rows - kept_back)
