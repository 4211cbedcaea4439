"""Building blocks of the conf schemas: sections, value types, and the folders that every conf has."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError


def home() -> Path:
    """Returns the folder of models, data and runs: ``LLM_RAY_HOME``, else ``~/.llm-ray``."""
    return Path(os.environ.get("LLM_RAY_HOME") or Path.home() / ".llm-ray").expanduser().absolute()


def conversion_folder(environ: Mapping[str, str]) -> Path:
    """Returns the virtual environment for converting models to OpenVINO, which may not exist: LLM_RAY_CONVERT_ENV of
    `environ`, else a sibling of the current one."""
    return Path(environ.get("LLM_RAY_CONVERT_ENV") or f"{sys.prefix}-convert").absolute()


def can_convert(folder: Path) -> bool:
    """Returns whether models can be converted in this environment."""
    return (folder / "bin" / "optimum-cli").is_file()


def harness_folder(environ: Mapping[str, str]) -> Path:
    """Returns the folder of lm-eval and the packages that it adds, which may not exist: LLM_RAY_LM_EVAL_ENV of
    `environ`, else ``lm-eval`` in the current environment."""
    return Path(environ.get("LLM_RAY_LM_EVAL_ENV") or f"{sys.prefix}/lm-eval").absolute()


def _absolute(value: object) -> object:
    return Path(value).expanduser().absolute() if isinstance(value, (str, Path)) and str(value) else value


# Ray workers have other working directories, so all paths of a conf are absolute.
AbsolutePath = Annotated[Path, BeforeValidator(_absolute)]


def listed(value: object) -> object:
    """Wraps a single text in a list; returns anything else unchanged."""
    return [value] if isinstance(value, str) else value


# Chosen from the data, the model and the host; params.json records the choice.
Auto = Literal["auto"]
Value = TypeVar("Value", int, float)


def _default(value: object) -> object:
    return "auto" if value is None else value


def as_run(value: Value | Auto) -> Value:
    """Returns the value. Raises TypeError if it is still `auto`."""
    if value == "auto":
        raise TypeError("this conf still has auto values")
    return value


# null in a conf means the default.
OrAuto = BeforeValidator(_default)

# One text, or a list of them.
Texts = Annotated[tuple[str, ...], BeforeValidator(listed, json_schema_input_type=str | tuple[str, ...])]


class Section(BaseModel):
    """A section of documented keys. Unknown keys are errors."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )

    @model_validator(mode="before")
    @classmethod
    def _empty_sections(cls, values: Any) -> Any:
        """Replaces null sections by their defaults: YAML reads a section whose keys are all commented out as null."""
        if not isinstance(values, dict):
            return values
        empty = {
            k for k, field in cls.model_fields.items() if values.get(k, ...) is None and _is_section(field.annotation)
        }
        return {k: v for k, v in values.items() if k not in empty}

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: object, info: ValidationInfo) -> object:
        """Rejects booleans as numbers, which Python and pydantic would accept: true equals 1."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise PydanticCustomError("truth", "true and false are not numbers")
        return value


def _is_section(annotation: object) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


class Paths(Section):
    """Folders of models, data and runs. On a cluster all of them are on shared storage."""

    models: AbsolutePath = Field(
        default_factory=lambda: home() / "models", json_schema_extra={"default": "$LLM_RAY_HOME/models"}
    )
    """The model registry: one Hugging Face folder per model."""
    data: AbsolutePath = Field(
        default_factory=lambda: home() / "data", json_schema_extra={"default": "$LLM_RAY_HOME/data"}
    )
    """Data files with a relative path are looked up next to the conf file, then in the current folder, then here."""
    runs: AbsolutePath = Field(
        default_factory=lambda: home() / "runs", json_schema_extra={"default": "$LLM_RAY_HOME/runs"}
    )
    """One folder per run."""

    @classmethod
    def of(cls, home: Path) -> Paths:
        """Returns the folders below `home`."""
        return cls(models=home / "models", data=home / "data", runs=home / "runs")
