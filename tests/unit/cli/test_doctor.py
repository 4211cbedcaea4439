"""How `llm-ray doctor` is printed."""

from __future__ import annotations

import pytest

from llm_ray.cli import doctor as command
from llm_ray.doctor.finding import Finding


def test_the_report_is_grouped_and_shows_fixes(capsys: pytest.CaptureFixture[str]) -> None:
    command._show(
        [
            Finding("Host", "CPU", "ok", "AMX"),
            Finding("Host", "clock", "note", "not synchronised", "timedatectl set-ntp true"),
            Finding("Network", "proxies", "problem", "caught", "export no_proxy=localhost"),
        ]
    )
    assert capsys.readouterr().out.splitlines() == [
        "",
        "Host",
        "  ok       CPU      AMX",
        "  note     clock    not synchronised",
        "                    fix: timedatectl set-ntp true",
        "",
        "Network",
        "  problem  proxies  caught",
        "                    fix: export no_proxy=localhost",
        "",
        "1 problem(s), 1 note(s), 1 ok",
    ]
