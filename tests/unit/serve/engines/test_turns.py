"""Turns of adapters: nobody starves, nobody is mixed with others, and whoever leaves is forgotten."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_ray.serve.engines.turns import BASE, Turns


class Engine:
    """Computes as OpenVinoCore does: each request needs so many tokens, and gets one a step."""

    def __init__(self, turns: Turns, batch: int = 4) -> None:
        self.turns, self.batch = turns, batch
        self.adapters: dict[str, int] = {}
        self.needs: dict[str, int] = {}
        self.running: list[str] = []
        self.applied = BASE
        self.switches = 0
        self.done: list[str] = []
        self.computed = Counter[int]()

    def ask(self, request_id: str, adapter: int, tokens: int) -> None:
        self.adapters[request_id], self.needs[request_id] = adapter, tokens
        self.turns.wait(request_id, adapter)

    def step(self) -> None:
        if self.turns.over():
            for request_id in self.running:
                self.turns.wait(request_id, self.adapters[request_id])
            self.running = []
        adapter = self.turns.next(len(self.running))
        if adapter is not None:
            assert not self.running
            self.applied, self.switches = adapter, self.switches + 1
        self.running += self.turns.take(self.batch - len(self.running))
        assert len(self.running) <= self.batch
        assert {self.adapters[request_id] for request_id in self.running} <= {self.applied}
        self.turns.count()
        for request_id in [*self.running]:
            self.computed[self.applied] += 1
            self.needs[request_id] -= 1
            if not self.needs[request_id]:
                self.running.remove(request_id)
                self.done.append(request_id)


def test_requests_of_one_adapter_are_never_held_back() -> None:
    engine = Engine(Turns(admit_steps=2, max_steps=4))
    for number in range(6):
        engine.ask(f"r{number}", 3, 50)
    for _ in range(100):
        engine.step()
    assert engine.done == [f"r{number}" for number in range(6)]
    assert engine.switches == 1


def test_a_turn_takes_in_no_more_once_others_have_waited() -> None:
    engine = Engine(Turns(admit_steps=3, max_steps=100))
    engine.ask("first", BASE, 6)
    engine.step()
    engine.ask("other", 1, 1)
    engine.ask("early", BASE, 1)
    for _ in range(3):
        engine.step()
    engine.ask("late", BASE, 1)
    for _ in range(5):
        engine.step()
    assert engine.done == ["early", "first", "other", "late"]
    assert engine.switches == 2


def test_an_endless_answer_is_paused_for_others_and_goes_on() -> None:
    engine = Engine(Turns(admit_steps=2, max_steps=5))
    engine.ask("endless", 1, 10**6)
    engine.step()
    engine.ask("short", 2, 2)
    for _ in range(20):
        engine.step()
    assert engine.done == ["short"]
    assert engine.running == ["endless"]


def test_who_came_first_is_next() -> None:
    engine = Engine(Turns(admit_steps=1, max_steps=100))
    for request_id, adapter in (("a", 1), ("b", 2), ("c", BASE), ("d", 2), ("e", 1)):
        engine.ask(request_id, adapter, 2)
    for _ in range(10):
        engine.step()
    assert engine.done == ["c", "a", "e", "b", "d"]  # the base's turn lasts as long as nobody has waited
    assert engine.switches == 2


@pytest.mark.parametrize("left", ["other", "own"])
def test_whoever_leaves_the_queue_is_forgotten(left: str) -> None:
    turns = Turns(admit_steps=1, max_steps=2)
    turns.wait("own", BASE)
    turns.wait("other", 1)
    turns.leave(left)
    turns.leave("unknown")
    stays = {"other": "own", "own": "other"}[left]
    assert turns.next(running=0) == {"own": None, "other": 1}[stays]
    assert turns.take(8) == [stays]
    assert not turns
    turns.leave(stays)
    assert turns.next(running=0) is None
    assert turns.take(8) == []


def test_a_steady_stream_for_one_adapter_starves_nobody() -> None:
    engine = Engine(Turns(admit_steps=4, max_steps=8), batch=2)
    engine.ask("waits", 7, 1)
    for number in range(200):
        engine.ask(f"s{number}", number % 2, 3)
        engine.step()
    assert "waits" in engine.done
    assert engine.done.index("waits") < 20
    assert min(engine.computed[0], engine.computed[1]) > 60


@settings(deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 4), st.integers(1, 30)), max_size=25),
    batch=st.integers(1, 4),
    admit_steps=st.integers(1, 6),
    max_steps=st.integers(6, 12),
)
def test_everyone_is_answered_within_the_turns_of_those_before(
    requests: list[tuple[int, int, int]], batch: int, admit_steps: int, max_steps: int
) -> None:
    engine = Engine(Turns(admit_steps, max_steps), batch)
    waiting = sorted((at, number, adapter, tokens) for number, (at, adapter, tokens) in enumerate(requests))
    for step in range(5000):
        while waiting and waiting[0][0] <= step:
            _, number, adapter, tokens = waiting.pop(0)
            engine.ask(f"r{number}", adapter, tokens)
        engine.step()
        if not waiting and not engine.running and not engine.turns:
            break
    assert sorted(engine.done) == sorted(f"r{number}" for number in range(len(requests)))
    # A step computes at least one token: none is lost to turns that do nothing.
    assert engine.computed.total() == sum(tokens for _, _, tokens in requests)
    assert step <= 20 + sum(tokens for _, _, tokens in requests) + engine.switches
