"""Several users in one process: what threads share is put back right, and what they ask for is not mixed up."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest

from llm_ray.app.data import preview
from llm_ray.app.finetune import plan_finetune
from llm_ray.conf.load import load_finetune
from llm_ray.progress import Silent
from llm_ray.serve.deployments.deploy import _quiet
from llm_ray.threads import Once

T = TypeVar("T")
WAIT = 60.0


def overlapping(block: Callable[[], contextlib.AbstractContextManager[Any]]) -> None:
    """Two threads are in the block at once; the first that came in goes first."""
    inside, came, gone = threading.Event(), threading.Event(), threading.Event()

    def first() -> None:
        with block():
            inside.set()
            assert came.wait(WAIT)
        gone.set()

    def second() -> None:
        assert inside.wait(WAIT)
        with block():
            came.set()
            assert gone.wait(WAIT)

    with ThreadPoolExecutor() as pool:
        ahead = pool.submit(first)
        behind = pool.submit(second)
        ahead.result(), behind.result()


def test_logging_is_as_it_was_after_threads_that_overlapped() -> None:
    before = logging.root.manager.disable
    overlapping(_quiet)
    assert logging.root.manager.disable == before


@pytest.fixture
def opened() -> list[str]:
    return []


@pytest.fixture
def one(opened: list[str]) -> Callable[[str], Callable[[], contextlib.AbstractContextManager[str]]]:
    @contextlib.contextmanager
    def make(name: str) -> Iterator[str]:
        opened.append(f"+{name}")
        yield name
        opened.append(f"-{name}")

    return lambda name: lambda: make(name)


def test_the_same_is_shared_and_another_waited_for(
    opened: list[str], one: Callable[[str], Callable[[], contextlib.AbstractContextManager[str]]]
) -> None:
    once: Once[str] = Once()
    overlapping(lambda: once.use("a", one("a")))
    assert opened == ["+a", "-a"]
    inside, done = threading.Event(), threading.Event()

    def other() -> None:
        inside.wait(WAIT)
        with once.use("b", one("b")) as value:
            assert (value, done.is_set()) == ("b", True)

    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(other)
        with once.use("a", one("a")):
            inside.set()
            assert not waiting.done()
            with once.use("c", one("c")):  # in the same thread it would wait for itself
                pass
            done.set()
        waiting.result(WAIT)
    assert opened[2:] == ["+a", "+c", "-c", "-a", "+b", "-b"]


def test_what_fails_to_open_leaves_nothing_behind() -> None:
    once: Once[None] = Once()

    @contextlib.contextmanager
    def broken() -> Iterator[None]:
        raise OSError("no")
        yield

    for _ in range(2):
        with pytest.raises(OSError, match="no"), once.use("a", broken):
            pass
    with once.use("b", contextlib.nullcontext):
        pass


def test_previews_and_plans_of_two_homes_at_once_are_those_of_each_alone(smollm2: Path, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(
        "name: own\nstages: [prepare]\nmodel: {base: small}\ndata: {train: rows.jsonl, validation: 0.25, max_length: "
        "64}\n"
    )
    homes = [tmp_path / "one", tmp_path / "two"]
    for number, home in enumerate(homes, 3):
        (home / "data").mkdir(parents=True)
        (home / "models").mkdir()
        (home / "models" / "small").symlink_to(smollm2)
        rows = (
            f'{{"prompt": "Code {n} of {home.name}?", "completion": "{"so " * n}"}}\n' for n in range(1, 4 * number)
        )
        (home / "data" / "rows.jsonl").write_text("".join(rows))

    def look(home: Path) -> tuple[object, ...]:
        conf = load_finetune(tmp_path / "own.yaml", home=home)
        plan = plan_finetune(conf, Silent())
        return conf, preview(conf, rows=5), plan.data, plan.choice, plan.warnings

    alone = [look(home) for home in homes]
    environment = dict(os.environ)
    with ThreadPoolExecutor() as pool:
        for _ in range(2):
            assert list(pool.map(look, homes)) == alone
    assert alone[0] != alone[1]
    assert dict(os.environ) == environment
