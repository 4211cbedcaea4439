"""A fuzzer over the fine-tuning API's own description, with files and jobs that exist."""

from __future__ import annotations

from typing import Any

import pytest

from tests import fuzzing
from tests.unit.serve.gateway.finetuning.conftest import ROWS, Site

PATHS = ("/v1/files", "/v1/fine_tuning", "/v1/models/")


def test_no_request_is_answered_otherwise_than_described(site: Site, subtests: pytest.Subtests) -> None:
    with site.client("alice") as alice:
        file = alice.files.create(file=("rows.jsonl", ROWS.encode()), purpose="fine-tune").id
        jobs = {}
        for use in ("looked at", "changed"):
            job = alice.fine_tuning.jobs.create(model="base", training_file=file)
            jobs[use] = alice.fine_tuning.jobs.cancel(job.id).id  # a stream of its events ends

    def change(case: Any) -> None:
        if "file_id" in (case.path_parameters or {}) and case.method != "DELETE":
            case.path_parameters["file_id"] = file
        if "fine_tuning_job_id" in (case.path_parameters or {}):
            case.path_parameters["fine_tuning_job_id"] = jobs["looked at" if case.method == "GET" else "changed"]
        if isinstance(case.body, dict) and "training_file" in case.body:
            case.body |= {"model": "base", "training_file": file}

    fuzzed = 0
    headers = {"Authorization": f"Bearer {site.secrets['alice']}"}
    for operation in fuzzing.operations(site.url, headers):
        if operation.path.startswith(PATHS):
            fuzzed += 1
            fuzzing.fuzz(operation, subtests, change, fuzzing.CHECKS, valid=6, invalid=12, headers=headers)
    assert fuzzed >= 14
