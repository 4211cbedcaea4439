"""Processors: small classes that change, drop or join rows before they are formatted (``data.processor``).

A processor is called once with an iterator of rows (dictionaries of columns) and yields rows, so it can change, drop,
add and join them. In a file of your own:

    class TicketProcessor:
        def __init__(self, product: str) -> None:  # data.processor_args: {product: router}
            self.product = product

        def __call__(self, rows):
            for row in rows:
                if row["product"] == self.product:
                    yield {"prompt": row["question"], "completion": row["reply"]}

Named in the conf as ``processor: ./tickets.py:TicketProcessor``.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import json
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from llm_ray.data.sources import Row
from llm_ray.errors import ConfError, DataError
from llm_ray.nearest import nearest_names

SHIPPED = {
    "wikitext": "llm_ray.data.processors.wikitext:Wikitext",
    "deduplicate": "llm_ray.data.processors.deduplicate:Deduplicate",
    "join": "llm_ray.data.processors.join:Join",
    "ranked": "llm_ray.data.processors.ranked:Ranked",
}


class Processor(Protocol):
    """Called with the rows of all files, in order; yields rows. It should stream them to save memory."""

    def __call__(self, rows: Iterator[dict[str, Any]]) -> Iterable[dict[str, Any]]: ...


def load_processor(name: str, arguments: Mapping[str, object]) -> Processor:
    """Creates the processor that ``data.processor`` names, with ``data.processor_args``.

    `name` is a built-in one, ``package.module:Class`` or ``/path/file.py:Class``. Raises :class:`ConfError` if it does
    not exist, cannot be imported, or does not accept the arguments.
    """
    path, colon, cls_name = SHIPPED.get(name, name).rpartition(":")
    if not colon or not path or not cls_name:
        nearest = nearest_names(name, SHIPPED)
        raise ConfError(
            f"data.processor: no processor {name!r}; built in are {', '.join(SHIPPED)}; write your own as "
            "package.module:Class or ./file.py:Class" + (f" (did you mean {nearest[0]}?)" if nearest else "")
        )
    module = _module(path)
    if not inspect.isclass(getattr(module, cls_name, None)):
        classes = [n for n, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == module.__name__]
        raise ConfError(f"data.processor: {path} has no class {cls_name!r}; it has {', '.join(classes) or 'none'}")
    made: Callable[..., Processor] = getattr(module, cls_name)
    if "__call__" not in dir(made):
        raise ConfError(f"data.processor: {cls_name} of {path} has no method __call__(self, rows) that yields rows")
    try:
        inspect.signature(made).bind(**arguments)
    except TypeError as error:
        raise ConfError(
            f"data.processor_args: {cls_name}{inspect.signature(made)} does not take {dict(arguments)}: {error}"
        ) from error
    try:
        return made(**arguments)
    except Exception as error:  # a user's own code may raise anything
        raise ConfError(f"data.processor_args: {cls_name}: {type(error).__name__}: {error}") from error


def code_of(name: str) -> list[Path]:
    """Returns the Python files that the processor `name` consists of: its own, and those it imports from its folder.

    For a processor in a module, the folder is that of its top-level package (without other installed packages beside
    it). Imports are parsed from the source; nothing is run. For a built-in processor, only its own file is returned;
    empty if the processor is not found.
    """
    path = name.rpartition(":")[0]
    if name in SHIPPED:
        return [Path(__file__).with_name(f"{name}.py")]
    if path.endswith(".py"):
        file = Path(path).expanduser().absolute()
        root, top, due = file.parent, "", [(file, "")]
    else:
        top = path.partition(".")[0]
        try:
            spec = importlib.util.find_spec(top)
        except (ImportError, ValueError):
            spec = None
        places = (
            [Path(spec.origin)]
            if spec and spec.origin
            else [Path(p) for p in (spec and spec.submodule_search_locations) or ()]
        )
        if not places:
            return []
        root = places[0].parent.parent if places[0].name == "__init__.py" else places[0].parent
        top = top if root.name in ("site-packages", "dist-packages") else ""
        due = _beside(root, path)
    found: dict[Path, None] = {}
    while due:
        file, module = due.pop()
        if file in found or not file.is_file():
            continue
        found[file] = None
        for imported in _imports(file, module):
            first = imported.partition(".")[0]
            if first != "llm_ray" and top in ("", first):
                due += _beside(root, imported)
    return sorted(found)


def _beside(root: Path, module: str) -> list[tuple[Path, str]]:
    """Returns the files under `root` that importing `module` would run, with their packages."""
    parts = module.split(".")
    files: list[tuple[Path, str]] = []
    for n in range(1, len(parts) + 1):
        folder = root.joinpath(*parts[:n])
        files += [(folder / "__init__.py", ".".join(parts[:n])), (folder.with_suffix(".py"), ".".join(parts[: n - 1]))]
    return [(file, package) for file, package in files if file.is_file()]


def _imports(file: Path, package: str) -> list[str]:
    """Returns the names of modules that a file imports, at any level; for `from a import b` also ``a.b``, which may be a
    module."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # importing it will report the error
        return []
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return [name for name in names if name]


def process(processor: Processor, rows: Iterable[Row]) -> Iterator[Row]:
    """Yields the processor's rows, each with file and line of the last row read before it.

    Raises :class:`DataError` with file and line if the processor fails or yields something other than a dictionary.
    """
    last = Row("", 0, {})
    name = type(processor).__name__

    def values() -> Iterator[dict[str, Any]]:
        nonlocal last
        for row in rows:
            last = row
            yield dict(row.values)

    try:
        for value in processor(values()):
            if not isinstance(value, dict):
                raise TypeError(
                    "__call__(self, rows) takes an iterator of rows and must yield rows (dict), but yielded a "
                    f"{type(value).__name__}"
                )
            json.dumps(value, ensure_ascii=False, default=repr).encode()  # the tokenizer would fail on a lone surrogate
            yield Row(last.file, last.line, value)
    except DataError:
        raise
    except Exception as error:  # a user's own code may raise anything
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{last.place}: " if last.line else ""
        what = f"{type(error).__name__}: {error} ({frame.filename}:{frame.lineno})"
        raise DataError(f"{where}data.processor {name} failed: {what}") from error


def _module(path: str) -> ModuleType:
    try:
        if not path.endswith(".py"):
            return importlib.import_module(path)
        file = Path(path).expanduser().absolute()
        if not file.is_file():
            near = [p.name for p in file.parent.glob("*.py")] if file.parent.is_dir() else []
            raise ConfError(
                f"data.processor: {file}: no such file"
                + (f"; that folder has {', '.join(sorted(near))}" if near else "")
            )
        if str(file.parent) not in sys.path:
            sys.path.append(str(file.parent))  # so that it can import modules beside it, like a script
        name = f"llm_ray_processor_{file.stem}"
        spec = importlib.util.spec_from_file_location(name, file)
        if spec is None or spec.loader is None:
            raise ConfError(f"data.processor: {file} cannot be imported")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look up their module there
        spec.loader.exec_module(module)
        return module
    except ConfError:
        raise
    except Exception as error:  # importing runs a user's own code
        raise ConfError(f"data.processor: {path} cannot be imported: {type(error).__name__}: {error}") from error
