#!/usr/bin/python
"""A job of the running cluster, through Ray's Jobs API: submits it once, follows it, stops it. Runs on the head."""

from __future__ import annotations

import codecs
import contextlib
import difflib
import hashlib
import json
import os
import re
import shlex
import time
import urllib.error
import urllib.request

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.ray_user import acting_as

DOCUMENTATION = """
module: ray_job
short_description: Submit, follow or stop a job of the running Ray cluster
description:
  - Submits llm-ray's work through Ray's Jobs API with the cluster's token. While a job of the same name runs, no other is started.
author: LLM on Ray
options:
  state: {description: Desired state., choices: [submitted, followed, stopped], required: true}
  name: {description: "Name of the work; ids of its jobs are NAME-1, NAME-2 and so on.", type: str, required: true}
  conf: {description: "Text of the conf (submitted).", type: str}
  folder: {description: "Folder that the conf is written into, with its SHA-256 (submitted).", type: path}
  command: {description: "Arguments of llm-ray, in which CONF stands for the conf's file (submitted).", type: list, elements: str}
  id: {description: "Id of the job (followed); by default the running one (stopped).", type: str}
  logs: {description: "Folder of the logs of Ray's session (followed).", type: path}
  offset: {description: "Bytes of its log that have been read (followed).", type: int, default: 0}
  seconds: {description: "How long to wait for output (followed), or for the end (stopped).", type: float, default: 5}
  result: {description: "A JSON file to read when it has ended (followed).", type: path}
  user: {description: User that Ray runs as., type: str, required: true}
  token: {description: File with the cluster's token., type: path, required: true}
  url: {description: Address of the dashboard., type: str, required: true}
  stop_seconds: {description: "How long a stopping job may take to write its checkpoint (submitted).", type: int, default: 900}
"""
EXAMPLES = "- ray_job: {state: stopped, name: finetune-support-bot, user: ray, token: /etc/llm-ray/token, url: 'http://127.0.0.1:8265'}"
RETURN = """
id: {description: Id of the job; empty if there is none., type: str, returned: always}
attached: {description: Whether it was already running (submitted)., type: bool, returned: submitted}
status: {description: "PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED; empty if there is none.", type: str, returned: always}
text: {description: "Its output since the offset (followed).", type: str, returned: followed}
offset: {description: Bytes of its log that have been read now (followed)., type: int, returned: followed}
more: {description: Whether the log continues after the offset (followed)., type: bool, returned: followed}
found: {description: "Contents of the result file (followed, at the end).", type: dict, returned: followed}
"""
_ENDED = ("STOPPED", "SUCCEEDED", "FAILED")
_POLL = 0.5
_CHUNK = 1 << 20  # bytes of a log per read


class Refused(Exception):
    """The request cannot be done; the message is for the user."""


class Api:
    """Client of Ray's Jobs API (ray.io, Ray Jobs REST API)."""

    def __init__(self, url, token):
        self.url = url
        self.token = token

    def __call__(self, path, data=None):
        request = urllib.request.Request(self.url + path, method="GET" if data is None else "POST")  # noqa: S310
        request.add_header("Authorization", f"Bearer {self.token}")
        if data is not None:
            request.add_header("Content-Type", "application/json")
            request.data = json.dumps(data).encode()
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
                return json.load(answer)
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace").strip()
            raise Refused(f"{self.url}{path}: {error.code} {text[-500:] or error.reason}") from error
        except OSError as error:
            raise Refused(
                f"Ray's head does not answer at {self.url} ({getattr(error, 'reason', error)}): "
                "see journalctl -u llm-ray-head; start it with ansible-playbook site.yml"
            ) from error

    def jobs(self, name):
        """Returns the jobs of that name by number."""
        found = {}
        for job in self("/api/jobs/"):
            match = re.fullmatch(rf"{re.escape(name)}-(\d+)", job.get("submission_id") or "")
            if match:
                found[int(match[1])] = job
        return found

    def running(self, name):
        """Returns the job of that name that has not ended, or None."""
        return next((job for job in self.jobs(name).values() if job["status"] not in _ENDED), None)


def submit(api, asked, check_mode):
    digest = hashlib.sha256(asked["conf"].encode()).hexdigest()
    jobs = api.jobs(asked["name"])
    file = f"{asked['folder']}/{digest[:16]}.yaml"
    active = api.running(asked["name"])
    if active:
        return attach(active, asked, digest)
    identity = f"{asked['name']}-{max(jobs, default=0) + 1}"
    if check_mode:
        return {"changed": True, "id": identity, "attached": False, "status": ""}
    write(file, asked["conf"])
    write(f"{file}.sha256", f"{digest}  {os.path.basename(file)}\n")  # noqa: PTH119
    words = [file if word == "CONF" else word for word in asked["command"]]
    body = {
        "entrypoint": "exec llm-ray " + " ".join(map(quote, words)),
        "submission_id": identity,
        "metadata": {"llm_ray": asked["name"], "conf": file, "conf_sha256": digest},
        "runtime_env": {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(asked["stop_seconds"])}},
    }
    try:
        api("/api/jobs/", body)
    except Refused:
        active = api.running(asked["name"])  # another command was faster
        if active:
            return attach(active, asked, digest)
        raise
    return {"changed": True, "id": identity, "attached": False, "status": "PENDING"}


def attach(job, asked, digest):
    """Attaches to the running job if it does the same work."""
    metadata, identity = job.get("metadata") or {}, job["submission_id"]
    if metadata.get("conf_sha256") != digest:
        changed = ""
        with contextlib.suppress(OSError), open(metadata.get("conf", "")) as file:  # noqa: PTH123
            lines = difflib.unified_diff(file.read().splitlines(), asked["conf"].splitlines(), n=0, lineterm="")
            changed = "; ".join(" ".join(line.split()) for line in lines if not line.startswith(("---", "+++", "@@")))
        ways = (
            "wait until it has ended, as status.yml shows, or end it on the head: /opt/llm-ray/current/bin/ray job "
            f"stop {identity}"
            if asked["command"][0] == "serve"
            else "wait for it, stop it with -e cancel=true, or use another name with -e name=…"
        )
        raise Refused(f"{identity} runs with another conf{f' ({changed})' if changed else ''}: {ways}")
    runs = shlex.split(job.get("entrypoint") or "")
    if any(word not in runs for word in asked["command"] if word != "CONF"):
        more = " ".join(asked["command"][asked["command"].index("CONF") + 1 :])
        raise Refused(
            f"{identity} runs, and was not started with {more}: end it first with -e cancel=true, or leave that out to "
            "see it go on"
        )
    return {"changed": False, "id": identity, "attached": True, "status": job["status"]}


def follow(api, asked):
    """Waits until there is output or the job or the time ends."""
    until = time.monotonic() + asked["seconds"]
    while True:
        job = api(f"/api/jobs/{asked['id']}")
        text, offset, more = read_log(f"{asked['logs']}/job-driver-{asked['id']}.log", asked["offset"])
        if text or job["status"] in _ENDED or time.monotonic() > until:
            break
        time.sleep(_POLL)
    found = {}
    if job["status"] in _ENDED and asked["result"]:
        with contextlib.suppress(OSError, ValueError), open(asked["result"]) as file:  # noqa: PTH123
            found = json.load(file)
    return {
        "changed": False,
        "id": asked["id"],
        "status": job["status"],
        "text": text,
        "offset": offset,
        "more": more,
        "found": found,
        "message": job.get("message") or "",
    }


def read_log(path, offset):
    """Returns the text after an offset in bytes, the offset after that text, and whether the log continues. A job whose
    driver has not started has no log.

    Reads the file because Ray's API has no offset and would send the whole log each time. Drivers run on the head, as
    does this module.
    """
    try:
        with open(path, "rb") as file:  # noqa: PTH123
            file.seek(offset)
            data = file.read(_CHUNK)
    except FileNotFoundError:
        return "", offset, False
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = decoder.decode(data)
    read = len(data) - len(decoder.getstate()[0])  # an incomplete character is read again
    return text, offset + read, len(data) == _CHUNK


def stop(api, asked, check_mode):
    job = api.running(asked["name"])
    if job is None:
        return {"changed": False, "id": "", "status": ""}
    identity = job["submission_id"]
    if check_mode:
        return {"changed": True, "id": identity, "status": job["status"]}
    api(f"/api/jobs/{identity}/stop", {})
    until = time.monotonic() + asked["seconds"]
    while job["status"] not in _ENDED:
        if time.monotonic() > until:
            raise Refused(
                f"{identity} was asked to stop but did not within {asked['seconds']:.0f} s: it may still be writing its "
                "checkpoint"
            )
        time.sleep(_POLL)
        job = api(f"/api/jobs/{identity}")
    return {"changed": True, "id": identity, "status": job["status"]}


def quote(word):
    """Like shlex.quote, but more readable in the list of jobs."""
    return word if re.fullmatch(r"[\w@%+=:,./-]+", word) else "'" + word.replace("'", "'\"'\"'") + "'"


def write(path, text):
    """Writes a file atomically."""
    os.makedirs(os.path.dirname(path), mode=0o750, exist_ok=True)  # noqa: PTH103, PTH120
    partial = f"{path}.{os.getpid()}.partial"
    with open(partial, "w") as file:  # noqa: PTH123
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)  # noqa: PTH105


def main():
    text, number = {"type": "str"}, {"type": "int"}
    module = AnsibleModule(
        {
            "state": {"type": "str", "choices": ["submitted", "followed", "stopped"], "required": True},
            "name": text | {"required": True},
            "conf": text,
            "folder": {"type": "path"},
            "command": {"type": "list", "elements": "str"},
            "id": text,
            "logs": {"type": "path"},
            "offset": number | {"default": 0},
            "seconds": {"type": "float", "default": 5},
            "result": {"type": "path"},
            "user": text | {"required": True},
            "token": {"type": "path", "required": True, "no_log": False},
            "url": text | {"required": True},
            "stop_seconds": number | {"default": 900},
        },
        required_if=[("state", "submitted", ("conf", "folder", "command")), ("state", "followed", ("id", "logs"))],
        supports_check_mode=True,
    )
    asked = module.params
    try:
        with open(asked["token"]) as file:  # noqa: PTH123
            token = file.read().strip()
        api = Api(asked["url"], token)
        with acting_as(asked["user"]):
            if asked["state"] == "submitted":
                result = submit(api, asked, module.check_mode)
            elif asked["state"] == "followed":
                result = follow(api, asked)
            else:
                result = stop(api, asked, module.check_mode)
    except KeyError as error:
        module.fail_json(msg=f"there is no user {asked['user']} ({error}): ansible-playbook site.yml makes it")
    except Refused as error:
        module.fail_json(msg=str(error))
    except OSError as error:
        module.fail_json(msg=f"{error.filename}: {error.strerror}: repair it with ansible-playbook site.yml")
    else:
        module.exit_json(**result)


if __name__ == "__main__":
    main()
