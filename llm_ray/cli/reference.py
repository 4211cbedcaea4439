"""Writes the reference of the command line (docs/reference/cli.md) from the commands.

python -m llm_ray.cli.reference            # write
python -m llm_ray.cli.reference --check    # exit 1 if the file is out of date
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import click

from llm_ray.cli.main import cli
from llm_ray.conf.reference import update

HEAD = """\
# The command line

<!-- Written by `python -m llm_ray.cli.reference` from llm_ray/cli: change it there. -->

Exit codes: 0 done, 1 failed, 2 wrong use (of a flag or in a conf), 130 interrupted. `LLM_RAY_DEBUG=1` shows the
traceback of any error, and warnings of libraries.
"""


def markdown() -> str:
    """Returns the reference page with the help of every command."""
    root = click.Context(cli, info_name="llm-ray", **cli.context_settings)
    return HEAD + "".join(_pages(root))


def _pages(ctx: click.Context) -> Iterator[str]:
    formatter = click.HelpFormatter(width=110)
    ctx.command.format_help(ctx, formatter)
    yield f"\n## {ctx.command_path}\n\n```text\n{formatter.getvalue()}```\n"
    if isinstance(ctx.command, click.Group):
        for name in ctx.command.list_commands(ctx):
            command = ctx.command.get_command(ctx, name)
            if command and not command.hidden:
                yield from _pages(click.Context(command, parent=ctx, info_name=name))


if __name__ == "__main__":
    update({"cli.md": markdown()}, "python -m llm_ray.cli.reference", check="--check" in sys.argv[1:])
