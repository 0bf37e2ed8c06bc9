"""`lxc-pool`, as it is typed: its answers, its exit statuses, its JSON."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lxc_pool import PoolServiceProxy
from lxc_pool.cli import main as cli_main
from lxc_pool.cli.main import main
from lxc_pool.images.store import ImageStore
from tests.support.processes import sleeper
from tests.support.real_service import ROOT, Service
from tests.support.starter import Starter
from tests.support.waiting import ends, eventually, pidfd


def answer(service: Service, *arguments: str | Path) -> Any:
    """Run a command with --json and return the document."""
    done = service.cli(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# --- the pool --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("pool")
def test_status_tells_the_counts(shared_service: Service) -> None:
    text = shared_service.cli("status")
    assert text.returncode == 0
    assert text.stdout.startswith(f"running, pid {shared_service.pid}, ")
    header, values = text.stdout.splitlines()[2:4]
    assert dict(zip(header.split(), values.split(), strict=True))["size"] == "3"
    document = answer(shared_service, "status")
    assert (document["running"], document["capacity"], document["size"]) == (True, 3, 3)
    assert document["profiles"]["default"]["size"] == 3


def test_ls_lists_every_container(pool: PoolServiceProxy, shared_service: Service) -> None:
    with pool.lease("mine") as container:
        lines = shared_service.cli("ls").stdout.splitlines()
        (line,) = [line for line in lines if line.startswith(container.name)]
        assert line.split()[1:5] == ["default", "leased", "mine", str(os.getpid())]
        (info,) = [info for info in answer(shared_service, "ls") if info["name"] == container.name]
    assert (info["state"], info["id"], info["owner_uid"]) == ("leased", "mine", 0)


@pytest.mark.usefixtures("pool")
def test_wait_answers_by_its_status(shared_service: Service) -> None:
    done = shared_service.cli("wait", "-n", "2")
    assert (done.returncode, done.stderr) == (0, "2 of 2 containers are warm\n")
    assert answer(shared_service, "wait")["size"] == 3
    wrong = shared_service.cli("wait", "-n", "4")
    assert wrong.returncode == 2
    assert "3, not 4" in wrong.stderr


def test_wait_shows_progress_and_gives_up_in_time(service: Service, starter: Starter) -> None:
    with starter.holding():
        service.start(size=1, path=[starter.directory])
        done = service.cli("wait", "--timeout", "0.2")
        assert done.returncode == 1
        assert done.stderr.startswith("0 of 1 containers are warm\nlxc-pool: 0 of 1 containers are warm after 0.2 s")
        assert json.loads(service.cli("--json", "wait", "--timeout", "0").stdout)["building"] == 1
    shown = service.cli("wait")
    assert shown.returncode == 0
    assert shown.stderr.endswith("1 of 1 containers are warm\n")


def test_an_administrator_resizes_drains_resumes_and_stops(service: Service) -> None:
    pool = service.start(size=1)
    assert service.cli("resize", "2").stdout == "the pool keeps 2 containers warm now\n"
    pool.wait_ready(2)
    wrong = service.cli("resize", "0")
    assert (wrong.returncode, "0" in wrong.stderr) == (2, True)
    assert answer(service, "drain") == {"draining": True}
    assert service.cli("run", "--", "true").returncode == 125
    refused = service.cli("get", "--timeout", "5", "--owner", str(os.getpid()))
    assert refused.returncode == 5
    assert "drained" in refused.stderr
    assert service.cli("status").stdout.startswith("drained, ")
    assert service.cli("resume").returncode == 0
    pool.wait_ready(2)
    with pidfd(service.pid) as process:
        assert service.cli("stop").stdout == "stopped\n"
        assert ends(process, timeout=0)
    assert service.wait().status == 0
    service.assert_clean()


@pytest.mark.host  # the program waits five seconds, with any Python
def test_without_a_service_the_status_is_3(service: Service) -> None:
    with ThreadPoolExecutor() as threads:  # since each waits for one to come
        status, stop, run = threads.map(lambda words: service.cli(*words), (["status"], ["stop"], ["run", "true"]))
    for done, expected in ((status, 3), (stop, 3), (run, 125)):
        assert (done.returncode, done.stdout) == (expected, "")
        assert f"no service answers in {service.host_dir}" in done.stderr


def test_the_host_dir_may_come_by_the_environment(pool: PoolServiceProxy, shared_service: Service) -> None:
    assert pool.echo("x")
    command = [
        word for word in shared_service.command("status") if word not in ("--host-dir", str(shared_service.host_dir))
    ]
    environment = os.environ | {"LXC_POOL_HOST_DIR": str(shared_service.host_dir)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split(",")[0]) == (0, "running")


@pytest.mark.parametrize("arguments", [[], ["no-such-command"], ["run"], ["resize", "many"]])
def test_wrong_use_is_status_2(shared_service: Service, arguments: list[str]) -> None:
    done = shared_service.cli(*arguments)
    assert done.returncode == 2
    assert "usage:" in done.stderr


# --- one container ---------------------------------------------------------------------------------------------------


def test_run_passes_streams_through_and_leaves_no_lease(pool: PoolServiceProxy, shared_service: Service) -> None:
    done = shared_service.cli("run", "--id", "me", "--", "sh", "-c", "cat; echo err >&2", stdin="words\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, "words\n", "err\n")
    eventually(lambda: pool.status().leased == 0, "it is released")


@pytest.mark.usefixtures("pool")
@pytest.mark.parametrize(
    ("argv", "status"),
    [
        (["sh", "-c", "exit 3"], 3),
        (["sh", "-c", "kill -TERM $$"], 128 + signal.SIGTERM),
        (["/etc/passwd"], 126),
        (["no-such-program"], 127),
    ],
)
def test_run_ends_as_its_command_does(shared_service: Service, argv: list[str], status: int) -> None:
    done = shared_service.cli("run", "--", *argv)
    assert done.returncode == status
    assert bool(done.stderr) == (status in (126, 127))


@pytest.mark.usefixtures("pool")
def test_run_that_gets_no_container_is_status_125(shared_service: Service) -> None:
    assert shared_service.cli("run", "--profile", "other", "true").returncode == 125
    assert shared_service.cli("run", "--timeout", "-1", "true").returncode == 125


def test_an_interrupted_run_gives_its_container_back(pool: PoolServiceProxy, shared_service: Service) -> None:
    command = shared_service.command("run", "--id", "interrupted", "--", "sleep", "1000")
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        eventually(lambda: any(info.id == "interrupted" for info in pool.containers()), "it runs", timeout=30)
        (info,) = [info for info in pool.containers() if info.id == "interrupted"]
        assert info.init_pid is not None
        with pidfd(info.init_pid) as init:
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 130
            assert ends(init)


def test_a_leased_container_is_used_by_name_until_it_is_released(
    pool: PoolServiceProxy, shared_service: Service
) -> None:
    with sleeper() as owner:
        got = shared_service.cli("get", "--id", "shell", "--owner", str(owner.pid))
        assert got.returncode == 0
        name = got.stdout.strip()
        assert re.fullmatch(r"lxp-[0-9a-z-]+", name)
        assert f"process {owner.pid}" in got.stderr
        assert shared_service.cli("exec", name, "--", "sh", "-c", "cat > /kept", stdin="x").returncode == 0
        assert shared_service.cli("exec", name, "--", "cat", "/kept").stdout == "x"
        assert shared_service.cli("exec", name, "--", "sh", "-c", "exit 9").returncode == 9
        assert answer(shared_service, "release", name) == {"name": name, "released": True}
        gone = shared_service.cli("exec", name, "--", "true")
        assert (gone.returncode, "released" in gone.stderr) == (125, True)
        assert shared_service.cli("release", "lxp-000000-0000-1").returncode == 5
    assert pool.status().leased == 0


def test_get_leases_to_this_sessions_leader_unless_told_otherwise(
    pool: PoolServiceProxy, shared_service: Service
) -> None:
    get = ["sh", "-c", '"$@"; echo; echo --; read _', "sh", *shared_service.command("get", "--json")]
    with subprocess.Popen(
        get, cwd=ROOT, start_new_session=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as leader:
        assert leader.stdin is not None
        assert leader.stdout is not None
        document = json.loads("".join(iter(leader.stdout.readline, "--\n")))
        assert (document["owner_pid"], document["state"]) == (leader.pid, "leased")
        leader.stdin.close()
    eventually(lambda: pool.status().leased == 0, "it was reaped with the session's leader")


def test_get_says_when_nothing_came_free(service: Service, starter: Starter) -> None:
    with starter.holding():
        service.start(size=1, path=[starter.directory])
        done = service.cli("get", "--timeout", "0", "--owner", str(os.getpid()))
    assert (done.returncode, done.stdout) == (1, "")
    assert "no container came free" in done.stderr


# --- for programs ----------------------------------------------------------------------------------------------------

ELSEWHERE = {"serve", "top", "run", "exec"}
"""What prints another thing than one document at its end: unit/test_cli and unit/test_top say what."""


def commands_in(parser: argparse.ArgumentParser, prefix: str = "") -> set[str]:
    """Return every command of a parser, with those of its groups."""
    found: set[str] = set()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                found |= commands_in(below, f"{prefix}{name} ")
    return found or {prefix.strip()}


def test_every_command_prints_one_document(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pool = service.start(size=1)
    pool.wait_ready()
    state = ("--state-dir", service.state_dir)
    source = tmp_path / "source"
    shutil.copytree(ImageStore(service.state_dir / "images").list()[0].rootfs, source, symlinks=True)
    said: dict[str, object] = {}

    def ask(command: str, *arguments: object) -> Any:
        capsys.readouterr()
        status = main(["--host-dir", str(service.host_dir), *command.split(), *map(str, arguments), "--json"])
        printed = capsys.readouterr()
        assert status == 0, (command, printed)
        said[command] = json.loads(printed.out)
        return said[command]

    ask("setup", "--dry-run", "--root", tmp_path)
    ask("check", *state)
    with sleeper() as owner:
        name = ask("get", "--owner", owner.pid)["name"]
        assert ask("logs", name) == {"name": name, "console": ""}
        assert ask("release", name) == {"name": name, "released": True}
    ask("resize", 2)
    assert ask("wait")["size"] == 2
    ask("status")
    assert len(ask("ls")) == 2
    ask("drain")
    ask("resume")
    assert ask("image build", "busybox", *state)["name"] == "busybox"
    assert ask("image import", "other", source, *state)["name"] == "other"
    ask("image ls", *state)
    assert {image["ok"] for image in ask("image verify", *state)} == {True}
    assert [image["name"] for image in ask("image rm", "other", *state)] == ["other"]
    assert ask("audit", *state) == {"clean": True, "findings": []}
    assert ask("stop") == {"running": False}
    assert ask("cleanup", *state)["clean"]
    service.wait()
    assert said.keys() | ELSEWHERE == commands_in(cli_main._parser())


# --- the host --------------------------------------------------------------------------------------------------------


def test_check_tells_what_there_is(shared_service: Service) -> None:
    done = shared_service.cli("check", "--state-dir", shared_service.state_dir)
    assert done.returncode == 0, done.stdout
    assert "LACKS" not in done.stdout
    document = json.loads(shared_service.cli("check", "--state-dir", shared_service.state_dir, "--json").stdout)
    assert all(item["ok"] or item["advice"] for item in document)


def test_images_are_built_and_listed(shared_service: Service, tmp_path: Path) -> None:
    state_dir = tmp_path / "state"
    built = shared_service.cli("image", "build", "busybox", "--state-dir", state_dir)
    assert built.returncode == 0, built.stderr
    reference = built.stdout.strip()
    assert reference.startswith("busybox:")
    assert "building base image busybox" in built.stderr
    (image,) = answer(shared_service, "image", "ls", "--state-dir", state_dir)
    assert f"{image['name']}:{image['version']}" == reference
    assert Path(image["rootfs"]).is_dir()
    assert reference.partition(":")[2] in shared_service.cli("image", "ls", "--state-dir", state_dir).stdout
    unknown = shared_service.cli("image", "build", "slackware", "--state-dir", state_dir)
    assert unknown.returncode == 5
    assert "lxc-pool image build busybox" in unknown.stderr
