"""A short soak: a few hundred lease cycles, some of whose clients are killed, and nothing is left of them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import report
from tests.support.real_service import ROOT, missing


@pytest.fixture
def short_path() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="lxp-test-"))
    path.chmod(0o755)  # containers' root is another user
    yield path
    left = list(path.iterdir())
    shutil.rmtree(path)
    assert not left


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_a_short_soak_leaves_nothing(short_path: Path, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    argv = ["--cycles", "150", "--rate", "40", "--killed", "0.05", "--directory", short_path, "--json", file]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.soak", *map(str, argv)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())["benchmarks"]["soak"]
    # What grows over thousands of cycles, and how fast it was, is not for so short a run to judge.
    assert [claim["what"] for claim in found["claims"] if claim["limit"] == 0 and not claim["met"]] == []
    figures = {figure["what"]: figure["value"] for figure in found["figures"]}
    assert figures["lease cycles"] == 150
    assert figures["clients killed"] > 0
    assert figures["failed creations and removals"] == 0


@pytest.mark.parametrize("arguments", [["--cycles", "x"], ["--cycles", "100", "--write-docs"]])
def test_wrong_use_is_told_at_once(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.soak", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr


def test_the_documentation_has_a_place_for_what_a_soak_finds() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert [text.count(mark) for mark in report.marks()] == [1, 1]
