"""Removes a model from this machine's endpoint, as a process of its own for callers in a Ray worker, which is already
connected to another Ray.

python -m llm_ray.cli.unserve HOME MODEL

Reports errors on standard error.
"""

from __future__ import annotations

import sys
from pathlib import Path

from llm_ray.cli.job import forget_ray
from llm_ray.errors import LlmRayError


def main(home: Path, model: str) -> int:
    """Removes the model; returns the exit code."""
    from llm_ray.app.serving import stop
    from llm_ray.cli.terminal import Terminal

    try:
        stop([model], home, Terminal())
    except LlmRayError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    forget_ray()
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
