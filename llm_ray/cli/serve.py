"""``llm-ray serve``: models behind the OpenAI API."""

from __future__ import annotations

import click


class _DeployByDefault(click.Group):
    """``serve --model M`` means ``serve deploy --model M``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0].startswith("-") and args[0] not in ("-h", "--help"):
            args = ["deploy", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_DeployByDefault)
def serve() -> None:
    """Deploy models on Ray Serve, with an OpenAI-compatible API.

    \b
    Example:
      llm-ray serve deploy --model quickstart
    """


@serve.command()
@click.option(
    "bases",
    "--model",
    multiple=True,
    required=True,
    metavar="FOLDER|RUN|NAME",
    help="A Hugging Face folder, a run, or a name in the model registry. Again for more.",
)
@click.option(
    "names",
    "--name",
    multiple=True,
    help="What clients call the model; one for each --model, in order. Default: the run's, the registry's or the folder's name.",
)
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True, help="Port on 127.0.0.1.")
@click.option("--cpus", type=click.IntRange(1), help="Cores for each model. Default: all, shared out evenly.")
@click.option(
    "--max-model-len", type=click.IntRange(16), help="Longest prompt and answer together, in tokens. Default: the model's, at most 8192."
)
def deploy(bases: tuple[str, ...], names: tuple[str, ...], port: int, cpus: int | None, max_model_len: int | None) -> None:
    """Serve models on this machine, until Ctrl-C.

    Starts Ray here, and answers on 127.0.0.1 alone.

    \b
    Examples:
      llm-ray serve deploy --model quickstart
      llm-ray serve deploy --model quickstart --model smollm2-135m-instruct --port 9000
      llm-ray serve --model ./my-model --name support-bot
    """
    import os

    from llm_ray.cluster import local_ray
    from llm_ray.conf.schema import Paths
    from llm_ray.console import Reporter
    from llm_ray.errors import ConfError, ModelError
    from llm_ray.models.load import resolve
    from llm_ray.serve.deploy import check_port
    from llm_ray.serve.deploy import deploy as deploy_models
    from llm_ray.serve.foreground import serve_until_interrupted
    from llm_ray.serve.models import ServedModel

    locations = [resolve(base, Paths()) for base in bases]
    if names and len(names) != len(bases):
        raise ConfError(f"--name is given {len(names)} times, --model {len(bases)} times: give each model a name, or none")
    called = names or tuple(location.name for location in locations)
    if len(set(called)) != len(called):
        raise ConfError(f"two models would be called the same ({', '.join(called)}): tell them apart with --name")
    models = []
    for base, name, location in zip(bases, called, locations, strict=True):
        if location.folder is None:
            raise ModelError(f"model {base} is not on this machine: bring it into the registry first (llm-ray model import {base})")
        models.append(ServedModel(name, location.folder, cpus or max(1, (os.cpu_count() or 1) // len(bases)), max_model_len))
    check_port("127.0.0.1", port)
    reporter = Reporter()
    with local_ray():
        endpoint = deploy_models(models, reporter, port=port)
        reporter.line(f"{', '.join(called)} ready after {endpoint.seconds:.0f} s")
        serve_until_interrupted(endpoint.url, called[0], reporter)
