"""How `llm-ray doctor` is printed."""

from __future__ import annotations

import pytest

from llm_ray.cli import doctor as command
from llm_ray.doctor.finding import Finding


def test_the_report_is_grouped_shows_fixes_and_of_other_nodes_only_what_is_to_be_done(
    capsys: pytest.CaptureFixture[str],
) -> None:
    command._show(
        [
            Finding("Host", "CPU", "ok", "AMX"),
            Finding("Host", "clock", "note", "not synchronised", "timedatectl set-ntp true"),
            Finding("Network", "proxies", "problem", "caught", "export no_proxy=localhost"),
            Finding("Host", "CPU", "ok", "AMX", host="node2"),
            Finding("Host", "clock", "note", "not synchronised", "timedatectl set-ntp true", host="node2"),
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
        "node2: Host",
        "  note     clock    not synchronised",
        "                    fix: timedatectl set-ntp true",
        "  ok       1 of 2 checks",
        "",
        "1 problem(s), 2 note(s), 2 ok",
    ]
