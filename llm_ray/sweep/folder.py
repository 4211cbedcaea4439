"""A sweep's folder: its confs, the data that all trials share, and a run's folder for each trial.

    runs/NAME/                 the best trial's run, once it has been chosen
    runs/NAME/sweep/           conf.yaml, finetune.yaml, sweep.json, and what `report` writes
    runs/NAME/sweep/data/      a run of stage prepare alone
    runs/NAME/sweep/trials/    trial-001/ and so on: runs of stage train, each with its trial.json

Each file is whole or not there. A trial.json is written by the searching process when the trial is proposed, and
afterwards by the trial's own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from llm_ray.conf import yamltext
from llm_ray.conf.finetune import STAGES, FinetuneConf
from llm_ray.conf.load import dump
from llm_ray.conf.sweep import SweepConf, with_values
from llm_ray.errors import RunError
from llm_ray.files import write_json, write_text
from llm_ray.runs.folder import RESULT_KEYS, RUN, differences
from llm_ray.runs.metrics import METRICS, read_metrics

State = Literal["begun", "done", "stopped", "failed"]
"""`begun`: proposed, and under way or broken off; `stopped`: ended early, because others were better."""
ENDED: tuple[State, ...] = ("done", "stopped", "failed")
MAY_CHANGE = ("trials", "hours", "concurrent", "cpus", "sampler", "asha", "seed")
"""Keys of a sweep's conf that another start of it may change: they change which trials are made, not what one gives."""
COLUMNS = {"loss": "validation_loss", "accuracy": "validation_rewards/accuracies"}
"""The column of metrics.jsonl that a metric is."""
_TRIAL = "trial.json"


@dataclass(frozen=True)
class Trial:
    """One trial: the values of the searched keys, and what came of it so far."""

    number: int
    values: dict[str, Any]
    state: State = "begun"
    metric: float | None = None
    """On the validation rows, of the weights that would be exported."""
    share: float = 0.0
    """Of its training that is done."""
    seconds: float = 0.0
    reason: str = ""
    history: list[tuple[float, float]] = field(default_factory=list)
    """Share and metric at each validation."""

    @property
    def name(self) -> str:
        return f"trial-{self.number:03d}"


class SweepFolder:
    """The folder of the sweep of a conf and its finetune."""

    def __init__(self, conf: SweepConf, base: FinetuneConf) -> None:
        self.run = base.paths.runs / conf.name
        self.path = self.run / "sweep"
        self.trials_folder = self.path / "trials"
        self.stop_file = self.path / ".stop"
        self.conf = conf
        self.base = base.model_copy(
            update={"data": base.data.model_copy(update={"test": base.data.test or conf.test})}, deep=True
        )

    # Confs ------------------------------------------------------------------------------------------------------------

    @property
    def data_conf(self) -> FinetuneConf:
        """The run of stage prepare whose data all trials share."""
        return self._conf({}, name="data", stages=("prepare",), runs=self.path)

    def trial_conf(self, trial: Trial, cpus: int, validate_every: int | None) -> FinetuneConf:
        """The run of a trial whose workers have `cpus` each. Raises ValidationError where its values do not go
        together."""
        conf = self._conf(trial.values, name=trial.name, stages=("prepare", "train"), runs=self.trials_folder)
        return conf.model_copy(
            update={
                "runtime": conf.runtime.model_copy(update={"cpus_per_worker": cpus}),
                "training": conf.training.model_copy(update={"validate_every": validate_every}),
            }
        )

    def best_conf(self, trial: Trial) -> FinetuneConf:
        """The finetune that makes what the trial made, and exports it: as the sweep's, with the trial's values."""
        wanted = {*self.base.stages, "prepare", "train", "evaluate", "export"}
        stages = tuple(stage for stage in STAGES if stage in wanted)
        conf = self._conf(trial.values, name=self.conf.name, stages=stages, runs=self.base.paths.runs)
        trained = FinetuneConf.model_validate(_read_yaml(self.trials_folder / trial.name / "conf.yaml"))
        every = trained.training.validate_every
        return conf.model_copy(update={"training": conf.training.model_copy(update={"validate_every": every})})

    def _conf(self, values: Mapping[str, Any], *, name: str, stages: tuple[str, ...], runs: Path) -> FinetuneConf:
        fixed = {"name": name, "stages": stages, "paths.runs": str(runs)}
        return FinetuneConf.model_validate(with_values({**values, **fixed}, self.base.model_dump(mode="json")))

    # Begin and go on --------------------------------------------------------------------------------------------------

    def refuse_run(self) -> None:
        """Raise RunError when there is a run of the sweep's name that no sweep has made."""
        if (self.run / RUN).exists() and not self.path.exists():
            raise RunError(
                f"{self.run} is a run, not made by a sweep: use another name for the sweep (--set name=…), or delete the run "
                f"(llm-ray runs delete {self.conf.name})"
            )

    def begin(self) -> None:
        """Go on with the sweep that is in the folder, if there is one. Raises RunError when it has other results."""
        self._refuse_other()
        self.trials_folder.mkdir(parents=True, exist_ok=True)
        write_text(self.path / "conf.yaml", dump(self.conf))
        write_text(self.path / "finetune.yaml", dump(self.base))
        self.stop_file.unlink(missing_ok=True)

    def _refuse_other(self) -> None:
        if not (self.path / "finetune.yaml").exists():
            return
        old, new = _read_yaml(self.path / "conf.yaml"), yamltext.parse(dump(self.conf)).data
        kept = [key for key in new if key not in (*MAY_CHANGE, "config", "set")]
        changed = differences({key: old.get(key) for key in kept}, {key: new[key] for key in kept})
        old_base = _read_yaml(self.path / "finetune.yaml")
        new_base = self.base.model_dump(mode="json")
        changed |= differences(*({k: conf.get(k) for k in RESULT_KEYS} for conf in (old_base, new_base)))
        if changed:
            lines = [f"{key}: {json.dumps(was)} -> {json.dumps(now)}" for key, (was, now) in changed.items()]
            raise RunError(
                "\n  ".join([f"the sweep {self.conf.name} exists ({self.path}) with a different conf:", *lines])
                + "\nIts trials cannot be compared with new ones. Use another name (--set name=…), or --force to start over. "
                f"({', '.join(MAY_CHANGE)} may change.)"
            )

    def notes(self) -> dict[str, Any]:
        """What sweep.json holds; empty without."""
        try:
            found: dict[str, Any] = json.loads((self.path / "sweep.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise RunError(f"{self.path / 'sweep.json'} cannot be read: {error}. --force starts over") from error
        return found

    def note(self, **values: Any) -> None:
        """Set values of sweep.json."""
        write_json(self.path / "sweep.json", self.notes() | values)

    # Trials -----------------------------------------------------------------------------------------------------------

    def trials(self) -> list[Trial]:
        """All trials, by number. Raises RunError where one cannot be read."""
        return [_read_trial(file) for file in sorted(self.trials_folder.glob(f"trial-*/{_TRIAL}"))]

    def propose(self, values: dict[str, Any]) -> Trial:
        """A new trial."""
        trial = Trial(max((trial.number for trial in self.trials()), default=0) + 1, values)
        self.write(trial)
        return trial

    def write(self, trial: Trial) -> None:
        write_json(self.trials_folder / trial.name / _TRIAL, asdict(trial))

    def metrics(self, trial: Trial) -> list[dict[str, Any]]:
        """The rows of the trial's metrics.jsonl."""
        return read_metrics(self.trials_folder / trial.name / METRICS)


def best_of(trials: Sequence[Trial], goal: Literal["min", "max"]) -> Trial | None:
    """The trial with the best metric: of those trained to their end, else of those stopped early, else of those broken
    off. None where no trial has one."""
    for state in ("done", "stopped", "begun"):
        found = [(trial.metric, trial) for trial in trials if trial.state == state and trial.metric is not None]
        if found:
            return (min if goal == "min" else max)(found, key=lambda entry: entry[0])[1]
    return None


def history(rows: Sequence[Mapping[str, Any]], metric: str, best_checkpoint: bool) -> list[tuple[float, float]]:
    """Of a training's metrics, at each validation: the share of its steps that is done, and the metric of the weights
    that would be exported if it ended there (of the lowest validation loss with `best_checkpoint`, else the last)."""
    found: list[tuple[float, float]] = []
    lowest = float("inf")
    for row in rows:
        loss, value = row.get("validation_loss"), row.get(COLUMNS[metric])
        if not row["step"] or loss is None or value is None:
            continue
        better = loss < lowest
        lowest = min(loss, lowest)
        kept = value if better or not best_checkpoint else found[-1][1]
        found.append((row["step"] / row["total_steps"], kept))
    return found


def _read_trial(file: Path) -> Trial:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return Trial(**found | {"history": [(share, value) for share, value in found["history"]]})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RunError(
            f"{file} cannot be read ({type(error).__name__}: {error}): delete its folder, and the trial is forgotten"
        ) from error


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = yamltext.parse(file.read_text(encoding="utf-8")).data
    except (OSError, ValueError, yamltext.Problem) as error:
        raise RunError(f"{file} cannot be read ({error}): --force starts over") from error
    return found
