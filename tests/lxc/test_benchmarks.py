"""The benchmarks work, on real containers, and leave nothing. How fast it was is not for a test to judge."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.plan import QUICK
from benchmarks.report import Claim, Figure, Outcome, Report, Sense
from benchmarks.stats import Summary, percentile, ratio_of_medians

pytestmark = pytest.mark.host

needs_lxc = pytest.mark.skipif(os.geteuid() != 0 or shutil.which("lxc-start") is None, reason="needs root and lxc")

ROOT = Path(__file__).resolve().parents[2]

BEGIN, END = report.marks()

CLAIMS = {"handout": 3, "refill": 1, "run": 2, "network": 2, "reap": 2, "idle": 1, "memory": 1}


def command(directory: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks", "--quick", "--directory", str(directory), *arguments]


@needs_lxc
@pytest.mark.parametrize("name", CLAIMS)
def test_a_quick_run_measures_and_writes_what_it_found(name: str, short_path: Path, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    argv = command(short_path, "--only", name, "--json", str(file), "--idle-seconds", "0.5")
    done = subprocess.run(argv, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(file.read_text(encoding="utf-8"))
    assert document["format"] == report.FORMAT
    assert document["plan"]["quick"] is True
    assert document["machine"].keys() >= {"cpu", "cpus", "kernel", "liblxc", "python", "cgroups", "load_1min"}
    assert list(document["benchmarks"]) == [name]
    found = document["benchmarks"][name]
    assert len(found["claims"]) == CLAIMS[name]
    for claim in found["claims"]:
        assert claim.keys() == {"what", "sense", "limit", "unit", "measured", "interval", "met"}
        assert isinstance(claim["met"], bool)
        assert claim["what"] in done.stdout
    for figure in found["figures"]:
        value = figure["value"]
        assert isinstance(value, float) or value["least"] <= value["median"] <= value["p99"] <= value["most"]
    assert "its numbers mean nothing" in done.stdout


@needs_lxc
def test_an_interrupted_run_leaves_nothing(short_path: Path) -> None:
    process = subprocess.Popen(
        command(short_path, "--only", "refill"),
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        deadline = time.monotonic() + 60
        while not [*short_path.glob("lxpb-*/bare/containers/*")]:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        _out, words = process.communicate(timeout=60)
    assert process.returncode == 130, words
    assert "cleaned up" in words


@pytest.mark.parametrize(
    "arguments", [("--only", "nothing"), ("--write-docs",), ("--rounds", "0"), ("--seconds", "nan")]
)
def test_wrong_use_is_told_at_once(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = subprocess.run(command(tmp_path, *arguments), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr


def test_percentiles_are_values_that_were_measured() -> None:
    values = [float(value) for value in range(1, 101)]
    assert percentile(values, 99) == 99
    assert percentile(values, 100) == 100
    assert percentile([7.0], 99) == 7
    assert Summary.of([3.0, 1.0, 2.0]) == Summary(3, 1, 2, 3, 3)


def test_the_interval_of_a_ratio_contains_it_and_is_the_same_each_time() -> None:
    above, below = [2.0, 2.1, 1.9, 2.2, 1.8], [1.0, 1.1, 0.9, 1.0, 1.2]
    ratio = ratio_of_medians(above, below)
    assert ratio.low <= ratio.value == 2 <= ratio.high
    assert ratio_of_medians(above, below) == ratio


@pytest.mark.parametrize(
    ("sense", "met"),
    [(Sense.AT_LEAST, (False, True, True)), (Sense.AT_MOST, (True, True, False)), (Sense.UNDER, (True, False, False))],
)
def test_a_target_is_met_on_its_side_of_the_limit(sense: Sense, met: tuple[bool, ...]) -> None:
    assert tuple(Claim("x", sense, 2.0, "×", measured).met for measured in (1.0, 2.0, 3.0)) == met


def test_the_documentation_gets_the_new_tables_between_its_marks(tmp_path: Path) -> None:
    found = Report(
        began="2024-01-02T03:04:05+00:00",
        seconds=600,
        machine={"cpu": "a fast one"},
        plan={"quick": QUICK.quick},
        outcomes={
            "run": Outcome(
                (Claim("ours, in theirs", Sense.AT_MOST, 1.3, "×", 0.5, (0.4, 0.6)),),
                (Figure.of_seconds("ours", [0.001, 0.002, 0.003]),),
            )
        },
    )
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    report.write_docs(page, found.markdown())
    report.write_docs(page, found.markdown())
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert text.count("| run | ours, in theirs | at most 1.3 × | 0.500 × (0.400–0.600) | yes |") == 1
    assert "| run | ours | 2.00 | 3.00 | 3 | ms |" in text


def test_a_page_without_the_marks_is_left_as_it_is(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"{END}\n{BEGIN}\n", encoding="utf-8")
    with pytest.raises(ValueError, match="once each"):
        report.write_docs(page, "new")
    assert page.read_text(encoding="utf-8") == f"{END}\n{BEGIN}\n"


def test_the_documentation_has_the_marks() -> None:
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    for name in ("benchmarks", "benchmarks.before", "benchmarks.compare"):
        assert [text.count(mark) for mark in report.marks(name)] == [1, 1]


@needs_lxc
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="an older revision is taken from git")
def test_two_revisions_are_compared_in_turns(short_path: Path, tmp_path: Path) -> None:
    # What another tree's lxc_pool does is none of this one's coverage, and its source is gone when that is reported.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    file = tmp_path / "found.json"
    options = ["--revision", "HEAD", "--rounds", "2", "--directory", str(short_path), "--json", str(file)]
    argv = [sys.executable, "-m", "benchmarks.before", *options]
    done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text(encoding="utf-8"))["benchmarks"]["before"]
    assert [claim["limit"] for claim in found["claims"]] == [1.25, 1.2]
    assert [figure["value"]["count"] for figure in found["figures"]] == [2] * 6
    argv[argv.index("HEAD")] = "no-such-revision"
    done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, "no revision no-such-revision" in done.stderr) == (5, True)
