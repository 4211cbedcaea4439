"""What a dotted name means, where models have names with dots in them."""

from __future__ import annotations

import pytest

from llm_ray.conf.keys import FINETUNE, SERVE


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("endpoint.limits.concurrent", ("endpoint", "limits", "concurrent")),
        ("models.a.cpus", ("models", "a", "cpus")),
        ("models.a.autoscale.min", ("models", "a", "autoscale", "min")),
        ("models.a", ("models", "a")),
        ("models.qwen2.5.cpus", ("models", "qwen2.5", "cpus")),
        ("models.qwen2.5-1.5b.autoscale.min", ("models", "qwen2.5-1.5b", "autoscale", "min")),
        ("models.org/qwen2.5.model", ("models", "org/qwen2.5", "model")),
        ("models.a.adapters.bot-1.5", ("models", "a", "adapters", "bot-1.5")),
        (
            "models.qwen2.5.engine_options.compilation_config.level",
            ("models", "qwen2.5", "engine_options", "compilation_config", "level"),
        ),
        ("models.engine.engine", ("models", "engine", "engine")),
        ("models.NAME.engine", ("models", "NAME", "engine")),
    ],
)
def test_what_a_name_means(name: str, path: tuple[str, ...]) -> None:
    assert SERVE.paths(name)[0] == path


def test_a_section_as_value_may_name_a_model_with_dots() -> None:
    assert SERVE.paths("models.qwen2.5") == []
    assert SERVE.paths("models.qwen2.5", section=True) == [("models", "qwen2.5")]
    assert SERVE.paths("models.qwen2.cpus", section=True) == [("models", "qwen2", "cpus"), ("models", "qwen2.cpus")]


@pytest.mark.parametrize(
    "name", ["", ".", "models.a.cpu", "models.a.limits.concurrent", "model.a.cpus", "endpoint.a", "endpoint.port.x"]
)
def test_names_that_mean_nothing(name: str) -> None:
    assert SERVE.paths(name) == []


def test_keys_of_the_users_own() -> None:
    assert FINETUNE.paths("data.columns.any.thing") == [("data", "columns", "any.thing")]
    assert FINETUNE.paths("data.processor_args.any.thing") == [("data", "processor_args", "any", "thing")]
    assert not FINETUNE.paths("data.anything")
    assert not FINETUNE.paths("name.anything")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("models.qwen2.5.cpu", "models.qwen2.5.cpus"),
        ("models.a.autoscal.min", "models.a.autoscale.min"),
        ("models.a.autoscale.mn", "models.a.autoscale.min"),
        ("models.a.b.num_replicas", "models.a.b.replicas"),
        ("model.a.cpus", "models.NAME.cpus"),
        ("cpus_per_worker", "models.NAME.cpus"),
        ("port", "endpoint.port"),
        ("models.a.port", "endpoint.port"),
        ("models.a.zebra", None),
    ],
)
def test_the_nearest_key(name: str, nearest: str | None) -> None:
    assert SERVE.nearest_to(name) == nearest


def test_what_has_to_be_given() -> None:
    assert [key.name for key in SERVE.needed()] == ["models.NAME.model"]
    assert [key.name for key in FINETUNE.needed()] == ["name", "model.base", "data.train"]
    assert [key.name for key in FINETUNE.needed("data")] == ["data.train"]
    assert [key.name for key in FINETUNE.needed("training.early_stopping.patience")] == [
        "training.early_stopping.patience"
    ]
