"""The test that is timed, again and again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.compare.suite.conftest import System


def test_in_a_fresh_system(system: System, payload: Path, unproven: list[str], number: int) -> None:
    """Run one command, and push one file. In a session's first test, which is not counted, see that it has arrived."""
    assert number >= 0
    assert system.run("sh", "-c", "test ! -e /root/file && echo fresh") == "fresh\n"
    system.push(payload, "/root/file")
    if unproven:
        unproven.clear()
        assert system.run("cat", "/root/file") == payload.read_text(encoding="ascii")
