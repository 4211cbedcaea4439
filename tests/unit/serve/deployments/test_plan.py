"""What is decided, and refused, before a model is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from llm_ray.cli.terminal import Terminal
from llm_ray.conf.section import Paths
from llm_ray.conf.serve import Autoscale, ModelServing, ServeConf
from llm_ray.errors import ModelError, ServeError
from llm_ray.serve.deployments import plan as planning
from llm_ray.serve.deployments.plan import Node, beyond_room, describe, place, plan
from llm_ray.serve.models import ServedModel

GIB = 2**30


def _plan(model: ModelServing, tmp_path: Path) -> ServedModel:
    conf = ServeConf(models={"m": model}, paths=Paths(models=tmp_path / "models", runs=tmp_path / "runs"))
    return plan(conf, Terminal())[0]


def _copy(smollm2: Path, to: Path, **config: object) -> Path:
    shutil.copytree(
        smollm2,
        to,
        copy_function=lambda a, b: Path(b).symlink_to(a) if a.endswith(".safetensors") else shutil.copy(a, b),
    )
    told = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(told | config))
    return to


def _adapter(folder: Path, **config: object) -> Path:
    """An adapter of the small model's first layer."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"r": 16} | config))
    layer, ones = "base_model.model.model.layers.0.self_attn.q_proj", np.ones((16, 576), np.float32)
    save_file(
        {f"{layer}.lora_A.weight": ones, f"{layer}.lora_B.weight": ones.T.copy()}, folder / "adapter_model.safetensors"
    )
    return folder


def test_a_small_model_needs_no_tuning(smollm2: Path, tmp_path: Path) -> None:
    model = _plan(ModelServing(model=str(smollm2)), tmp_path)
    assert (model.engine, model.precision, model.max_model_len, model.task, model.tool_parser) == (
        "vllm",
        "fp32",
        8192,
        "chat",
        "hermes",
    )
    assert 2 * GIB < model.memory_bytes < 4 * GIB


def test_weights_in_fp32_are_not_rounded_unasked(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "cpu_flags", lambda: frozenset({"amx_bf16", "amx_tile"}))
    assert _plan(ModelServing(model=str(smollm2)), tmp_path).precision == "fp32"
    assert _plan(ModelServing(model=str(smollm2), precision="bf16"), tmp_path).precision == "bf16"


def test_more_tokens_than_the_model_was_made_for_are_refused(smollm2: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"models.m.max_model_len is 20000, but the model supports 8192 tokens"):
        _plan(ModelServing(model=str(smollm2), max_model_len=20000), tmp_path)


def test_a_run_is_served_by_its_name(smollm2: Path, tmp_path: Path) -> None:
    (tmp_path / "runs" / "bot").mkdir(parents=True)
    (tmp_path / "runs" / "bot" / "output").symlink_to(smollm2)
    assert _plan(ModelServing(model="bot"), tmp_path).path == tmp_path / "runs" / "bot" / "output"


def test_other_weights_in_the_same_folder_are_another_model(smollm2: Path, tmp_path: Path) -> None:
    folder = _copy(smollm2, tmp_path / "m")
    before = _plan(ModelServing(model=str(folder)), tmp_path)
    (folder / "generation_config.json").write_text("{}")
    assert _plan(ModelServing(model=str(folder)), tmp_path).version() != before.version()


def test_a_kind_of_model_that_nobody_knows_is_refused(smollm2: Path, tmp_path: Path) -> None:
    folder = _copy(smollm2, tmp_path / "m", model_type="frobnicator")
    with pytest.raises(ModelError, match=r"no engine supports models of type frobnicator \(config.json: model_type\)"):
        _plan(ModelServing(model=str(folder)), tmp_path)


def test_a_model_with_code_of_its_own_is_told_how_to_be_trusted(smollm2: Path, tmp_path: Path) -> None:
    folder = _copy(
        smollm2, tmp_path / "m", model_type="frobnicator", auto_map={"AutoConfig": "configuration.Frobnicator"}
    )
    with pytest.raises(
        ModelError, match="has its own Python code: read it, and set trust_remote_code and trusted_models"
    ):
        _plan(ModelServing(model=str(folder)), tmp_path)


def test_a_model_that_writes_no_text_is_refused_by_transformers(smollm2: Path, tmp_path: Path) -> None:
    folder = _copy(smollm2, tmp_path / "m", model_type="clip")
    with pytest.raises(ModelError, match="a model of type clip does not generate text"):
        _plan(ModelServing(model=str(folder), engine="transformers"), tmp_path)


@pytest.mark.parametrize(
    ("template", "parser"),
    [
        ("{{ '<tool_call>' }}{{ tools }}", "hermes"),
        ("{{ '<|python_tag|>' }}", "llama3_json"),
        ("{{ '[TOOL_CALLS]' }}", "mistral"),
        ("plain", "hermes"),
    ],
)
def test_tool_calls_are_read_as_the_template_writes_them(
    template: str, parser: str, smollm2: Path, tmp_path: Path
) -> None:
    (tmp_path / "t.jinja").write_text(template)
    assert _plan(ModelServing(model=str(smollm2), chat_template=tmp_path / "t.jinja"), tmp_path).tool_parser == parser
    assert _plan(ModelServing(model=str(smollm2), tools="off"), tmp_path).tool_parser is None
    assert _plan(ModelServing(model=str(smollm2), tools="mistral"), tmp_path).tool_parser == "mistral"


def test_a_model_without_a_chat_template_has_no_tools(smollm2: Path, tmp_path: Path) -> None:
    folder = _copy(smollm2, tmp_path / "m")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    told = json.loads((folder / "tokenizer_config.json").read_text())
    told.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    model = _plan(ModelServing(model=str(folder)), tmp_path)
    assert (model.task, model.tool_parser) == ("completions", None)


def test_adapters_are_runs_or_folders(smollm2: Path, tmp_path: Path) -> None:
    of_run = _adapter(tmp_path / "runs" / "bot" / "output" / "adapter", r=12)
    folder = _adapter(tmp_path / "mine", r=8, rank_pattern={"q_proj": 100})
    model = _plan(ModelServing(model=str(smollm2), adapters={"bot": "bot", "mine": str(folder)}), tmp_path)
    assert {name: adapter.path for name, adapter in model.adapters.items()} == {"bot": str(of_run), "mine": str(folder)}
    assert model.lora_rank == 128


def test_an_adapter_that_may_belong_to_another_model_is_told(
    smollm2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _adapter(tmp_path / "mine", base_model_name_or_path="Org/Other")
    _plan(ModelServing(model=str(smollm2), adapters={"mine": str(folder)}), tmp_path)
    assert "adapter mine: made for Org/Other" in capsys.readouterr().err


def test_only_the_named_models_are_planned(smollm2: Path) -> None:
    conf = ServeConf(models={name: ModelServing(model=str(smollm2)) for name in ("a", "b")})
    assert [model.name for model in plan(conf, Terminal(), ["b"])] == ["b"]
    with pytest.raises(ServeError, match="--only c: the conf has no such model; it has a, b"):
        plan(conf, Terminal(), ["c"])


# Places ---------------------------------------------------------------------------------------------------------------


def _node(
    host: str = "one", cpus: float = 8, free: float | None = None, memory: float = 64, free_memory: float | None = None
) -> Node:
    return Node(
        host, cpus, memory * GIB, cpus if free is None else free, (memory if free_memory is None else free_memory) * GIB
    )


def _model(name: str = "m", cpus: int = 0, memory: float = 4, **more: object) -> ServedModel:
    return ServedModel(name, Path("/m"), cpus=cpus, threads=8, memory_bytes=int(memory * GIB), **more)


def test_one_model_takes_the_cores_that_help_it() -> None:
    assert [m.cpus for m in place([_model()], [_node(cpus=2)], {})] == [2]
    assert [m.cpus for m in place([_model()], [_node(cpus=96)], {})] == [8]


def test_several_share_the_free_cores_evenly_after_those_that_say_what_they_want() -> None:
    assert [m.cpus for m in place([_model("a"), _model("b")], [_node(cpus=2)], {})] == [1, 1]
    assert [m.cpus for m in place([_model("a"), _model("b", 6), _model("c")], [_node(cpus=8)], {})] == [1, 6, 1]
    assert [m.cpus for m in place([_model(replicas=2)], [_node("one", 4), _node("two", 4)], {})] == [4]


def test_replicas_that_may_come_with_the_load_find_cores() -> None:
    assert [m.cpus for m in place([_model(autoscale=Autoscale(min=1, max=2))], [_node(cpus=2)], {})] == [1]
    assert [m.cpus for m in place([_model(autoscale=Autoscale(min=0, max=3))], [_node(cpus=12)], {})] == [4]
    assert [m.cpus for m in place([_model(autoscale=Autoscale(min=0, max=99))], [_node(cpus=12)], {})] == [1]
    assert [m.cpus for m in place([_model("a", autoscale=Autoscale(max=3)), _model("b")], [_node(cpus=8)], {})] == [
        2,
        6,
    ]


def test_what_may_come_with_the_load_and_has_no_room_is_told() -> None:
    greedy, modest = (
        _model(cpus=2, autoscale=Autoscale(min=1, max=9)),
        _model("n", cpus=1, autoscale=Autoscale(min=0, max=2)),
    )
    nodes = [_node("one", 4), _node("two", 2)]
    (said,) = beyond_room([greedy, modest], nodes, {})
    assert said.startswith("m: autoscale.max is 9, but with what runs now the cluster has room for 2")
    # Placed in another order (those that say what they want first) than they are told.
    assert beyond_room([_model("small", cpus=1), _model("large", cpus=6)], [_node("one", 6), _node("two", 1)], {}) == []
    full = [_node("one", 4, free=0, free_memory=32)]
    assert beyond_room([modest], full, {"n": _model("n", cpus=2, replicas=2)}) == []


def test_where_no_core_is_free_they_are_shared() -> None:
    (model,) = place([_model()], [_node(cpus=2, free=0)], {})
    assert (model.cpus, model.threads) == (0, 2)
    assert "2 thread(s) on shared cores" in describe(model)


def test_what_a_model_holds_is_free_for_its_successor() -> None:
    old = _model(cpus=2, memory=40)
    assert [m.cpus for m in place([_model(memory=40)], [_node(cpus=2, free=0, free_memory=24)], {"m": old})] == [2]


def test_a_model_that_sleeps_holds_nothing() -> None:
    sleeper = _model(cpus=2, replicas=0)
    with pytest.raises(ServeError, match="no room for m"):
        place([_model(cpus=2)], [_node(cpus=2, free=0)], {"m": sleeper})


@pytest.mark.parametrize(
    ("model", "nodes", "figures"),
    [
        (
            _model(cpus=4),
            [_node(cpus=8, free=3)],
            r"it needs 4 CPU\(s\) and 4.0 GiB .* but one has 3 of 8 CPUs and 64.0 of 64.0 GiB free: give it fewer",
        ),
        (_model(memory=99), [_node()], r"needs 8 CPU\(s\) and 99.0 GiB .* smaller max_model_len or kv_cache_gib"),
        (
            _model(cpus=5, replicas=3),
            [_node("one"), _node("two")],
            r"each of its 3 replicas needs 5 CPU\(s\).*one has 3 of 8 CPUs.*two has 3 of 8",
        ),
        (_model(cpus=6, autoscale=Autoscale(min=2, max=2)), [_node()], r"each of its 2 replicas"),
    ],
    ids=["cpus", "memory", "replicas", "autoscale"],
)
def test_no_room_is_told_with_the_figures(model: ServedModel, nodes: list[Node], figures: str) -> None:
    with pytest.raises(ServeError, match=figures):
        place([model], nodes, {})


def test_memory_for_adapters_is_reserved_by_eights(smollm2: Path, tmp_path: Path) -> None:
    def memory(count: int, rank: int) -> int:
        adapters = {f"a{i}": str(_adapter(tmp_path / f"{count}-{rank}-{i}", r=rank)) for i in range(count)}
        return _plan(ModelServing(model=str(smollm2), engine="vllm", adapters=adapters), tmp_path).memory_bytes

    none, one, eight, nine = (memory(count, 16) for count in (0, 1, 8, 9))
    assert one == eight > none
    assert nine - none == 2 * (one - none) == memory(1, 32) - none
