"""docs/guide.md does what it says: its blocks are run in order, against a real service.

```
 ```python        in one Python process that has all of them
 ```python NAME   is written to the file NAME, for what comes
 ```console       in a shell: `$ ` begins a command; what follows is its output, where … stands for anything
```
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.real_service import ROOT, Service
from tests.support.waiting import eventually

pytestmark = pytest.mark.host

GUIDE = ROOT / "docs" / "guide.md"
FENCE = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CONFIG = """\
[network]
nat = false
dns = []
[profile.default]
size = 3
[profile.net]
size = 0
network = "bridge"
"""
"""What the administrator has set up before; the guide's own configuration is loaded when it has come to that. Without
NAT, nothing of the machine's own network is touched."""

TIMEOUT = 60.0
"""Seconds for one block; a guess, the longest takes three."""

RUNNER = """
import json, sys, traceback, warnings

def main():
    sys.path.insert(0, "")
    warnings.simplefilter("error")
    names = {"__name__": "guide"}
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        block = json.loads(line)
        try:
            exec(compile("\\n" * block["line"] + block["text"], "guide.md", "exec"), names)
            error = None
        except BaseException:
            error = traceback.format_exc()
        print(json.dumps(error), file=answers, flush=True)

if __name__ == "__main__":
    main()
"""


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of the guide."""

    language: str
    name: str | None
    text: str
    line: int
    """The line of its fence, counted from 1."""


@dataclasses.dataclass(frozen=True)
class Command:
    """One command of a console block, with the output that the guide shows."""

    text: str
    output: tuple[str, ...]


def blocks() -> list[Block]:
    guide = GUIDE.read_text()
    return [
        Block(found[1], found[2], found[3], guide.count("\n", 0, found.start()) + 1) for found in FENCE.finditer(guide)
    ]


def commands(text: str) -> list[Command]:
    assert text.startswith("$ "), text
    parts = [part.splitlines() for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]]
    return [Command(first, tuple(output)) for first, *output in parts]


def matches(output: str, expected: tuple[str, ...]) -> bool:
    """Tell whether a command's output is what the guide shows; a line of … alone stands for any number of lines."""
    pattern = ""
    for line in expected:
        pattern += "(?:.*\n)*?" if line == "…" else ".*".join(map(re.escape, line.split("…"))) + "\n"
    return re.fullmatch(pattern, output) is not None


class Reader:
    """Somebody who follows the guide in an empty directory."""

    def __init__(self, directory: Path, service: Service) -> None:
        self.directory = directory / "work"
        self.directory.mkdir()
        programs = directory / "bin"
        programs.mkdir()
        for name, module in {"lxc-pool": "lxc_pool", "pytest": "pytest"}.items():
            (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} -m {module} "$@"\n')
            (programs / name).chmod(0o755)
        self.environment = os.environ | {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            # What is installed beside is not the reader's; and nothing at all may be.
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "PYTEST_PLUGINS": "lxc_pool.pytest_plugin,pytest_timeout,xdist.plugin",
            "LXC_POOL_HOST_DIR": str(service.host_dir),
            "COLUMNS": "120",
        }
        self._runner_path = directory / "runner.py"
        self._runner_path.write_text(RUNNER)

    @contextlib.contextmanager
    def python(self) -> Iterator[subprocess.Popen[str]]:
        """Start the process that Python blocks run in."""
        options: dict[str, Any] = {"cwd": self.directory, "env": self.environment, "text": True}
        with subprocess.Popen(
            [sys.executable, self._runner_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options
        ) as runner:
            try:
                yield runner
            finally:
                runner.kill()

    def execute(self, runner: subprocess.Popen[str], block: Block) -> None:
        assert runner.stdin is not None
        assert runner.stdout is not None
        runner.stdin.write(json.dumps({"line": block.line, "text": block.text}) + "\n")
        runner.stdin.flush()
        error = json.loads(runner.stdout.readline())
        assert error is None, error

    def type(self, block: Block) -> None:
        """Type a console block's commands into one shell, and compare what it answers."""
        typed = commands(block.text)
        script = "".join(f"{{ {command.text}\n}} 2>&1; printf '\\036%s\\036' $?\n" for command in typed)
        shell = subprocess.run(
            ["bash", "-c", script],
            cwd=self.directory,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=TIMEOUT,
            start_new_session=True,  # as a terminal's shell, which is the owner of what `get` leases
        )
        answers = shell.stdout.split("\036")
        for index, command in enumerate(typed):
            output, status = answers[2 * index : 2 * index + 2]
            where = f"guide.md, line {block.line}: $ {command.text}\n{output}"
            if command.output:
                assert matches(output, command.output), where
            else:
                assert (output, status) == ("", "0"), where


@pytest.mark.timeout(300)  # a dozen sessions of pytest; 15 s on an idle machine
def test_the_guide_does_what_it_says(tmp_path: Path, service: Service) -> None:
    service.start(config=CONFIG).wait_ready()
    reader = Reader(tmp_path, service)
    with reader.python() as runner:
        for block in blocks():
            if block.name == "/etc/lxc-pool.toml":
                service.config_path.write_text(block.text)
            elif block.name is not None:
                (reader.directory / block.name).write_text(block.text)
            elif block.language == "python":
                reader.execute(runner, block)
            else:
                assert block.language == "console"
                reader.type(block)
                if "kill -HUP" in block.text:
                    eventually(lambda: "has been read again" in service.log, "the service has read it")


def test_no_block_of_the_guide_is_overlooked() -> None:
    guide = GUIDE.read_text()
    assert len(blocks()) * 2 == len(re.findall(r"^\s*```", guide, re.MULTILINE))
    assert len(blocks()) > 20
    assert {block.language for block in blocks()} == {"python", "console", "toml"}


@pytest.mark.parametrize(
    ("output", "expected", "does"),
    [
        ("a\nb\n", ("a", "b"), True),
        ("a\nb\n", ("a",), False),
        ("a 1 b\n", ("a … b",), True),
        ("a\nx\ny\nb\n", ("a", "…", "b"), True),
        ("a\nb\n", ("a", "…", "b"), True),
        ("a\nx\n", ("a", "…", "b"), False),
        ("a.c\n", ("abc",), False),
    ],
)
def test_an_ellipsis_stands_for_anything(output: str, expected: tuple[str, ...], does: bool) -> None:
    assert matches(output, expected) is does
