"""Work in a process of its own: its lines, its result and its errors come back, and it ends when nobody waits for it
any more."""

from __future__ import annotations

import threading

import psutil
import pytest

from llm_ray.apart import Apart, apart, end_all
from llm_ray.errors import ClusterError, ConfError, RunError
from llm_ray.progress import Kind, Silent
from tests.unit.errands import die, double, leave, never, own_pid, refuse
from tests.waiting import until


def test_lines_and_a_result() -> None:
    with apart(double, 21) as work:
        assert list(work.lines()) == ["doubling 21"]
        assert work.result() == 42


def test_its_error_is_raised_here() -> None:
    with apart(refuse) as work, pytest.raises(ConfError, match=r"data\.train: no such file"):
        work.result()


def test_a_process_that_dies_is_told() -> None:
    with apart(die) as work, pytest.raises(RunError, match="its process ended with code 3"):
        work.result()


def test_it_ends_with_the_block() -> None:
    with apart(never) as work:
        process = psutil.Process(int(next(work.lines())))
    assert not process.is_running()


def test_all_are_ended_where_this_process_is_to_end() -> None:
    told: list[str] = []
    began = threading.Event()

    def wait() -> None:
        with apart(never) as work:
            told.append(next(work.lines()))
            began.set()
            with pytest.raises(RunError, match="it was killed"):
                work.result()

    waiting = threading.Thread(target=wait)
    waiting.start()
    assert began.wait(60)
    end_all()
    waiting.join(60)
    assert not waiting.is_alive()
    assert not psutil.pid_exists(int(told[0]))


def test_calls_one_after_the_other() -> None:
    """In one process, until it dies or does not answer: then the next call begins another."""
    process = Apart()
    pid = process.call(own_pid, reporter=Silent())
    with pytest.raises(ConfError, match=r"data\.train: no such file"):
        process.call(refuse)
    assert process.call(own_pid) == pid
    with pytest.raises(ClusterError, match="was lost"):
        process.call(die)
    assert (another := process.call(own_pid)) != pid
    with pytest.raises(ClusterError, match="does not answer within 1 s"):
        process.call(never, timeout=1)
    assert not psutil.pid_exists(another)
    assert process.call(double, 21) == 42
    process.kill()


def ended(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_what_a_failed_call_has_begun_outlives_it() -> None:
    """The Ray that a deployment has started serves others. What a block has begun ends with it."""
    lines: list[str] = []

    class Lines(Silent):
        def line(self, text: str, kind: Kind = "plain") -> None:
            lines.append(text)

    with pytest.raises(ClusterError, match="the cluster is away"):
        Apart().call(leave, reporter=Lines())
    child = psutil.Process(int(lines[0]))
    assert not ended(child)
    child.kill()
    with apart(leave) as work:
        child = psutil.Process(int(next(work.lines())))
    until(lambda: ended(child), "the end of what the block had begun")


def test_what_goes_on_is_not_broken_off() -> None:
    """A call that changes what is served ends as it should, whoever still waits for it."""
    process = Apart()
    child = psutil.Process(process.call(own_pid))
    process.close()
    assert child.wait(60) in (0, None)
