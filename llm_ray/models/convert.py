"""Converts Hugging Face models to OpenVINO form, for engine openvino.

    llm-ray model convert support-bot --to openvino --weights int8

optimum-intel does the conversion in its own process and environment, since it needs an older transformers than serving.
`make setup-convert` creates that environment next to llm-ray's own, with ``-convert`` appended to its name;
LLM_RAY_CONVERT_ENV overrides the location. A conversion is the model's folder with other weights: configuration,
tokenizer, chat template and generation settings are copied from the original, so all engines use the same tokens.

Conversions of a run are kept in its folder (runs/NAME/openvino-int8), those of other models in the registry
(models/NAME-openvino-int8). An existing conversion of the same source and weights is reused.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import shutil
import subprocess
from collections import deque
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from llm_ray.conf.engines import WEIGHTS, WeightForm
from llm_ray.conf.section import can_convert, conversion_folder
from llm_ray.errors import ModelError
from llm_ray.files import locked, replace_folder, write_json
from llm_ray.models.complete import check_complete
from llm_ray.models.folder import CONFIG, OPENVINO, Weights, check_folder, read_json
from llm_ray.models.load import fingerprint
from llm_ray.models.openvino import LINEAGE, is_openvino, lineage, openvino_weights
from llm_ray.progress import Bar, Reporter

DEFAULT_WEIGHTS: WeightForm = "int8"
# Options of optimum-intel. bf16 becomes f16, which rounds less. int8: one scale and zero point per row. int4: one per
# 32 weights of a row, since the usual groups of 64 double SmolLM2's increase in perplexity; rows not divisible by 32
# become int8.
_ASKED = {
    "fp32": ("--weight-format", "fp32"),
    "bf16": ("--weight-format", "fp16"),
    "int8": ("--weight-format", "int8"),
    "int4": ("--weight-format", "int4", "--group-size", "32", "--group-size-fallback", "adjust"),
}
# Bytes per weight, including scales.
_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.02, "int4": 0.7}
_PROGRAM_BYTES = 0.6e9  # torch and OpenVINO without a model
# Runs a module like `python -m`, but dies with its parent process.
_RUN = """
import ctypes, runpy, signal
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
runpy.run_module("optimum.commands.optimum_cli", run_name="__main__")
"""
# Text that optimum-intel prints when a step begins, and the step's name for the progress bar.
_PARTS = (
    ("Loading weights", "reading the weights"),
    ("TracerWarning", "tracing the layers"),
    ("INFO:nncf", "compressing the weights"),
)
_ERROR = re.compile(r"^(?:[\w.]+\.)?(\w*(?:Error|Exception|Interrupt)\b.*)")
# optimum-intel's messages for model types that it cannot export; the last one refers to its installed transformers.
_NOT_EXPORTED = (
    "unsupported architecture",
    "only supports the tasks",
    "does not recognize this architecture",
    "does not allow for the export of the model",
)
# Patterns of files that are not copied from the original.
_WEIGHT_FILES = (
    ".*",
    "*.safetensors",
    "*.index.json",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.h5",
    "*.msgpack",
    "*.onnx",
    "*.gguf",
    LINEAGE,
)


def openvino_folder(source: Path, weights: WeightForm | None, registry: Path, reporter: Reporter) -> Path:
    """Returns `source` if it is in OpenVINO form, else its conversion, which is created if missing.

    `weights` None uses the existing conversion, or int8 if there are several or none. Raises ModelError.
    """
    if is_openvino(source):
        form = openvino_weights(source).dtype
        if weights not in (None, form):
            raise ModelError(
                f"{source} has {form} weights, but {weights} is requested: use the model that it was made from"
            )
        return source
    if found := find_conversion(source, weights, registry):
        return found
    form = weights or DEFAULT_WEIGHTS
    return convert_model(source, converted(source, form, registry), form, reporter)


def find_conversion(source: Path, weights: WeightForm | None, registry: Path) -> Path | None:
    """Returns the folder of an existing conversion of `source` with these weights (None: any, int8 first); None if
    there is none."""
    identity = fingerprint(source)
    for form in (weights,) if weights else sorted(WEIGHTS, key=lambda form: form != DEFAULT_WEIGHTS):
        if _is_made(place := converted(source, form, registry), identity, form):
            return place
    return None


def converted(source: Path, weights: WeightForm, registry: Path) -> Path:
    """Returns the folder for the conversion of `source`: inside its run's folder, else in the registry."""
    source = source.absolute()
    if source.name == "output" and (source.parent / "run.json").is_file():
        return source.parent / f"openvino-{weights}"
    return registry / f"{source.name}-openvino-{weights}"


def convert_model(source: Path, target: Path, weights: WeightForm, reporter: Reporter, *, force: bool = False) -> Path:
    """Converts the Hugging Face model in `source` to `target`, completely or not at all; returns `target`.

    An existing conversion of the same source and weights is kept unless `force`. A conversion of an earlier state of
    `source` is replaced, any other conversion only with `force`, and a folder that is not a conversion never. Raises
    ModelError.
    """
    source = source.absolute()
    found, identity = check_folder(source, tokenizer=False), fingerprint(source)
    check_complete(source)
    try:
        if not force and _is_made(target, identity, weights):
            reporter.line(f"{target}: already converted from the same model")
            return target
        _refuse_to_lose(target, source, weights, force)
        python = check_environment()
        _check_room(source, found, weights, target)
        reporter.line(f"Converting {source} to OpenVINO, {weights} …")
        with locked(target.with_name(f".{target.name}.lock")):
            if not force and _is_made(target, identity, weights):  # another process finished it meanwhile
                return target
            with replace_folder(target) as new:
                _export(python, source, new, weights, reporter)
                for file in source.iterdir():
                    if file.is_file() and not any(file.match(pattern) for pattern in _WEIGHT_FILES):
                        shutil.copy2(file, new)
                versions = _versions(python, "optimum-intel", "openvino", "nncf", "transformers", "torch")
                made = {
                    "source": str(source),
                    "fingerprint": identity,
                    "weights": weights,
                    "licence": lineage(source).get("licence"),
                    "converted": datetime.now(UTC).isoformat(timespec="seconds"),
                    "versions": versions,
                }
                write_json(new / LINEAGE, made)
                openvino_weights(new)
    except OSError as error:
        raise ModelError(
            f"{target} cannot be written: {error.strerror or error} ({_gib(_free(target))} free there)"
        ) from error
    return target


def check_environment() -> Path:
    """Returns the Python interpreter of the conversion environment. Raises ModelError, with the command that creates
    it, if there is none."""
    folder = conversion_folder(os.environ)
    if not can_convert(folder):
        raise ModelError(
            f"conversion to OpenVINO runs in a separate environment, which {folder} is not: create it with `make "
            "setup-convert`, or install requirements/convert.txt into an environment and set LLM_RAY_CONVERT_ENV to "
            "its folder"
        )
    return folder / "bin" / "python"


def size_on_disk(parameters: int, weights: WeightForm) -> int:
    """Returns the approximate size in bytes of a conversion with this number of parameters."""
    return int(parameters * _BYTES[weights])


def _is_made(target: Path, identity: str, weights: WeightForm) -> bool:
    """Whether `target` is a complete conversion of the model with this fingerprint."""
    if not is_openvino(target):
        return False
    try:
        made = lineage(target)
        return (made.get("fingerprint"), made.get("weights")) == (identity, weights) and bool(openvino_weights(target))
    except ModelError:
        return False


def _refuse_to_lose(target: Path, source: Path, weights: WeightForm, force: bool) -> None:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    made = lineage(target) if target.is_dir() else {}
    if "fingerprint" not in made:
        raise ModelError(f"{target} already exists and is not a conversion: choose another --name or --output")
    if not force and (made.get("source"), made.get("weights")) != (str(source), weights):
        raise ModelError(
            f"{target} contains another conversion, of {made.get('source')} with {made.get('weights')} weights: "
            "choose another --name or --output, or replace it with --force"
        )


def _check_room(source: Path, found: Weights, weights: WeightForm, target: Path) -> None:
    """Raises ModelError if memory or disk space is insufficient, before the conversion starts."""
    import psutil

    loaded = found.parameters * (2.0 if found.dtype in ("bf16", "fp16") and weights != "fp32" else 4.0)
    memory, free = loaded + _PROGRAM_BYTES, psutil.virtual_memory().available
    if memory > free:
        raise ModelError(
            f"converting {source} to {weights} needs about {_gib(memory)} of memory, but {_gib(free)} are free: use "
            "another host"
        )
    disk = size_on_disk(found.parameters, weights) + (
        loaded if weights.startswith("int") else 0
    )  # temporarily includes the uncompressed model
    if disk > _free(target):
        raise ModelError(
            f"converting {source} to {weights} needs about {_gib(disk)} of disk at {target.parent}, but "
            f"{_gib(_free(target))} are free: free some space, or choose another place with --output"
        )


def _export(python: Path, source: Path, new: Path, weights: WeightForm, reporter: Reporter) -> None:
    """Runs optimum-intel, and moves the graph and its weights into the folder `new`."""
    work = new / "work"
    (work / "tmp").mkdir(parents=True)
    options = [
        "--task",
        "text-generation-with-past",
        "--library",
        "transformers",
        "--disable-convert-tokenizer",
        *_ASKED[weights],
    ]
    command = [str(python), "-I", "-c", _RUN, "export", "openvino", "--model", str(source), *options, str(work / "out")]
    # OpenVINO's library works only with glibc's malloc.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TMPDIR": str(work / "tmp"), "LD_PRELOAD": ""}
    last = deque[str](maxlen=200)
    with (
        reporter.bar("converting", total=len(_PARTS) + 1) as bar,
        _process(command, environment) as process,
    ):
        _follow(process.stdout or (), last, bar)
        code = process.wait()
        if code == 0:
            bar.update(len(_PARTS) + 1, len(_PARTS) + 1)
    if code != 0:
        raise ModelError(f"{source} could not be converted: {_reason(code, list(last), source)}")
    for file in (OPENVINO, OPENVINO.replace(".xml", ".bin")):
        (work / "out" / file).rename(new / file)
    shutil.rmtree(work)


@contextlib.contextmanager
def _process(command: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """Starts a process and kills it when the block ends; its output is read from stdout."""
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def _follow(lines: Iterable[str], last: deque[str], bar: Bar) -> None:
    """Updates the progress bar from optimum-intel's output; `last` keeps the last lines."""
    part, words = 0, "starting optimum-intel"
    bar.update(part, len(_PARTS) + 1, words)
    for line in lines:
        last.append(line.rstrip())
        for number, (mark, meaning) in enumerate(_PARTS, 1):
            if mark in line and number > part:
                part, words = number, meaning
        bar.update(part, len(_PARTS) + 1, words)


def _reason(code: int, output: list[str], source: Path) -> str:
    """Returns why optimum-intel failed, as a message for the user."""
    text = "\n".join(output)
    kind = read_json(source / CONFIG).get("model_type", "unknown")
    if code == -9 or "MemoryError" in text or "can't allocate memory" in text:
        return "not enough memory: stop other processes on this host, or convert on another"
    if "No space left on device" in text:
        return "the disk is full: free some space, or choose another place with --output"
    if "trust_remote_code" in text:
        return "it has its own Python code, which conversion does not run: serve it with engine vllm or transformers"
    if any(phrase in text for phrase in _NOT_EXPORTED):
        return f"optimum-intel does not export text models of type {kind} ({CONFIG}: model_type): serve it with engine vllm or transformers"
    errors = [found[1] for line in output if (found := _ERROR.match(line))]
    return f"optimum-intel says: {errors[-1] if errors else next(filter(None, reversed(output)), f'nothing, with exit code {code}')}"


def _versions(python: Path, *packages: str) -> dict[str, str]:
    """Returns the versions of these packages in the environment of `python`."""
    folders = [str(folder) for folder in python.parents[1].glob("lib/python3*/site-packages")]
    return {
        name: found.version for name in packages for found in importlib.metadata.distributions(name=name, path=folders)
    }


def _free(place: Path) -> int:
    return shutil.disk_usage(next(path for path in place.absolute().parents if path.is_dir())).free


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
