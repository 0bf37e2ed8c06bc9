"""The comparison with other ways to a fresh system works, and leaves nothing; here with LXC's own programs alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.compare.commands import Commands, filled
from benchmarks.compare.measure import OURS, OURS_SMALL, QUICK
from benchmarks.compare.peers import PEERS, Peer, lxc_copy
from benchmarks.compare.session import judged
from benchmarks.lab import LabError
from benchmarks.report import Claim, Outcome, Report, Sense
from lxc_pool.host import cgroups

pytestmark = pytest.mark.host

needs_lxc = pytest.mark.skipif(os.geteuid() != 0 or shutil.which("lxc-copy") is None, reason="needs root and lxc")

ROOT = Path(__file__).resolve().parents[2]


def command(directory: Path, *arguments: str) -> list[str]:
    argv = [sys.executable, "-m", "benchmarks.compare", "--quick", "--peers", "lxc-copy"]
    return [*argv, "--directory", str(directory), *arguments]


@needs_lxc
def test_a_quick_run_measures_both_sides_and_leaves_nothing(short_path: Path, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    with subprocess.Popen(
        command(short_path, "--json", str(file)),
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        table, words = process.communicate()
    assert process.returncode == 0, words
    document = json.loads(file.read_text(encoding="utf-8"))
    found = document["benchmarks"]
    assert list(found) == [OURS, OURS_SMALL, "lxc-copy"]
    (claim,) = found["lxc-copy"]["claims"]
    assert (claim["limit"], claim["sense"], claim["unit"]) == (3, "at least", "×")
    assert claim["measured"] > 0
    assert claim["what"] in table
    assert "its numbers mean nothing" in table
    for outcome in found.values():
        figures = {figure["what"]: figure["value"] for figure in outcome["figures"]}
        counts = {what: value["count"] for what, value in figures.items()}
        tests = QUICK.tests * QUICK.rounds
        assert counts == {
            "a test, -n 1": tests,
            "its setup": tests,
            "its call": tests,
            "its teardown": tests,
            "a test, -n 2": tests,
            "tests a second, -n 1": QUICK.rounds,
            "tests a second, -n 2": QUICK.rounds,
        }
        assert all(value["least"] > 0 for value in figures.values())
    assert not cgroups.cgroups_by_container(f"lxpb-{process.pid}-")


@needs_lxc
def test_an_interrupted_session_leaves_no_container(short_path: Path) -> None:
    process = subprocess.Popen(
        command(short_path),
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        deadline = time.monotonic() + 100
        while not [*short_path.glob("lxpb-*/cold/lxpb-*")]:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        _out, words = process.communicate(timeout=100)
    assert process.returncode == 130, words
    assert "cleaned up" in words
    assert not cgroups.cgroups_by_container(f"lxpb-{process.pid}-")


@pytest.mark.parametrize("arguments", [("--peers", "nothing"), ("--peers", ""), ("--write-docs",), ("--rounds", "1")])
def test_wrong_use_is_told_at_once(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = subprocess.run(command(tmp_path, *arguments), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr


def test_a_peer_whose_programs_are_not_there_is_named_with_what_to_install() -> None:
    peer = Peer("Nothing", ("sh", "no-such-program"), "no-such-package", "sh", 5, lxc_copy.ready)
    assert peer.missing == "not installed: no no-such-program (apt-get install no-such-package)"
    assert Peer("A shell", ("sh",), "dash", "sh", 5, lxc_copy.ready).missing == ""
    assert {name: peer.target for name, peer in PEERS.items()} == {"lxc-copy": 3, "docker": 5, "podman": 5, "lxd": 5}


def test_what_is_not_measured_is_in_every_report() -> None:
    found = Report(
        began="2024-01-02T03:04:05+00:00",
        seconds=60,
        machine={"cpu": "a fast one"},
        plan={"quick": False},
        outcomes={
            OURS: Outcome((Claim("theirs, in ours", Sense.AT_LEAST, 5, "×", 6.0),), ()),
            "docker": Outcome((), (), not_measured="not installed: a | b"),
        },
    )
    assert "docker     not measured: not installed: a | b" in found.text()
    assert "| docker | not measured: not installed: a &#124; b |  |  |  |" in found.markdown()
    benchmarks = found.as_dict()["benchmarks"]
    assert benchmarks["docker"] == {"claims": [], "figures": [], "not_measured": "not installed: a | b"}
    assert "not_measured" not in benchmarks[OURS]


def phases(
    test: str, worker: str, start: float, durations: tuple[float, ...] = (0.1, 0.2, 0.3)
) -> list[dict[str, Any]]:
    """What pytest says of one test."""
    found = []
    for phase, duration in zip(("setup", "call", "teardown"), durations, strict=False):
        entry = {"test": test, "worker": worker, "phase": phase, "start": start, "stop": start + duration}
        found.append({**entry, "duration": duration})
        start += duration
    return found


def test_the_first_test_of_each_worker_does_not_count() -> None:
    told = [
        *phases("c", "gw0", 11.0),
        *phases("a", "gw0", 10.0, (0.5, 0.2, 0.3)),
        *phases("b", "gw1", 10.2, (5.0, 0.2, 0.4)),
        *phases("d", "gw1", 16.0),
        *phases("e", "gw0", 17.2),
    ]
    session = judged(told, workers=2)
    assert [test.start for test in session.tests] == [11.0, 16.0, 17.2]
    assert [round(test.seconds, 3) for test in session.tests] == [0.6, 0.6, 0.6]
    # From 15.8, when the second worker is done with its first, to 17.8: two tests began in there.
    assert session.rate == pytest.approx(1.0)


@pytest.mark.parametrize(
    "told",
    [
        [],
        phases("a", "gw0", 1.0) + phases("b", "gw0", 2.0),
        phases("a", "gw0", 1.0) + phases("b", "gw1", 1.0),
        phases("a", "gw0", 1.0) + phases("b", "gw1", 1.0) + phases("c", "gw1", 2.0, (0.1, 0.2)),
        phases("a", "gw0", 1.0) + phases("b", "gw1", 1.0, (9.0, 0.1, 0.1)) + phases("c", "gw0", 2.0),
    ],
    ids=["nothing", "one worker idle", "none counts", "one cut short", "none in the time that counts"],
)
def test_too_little_is_no_measurement(told: list[dict[str, Any]]) -> None:
    with pytest.raises(LabError):
        judged(told, workers=2)


def test_commands_are_handed_on_as_they_are(tmp_path: Path) -> None:
    commands = Commands("p", {"A": "b"}, ["start", "{name}"], ["run"], ["cp", "{src}", "{name}:{dst}"], ["rm"])
    commands.write(tmp_path / "file")
    assert Commands.read(tmp_path / "file") == commands
    assert filled(commands.push, name="n", src="/a", dst="/b") == ["cp", "/a", "n:/b"]
