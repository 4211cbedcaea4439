"""Deployed models, as reported by Ray Serve's controller. The controller is the only registry of deployments.

Each model is a Serve application whose deployment carries the model's description as `user_config`; the gateway is
another application. Deploying, changing or removing a model does not touch the other applications.
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
    """A deployed model and its status."""

    model: ServedModel
    status: str
    """The application's: DEPLOYING, RUNNING, UNHEALTHY, DEPLOY_FAILED, DELETING."""
    message: str
    replicas: int
    """Running replicas."""
    wanted: int
    created: int
    """Time of deployment, in seconds since 1970."""

    @property
    def held(self) -> int:
        """Number of replicas that hold, or will hold, cores and memory."""
        return max(self.replicas, self.wanted)

    @property
    def ready(self) -> bool:
        """Whether the model answers requests, possibly after starting a replica."""
        return self.status == "RUNNING" or self.replicas > 0


def on_nodes(details: Mapping[str, Any]) -> dict[str, list[str]]:
    """Returns the models with replicas on each node, by node id. A model with several replicas on a node is listed once
    per replica."""
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
    """Returns the name of a model's Serve application, which is also used in file names."""
    return _PREFIX + model.replace("/", "--")


def user_config(model: ServedModel) -> dict[str, Any]:
    """Returns a model's user_config: its description, including the adapters that a replica can change without a
    restart."""
    return {"model": _MODEL.dump_python(model, mode="json")}


def endpoint(details: Mapping[str, Any]) -> Endpoint | None:
    """Returns the deployed endpoint's conf from the controller's details, or None; the gateway's `user_config` holds
    it."""
    app = (details.get("applications") or {}).get(GATEWAY)
    config = (
        app["deployments"][GATEWAY]["deployment_config"]["user_config"]
        if app and GATEWAY in app["deployments"]
        else None
    )
    return Endpoint.model_validate(config["endpoint"]) if config and "endpoint" in config else None


def described(config: Mapping[str, Any]) -> ServedModel:
    """Returns the model that a deployment's user_config describes."""
    return _MODEL.validate_python(config["model"])


def deployed(details: Mapping[str, Any]) -> dict[str, Deployed]:
    """Returns the deployed models by name, from the controller's details (`ServeInstanceDetails`)."""
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
