"""What has left its command's cgroup, as root of a container can, ends with the command all the same."""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lxc_pool import Container, PoolServiceProxy, State
from lxc_pool.client.process import Process
from lxc_pool.host import apparmor
from tests.security.attackers import Attacker
from tests.support.real_service import Service, running
from tests.support.waiting import ends, eventually, pidfd

CONFIG = """\
[pool]
workers = 2
[profile.default]
size = 1
[profile.root]
size = 1
privileged = true
"""

LEAVE = """\
if [ -e /sys/fs/cgroup/unified ]; then place=/sys/fs/cgroup/unified
elif [ -e /sys/fs/cgroup/cgroup.procs ]; then place=/sys/fs/cgroup
elif [ -e /sys/fs/cgroup/freezer/tasks ]; then place=/sys/fs/cgroup/freezer
else
    place=/tmp/cgroup
    mkdir -p $place
    mount -t cgroup2 none $place || mount -t cgroup -o freezer none $place
fi
mkdir -p $place/$own
echo 0 >$place/$own/cgroup.procs && ! grep -q "lxc_pool[.][0-9]*[.][0-9]*$" /proc/self/cgroup && echo left
"""
"""Moves the shell that reads it to the container's own cgroup, or to one that it makes there, `$own`, and says so."""

WAYS = {
    "child": "sh -c '. /leave; sleep 1000'; true",
    "daemon": "(setsid sh -c '. /leave; (setsid sleep 1000 &); sleep 1000' &); sleep 1000",
    "of a command that has ended": "(sh -c '. /leave; sleep 1000' &); exit 0",
    "in a directory with a command's name": "own=lxc_pool.1.mine sh -c '. /leave; sleep 1000'; true",
    "with its mark lowered": "ulimit -H -x 5; sh -c '. /leave; sleep 1000'; true",
}


@pytest.fixture(scope="module")
def service(images: Path) -> Iterator[Service]:
    with running(images, CONFIG) as service:
        yield service


@pytest.fixture
def pool(service: Service) -> Iterator[PoolServiceProxy]:
    with service.connect() as pool:
        yield pool


@pytest.fixture(params=["default", "root"])
def container(pool: PoolServiceProxy, request: pytest.FixtureRequest) -> Iterator[Container]:
    if request.param == "root" and apparmor.is_on():
        pytest.skip("root of a privileged container can mount no cgroups under AppArmor")
    with pool.lease("strays", timeout=30, profile=request.param) as container:
        container.run(["sh", "-c", "cat >/leave"], input=LEAVE, text=True, check=True)
        yield container


def sleepers(container: Container) -> list[str]:
    """Return how long those sleep that live in the container."""
    done = container.run(["ps", "-o", "stat,args"], capture_output=True, text=True, timeout=30, check=True)
    found = [line.split() for line in done.stdout.splitlines()]
    return sorted(words[2] for words in found if words[1] == "sleep" and words[0][0] != "Z")


def begun(container: Container, script: str) -> Process:
    """Start a script; return once what leaves has left."""
    command = container.popen(["sh", "-c", script], stdout=subprocess.PIPE, text=True)
    assert command.stdout is not None
    assert command.stdout.readline() == "left\n"
    eventually(lambda: "1000" in sleepers(container), "it sleeps")
    return command


@pytest.mark.parametrize("way", WAYS)
def test_it_ends_when_the_command_is_killed_and_nothing_else_does(container: Container, way: str) -> None:
    if way == "in a directory with a command's name" and container.profile == "root":
        pytest.skip("root of a privileged container is whoever makes the commands' directories")
    container.run(["sh", "-c", "sleep 2000 >/dev/null 2>&1 &"], check=True)  # of a command that has ended
    with container.popen(["sleep", "3000"]) as before, begun(container, WAYS[way]) as command:
        with container.popen(["sleep", "4000"]) as later:
            command.kill_tree()
            assert sleepers(container) == ["2000", "3000", "4000"]
            later.kill()
        before.kill()
    assert container.state is State.LEASED


def test_a_timeout_leaves_none(container: Container) -> None:
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        container.run(["sh", "-c", WAYS["of a command that has ended"]], capture_output=True, timeout=2)
    assert caught.value.stdout == b"left\n"
    assert sleepers(container) == []


def test_a_dead_client_leaves_none(service: Service, container: Container) -> None:
    script = f"""
        import pickle, subprocess
        container = pickle.loads(bytes.fromhex({pickle.dumps(container).hex()!r}))
        container.popen(["sh", "-c", {WAYS["daemon"]!r}], stdout=sys.stdout).wait()
    """
    with service.client(script) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == "left\n"
        eventually(lambda: len(sleepers(container)) == 3, "they sleep")
        client.kill()
        client.wait()
    eventually(lambda: sleepers(container) == [], "nothing of the command is left")
    assert container.state is State.LEASED


def test_background_processes_go_on_as_ever(container: Container) -> None:
    with begun(container, "(sh -c '. /leave; exec >/dev/null; exec sleep 1000' &); exit 0") as command:
        assert command.wait(10) == 0
    assert sleepers(container) == ["1000"]


@pytest.mark.parametrize("user", [0, 1000])
def test_the_mark_can_not_be_taken_off(pool: PoolServiceProxy, attack_program: bytes, user: int) -> None:
    with pool.lease("strays", timeout=30) as container:
        attacker = Attacker(container, attack_program)
        container.run(["chmod", "4755", "/attack"], check=True)  # user 1000 becomes root by executing it
        answers = attacker.run("unmark", user=user)
    assert (answers.pop("unshare"), answers.pop("lower")) == ("ok", "ok")
    assert len(answers) == 10
    assert set(answers.values()) == {"EPERM"}


UNMARKED = {
    "of init's": "echo ::respawn:sleep 1000 >>/etc/inittab; kill -HUP 1; echo left",
    "without its mark": "(sh -c '. /leave; ulimit -H -x unlimited; exec sleep 1000' &); exit 0",
}


@pytest.mark.parametrize("way", UNMARKED)
def test_what_has_no_mark_goes_on_as_long_as_the_container(container: Container, way: str) -> None:
    if way == "without its mark" and not (container.profile == "root" and may_raise_limits(container)):
        pytest.skip("only root of a privileged container can take it off, and only where the service could")
    with begun(container, UNMARKED[way]) as command:
        command.kill_tree()
    assert sleepers(container) == ["1000"]
    (stray,) = inside(container, b"sleep\0001000\0")
    with pidfd(stray) as descriptor:
        container.release()
        assert ends(descriptor)


def may_raise_limits(container: Container) -> bool:
    """Tell whether root of a container has CAP_SYS_RESOURCE."""
    status = Path(f"/proc/{container.init_pid}/status").read_text()
    return bool(int(status.partition("CapBnd:")[2].split()[0], 16) >> 24 & 1)


def inside(container: Container, command: bytes) -> list[int]:
    """Return the host's pids of all in the container that have this command line."""
    namespace = os.readlink(f"/proc/{container.init_pid}/ns/pid")
    found = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{pid}/ns/pid") == namespace:
                found += [int(pid)] if Path(f"/proc/{pid}/cmdline").read_bytes().endswith(command) else []
    return found
