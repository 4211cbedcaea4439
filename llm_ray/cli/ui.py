"""``llm-ray ui``: the web page and its users."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from click.core import ParameterSource

from llm_ray.cli.options import address_option, from_stdin
from llm_ray.conf.section import home

_ROLES = ("viewer", "user", "admin")
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.group(invoke_without_command=True)
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on. Beyond loopback, at least one user is required.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=7860,
    show_default=True,
    help="Port to listen on; 0 for any free one.",
)
@click.option("--tls-cert", type=_FILE, metavar="FILE", help="Certificate with its intermediates (PEM), for HTTPS.")
@click.option("--tls-key", type=_FILE, metavar="FILE", help="Its key (PEM), without a password.")
@click.option(
    "--allow-host",
    "hosts",
    multiple=True,
    metavar="NAME[:PORT]",
    help="A host name under which the page is reached. Repeat for more.",
)
@click.option(
    "--allow-origin",
    "origins",
    multiple=True,
    metavar="URL",
    help="The page's URL behind a proxy, https://llm.example.org.",
)
@click.option(
    "--trusted-proxy", metavar="ADDRESS", help="The proxy whose X-Forwarded-For and X-Forwarded-Proto are trusted."
)
@click.option(
    "--max-upload-mib",
    type=click.IntRange(1),
    default=2048,
    show_default=True,
    help="The largest file that may be uploaded.",
)
@address_option("The cluster that serves: auto on one of its nodes, else its head's GCS. Default: this machine.")
@click.pass_context
def ui(
    ctx: click.Context,
    host: str,
    port: int,
    tls_cert: Path | None,
    tls_key: Path | None,
    hosts: tuple[str, ...],
    origins: tuple[str, ...],
    trusted_proxy: str | None,
    max_upload_mib: int,
    address: str | None,
) -> None:
    """Serve the web page to finetune, deploy and ask models, until Ctrl-C.

    Prints the URL to open. Without users, it contains a secret that is valid for one browser; the next one is printed
    when it is used.

    \b
    Examples:
      llm-ray ui
      llm-ray ui users add alice --role admin
      llm-ray ui --host 0.0.0.0 --tls-cert page.pem --tls-key page.key --allow-host llm.example.org
    """
    if ctx.invoked_subcommand is not None:
        given = next(
            (name for name in ctx.params if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT), None
        )
        if given:
            flag = next(option.opts[0] for option in ctx.command.params if option.name == given)
            raise click.UsageError(f"{flag} applies to the page itself, not to {ctx.invoked_subcommand}")
        return
    import contextlib
    import logging
    import re

    from llm_ray.errors import ConfError

    for origin in origins:
        if not re.fullmatch(r"https?://[^/\s]+", origin):
            raise ConfError(f"--allow-origin {origin}: expected a scheme and a name, such as https://llm.example.org")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    from llm_ray.ui.server import Settings, serve

    settings = Settings(
        home(), host, port, tls_cert, tls_key, hosts, origins, trusted_proxy, max_upload_mib * 2**20, address
    )  # fmt: skip
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C is the normal end
        serve(settings, lambda url: click.echo(f"The page: {url}"))


@ui.group()
def users() -> None:
    """Manage users of the page; changes apply at once and end the user's sessions.

    Viewers can only view; users can also finetune, deploy and ask; admins can also manage the cluster.

    \b
    Examples:
      llm-ray ui users add alice --role admin
      llm-ray ui users list
      llm-ray ui users revoke alice
    """


@users.command()
@click.argument("name")
@click.option("--role", type=click.Choice(_ROLES), default="user", show_default=True, help="The user's permissions.")
def add(name: str, role: str) -> None:
    """Add a user. Prompts for the password, or reads it from the first line of standard input.

    \b
    Examples:
      llm-ray ui users add alice --role admin
      llm-ray ui users add bob < password.txt
    """
    from llm_ray.ui.users import Role, add_user, users_file

    user = add_user(users_file(home()), name, _password(name), Role(role))
    click.echo(f"Added {user.name}, role {user.role}.")


@users.command("import")
def import_() -> None:
    """Add users given as JSON on standard input: {"NAME": {"password": "…", "role": "viewer|user|admin"}}.

    Existing users get the new password and role; other users are unchanged. The default role is user. ui.yml uses this
    for users from a vault.

    \b
    Example:
      llm-ray ui users import < users.json
    """
    from llm_ray.errors import ConfError
    from llm_ray.ui.users import Role, import_users, users_file

    wanted = {}
    for name, settings in from_stdin('{"NAME": {"password": "…", "role": "user"}}', "users").items():
        if (
            not isinstance(settings, dict)
            or not isinstance(settings.get("password"), str)
            or set(settings) - {"password", "role"}
        ):
            raise ConfError(
                f'the user {name}: {{"password": "…", "role": "user"}} is expected, with a password and, unless it '
                "is user, a role"
            )
        if settings.get("role", "user") not in _ROLES:
            raise ConfError(f"the user {name}: the role must be one of {', '.join(_ROLES)}")
        wanted[name] = (settings["password"], Role(settings.get("role", "user")))
    changed = import_users(users_file(home()), wanted)
    click.echo(f"kept: {', '.join(changed)}" if changed else "unchanged")


@users.command("list")
@click.option("as_json", "--json", is_flag=True, help="Print JSON.")
def list_(as_json: bool) -> None:
    """Show the users and their roles.

    \b
    Example:
      llm-ray ui users list --json
    """
    import json

    from llm_ray.ui.users import list_users, users_file

    found = list_users(users_file(home()))
    if as_json:
        click.echo(
            json.dumps([{"name": user.name, "role": user.role, "created": user.created} for user in found], indent=2)
        )
    elif not found:
        click.echo("There are no users: llm-ray ui users add NAME")
    else:
        width = max(len(user.name) for user in found)
        for user in found:
            click.echo(f"{user.name:<{width}}  {user.role}")


@users.command()
@click.argument("name")
@click.argument("role", type=click.Choice(_ROLES))
def role(name: str, role: str) -> None:
    """Change a user's role.

    \b
    Example:
      llm-ray ui users role bob viewer
    """
    from llm_ray.ui.users import Role, change_user, users_file

    user = change_user(users_file(home()), name, role=Role(role))
    click.echo(f"{user.name} now has the role {user.role}.")


@users.command()
@click.argument("name")
def password(name: str) -> None:
    """Change a user's password.

    \b
    Example:
      llm-ray ui users password bob
    """
    from llm_ray.ui.users import change_user, users_file

    change_user(users_file(home()), name, password=_password(name))
    click.echo(f"{name} has a new password.")


@users.command()
@click.argument("name")
def revoke(name: str) -> None:
    """Remove a user.

    \b
    Example:
      llm-ray ui users revoke bob
    """
    from llm_ray.ui.users import revoke_user, users_file

    click.echo(f"{revoke_user(users_file(home()), name).name} can no longer use the page.")


def _password(name: str) -> str:
    """Returns the password, prompted for twice on a terminal, or else the first line of standard input; never an
    argument, which other users could see."""
    if sys.stdin.isatty():
        return str(click.prompt(f"Password of {name}", hide_input=True, confirmation_prompt=True))
    return sys.stdin.readline().rstrip("\r\n")
