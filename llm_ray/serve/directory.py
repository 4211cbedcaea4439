"""What is deployed, as Ray Serve's controller tells it. It is the one registry: nothing else remembers what is served.

Each model is an application of its own, whose deployment carries the model's description as its `user_config`; the
gateway is one more application. Deploying, changing or taking away one model leaves the others' applications alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from llm_ray.conf.serve import Endpoint
from llm_ray.serve.models import ServedModel

GATEWAY = "llm-ray"
DEPLOYMENT = "model"
_PREFIX = "model:"
_MODEL = TypeAdapter(ServedModel)


@dataclass(frozen=True)
class Deployed:
    """A deployed model: what it is, and how it fares."""

    model: ServedModel
    status: str
    """Of its application: DEPLOYING, RUNNING, UNHEALTHY, DEPLOY_FAILED, DELETING."""
    message: str
    replicas: int
    """That answer now."""
    wanted: int
    created: int
    """When it was deployed, in seconds since 1970."""

    @property
    def held(self) -> int:
        """Replicas that hold cores and memory, or are to."""
        return max(self.replicas, self.wanted)

    @property
    def ready(self) -> bool:
        """Whether a request is answered, if only after a replica has been started for it."""
        return self.status == "RUNNING" or self.replicas > 0


def on_nodes(details: Mapping[str, Any]) -> dict[str, list[str]]:
    """The models with replicas on each node, by node id; one that has two there is named twice."""
    found: dict[str, list[str]] = {}
    for name, app in sorted((details.get("applications") or {}).items()):
        deployment = app["deployments"].get(DEPLOYMENT)
        if name.startswith(_PREFIX) and deployment:
            model = described(deployment["deployment_config"]["user_config"]).name
            for replica in deployment["replicas"]:
                if replica.get("node_id"):
                    found.setdefault(replica["node_id"], []).append(model)
    return found


def app_name(model: str) -> str:
    """The Serve application of a model; the name becomes part of file names."""
    return _PREFIX + model.replace("/", "--")


def user_config(model: ServedModel) -> dict[str, Any]:
    """What a model's deployment carries: its description, and the adapters that a replica takes over without a
    restart."""
    return {"model": _MODEL.dump_python(model, mode="json")}


def endpoint(details: Mapping[str, Any]) -> Endpoint | None:
    """The endpoint that is deployed, from the controller's details; the gateway's `user_config` has it."""
    app = (details.get("applications") or {}).get(GATEWAY)
    config = (
        app["deployments"][GATEWAY]["deployment_config"]["user_config"]
        if app and GATEWAY in app["deployments"]
        else None
    )
    return Endpoint.model_validate(config["endpoint"]) if config and "endpoint" in config else None


def described(config: Mapping[str, Any]) -> ServedModel:
    """The model that a deployment's user_config describes."""
    return _MODEL.validate_python(config["model"])


def deployed(details: Mapping[str, Any]) -> dict[str, Deployed]:
    """The deployed models by name, from the controller's details (`ServeInstanceDetails`)."""
    found = {}
    for name, app in (details.get("applications") or {}).items():
        deployment = app["deployments"].get(DEPLOYMENT)
        if not name.startswith(_PREFIX) or not deployment:
            continue
        model = described(deployment["deployment_config"]["user_config"])
        found[model.name] = Deployed(
            model=model,
            status=str(getattr(app["status"], "value", app["status"])),
            message="\n".join(filter(None, [app["message"], deployment["message"]])),
            replicas=sum(getattr(r["state"], "value", r["state"]) == "RUNNING" for r in deployment["replicas"]),
            wanted=deployment["target_num_replicas"],
            created=int(app["last_deployed_time_s"]),
        )
    return found
