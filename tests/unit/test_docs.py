"""What the documentation names is there: files, headings, make targets, commands and their options, keys of the conf,
imports."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from llm_ray.cli.main import cli
from llm_ray.conf.keys import FINETUNE, SERVE, SWEEP, Keys
from llm_ray.conf.load import shipped
from llm_ray.conf.render import variables

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "llm_ray").rglob("*.md")])
WRITTEN = [
    page for page in PAGES if page.name not in ("cli.md", "finetune-conf.md", "serve-conf.md", "sweep-conf.md")
]  # the others are generated
KINDS = (FINETUNE, SERVE, SWEEP)
SECTIONS = {name for keys in KINDS for name, key in keys.table.items() if key.section or keys.below(name)}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
each_written_page = pytest.mark.parametrize("page", WRITTEN, ids=lambda page: str(page.relative_to(ROOT)))


def prose(page: Path) -> str:
    """The page without its fenced code."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub links to them."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@each_page
def test_relative_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name} links to {target}, which is not there"
        assert not anchor or anchor in anchors(file), f"{page.name} links to {target}: {file.name} has no such heading"


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = [page.relative_to(ROOT / "docs") for page in (ROOT / "docs").rglob("*.md") if page.name != "README.md"]
    assert [str(page) for page in pages if f"]({page})" not in index] == []


def test_the_tree_of_the_readme_is_there() -> None:
    tree = (ROOT / "README.md").read_text(encoding="utf-8").partition("## What is where")[2].partition("\n## ")[0]
    rows = re.findall(r"^    (  )?((?:[\w./]*[./][\w./]* ?)+)  *\w", tree, re.MULTILINE)
    places = {ROOT / ("llm_ray" if inside else "") / name for inside, names in rows for name in names.split()}
    assert [str(place) for place in places if not place.exists()] == []
    packages = {path.parent for path in (ROOT / "llm_ray").glob("*/__init__.py")}
    assert packages <= places, "the tree says of every package what it is for"


@each_written_page
def test_make_targets_exist(page: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`make ([a-z-]+)`", text) + re.findall(
        r"^(?:\$ |[A-Z_]+=\S+ )*make ([a-z-]+)", text, re.MULTILINE
    )
    assert set(named) <= set(targets)


# Commands -------------------------------------------------------------------------------------------------------------


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each `llm-ray …` in the page's code, fenced, indented or between backticks; without what only a
    shell reads."""
    text = page.read_text(encoding="utf-8")
    lines = [line for _, code in FENCE.findall(text) for line in code.splitlines()]
    lines += [line for line in prose(page).splitlines() if line.startswith("    ")]
    lines += [re.sub(r"\s+", " ", code) for code in re.findall(r"`(llm-ray [^`]+)`", prose(page))]
    yield from parsed(lines)


def parsed(lines: list[str]) -> Iterator[list[str]]:
    """The words of the lines that are commands."""
    for line in lines:
        found = re.match(r"\s*(?:\$ )?(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?llm-ray (.+)", line)
        if found:
            words = shlex.split(found[1], comments=True)
            yield words[: next((at for at, word in enumerate(words) if word in ("|", ">", "&&", "\\")), len(words))]


def parse(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that `words` begin with, and the rest of them."""
    context = click.Context(cli, info_name="llm-ray")
    while isinstance(context.command, click.Group) and words and not words[0].startswith("-"):
        command = context.command.get_command(context, words[0])
        assert command, f"{context.command_path} has no command {words[0]}"
        context, words = click.Context(command, context, info_name=words[0]), words[1:]
    if (
        isinstance(context.command, click.Group)
        and context.command.invoke_without_command
        and words
        and words[0].startswith("-")
    ):
        return context.command, words  # options of its own, as `ui`
    if isinstance(context.command, click.Group) and words and words[0] not in context.help_option_names:
        rest = list(words)
        words = context.command.parse_args(
            context, rest
        )  # a group with a command of its own when none is named, as `serve`
        _, command, words = context.command.resolve_command(context, [*context._protected_args, *context.args])
        assert command
        return command, words
    return context.command, words


def check_options(words: list[str], where: str) -> None:
    """The command exists, and has the options that are given."""
    command, rest = parse(words)
    options = {
        name: option
        for option in command.params
        if isinstance(option, click.Option)
        for name in option.opts + option.secondary_opts
    }
    for word in rest:
        name = word.partition("=")[0]
        assert not re.fullmatch(r"--?[a-z][\w-]*", name) or name in {*options, "--help", "-h"}, (
            f"{where}: {words}: no option {name}"
        )


@each_written_page
def test_commands_and_their_options_exist(page: Path) -> None:
    for words in commands(page):
        check_options(words, page.name)


@pytest.mark.parametrize("template", [f"{keys.kind}/{name}" for keys in KINDS for name in shipped(keys.kind)])
def test_commands_in_the_heads_of_templates_exist(template: str) -> None:
    text = (ROOT / "conf" / f"{template}.yaml.j2").read_text(encoding="utf-8")
    for words in parsed(re.findall(r"^#.*?(llm-ray .+)$", text, re.MULTILINE)):
        check_options(words, template)


@each_written_page
def test_settings_of_commands_exist(page: Path) -> None:
    for words in commands(page):
        kinds: dict[str, Keys] = {"serve": SERVE, "sweep": SWEEP}
        keys = kinds.get(words[0], FINETUNE)
        templates = {name: variables(file.read_text(encoding="utf-8")) for name, file in shipped(keys.kind).items()}
        config = next((words[at + 1] for at, word in enumerate(words) if word in ("--config", "--config_path")), "")
        for setting in (words[at + 1] for at, word in enumerate(words[:-1]) if word == "--set"):
            name = setting.partition("=")[0]
            known = keys.paths(name) or name in templates.get(config, ()) or config not in templates
            assert known, f"{page.name}: --set {setting}: {name} is neither a key nor a variable of {config}"
            assert "." not in name or keys.paths(name), f"{page.name}: --set {setting}: there is no such key"


# Keys of the conf -----------------------------------------------------------------------------------------------------


@each_written_page
def test_keys_of_the_conf_exist(page: Path) -> None:
    for name in re.findall(r"`([a-z_]+(?:\.(?:[a-z_]+|NAME))+)(?:: [^`]*)?`", prose(page)):
        if name.partition(".")[0] in SECTIONS and Path(name).suffix not in (".md", ".py", ".safetensors"):
            near = [keys.nearest_to(name) for keys in KINDS]
            assert any(keys.paths(name) for keys in KINDS), (
                f"{page.name} names the key {name}: no schema has it; near it are {near}"
            )


# Modules --------------------------------------------------------------------------------------------------------------


def allowed_imports() -> dict[str, set[str]]:
    """The table of the architecture: for each module those it may import."""
    table: dict[str, set[str]] = {}
    rows = re.findall(
        r"^\| `llm_ray/(\w+)(?:\.py|/)` \|[^|]+\| ([^|]+) \|$",
        (ROOT / "docs/design/architecture.md").read_text(encoding="utf-8"),
        re.M,
    )
    for name, may in rows:
        named = set(table) if may == "all above" else set() if may == "–" else set(may.split(", "))
        assert named <= set(table), f"{name} may import {named - set(table)}, which is not above it"
        table[name] = named | {"errors"}
    return table


def imports(file: Path) -> Iterator[str]:
    """The modules of llm_ray that a file imports, by their first name."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "llm_ray":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llm_ray."):
            yield str(node.module).split(".")[1]


def test_modules_import_only_what_the_architecture_allows() -> None:
    table = allowed_imports()
    modules = {path.stem for path in (ROOT / "llm_ray").iterdir() if not path.name.startswith("_")}
    assert set(table) == modules
    for name, may in table.items():
        path = ROOT / "llm_ray" / name
        for file in path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")]:
            unexpected = set(imports(file)) & set(table) - may - {name}
            assert not unexpected, (
                f"{file.relative_to(ROOT)} imports {', '.join(sorted(unexpected))}: see docs/design/architecture.md"
            )


def test_the_command_line_imports_no_more_than_use_cases_and_confs() -> None:
    assert allowed_imports()["cli"] == {"app", "conf", "errors", "progress", "ui"}


def names(file: Path) -> set[str]:
    """All names, attributes and packages that a file uses."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.name for alias in node.names}
    return found | packages(file)


def packages(file: Path) -> set[str]:
    """The packages that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found


def test_nothing_below_the_command_line_knows_a_terminal() -> None:
    for file in (ROOT / "llm_ray").rglob("*.py"):
        module = file.relative_to(ROOT / "llm_ray").parts
        if module[0] == "cli" or module == ("operations", "__main__.py"):  # a command line, too
            continue
        assert not packages(file) & {"click", "rich"} and "Terminal" not in names(file), file
        # Settings of the environment, the current folder and signals are the whole process's, in which others work as
        # well.
        whole_process = {"print", "environ", "getenv", "putenv", "chdir", "signal", "stdout", "stderr", "argv"}
        assert module[0] != "app" or not names(file) & whole_process, file
