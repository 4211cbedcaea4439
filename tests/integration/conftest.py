"""The order of the files, which run two at a time: the longest first, and what shares an endpoint together."""

from __future__ import annotations

from pathlib import Path

import pytest

_HERE = Path(__file__).parent
_LONGEST_FIRST = ("test_faults", "test_serve_life", "test_training", "test_quickstart", "test_engines", "api", "test_finetune", "endpoint")
"""What is not named comes last."""


def _group(item: pytest.Item) -> str:
    """The file that it is in, or the folder where its files share fixtures."""
    return item.path.relative_to(_HERE).parts[0].removesuffix(".py")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def rank(item: pytest.Item) -> int:
        if not item.path.is_relative_to(_HERE):
            return -1
        item.add_marker(pytest.mark.xdist_group(_group(item)))
        return _LONGEST_FIRST.index(_group(item)) if _group(item) in _LONGEST_FIRST else len(_LONGEST_FIRST)

    items.sort(key=rank)
