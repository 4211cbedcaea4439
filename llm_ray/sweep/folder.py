"""A sweep's folder: its confs, the data shared by all trials, and a run folder for each trial.

    runs/NAME/                 the best trial's run, once chosen
    runs/NAME/sweep/           conf.yaml, finetune.yaml, sweep.json, and the files written by `report`
    runs/NAME/sweep/data/      a run with only the stage prepare
    runs/NAME/sweep/trials/    trial-001/ and so on: runs with the stage train, each with its trial.json

Files are written atomically. The searching process creates a trial's trial.json; from then on, only the trial's own
process writes it.
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
"""`begun`: running or interrupted; `stopped`: stopped early in favour of better trials."""
ENDED: tuple[State, ...] = ("done", "stopped", "failed")
MAY_CHANGE = ("trials", "hours", "concurrent", "cpus", "sampler", "asha", "seed")
"""Keys of a sweep's conf that may change between starts: they affect which trials run, not the results of a trial."""
COLUMNS = {"loss": "validation_loss", "accuracy": "validation_rewards/accuracies"}
"""The column of metrics.jsonl for each metric."""
_TRIAL = "trial.json"


@dataclass(frozen=True)
class Trial:
    """One trial: the values of the searched keys, and its result so far."""

    number: int
    values: dict[str, Any]
    state: State = "begun"
    metric: float | None = None
    """On the validation rows, for the weights that would be exported."""
    share: float = 0.0
    """Completed share of its training."""
    seconds: float = 0.0
    reason: str = ""
    history: list[tuple[float, float]] = field(default_factory=list)
    """Share and metric at each validation."""

    @property
    def name(self) -> str:
        return f"trial-{self.number:03d}"


class SweepFolder:
    """The folder of a sweep, given its conf and its finetune's."""

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
        """The conf of the run that prepares the data for all trials."""
        return self._conf({}, name="data", stages=("prepare",), runs=self.path)

    def trial_conf(self, trial: Trial, cpus: int, validate_every: int | None) -> FinetuneConf:
        """Returns the conf of a trial's run, with `cpus` per worker. Raises ValidationError if its values cannot be
        combined."""
        conf = self._conf(trial.values, name=trial.name, stages=("prepare", "train"), runs=self.trials_folder)
        return conf.model_copy(
            update={
                "runtime": conf.runtime.model_copy(update={"cpus_per_worker": cpus}),
                "training": conf.training.model_copy(update={"validate_every": validate_every}),
            }
        )

    def best_conf(self, trial: Trial) -> FinetuneConf:
        """Returns the conf that repeats the trial's training and exports the model: the sweep's finetune with the
        trial's values."""
        wanted = {*self.base.stages, "prepare", "train", "evaluate", "export"}
        stages = tuple(stage for stage in STAGES if stage in wanted)
        conf = self._conf(trial.values, name=self.conf.name, stages=stages, runs=self.base.paths.runs)
        trained = FinetuneConf.model_validate(_read_yaml(self.trials_folder / trial.name / "conf.yaml"))
        every = trained.training.validate_every
        return conf.model_copy(update={"training": conf.training.model_copy(update={"validate_every": every})})

    def _conf(self, values: Mapping[str, Any], *, name: str, stages: tuple[str, ...], runs: Path) -> FinetuneConf:
        fixed = {"name": name, "stages": stages, "paths.runs": str(runs)}
        return FinetuneConf.model_validate(with_values({**values, **fixed}, self.base.model_dump(mode="json")))

    # Begin and continue
    # -------------------------------------------------------------------------------------------------

    def refuse_run(self) -> None:
        """Raises RunError if there is a run of the sweep's name that was not created by a sweep."""
        if (self.run / RUN).exists() and not self.path.exists():
            raise RunError(
                f"{self.run} is a run, not made by a sweep: use another name for the sweep (--set name=…), or delete the run "
                f"(llm-ray runs delete {self.conf.name})"
            )

    def begin(self) -> None:
        """Creates the folder, or continues the sweep in it. Raises RunError if that one's results are not
        comparable."""
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
        """Returns the contents of sweep.json; empty if it does not exist."""
        try:
            found: dict[str, Any] = json.loads((self.path / "sweep.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise RunError(f"{self.path / 'sweep.json'} cannot be read: {error}. --force starts over") from error
        return found

    def note(self, **values: Any) -> None:
        """Updates values in sweep.json."""
        write_json(self.path / "sweep.json", self.notes() | values)

    # Trials -----------------------------------------------------------------------------------------------------------

    def trials(self) -> list[Trial]:
        """Returns all trials by number. Raises RunError if one cannot be read."""
        return [_read_trial(file) for file in sorted(self.trials_folder.glob(f"trial-*/{_TRIAL}"))]

    def propose(self, values: dict[str, Any]) -> Trial:
        """Adds a new trial."""
        trial = Trial(max((trial.number for trial in self.trials()), default=0) + 1, values)
        self.write(trial)
        return trial

    def write(self, trial: Trial) -> None:
        write_json(self.trials_folder / trial.name / _TRIAL, asdict(trial))

    def metrics(self, trial: Trial) -> list[dict[str, Any]]:
        """Returns the rows of the trial's metrics.jsonl."""
        return read_metrics(self.trials_folder / trial.name / METRICS)


def best_of(trials: Sequence[Trial], goal: Literal["min", "max"]) -> Trial | None:
    """Returns the trial with the best metric among those that completed, else among those stopped early, else among
    interrupted ones; None if no trial has a metric."""
    for state in ("done", "stopped", "begun"):
        found = [(trial.metric, trial) for trial in trials if trial.state == state and trial.metric is not None]
        if found:
            return (min if goal == "min" else max)(found, key=lambda entry: entry[0])[1]
    return None


def history(rows: Sequence[Mapping[str, Any]], metric: str, best_checkpoint: bool) -> list[tuple[float, float]]:
    """Returns for each validation the completed share of a training's steps, and the metric of the weights that would
    be exported at that point (those with the lowest validation loss with `best_checkpoint`, else the current ones)."""
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
            f"{file} cannot be read ({type(error).__name__}: {error}): delete its folder to discard the trial"
        ) from error


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = yamltext.parse(file.read_text(encoding="utf-8")).data
    except (OSError, ValueError, yamltext.Problem) as error:
        raise RunError(f"{file} cannot be read ({error}): --force starts over") from error
    return found
