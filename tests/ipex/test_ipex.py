"""The profile ipex beside the stock one: the same losses in training and the same answer in serving, each in its own
environment.

make setup PROFILE=ipex && make test-ipex
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = {"stock": Path(sys.executable), "ipex": ROOT / ".venv-ipex/bin/python"}
STEPS = 4
# Relative, of losses and gradient norms: sums in another order; bf16 rounds what is summed.
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Run:
    """What tests.ipex.steps prints in one of the environments. Ends the session, with exit code 3, where the second is
    not made."""
    if not ENVIRONMENTS["ipex"].exists():
        pytest.exit("there is no .venv-ipex: make setup PROFILE=ipex", 3)
    folder = tmp_path_factory.mktemp("ipex")

    def steps(profile: str, what: str, *arguments: object) -> dict[str, Any]:
        command = [str(ENVIRONMENTS[profile]), "-m", "tests.ipex.steps", what, str(smollm2), *map(str, arguments)]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "LLM_RAY_HOME": str(folder / profile)}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True, timeout=800
        )
        assert done.returncode == 0, done.stderr[-4000:]
        assert "autograd kernel was not registered" not in done.stderr  # of a kernel whose gradients are wrong
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        print(f"{profile} {what} {arguments}: {found}")
        return found

    return steps


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_losses_and_gradients_are_those_of_the_stock_profile(run: Run, tmp_path: Path, precision: str) -> None:
    stock = run("stock", "train", tmp_path / "stock", "torch", precision, STEPS)
    ipex = run("ipex", "train", tmp_path / "ipex", "ipex", precision, STEPS)
    assert "_IPEXLinear" in ipex["layers"]
    assert ipex["adapters"] == stock["adapters"] > 0
    assert ipex["losses"] == pytest.approx(stock["losses"], rel=TOLERANCE[precision])
    assert ipex["norms"] == pytest.approx(stock["norms"], rel=5 * TOLERANCE[precision])
    assert ipex["losses"][-1] < ipex["losses"][0]


def test_the_greedy_answer_is_that_of_the_stock_profile(run: Run) -> None:
    stock, ipex = run("stock", "answer", "fp32", 24), run("ipex", "answer", "fp32", 24)
    assert "_IPEXLinear" in ipex["layers"]
    assert ipex["tokens"] == stock["tokens"]
    assert ipex["logprobs"] == pytest.approx(stock["logprobs"], abs=1e-3)
    assert "Paris" in ipex["text"]
