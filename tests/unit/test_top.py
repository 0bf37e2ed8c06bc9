"""`lxc-pool top`, at a terminal and elsewhere, against a service in this process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from lxc_pool import PoolManager, PoolServiceProxy
from lxc_pool.cli import top_command
from tests.support.memory_service import MemoryService, memory_service
from tests.support.processes import open_descriptors
from tests.support.typist import Typist, typist
from tests.support.waiting import eventually

ROOT = Path(__file__).resolve().parents[2]
TOP = [sys.executable, "-m", "lxc_pool", "top"]
CTRL_C, CTRL_Z = b"\x03", b"\x1a"
PICTURE = rb"(?s)\x1b\[H(running.*?)\x1b\[J"


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryService]:
    with memory_service(2) as service:
        service.reaches(size=2)
        monkeypatch.setenv("LXC_POOL_HOST_DIR", str(service.host_dir))
        yield service


@pytest.fixture
def pool(service: MemoryService) -> Iterator[PoolServiceProxy]:
    with PoolManager.connect(service.host_dir) as pool:
        yield pool


def at_terminal(*arguments: str, **options: Any) -> AbstractContextManager[Typist]:
    return typist([*TOP, *arguments], ROOT, **options)


def picture(somebody: Typist) -> list[str]:
    """Return the lines of the next picture."""
    shown: str = somebody.sees(PICTURE)[1].decode()
    return shown.replace("\x1b[K", "").split("\r\n")


@contextlib.contextmanager
def elsewhere(*arguments: str, stdout: int = subprocess.PIPE) -> Iterator[subprocess.Popen[str]]:
    """Run it without a terminal."""
    with subprocess.Popen(
        [*TOP, *arguments], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_counts_and_containers_are_shown_live(pool: PoolServiceProxy) -> None:
    with at_terminal("--interval", "0.1", size=(24, 120)) as somebody:
        somebody.sees(rb"\x1b\[\?1049h")
        lines = picture(somebody)
        assert lines[0].startswith(f"running, pid {os.getpid()}, ")
        assert [line.split()[2] for line in lines if line.startswith("lxp-")] == ["warm", "warm"]
        with pool.lease("a lease that is seen"):
            eventually(lambda: any("a lease that is seen" in line for line in picture(somebody)), "it is shown")
            assert any(line.startswith("lxp-") and " leased " in line for line in picture(somebody))
        somebody.type(b"q")
        assert somebody.ends() == 0
        assert somebody.shown.endswith(b"\x1b[?7h\x1b[?25h\x1b[?1049l")
        assert somebody.is_as_before


@pytest.mark.usefixtures("service")
def test_a_picture_is_no_larger_than_the_window(pool: PoolServiceProxy) -> None:
    name = pool.containers()[0].name
    with at_terminal("-n", "1000", size=(5, 30)) as somebody:
        lines = picture(somebody)
        assert len(lines) == 5
        assert lines[-1] == "…"
        assert max(map(len, lines)) == 30
        somebody.resize(30, 200)
        assert name in "\n".join(picture(somebody)), "the picture is drawn anew at once"
        somebody.type(b"xQ")
        assert somebody.ends() == 0


@pytest.mark.usefixtures("service")
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_leaves_the_terminal_as_it_was(signum: signal.Signals) -> None:
    with at_terminal() as somebody:
        picture(somebody)
        if signum == signal.SIGINT:
            somebody.type(CTRL_C)
        else:
            somebody.process.send_signal(signum)
        assert somebody.ends() == (130 if signum == signal.SIGINT else -signum)
        assert somebody.shown.endswith(b"\x1b[?1049l")
        assert somebody.is_as_before


@pytest.mark.usefixtures("service")
def test_whoever_stops_it_has_the_terminal_until_it_goes_on() -> None:
    shell = ["sh", "-c", 'set -m; "$@"; echo is stopped; read x; fg >/dev/null; echo status $?', "sh"]
    with typist([*shell, *TOP, "-n", "1000"], ROOT) as somebody:
        picture(somebody)
        somebody.type(CTRL_Z)
        somebody.sees(rb"\x1b\[\?1049l(?s:.*)is stopped")
        assert somebody.is_as_before
        somebody.type(b"\n")
        somebody.sees(rb"\x1b\[\?1049h")
        picture(somebody)
        somebody.type(b"q")
        somebody.sees(b"status 0")
        assert somebody.ends() == 0


@pytest.mark.usefixtures("service")
def test_elsewhere_it_prints_a_picture_after_the_other_without_escape_sequences() -> None:
    with elsewhere("--interval", "0.1") as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(20)]
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    assert "\x1b" not in "".join(lines)
    assert sum(line.startswith("running, pid ") for line in lines) >= 2


@pytest.mark.usefixtures("service")
def test_json_is_a_document_a_line() -> None:
    with elsewhere("--json", "-n", "0.1") as process:
        assert process.stdout is not None
        documents = [json.loads(process.stdout.readline()) for _ in range(3)]
    assert [document["status"]["size"] for document in documents] == [2, 2, 2]
    assert {info["state"] for info in documents[-1]["containers"]} == {"warm"}


@pytest.mark.usefixtures("service")
def test_it_ends_when_nobody_reads_it() -> None:
    read, write = os.pipe()
    with elsewhere("-n", "0.1", stdout=write) as process:
        os.close(write)
        os.read(read, 10)
        os.close(read)
        assert process.wait(30) == 5


@pytest.mark.parametrize("interval", ["0", "-1", "0.01", "nan", "inf", "soon"])
def test_a_wrong_interval_is_wrong_use(interval: str) -> None:
    done = subprocess.run([*TOP, "-n", interval], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "argument -n/--interval" in done.stderr


def test_what_a_terminal_obeys_is_not_shown(
    pool: PoolServiceProxy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = open_descriptors()
    master, slave = os.openpty()
    monkeypatch.setattr(top_command, "_STDIN", slave)
    screen = top_command._Screen(pool, 1.0)
    screen._lines = ["words\n\x1b]0;title\x07\u202eend"]
    screen._draw()
    assert capsys.readouterr().out == "\x1b[Hwords  ]0;title  end\x1b[K\x1b[J"
    os.close(master)
    os.close(slave)
    assert open_descriptors() == before
