"""The desired state of a cluster's serving, as confs: the endpoint is restored from it after a restart of Ray's head.

llm-ray serve restore     # on the head after each start, run by the unit llm-ray-serve

Ray's head loses its deployments when it stops. `serve deploy` on a cluster therefore saves the conf of each deployed
model in `LLM_RAY_HOME/serve/desired.json`, on the shared storage, and `serve stop` removes it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llm_ray.conf.serve import ServeConf
from llm_ray.errors import ServeError
from llm_ray.files import locked, write_text

_EARLIER = "declared.json"
"""The file's name in earlier versions."""


def desired_file(home: Path) -> Path:
    """Returns the path of the desired state."""
    return home / "serve" / "desired.json"


def remember(file: Path, conf: ServeConf, names: Sequence[str]) -> None:
    """Saves these models of the conf in `file`, replacing others of the same names. Raises ServeError."""
    document = conf.model_dump(mode="json")
    with _changing(file) as kept:
        kept["endpoint"] = document["endpoint"]
        kept.setdefault("models", {}).update(
            {name: {"paths": document["paths"], "model": document["models"][name]} for name in names}
        )


def forget(file: Path, names: Sequence[str] | None = None) -> None:
    """Removes these models and adapters; all of them if `names` is None. Raises ServeError."""
    if not _kept_in(file).exists():
        return
    with _changing(file) as kept:
        kept["models"] = {
            name: entry for name, entry in kept.get("models", {}).items() if names is not None and name not in names
        }
        for entry in kept["models"].values():
            for name in names or ():
                entry["model"].get("adapters", {}).pop(name, None)


def desired_confs(file: Path) -> list[ServeConf]:
    """Returns a conf for each desired model, with the endpoint they share. Raises ServeError for one that this version
    cannot read."""
    kept = _read(file)
    found = []
    for name, entry in kept.get("models", {}).items():
        runtime = {"mode": "cluster", "address": "auto"}
        try:
            found.append(
                ServeConf.model_validate(
                    {
                        "runtime": runtime,
                        "endpoint": kept["endpoint"],
                        "paths": entry["paths"],
                        "models": {name: entry["model"]},
                    }
                )
            )
        except (ValidationError, KeyError, TypeError) as error:
            raise ServeError(
                f"{file}: the saved model {name} cannot be read by this version: deploy it again (llm-ray serve "
                f"deploy), or stop it (llm-ray serve stop {name}). ({str(error).splitlines()[0]})"
            ) from error
    return found


def _kept_in(file: Path) -> Path:
    """Returns `file`, or the file of earlier versions until `file` is first written."""
    return file if file.exists() else file.with_name(_EARLIER)


def _read(file: Path) -> dict[str, Any]:
    file = _kept_in(file)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ServeError(
            f"{file} cannot be read: {error}: repair it, or move it away and deploy the models again"
        ) from error
    return found if isinstance(found, dict) else {}


@contextmanager
def _changing(file: Path) -> Iterator[dict[str, Any]]:
    try:
        with locked(file.with_suffix(".lock")):
            kept = _read(file)
            yield kept
            write_text(file, json.dumps(kept, indent=2, ensure_ascii=False) + "\n", mode=0o640)
            file.with_name(_EARLIER).unlink(missing_ok=True)
    except OSError as error:
        raise ServeError(
            f"{file} cannot be written: {error.strerror or error}: the models would not be restored after a restart "
            "of Ray's head"
        ) from error
