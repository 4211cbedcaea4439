"""``llm-ray serve keys``: API keys of the served models."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Any

import click

from llm_ray.cli.options import from_stdin
from llm_ray.conf.section import home

if TYPE_CHECKING:
    from llm_ray.app.keys import Scope

_SCOPE = click.Choice(["ask", "train", "admin"])
_UNITS = {"m": 60, "h": 3600, "d": 86400, "w": 604800}


class _Duration(click.ParamType):
    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        found = re.fullmatch(r"([1-9]\d{0,5})([mhdw])", value) if isinstance(value, str) else None
        if not found:
            self.fail(f"{value} is not a duration: write 30d, 12h, 45m or 4w", param, ctx)
        return float(found[1]) * _UNITS[found[2]]


@click.group()
def keys() -> None:
    """Manage the endpoint's API keys while it runs.

    \b
    Examples:
      llm-ray serve keys add alice
      llm-ray serve keys list
      llm-ray serve keys revoke alice
    """


@keys.command()
@click.argument("name")
@click.option("--requests-per-minute", type=click.IntRange(1), help="Requests per minute.")
@click.option("--concurrent", type=click.IntRange(1), help="Concurrent requests.")
@click.option("--max-tokens", type=click.IntRange(1), help="Tokens per answer.")
@click.option(
    "--model", "models", multiple=True, metavar="NAME", help="A model it may use; repeat for more. Default: all."
)
@click.option("--expires", type=_Duration(), metavar="30d|12h|…", help="When it expires. Default: never.")
@click.option(
    "--scope",
    "scopes",
    type=_SCOPE,
    multiple=True,
    help="Permission; repeat for more: `ask` models, `train` with the fine-tuning API, or `admin`: both, with priority for "
    "its jobs. Default: ask and train.",
)
def add(
    name: str,
    requests_per_minute: int | None,
    concurrent: int | None,
    max_tokens: int | None,
    models: tuple[str, ...],
    expires: float | None,
    scopes: tuple[Scope, ...],
) -> None:
    """Create a key and print it once; only its hash is stored.

    \b
    Examples:
      llm-ray serve keys add alice
      llm-ray serve keys add batch --requests-per-minute 60 --concurrent 4 --expires 30d > key.txt
      llm-ray serve keys add web --scope ask
    """
    from llm_ray.app.keys import USUAL_SCOPES, Limits, add_key, keys_file

    limits = Limits(requests_per_minute=requests_per_minute, concurrent=concurrent, max_tokens=max_tokens)
    until = time.time() + expires if expires else None
    key, secret = add_key(keys_file(home()), name, limits, models or None, until, scopes or USUAL_SCOPES)
    click.echo(f"Key {key.name} (id {key.id}). It is shown only once: send it as Authorization: Bearer KEY.", err=True)
    click.echo(secret)


@keys.command("list")
@click.option("as_json", "--json", is_flag=True, help="Print JSON.")
def list_(as_json: bool) -> None:
    """Show the keys, without their secrets.

    \b
    Example:
      llm-ray serve keys list --json
    """
    import json

    from llm_ray.app.keys import keys_file, list_keys

    found = list_keys(keys_file(home()))
    if as_json:
        listed = [
            {
                "id": key.id,
                "name": key.name,
                "created": key.created,
                "expires": key.expires,
                "expired": key.expired,
                "models": key.models,
                "scopes": key.scopes,
                "limits": key.limits.model_dump(),
            }
            for key in found
        ]
        click.echo(json.dumps(listed, indent=2))
        return
    if not found:
        click.echo("There are no keys: llm-ray serve keys add NAME")
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(*("name", "id", "created", "expires", "scopes", "models", "limits"), box=box.SIMPLE)
    for key in found:
        limits = ", ".join(f"{name} {value}" for name, value in key.limits.model_dump().items() if value is not None)
        expires = "never" if key.expires is None else _day(key.expires) + (" (expired)" if key.expired else "")
        table.add_row(
            key.name,
            key.id,
            _day(key.created),
            expires,
            ", ".join(key.scopes),
            ", ".join(key.models or ["all"]),
            limits or "the endpoint's",
        )
    console = Console(markup=False)
    if not console.is_terminal:
        console.width = 160
    console.print(table)


@keys.command()
def generate() -> None:
    """Print a key without storing it: for a vault, from which `import` (and serve.yml) reads it.

    \b
    Example:
      llm-ray serve keys generate | ansible-vault encrypt_string --stdin-name alice
    """
    from llm_ray.app.keys import new_secret

    click.echo(new_secret())


@keys.command("import")
def import_() -> None:
    """Store keys created by `generate`, given as JSON on standard input: {"NAME": "KEY"}.

    Existing names get the new key; keys under other names are unchanged.

    \b
    Example:
      llm-ray serve keys import < keys.json
    """
    from llm_ray.app.keys import import_keys, keys_file

    given = from_stdin('{"NAME": "KEY"}', "names with keys")
    # a key piped into a vault ends with a line break
    wanted = {name: secret.strip() if isinstance(secret, str) else secret for name, secret in given.items()}
    changed = import_keys(keys_file(home()), wanted)
    click.echo(f"kept: {', '.join(changed)}" if changed else "unchanged")


@keys.command()
@click.argument("name", metavar="NAME|ID")
@click.argument("scopes", type=_SCOPE, nargs=-1, required=True)
def scopes(name: str, scopes: tuple[Scope, ...]) -> None:
    """Set a key's permissions: ask, train, admin.

    \b
    Examples:
      llm-ray serve keys scopes web ask
      llm-ray serve keys scopes alice ask train
    """
    from llm_ray.app.keys import keys_file, set_scopes

    key = set_scopes(keys_file(home()), name, tuple(dict.fromkeys(scopes)))
    click.echo(f"Key {key.name} (id {key.id}) may now: {', '.join(key.scopes)}", err=True)


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


@keys.command()
@click.argument("name", metavar="NAME|ID")
def revoke(name: str) -> None:
    """Revoke a key; the endpoint rejects it from then on.

    \b
    Example:
      llm-ray serve keys revoke alice
    """
    from llm_ray.app.keys import keys_file, revoke_key

    key = revoke_key(keys_file(home()), name)
    click.echo(f"Key {key.name} (id {key.id}) is revoked.", err=True)
