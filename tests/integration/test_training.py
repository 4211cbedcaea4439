"""Training on real Ray: strategies agree, broken runs end as unbroken ones, failures are told."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from llm_ray.cluster import OBJECT_STORE_BYTES, Cluster, describe, fit_workers, local_ray
from llm_ray.conf.finetune import FinetuneConf
from llm_ray.data.prepare import prepare
from llm_ray.errors import ClusterError, Stopped, TrainError
from llm_ray.export.stage import export_here
from llm_ray.models.load import load_tokenizer
from llm_ray.progress import Silent
from llm_ray.runs.folder import stop_file
from llm_ray.runs.metrics import read_metrics
from llm_ray.train.checkpoint import list_checkpoints
from llm_ray.train.estimate import RAY_BYTES
from llm_ray.train.launch import run_training
from llm_ray.train.task import Outcome
from llm_ray.train.trained import final_checkpoint
from llm_ray.train.trial import measure
from tests.integration.tiny import llama
from tests.runs import base_of

STEPS = 6
ROWS = [
    {"prompt": f"What is code {n}?", "completion": f"Code {n} means the {word} is worn."}
    for n, word in enumerate(["belt", "seal", "valve", "fan"] * 6)
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with local_ray(2) as joined:
        yield joined


@pytest.fixture(scope="module")
def base(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights as small as those of one that is to learn."""
    return llama(tmp_path_factory.mktemp("base"), smollm2, initializer_range=0.02, num_key_value_heads=1)


@pytest.fixture(scope="module")
def make(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., FinetuneConf]:
    """A prepared run. Keyword arguments are sections of the conf, merged into the defaults."""
    folder = tmp_path_factory.mktemp("training")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def conf(name: str, **sections: dict[str, Any]) -> FinetuneConf:
        defaults: dict[str, Any] = {
            "model": {"base": str(base), "dtype": "fp32"},
            "paths": {"runs": str(folder / "runs")},
            "data": {"train": str(folder / "rows.jsonl"), "validation": 0.2, "max_length": 96},
            "runtime": {"workers": 2, "cpus_per_worker": 1, "max_failures": 0},
            "tuning": {"lora": {"r": 4, "dropout": 0.1}},
            "training": {
                "max_steps": STEPS,
                "global_batch_size": 6,
                "learning_rate": 3e-2,
                "precision": "fp32",
                "validate_every": 3,
            },
            "checkpoint": {"every_steps": 2, "keep": 2},
        }
        merged = {key: {**defaults.get(key, {}), **sections.get(key, {})} for key in {*defaults, *sections}}
        made = FinetuneConf.model_validate({"name": name, **merged})
        prepare(made, load_tokenizer(base_of(made)), made.run_dir / "prepared", lambda line: None)
        return made

    return conf


def run(conf: FinetuneConf, cluster: Cluster) -> Outcome:
    return run_training(conf, base_of(conf), fit_workers(conf.runtime, cluster), None, Silent())


def losses(conf: FinetuneConf) -> list[float]:
    rows = [row for row in read_metrics(conf.run_dir / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)), "each step once, in order"
    return [row["loss"] for row in rows]


@pytest.fixture(scope="module")
def unbroken(make: Callable[..., FinetuneConf], cluster: Cluster) -> FinetuneConf:
    conf = make("unbroken")
    outcome = run(conf, cluster)
    assert outcome["status"] == "done"
    return conf


def test_a_run_learns_and_writes_its_figures_and_checkpoints(unbroken: FinetuneConf) -> None:
    rows = read_metrics(unbroken.run_dir / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    assert len(steps) == STEPS
    assert {"step", "loss", "learning_rate", "tokens", "tokens_per_second", "seconds"} <= steps[0].keys()
    assert steps[-1]["loss"] < steps[0]["loss"]
    validations = [row["validation_loss"] for row in rows if "validation_loss" in row]
    assert len(validations) == 3  # before, at step 3, at the end
    assert validations[-1] < validations[0]
    assert [p.name for p in list_checkpoints(unbroken.run_dir / "checkpoint")] == ["step_00000004", "step_00000006"]
    assert (unbroken.run_dir / "checkpoint" / "best" / ".metadata").is_file()
    assert list((unbroken.run_dir / "tensorboard").glob("events.out.tfevents.*"))
    total = sum(row["tokens"] for row in steps)
    stats = json.loads((unbroken.run_dir / "prepared" / "stats.json").read_text())
    assert total == pytest.approx(stats["train"]["tokens"] * steps[-1]["epoch"], rel=0.25), (
        "real tokens, over all workers"
    )


@pytest.mark.long
def test_the_same_seed_gives_the_same_losses(
    make: Callable[..., FinetuneConf], cluster: Cluster, unbroken: FinetuneConf
) -> None:
    again = make("again")
    run(again, cluster)
    assert losses(again) == pytest.approx(losses(unbroken), rel=1e-6)


def test_a_killed_worker_is_replaced_and_the_run_ends_the_same(
    make: Callable[..., FinetuneConf], cluster: Cluster, unbroken: FinetuneConf
) -> None:
    conf = make("killed", runtime={"max_failures": 2})
    killed: list[int] = []

    def kill_after_a_checkpoint() -> None:
        while not list_checkpoints(conf.run_dir / "checkpoint"):
            time.sleep(0.05)
        workers = [p for p in psutil.process_iter(["cmdline"]) if "RayTrainWorker" in " ".join(p.info["cmdline"] or ())]
        killed.append(workers[0].pid)
        os.kill(workers[0].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_after_a_checkpoint, daemon=True)
    killer.start()
    assert run(conf, cluster)["status"] == "done"
    assert killed
    assert losses(conf) == pytest.approx(losses(unbroken), rel=1e-4)


@contextlib.contextmanager
def second_node() -> Iterator[Any]:
    """Another node of the cluster, with a CPU of its own, on this machine; its `kill_all_processes` is as if its host's
    power were cut."""
    import ray
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    head = ray._private.worker._global_node
    place = {
        "node_ip_address": "127.0.0.1",
        "temp_dir": head.get_temp_dir_path(),
        "min_worker_port": 0,
        "max_worker_port": 0,
    }
    parameters = RayParams(
        gcs_address=head.gcs_address,
        num_cpus=1,
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        **place,
    )
    node = Node(parameters, head=False, shutdown_at_exit=False, spawn_reaper=False)
    try:
        while len(describe().node_cpus) < 2:
            time.sleep(0.1)
        yield node
    finally:
        node.kill_all_processes(check_alive=False, allow_graceful=False)


@pytest.mark.long
def test_with_a_host_lost_fewer_workers_finish_the_run_with_the_same_losses(
    make: Callable[..., FinetuneConf], cluster: Cluster
) -> None:
    exact = {"tuning": {"lora": {"r": 4, "dropout": 0.0}}}
    whole = make("whole", **exact)
    run(whole, cluster)
    conf = make("elastic", **exact, runtime={"placement": "strict_spread", "min_workers": 1, "max_failures": 1})
    with second_node() as node:

        def cut_after_a_checkpoint() -> None:
            while not list_checkpoints(conf.run_dir / "checkpoint"):
                time.sleep(0.05)
            node.kill_all_processes(check_alive=False, allow_graceful=False)

        threading.Thread(target=cut_after_a_checkpoint, daemon=True).start()
        assert run(conf, describe())["status"] == "done"
    assert losses(conf) == pytest.approx(losses(whole), rel=1e-4)
    assert read_metrics(conf.run_dir / "metrics.jsonl", last=1)[0]["step"] == STEPS


def stopped_at_step_three(conf: FinetuneConf, cluster: Cluster) -> None:
    """Run `conf` until somebody asks it to stop at its third step."""

    def stop_at_step_three() -> None:
        while not (rows := read_metrics(conf.run_dir / "metrics.jsonl", last=1)) or rows[-1]["step"] < 3:
            time.sleep(0.02)
        stop_file(conf.run_dir).touch()

    threading.Thread(target=stop_at_step_three, daemon=True).start()
    with pytest.raises(Stopped, match="with a checkpoint"):
        run(conf, cluster)


@pytest.mark.long
def test_a_stopped_run_goes_on_with_the_losses_of_an_unbroken_one(
    make: Callable[..., FinetuneConf], cluster: Cluster, unbroken: FinetuneConf
) -> None:
    conf = make("stopped")

    stopped_at_step_three(conf, cluster)
    reached = len(losses(conf))
    assert 3 <= reached < STEPS
    assert run(conf, cluster)["status"] == "done"
    assert losses(conf) == pytest.approx(losses(unbroken), rel=1e-4)


def test_one_worker_has_the_losses_of_two(make: Callable[..., FinetuneConf], cluster: Cluster) -> None:
    two = make("two", tuning={"lora": {"r": 4}})
    one = make("one", tuning={"lora": {"r": 4}}, runtime={"workers": 1}, training={"micro_batch_tokens": 100})
    for conf in (two, one):
        run(conf, cluster)
    assert losses(one) == pytest.approx(losses(two), rel=1e-3)


@pytest.mark.long  # three runs; layers in few bits have tests of their own
def test_a_base_in_few_bits_learns_goes_on_and_is_exported_as_it_was_trained(
    make: Callable[..., FinetuneConf], cluster: Cluster, base: Path
) -> None:
    few = {"model": {"base": str(base), "weights": "int4"}, "training": {"gradient_checkpointing": True}}
    unbroken, stopped = make("bits", **few), make("bits-stopped", **few)
    assert run(unbroken, cluster)["status"] == "done"
    assert losses(unbroken)[-1] < losses(unbroken)[0]
    stopped_at_step_three(stopped, cluster)
    assert 3 <= len(losses(stopped)) < STEPS
    assert run(stopped, cluster)["status"] == "done"
    assert losses(stopped) == pytest.approx(losses(unbroken), rel=1e-4)
    checkpoint = str(final_checkpoint(unbroken))
    checked = export_here(unbroken.model_dump(mode="json"), base_of(unbroken), checkpoint, "# card")
    exported, trained = map(float, re.findall(r"\d+\.\d+", checked))
    assert exported == pytest.approx(trained, rel=1e-3)


PREFERENCE_FIGURES = ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected")


@pytest.fixture(scope="module")
def make_pairs(make: Callable[..., FinetuneConf], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """A prepared run on preference pairs."""
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    pairs = [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": f"{'No ' * (n % 3)}idea, ask somebody."}
        for n, row in enumerate(ROWS)
    ]
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))

    def made(name: str, **sections: dict[str, Any]) -> FinetuneConf:
        tuning = {"objective": "dpo", "lora": {"r": 4}} | sections.pop("tuning", {})
        return make(name, data={"train": str(file), "validation": 0.2, "max_length": 96}, tuning=tuning, **sections)

    return made


def preferences(conf: FinetuneConf, names: tuple[str, ...] = PREFERENCE_FIGURES) -> dict[str, list[float]]:
    """The figures of each step."""
    losses(conf)
    rows = [row for row in read_metrics(conf.run_dir / "metrics.jsonl") if "loss" in row]
    return {name: [row[name] for row in rows] for name in names}


@pytest.fixture(scope="module")
def preferring(make_pairs: Callable[..., FinetuneConf], cluster: Cluster) -> FinetuneConf:
    conf = make_pairs("preferring")
    assert run(conf, cluster)["status"] == "done"
    return conf


def test_preferences_are_learned_from_a_reference_that_is_kept(preferring: FinetuneConf) -> None:
    rows = read_metrics(preferring.run_dir / "metrics.jsonl")
    assert rows[0]["validation_loss"] == pytest.approx(math.log(2), abs=1e-3), "the base model against itself"
    assert "validation_perplexity" not in rows[0]
    assert abs(rows[0]["validation_rewards/margins"]) < 1e-2
    assert rows[-1]["validation_loss"] < 0.9 * rows[0]["validation_loss"]
    assert rows[-1]["validation_rewards/accuracies"] == 1
    assert rows[-1]["rewards/chosen"] > rows[-1]["rewards/rejected"]
    kept = sorted(file.name for file in preferring.run_dir.glob("prepared/reference/*/*/*"))
    assert kept == ["000000000.npy"] * 2, "of training and validation pairs"


@pytest.mark.long  # two runs more; that a run goes on with the same figures is tested above
def test_a_stopped_run_of_preferences_goes_on_and_computes_no_reference_again(
    make_pairs: Callable[..., FinetuneConf], cluster: Cluster, preferring: FinetuneConf
) -> None:
    conf = make_pairs("preferring-stopped")

    stopped_at_step_three(conf, cluster)
    assert 3 <= len(losses(conf)) < STEPS
    written = {file: file.stat().st_mtime_ns for file in conf.run_dir.glob("prepared/reference/*/*/*")}
    assert run(conf, cluster)["status"] == "done"
    assert written == {file: file.stat().st_mtime_ns for file in conf.run_dir.glob("prepared/reference/*/*/*")}
    unbroken = preferences(preferring)
    for name, figures in preferences(conf).items():
        assert figures == pytest.approx(unbroken[name], rel=1e-3, abs=1e-4), name


def test_one_worker_has_the_preferences_of_two(
    make_pairs: Callable[..., FinetuneConf], cluster: Cluster, preferring: FinetuneConf
) -> None:
    one = make_pairs("preferring-alone", runtime={"workers": 1}, training={"micro_batch_tokens": 200})
    run(one, cluster)
    two = preferences(preferring)
    for name, figures in preferences(one).items():
        assert figures == pytest.approx(two[name], rel=2e-3, abs=1e-3), name


def test_odds_ratios_need_no_reference_and_are_those_of_one_worker(
    make_pairs: Callable[..., FinetuneConf], cluster: Cluster
) -> None:
    odds: dict[str, Any] = {"tuning": {"objective": "orpo", "lora": {"r": 8, "target_modules": ["o_proj", "lm_head"]}}}
    two = make_pairs("odds", **odds)
    one = make_pairs("odds-alone", runtime={"workers": 1}, training={"micro_batch_tokens": 200}, **odds)
    for conf in (two, one):
        assert run(conf, cluster)["status"] == "done"
    rows = read_metrics(two.run_dir / "metrics.jsonl")
    assert rows[-1]["validation_loss"] < 0.9 * rows[0]["validation_loss"]
    assert rows[-1]["validation_log_odds_ratio"] > rows[0]["validation_log_odds_ratio"]
    assert rows[-1]["nll_loss"] < rows[1]["nll_loss"]
    assert not (two.run_dir / "prepared" / "reference").exists()
    of_two = preferences(two)
    for name, figures in preferences(one).items():
        assert figures == pytest.approx(of_two[name], rel=2e-3, abs=1e-3), name


@pytest.mark.long  # three runs; the losses have tests of their own
def test_ratings_are_learned_and_a_stopped_worker_alone_has_the_divergence_of_two(
    make_pairs: Callable[..., FinetuneConf], cluster: Cluster
) -> None:
    """The ratings are of pairs, each a good and a bad answer; the steps of two epochs have other passes alone."""
    training = {"global_batch_size": 12, "learning_rate": 1e-2}
    two = make_pairs("rated", tuning={"objective": "kto"}, training=training)
    one = make_pairs(
        "rated-alone",
        tuning={"objective": "kto"},
        runtime={"workers": 1},
        training=training | {"micro_batch_tokens": 200},
    )
    assert run(two, cluster)["status"] == "done"
    stopped_at_step_three(one, cluster)
    written = {file: file.stat().st_mtime_ns for file in one.run_dir.glob("prepared/reference/*/*/*")}
    assert len(written) == 2, "of training and validation rows"
    assert run(one, cluster)["status"] == "done"
    assert written == {file: file.stat().st_mtime_ns for file in one.run_dir.glob("prepared/reference/*/*/*")}
    of_two, of_one = (read_metrics(conf.run_dir / "metrics.jsonl") for conf in (two, one))
    assert of_two[0]["validation_loss"] == pytest.approx(0.5, abs=1e-3), "the base model against itself"
    assert of_two[-1]["validation_loss"] < 0.95 * of_two[0]["validation_loss"]
    assert of_two[-1]["validation_rewards/margins"] > 0
    assert max(row["kl"] for row in of_two if "loss" in row) > 0
    for name in ("loss", "kl", "rewards/chosen", "rewards/rejected", "validation_loss", "validation_kl"):
        figures = [[(row["step"], row[name]) for row in rows if name in row] for rows in (of_one, of_two)]
        assert figures[0] == [(n, pytest.approx(value, rel=2e-3, abs=1e-3)) for n, value in figures[1]], name


@pytest.mark.long
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize(
    ("objective", "names"), [("dpo", PREFERENCE_FIGURES), ("kto", ("loss", "kl", "rewards/accuracies"))]
)
def test_fsdp_has_the_preferences_of_ddp(
    make_pairs: Callable[..., FinetuneConf], cluster: Cluster, objective: str, names: tuple[str, ...], method: str
) -> None:
    confs = [
        make_pairs(
            f"{objective}-{method}-{strategy}",
            tuning={"objective": objective, "method": method},
            training={"strategy": strategy, "max_steps": 3, "learning_rate": 1e-4},
            checkpoint={"every_steps": 100},
        )
        for strategy in ("ddp", "fsdp")
    ]
    for conf in confs:
        run(conf, cluster)
    ddp, fsdp = (preferences(conf, names) for conf in confs)
    for name, figures in fsdp.items():
        assert figures == pytest.approx(ddp[name], rel=2e-3, abs=1e-3), name


@pytest.mark.long
@pytest.mark.parametrize("method", ["lora", "full"])
def test_fsdp_has_the_losses_of_ddp_and_memory_as_told(
    make: Callable[..., FinetuneConf], cluster: Cluster, smollm2: Path, method: str
) -> None:
    confs = [
        make(
            f"{method}-{strategy}",
            model={"base": str(smollm2)},  # of a tiny one, the libraries take nearly all of the memory
            tuning={"method": method, "lora": {"r": 4}},
            data={"validation": None},
            training={"strategy": strategy, "max_steps": 3, "learning_rate": 1e-4},
            checkpoint={"every_steps": 100},
        )
        for strategy in ("ddp", "fsdp")
    ]
    told = [measure(conf, base_of(conf), conf.run_dir / "prepared", cpus=1).memory + RAY_BYTES for conf in confs]
    for conf in confs:
        run(conf, cluster)
    ddp, fsdp = confs
    for conf, memory in zip(confs, told, strict=True):
        used = max(row["memory_per_worker"] for row in read_metrics(conf.run_dir / "metrics.jsonl") if "loss" in row)
        assert memory == pytest.approx(used, rel=0.15), "a dry run's trial"
    assert losses(fsdp) == pytest.approx(losses(ddp), rel=1e-3)
    if method == "full":  # weights, gradients and optimizer state are what takes the memory
        memory = [read_metrics(conf.run_dir / "metrics.jsonl")[-1]["memory_per_worker"] for conf in confs]
        assert memory[1] < 0.85 * memory[0]


@pytest.mark.long
def test_variants_of_lora_go_on_and_are_the_same_with_fsdp(make: Callable[..., FinetuneConf], cluster: Cluster) -> None:
    """DoRA, LoRA+, rsLoRA and ranks by layer, all at once."""
    variants = {"dora": True, "rslora": True, "loraplus_lr_ratio": 4, "rank_pattern": {"q_proj": 8}, "dropout": 0}
    whole, sharded = (
        make(
            f"variants-{strategy}",
            tuning={"lora": {"r": 4, **variants}},
            training={"strategy": strategy, "learning_rate": 3e-3},  # the B matrices learn at four times that
        )
        for strategy in ("ddp", "fsdp")
    )
    assert run(whole, cluster)["status"] == "done"
    stopped_at_step_three(sharded, cluster)
    assert run(sharded, cluster)["status"] == "done"
    assert losses(sharded) == pytest.approx(losses(whole), rel=1e-3)
    assert losses(whole)[-1] < losses(whole)[0]


@pytest.mark.long
def test_training_ends_early_when_validation_no_longer_improves(
    make: Callable[..., FinetuneConf], cluster: Cluster
) -> None:
    conf = make(
        "early",
        training={"learning_rate": 1e-12, "validate_every": 1, "early_stopping": {"patience": 2, "min_delta": 0.01}},
    )
    outcome = run(conf, cluster)
    assert outcome["status"] == "done"
    assert "stopped early" in outcome["reason"]
    assert len(losses(conf)) == 3  # the first counts as an improvement on nothing


@pytest.mark.long
def test_a_run_whose_loss_is_no_number_ends_with_the_reason_and_its_checkpoint(
    make: Callable[..., FinetuneConf], cluster: Cluster
) -> None:
    conf = make(
        "nan", training={"learning_rate": 1e30, "max_grad_norm": None, "warmup": 0}, runtime={"max_failures": 3}
    )
    with pytest.raises(TrainError, match=r"loss at step \d+ is (nan|inf).*Lower training.learning_rate"):
        run(conf, cluster)


def test_workers_that_do_not_fit_are_refused_with_the_figures(
    make: Callable[..., FinetuneConf], cluster: Cluster
) -> None:
    conf = make("large", runtime={"workers": 3})
    with pytest.raises(ClusterError, match=r"runtime.workers is 3 with 1 CPU\(s\) each.*room for 2"):
        run(conf, cluster)


def test_half_a_model_folder_is_told_at_once(
    make: Callable[..., FinetuneConf], cluster: Cluster, tmp_path: Path, smollm2: Path
) -> None:
    half = tmp_path / "half"
    half.mkdir()
    for file in smollm2.iterdir():
        (half / file.name).write_bytes(
            file.read_bytes()[:1_000_000] if file.suffix == ".safetensors" else file.read_bytes()
        )
    conf = make("half", model={"base": str(half)}, runtime={"max_failures": 3})
    with pytest.raises(TrainError, match=r"damaged or truncated.*worker 0 on"):
        run(conf, cluster)
