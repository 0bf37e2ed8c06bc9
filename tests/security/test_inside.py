"""Code in a container, root there, gets nothing of the host and nothing of its neighbours; its limits hold."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from lxc_pool import PoolServiceProxy, State
from lxc_pool.backend.lxc import limits
from lxc_pool.config import ProfileConfig
from lxc_pool.errors import ExecFailed, LeaseError, LxcPoolError
from lxc_pool.host import apparmor, cgroups, idranges, requirements
from tests.security.attackers import LIMITS, STRANGER, TIMEOUT, Attacker, as_person
from tests.support.real_service import Service

SHARE = 32
"""inotify instances of one container."""


@pytest.fixture
def neighbour(new_attacker: Callable[[], Attacker]) -> Attacker:
    return new_attacker()


def is_well(container: Attacker) -> bool:
    return container.shell("echo $((6 * 7)) >/tmp/x; cat /tmp/x; rm /tmp/x") == "42\n"


def peak(container: Attacker) -> int:
    """Return the most memory that a container has had, in bytes."""
    return int(container.cgroup_file("memory.max_usage_in_bytes") or container.cgroup_file("memory.peak"))


def soon(true: Callable[[], bool]) -> None:
    """Wait until something is true that nothing tells of."""
    deadline = time.monotonic() + TIMEOUT
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)  # a test looks from outside, where there is no event


# --- the host's kernel and files --------------------------------------------------------------------------------------


def test_no_system_call_reaches_beyond_the_container(attacker: Attacker) -> None:
    answers = attacker.run("calls")
    assert len(answers) > 20
    reached = [call for call, answer in answers.items() if answer == "ok"]
    assert reached == []
    # Not even asked: the policy answers for the kernel.
    hidden = {call for call, answer in answers.items() if answer == "ENOSYS"}
    assert hidden >= {
        *("init_module", "finit_module", "delete_module", "kexec_load", "kexec_file_load"),
        *("open_by_handle_at", "add_key", "request_key", "keyctl"),
    }


@pytest.mark.parametrize("user", [0, 1000])
def test_no_switch_of_the_hosts_can_be_opened_for_writing(attacker: Attacker, user: int) -> None:
    switches = [
        *(
            "/proc/sysrq-trigger",
            "/proc/kcore",
            "/proc/kmsg",
            "/proc/sys/kernel/core_pattern",
            "/proc/sys/vm/drop_caches",
        ),
        *("/proc/sys/kernel/modprobe", "/proc/sys/kernel/hostname_of_host", "/proc/sys/kernel/sysrq"),
        *("/proc/sys/fs/file-max", "/proc/sys/fs/inotify/max_user_instances", "/proc/sys/kernel/panic"),
        *("/sys/power/state", "/sys/kernel/uevent_helper", "/sys/module/kernel/parameters/panic", "/dev/mem"),
        *("/dev/kmsg", "/dev/sda", "/dev/loop-control", "/dev/fuse", "/dev/net/tun"),
        # Its own limits, and what they are made of.
        *(
            "/sys/fs/cgroup/pids/pids.max",
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/cpu/cpu.shares",
        ),
        *("/sys/fs/cgroup/pids.max", "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/cpu.weight"),
        *("/sys/fs/cgroup/devices/devices.allow", "/sys/fs/cgroup/unified/cgroup.max.descendants"),
        *("/sys/fs/cgroup/memory/release_agent", "/sys/fs/cgroup/systemd/release_agent"),
        *("/proc/sys/user/max_inotify_instances", "/proc/sys/user/max_net_namespaces"),
    ]
    answers = attacker.run("files", *switches, user=user)
    assert [path for path, answer in answers.items() if answer == "ok"] == []
    assert attacker.shell("echo x >/proc/sys/kernel/core_pattern && echo got through", user=user).count("got") == 0


def test_no_file_of_proc_sys_or_sysfs_is_open_but_those_of_its_own_namespaces(attacker: Attacker) -> None:
    writable = attacker.shell("find /proc/sys /sys -type f -writable 2>/dev/null").split()
    # Each of these belongs to a namespace that the container has for itself, or is its cgroup.
    own = (
        *("/proc/sys/net/", "/proc/sys/kernel/shm", "/proc/sys/kernel/msg", "/proc/sys/kernel/sem", "/sys/fs/cgroup/"),
        *("/proc/sys/fs/mqueue/", "/proc/sys/kernel/hostname", "/proc/sys/kernel/domainname"),
        *("/proc/sys/kernel/auto_msgmni", "/proc/sys/kernel/ns_last_pid", "/proc/sys/kernel/pid_max"),
        *("/sys/class/net/", "/sys/devices/virtual/net/"),
    )
    assert [path for path in writable if not path.startswith(own)] == []


@pytest.mark.parametrize(
    "command",
    [
        "mount -t ext4 /dev/zero /mnt",
        "mount -t debugfs none /mnt",
        "mount -t tracefs none /mnt",
        "mount -t securityfs none /mnt",
        "mount -t devtmpfs none /mnt",
        "mount -o remount,dev /",
        "mount -o bind,remount,dev /",
        "mknod /tmp/zero c 1 5",
        "mknod /tmp/sda b 8 0",
        "insmod /attack",
        "rmmod loop",
        "swapon /attack",
        "dmesg",
        "chroot /proc/1/root/../.. ls /work",
        "losetup /dev/loop0 /attack",
        "nsenter -t 1 -m -u -i -n -p -U true",
    ],
)
def test_what_root_of_the_host_could_do_is_refused(attacker: Attacker, command: str) -> None:
    said = attacker.shell(f"mkdir -p /mnt; {command} && echo DONE")
    assert "DONE" not in said


def test_a_device_node_in_an_image_is_no_device(attacker: Attacker) -> None:
    assert "c" in attacker.shell("ls -l /zero").split()[0]
    assert "denied" in attacker.shell("head -c 1 /zero")
    # Not even after a remount, or seen through another mount of its own.
    said = attacker.shell(
        "mkdir -p /tmp/m; mount -o bind / /tmp/m; mount -o remount,bind,dev /tmp/m; head -c 1 /tmp/m/zero && echo READ"
    )
    assert "READ" not in said


def test_a_set_uid_program_makes_root_of_the_container_only(attacker: Attacker) -> None:
    attacker.shell("cp /bin/busybox /tmp/sleep; chmod 4755 /tmp/sleep")
    process = attacker.container.popen(["/tmp/sleep", "100"], user=1000)
    try:
        uids = Path(f"/proc/{process.pid}/status").read_text().partition("Uid:")[2].split()[:4]
        # busybox gives up what it does not need; whichever it is, it is the container's.
        assert {int(uid) - attacker.first_id for uid in uids} <= {0, 1000}
        assert attacker.first_id >= idranges.DEFAULT_BASE
    finally:
        process.kill()
        process.wait()
        process.close()


def test_the_hosts_directories_and_the_services_socket_are_not_there(attacker: Attacker, real: Service) -> None:
    found = attacker.shell(f"find / -xdev -name pool.sock -o -name authkey -o -name ledger.db; ls -d {real.directory}")
    assert "No such file" in found
    assert len(found.splitlines()) == 1
    sockets = attacker.shell("cat /proc/net/unix")
    assert str(real.host_dir) not in sockets


def test_a_command_is_handed_pipes_and_nothing_else(attacker: Attacker) -> None:
    streams = attacker.run("streams")
    assert sorted(streams) == ["fd0", "fd1", "fd2"]
    for what in streams.values():
        assert what.startswith("pipe:[")
        assert what.endswith("ENOTDIR")
    said = attacker.shell("ls -l /proc/self/fd/ /proc/1/fd/ 2>&1; ls /proc/self/fd/0/../..")
    assert "/work" not in said


def test_no_terminal_takes_injected_input(attacker: Attacker) -> None:
    answers = attacker.run("terminal")
    assert len(answers) == 5
    # The console is there to be written to, and is a terminal of the container's own.
    assert {what for what, answer in answers.items() if answer == "ok"} == {"console"}
    assert attacker.shell("stat -c %t:%T /dev/console /dev/pts/0") == "88:0\n88:0\n"


@pytest.mark.parametrize("way", ["commands", "files"])
def test_whoever_enters_can_not_be_traced_or_looked_into(attacker: Attacker, tmp_path: Path, way: str) -> None:
    source = tmp_path / "file"
    source.write_bytes(os.urandom(1 << 20))
    lurking = attacker.container.popen(["/attack", "lurk", "3"], stdout=subprocess.PIPE, text=True)
    assert lurking.stdout is not None
    assert lurking.stdout.readline() == "lurking\n"
    entered = 0
    while lurking.poll() is None:
        if way == "commands":
            attacker.container.run(["true"], check=True, timeout=TIMEOUT)
        else:
            attacker.container.push(source, f"/tmp/{entered}")
            attacker.container.pull(f"/tmp/{entered}", tmp_path / str(entered))
            attacker.shell("rm /tmp/*")
        entered += 1
    found = dict(line.split("=") for line in lurking.stdout.read().split())
    lurking.close()
    assert entered > 10
    assert int(found["looks"]) > entered
    assert int(found["closed"]) > 0  # some were there to be seen
    assert found["foreign"] == "0"


needs_apparmor = pytest.mark.skipif(
    not requirements.apparmor().ok, reason="needs a host with AppArmor, and its profiles: `lxc-pool setup`"
)

CHANGES = [
    f"echo {words} >/proc/self/attr/{file}"
    for file in ("current", "exec", "apparmor/current", "apparmor/exec")
    for words in ("changeprofile unconfined", f"changeprofile {apparmor.LIBLXC_PROFILE}", "exec unconfined")
]


def under(profile: str, script: str) -> str:
    """Return what a shell says that is the host's root, under an AppArmor profile and nothing else."""
    change = (
        "import os, sys; open('/proc/self/attr/apparmor/exec', 'w').write('exec ' + sys.argv[1]);"
        "os.execvp('sh', ['sh', '-c', sys.argv[2]])"
    )
    done = subprocess.run(
        [sys.executable, "-c", change, profile, script],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    return done.stdout


@needs_apparmor
def test_apparmor_holds_init_and_commands_and_its_root_can_not_shake_it_off(attacker: Attacker) -> None:
    label = f"{apparmor.PROFILE} (enforce)\n"
    assert Path(f"/proc/{attacker.container.init_pid}/attr/apparmor/current").read_text() == label
    assert attacker.shell("cat /proc/1/attr/current /proc/self/attr/current") == label * 2
    assert attacker.shell("cat /proc/self/attr/current", user=1000) == label
    with attacker.container.popen(["cat", "/proc/self/attr/current"], stdout=subprocess.PIPE, text=True) as command:
        assert command.communicate(timeout=TIMEOUT)[0] == label
    tries = "; ".join(f"({change}) 2>/dev/null && echo changed" for change in CHANGES)
    assert attacker.shell(f"{tries}; cat /proc/self/attr/current") == label
    # In a user and mount namespace of its own it has no more to say.
    assert attacker.shell(f"unshare -Urm sh -c '{tries}; cat /proc/self/attr/current'") == label


@needs_apparmor
def test_apparmor_lets_it_mount_what_its_user_namespace_does(attacker: Attacker) -> None:
    said = attacker.shell(
        "mkdir /tmp/m && unshare -m sh -c '"
        "mount -t tmpfs t /tmp/m && mount -o bind /etc /tmp/m && mount -o remount,bind,ro /tmp/m && umount /tmp/m &&"
        "mount -t proc p /tmp/m && mount --make-rslave / && echo all'"
    )
    assert said == "all\n"
    assert "done" not in attacker.shell(
        "for type in debugfs tracefs securityfs; do mount -t $type x /mnt && echo done; done"
    )


@needs_apparmor
def test_what_apparmor_denies_is_denied_where_all_else_would_allow_it(attacker: Attacker) -> None:
    """The files are its own: it has put them in the places of those of the kernel."""
    allowed = [
        *("/proc/version", "/proc/sys/net/x", "/proc/sys/user/x", "/proc/sys/fs/mqueue/x", "/sys/fs/cgroup/x"),
        *(f"/proc/sys/kernel/{name}" for name in ("domainname", "hostname", "msgmax", "sem", "shmmax")),
        "/sys/devices/virtual/net/x",
    ]
    denied = [
        *("/proc/sysrq-trigger", "/proc/kcore", "/proc/bus/x", "/proc/sys/x", "/proc/sys/fs/file-max", "/sys/x"),
        *(f"/proc/sys/kernel/{name}" for name in ("core_pattern", "modprobe", "sysrq", "dmesg_restrict", "printk")),
        *("/sys/fs/x", "/sys/devices/x", "/sys/devices/virtual/x"),
    ]
    script = "mount -t tmpfs t /proc; mount -t tmpfs t /sys; mkdir -p /proc/bus /proc/sys/kernel /proc/sys/net"
    script += " /proc/sys/user /proc/sys/fs/mqueue /sys/fs/cgroup /sys/devices/virtual/net"
    script += f"; for file in {' '.join(allowed + denied)}; do (echo x >$file) 2>/dev/null && echo $file; done"
    assert attacker.shell(f"unshare -m sh -c '{script}; true'").split() == allowed


@needs_apparmor
def test_apparmor_alone_keeps_even_the_hosts_root_from_the_host() -> None:
    victim = subprocess.Popen(["sleep", "60"])
    tries = {
        "signal": f"kill -TERM {victim.pid}",
        "look": f"head -c 0 /proc/{victim.pid}/environ",
        # What it would write is what is there, should the profile not hold it.
        **{
            name: f"old=$(cat /proc/sys/{name}) && echo $old >/proc/sys/{name}"
            for name in ("kernel/panic", "vm/swappiness")
        },
        "ask": "echo h >/proc/sysrq-trigger",
        "dump": "head -c 0 /proc/kcore",
        "mount": "unshare -m mount -t debugfs d /mnt",
        "change": "echo changeprofile unconfined >/proc/self/attr/current",
    }
    script = "; ".join(f"({command}) >/dev/null 2>&1 && echo {name}" for name, command in tries.items())
    own = "sleep 60 & kill -TERM $! && cat /proc/self/attr/current"
    try:
        assert under(apparmor.PROFILE, f"{script}; {own}") == f"{apparmor.PROFILE} (enforce)\n"
        assert victim.poll() is None
        assert under("unconfined", script).split() == list(tries), "each could be done"
        assert victim.wait(TIMEOUT) == -signal.SIGTERM
    finally:
        victim.kill()
        victim.wait()


# --- limits -----------------------------------------------------------------------------------------------------------


def test_limits_stand_inside_and_outside_whatever_its_root_does(attacker: Attacker) -> None:
    said = attacker.shell(
        "cd /sys/fs/cgroup; for file in $(find . -name 'pids.max' -o -name 'memory.*limit_in_bytes' -o -name memory.max"
        " -o -name 'memory.*.max' -o -name 'cpu.shares' -o -name cpu.weight -o -name 'devices.allow'"
        " -o -name cgroup.max.descendants -o -name memory.oom_control -o -name memory.force_empty); do"
        "  (echo 999999999 >$file) 2>/dev/null && echo wrote $file; done; echo tried"
    )
    assert said == "tried\n"
    assert limits.problems(LIMITS.profile, attacker.cgroups) == []
    # What it can mount again is the same cgroup.
    attacker.shell("mkdir -p /tmp/c; mount -t cgroup -o pids none /tmp/c && echo 99999 >/tmp/c/pids.max")
    attacker.shell("mkdir -p /tmp/d; mount -t cgroup2 none /tmp/d && echo 99999 >/tmp/d/pids.max")
    assert limits.problems(LIMITS.profile, attacker.cgroups) == []


def test_a_fork_bomb_stays_within_its_limit_and_hurts_nobody(
    attacker: Attacker, neighbour: Attacker, pool: PoolServiceProxy
) -> None:
    with attacker.holding("forks") as made:
        count, error = made.split()
        assert error == "EAGAIN"
        assert int(count) < LIMITS.pids
        assert int(attacker.cgroup_file("pids.current")) <= LIMITS.pids
        with pytest.raises(ExecFailed, match="Resource temporarily unavailable"):
            attacker.run("terminal")
        assert is_well(neighbour)
        with pool.lease("another", TIMEOUT) as another:
            assert another.state is State.LEASED
    soon(lambda: int(attacker.cgroup_file("pids.current")) < LIMITS.pids // 2)  # its init reaps them
    assert is_well(attacker)


def test_a_container_that_bombs_is_removed_like_any_other(attacker: Attacker, real: Service) -> None:
    process = attacker.container.popen(["sh", "-c", "bomb() { bomb | bomb & }; bomb; sleep 1000"])
    soon(lambda: int(attacker.cgroup_file("pids.current")) > LIMITS.pids - 5)
    attacker.container.release()
    soon(lambda: not real.has_traces(attacker.container.name))
    process.close()


def test_a_client_that_holds_on_to_a_command_keeps_nothing_of_its_container(attacker: Attacker, real: Service) -> None:
    process = attacker.container.popen(["sh", "-c", "sleep 1000 & read line"], stdin=subprocess.PIPE)
    supervisor = psutil.Process(process.pid).parent()
    assert supervisor is not None
    assert supervisor.pid in real.marked()
    assert process.stdin is not None
    process.stdin.close()
    process.wait()
    held = supervisor.num_fds()
    attacker.container.release()
    # Else whoever leases and releases could have the supervisor run out of descriptors: its container and its control.
    soon(lambda: supervisor.num_fds() <= held - 2)
    process.close()


def test_memory_is_bounded_and_whoever_fills_it_is_killed_alone(attacker: Attacker, neighbour: Attacker) -> None:
    done = attacker.container.run(["/attack", "memory"], capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == -9
    most = int(done.stdout.splitlines()[-1].partition("=")[2])
    assert most << 20 <= LIMITS.memory
    assert peak(attacker) <= LIMITS.memory
    assert is_well(neighbour)


def held_below(directory: Path) -> int:
    """Return how many bytes the files below a directory have, as far as none goes meanwhile: the pool refills."""
    total = 0
    for place, directories, files in os.walk(directory):
        for name in (*directories, *files):
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(os.path.join(place, name)).st_size
    return total


def test_the_disk_is_bounded_and_the_hosts_stays_as_it_was(
    attacker: Attacker, neighbour: Attacker, real: Service
) -> None:
    before = shutil.disk_usage(real.state_dir).free
    said = attacker.shell("dd if=/dev/zero of=/full bs=64k; stat -c %s /full")
    assert "No space left on device" in said
    assert LIMITS.disk // 2 < int(said.split()[-1]) <= LIMITS.disk
    assert abs(shutil.disk_usage(real.state_dir).free - before) < LIMITS.disk // 2
    assert held_below(real.containers) < 1 << 20
    assert is_well(neighbour)
    assert "No space" in attacker.shell("dd if=/dev/zero of=/tmp/more bs=64k count=100")


def test_what_is_shared_memory_counts_as_memory(attacker: Attacker, neighbour: Attacker) -> None:
    # What is in it is not freed by killing: in the end its init may be killed too, and the container is reaped.
    with contextlib.suppress(LxcPoolError):
        attacker.shell("mount -o remount,size=1000m /dev/shm; dd if=/dev/zero of=/dev/shm/full bs=64k count=16000")
    used = attacker.cgroup_file("memory.max_usage_in_bytes") or attacker.cgroup_file("memory.peak")
    assert not used or int(used) <= LIMITS.memory
    assert is_well(neighbour)


def test_inotify_instances_are_shared_out(attacker: Attacker, neighbour: Attacker) -> None:
    with attacker.holding("inotify") as made:
        assert made == f"{SHARE} EMFILE"
        with neighbour.holding("inotify") as its:
            assert its == f"{SHARE} EMFILE"
        # Those of containers count against the host's root, too.
        descriptor = ctypes.CDLL(None).inotify_init1(0)
        assert descriptor >= 0
        os.close(descriptor)


def test_namespaces_of_its_own_lift_no_limit(attacker: Attacker) -> None:
    answers = attacker.run("nested")
    assert answers["mknod_disk"] == "EPERM"
    assert int(answers["inotify"].split()[0]) <= SHARE
    assert answers["remount_dev"] in ("EPERM", "EACCES")  # AppArmor, where there is one, is asked first
    count, error = attacker.run("namespaces")["netns"].split()
    assert int(count) <= 128
    assert error == "ENOSPC"


def test_users_keyrings_can_not_be_filled(attacker: Attacker) -> None:
    assert attacker.run("keyrings") == {"keys": "0"}


def test_descriptors_end_at_a_process_limit_and_then_at_memory(attacker: Attacker, neighbour: Attacker) -> None:
    with attacker.holding("descriptors") as made:
        # Where a process may have a million, memory ends it.
        assert made.endswith("EMFILE") or peak(attacker) > LIMITS.memory // 2
        assert is_well(neighbour)
    with attacker.holding("many-descriptors", "5") as made:
        assert is_well(neighbour)
        descriptor = os.open("/dev/null", os.O_RDONLY)
        os.close(descriptor)


def test_cgroups_are_bounded_where_they_cost_the_host(attacker: Attacker) -> None:
    # systemd needs the one with its name, in which there is nothing to use up but names.
    mounted = attacker.shell("awk '$3 ~ /^cgroup/ && !/name=systemd/ {print $2}' /proc/mounts").split()
    named = [tree for tree in cgroups.hierarchies() if tree.is_named]
    assert len(mounted) == len(attacker.cgroups) - len(named) > 0
    answers = attacker.run("cgroups", *mounted)
    assert len(answers) == len(mounted)
    for where, answer in answers.items():
        count, error = answer.split()
        assert int(count) < 1000, where
        assert error in ("EACCES", "EAGAIN"), where
    assert is_well(attacker)


# --- neighbours -------------------------------------------------------------------------------------------------------


def test_processes_of_others_are_neither_seen_nor_killed(attacker: Attacker, neighbour: Attacker) -> None:
    others = neighbour.container.popen(["sleep", "1000"])
    try:
        seen = attacker.shell("ls /proc | grep -c '^[0-9]'; cat /proc/*/cmdline | tr '\\0' ' '")
        assert int(seen.split()[0]) < 10
        assert "sleep 1000" not in seen
        attacker.shell(f"kill -9 {others.pid}; kill -9 -1")
        assert others.poll() is None
    finally:
        others.kill()
        others.wait()
        others.close()
    assert is_well(neighbour)


def test_abstract_sockets_of_others_and_of_the_host_are_out_of_reach(attacker: Attacker, neighbour: Attacker) -> None:
    with socket.socket(socket.AF_UNIX) as hosts, neighbour.holding("listen", "lxp-security") as bound:
        assert bound == "ok"
        assert neighbour.run("connect", "lxp-security") == {"connect": "ok"}
        assert attacker.run("connect", "lxp-security") == {"connect": "ECONNREFUSED"}
        hosts.bind("\0lxp-security-host")
        hosts.listen()
        assert attacker.run("connect", "lxp-security-host") == {"connect": "ECONNREFUSED"}


def test_liblxcs_own_socket_takes_orders_from_root_alone(attacker: Attacker, real: Service) -> None:
    name = f"{real.containers}/{attacker.container.name}/command"
    assert name in Path("/proc/net/unix").read_text()
    assert attacker.run("connect", name) == {"connect": "ECONNREFUSED"}

    def stop() -> int:
        command = ["lxc-stop", "-P", str(real.containers), "-n", attacker.container.name, "-k", "--nolock"]
        return subprocess.run(command, capture_output=True, timeout=TIMEOUT, check=False).returncode

    for uid in (STRANGER, attacker.first_id):
        assert as_person(uid, stop) != 0
    assert is_well(attacker)


def test_each_container_has_ids_that_no_other_and_nobody_else_has(
    attacker: Attacker, neighbour: Attacker, real: Service
) -> None:
    assert abs(attacker.first_id - neighbour.first_id) >= idranges.SIZE
    holders = {int(path.name): holder for path, holder in idranges.held()}
    assert holders[attacker.first_id] == str(real.containers / attacker.container.name)
    for file in idranges.SUBID_FILES:
        for line in file.read_text().splitlines() if file.exists() else ():
            _name, start, count = line.split(":")
            assert not int(start) - idranges.SIZE < attacker.first_id < int(start) + int(count)
    attacker.container.release()
    directory = real.containers / attacker.container.name
    # As long as its files are there, nobody else can have them.
    while directory.exists():
        held = {int(path.name): holder for path, holder in idranges.held()}
        assert held.get(attacker.first_id) == holders[attacker.first_id] or not directory.exists()
    soon(lambda: str(directory) not in [holder for _path, holder in idranges.held()])


@pytest.mark.parametrize("who", ["a stranger", "its root", "its neighbour's root", "a user of its"])
def test_nobody_on_the_host_gets_into_containers_or_images(
    attacker: Attacker, neighbour: Attacker, real: Service, who: str
) -> None:
    uid = {
        "a stranger": STRANGER,
        "its root": attacker.first_id,
        "its neighbour's root": neighbour.first_id,
        "a user of its": attacker.first_id + 1000,
    }[who]
    directory = real.containers / attacker.container.name
    init = attacker.container.init_pid

    def reachable() -> list[str]:
        found = []
        for path in (
            *(real.state_dir / "images", real.state_dir / "ledger.db", real.state_dir / "ledger.db-wal"),
            *(real.containers, real.state_dir, directory, directory / "config", directory / "lxc.log"),
            *(directory / "console.log", directory / "lease", real.state_dir / "ledger.db-intent"),
            *(Path(f"/proc/{init}/root/etc"), Path(f"/proc/{init}/cwd"), Path(f"/proc/{init}/environ")),
        ):
            try:
                os.close(os.open(path, os.O_RDONLY))
                found.append(str(path))
            except OSError:
                pass
        return found

    reached = as_person(uid, reachable)
    if who == "its root":
        # liblxc needs that its root goes through; and its processes are its own, wherever it is.
        reached = [path for path in reached if not path.startswith((f"/proc/{init}", str(directory / "config")))]
    assert reached == []


def test_a_container_that_filled_itself_up_is_reaped_and_the_pool_goes_on(
    attacker: Attacker, pool: PoolServiceProxy
) -> None:
    attacker.shell("dd if=/dev/zero of=/dev/shm/a bs=1M count=200 & dd if=/dev/zero of=/full bs=1M & sh -c ':'")
    attacker.container.release()
    with pytest.raises(LeaseError):
        attacker.container.renew(10)
    pool.wait_ready(timeout=TIMEOUT)


def test_the_profile_of_these_tests_is_the_unprivileged_default() -> None:
    assert LIMITS.profile == ProfileConfig(
        "default", LIMITS.size, memory=LIMITS.memory, pids=LIMITS.pids, disk=LIMITS.disk
    )


# --- other profiles ---------------------------------------------------------------------------------------------------

OTHERS = """
[profile.default]
size = 1
[profile.bound]
no_new_privs = true
[profile.rooted]
privileged = true
"""


@pytest.fixture(scope="module")
def others(images: Path) -> Iterator[PoolServiceProxy]:
    service = Service(images)
    try:
        yield service.start(config=OTHERS)
    finally:
        service.close()


def test_without_new_privileges_a_set_uid_program_is_as_any_other(
    others: PoolServiceProxy, attack_program: bytes
) -> None:
    for profile, gained in (("default", "0\n"), ("bound", "1000\n")):
        with others.lease("x", timeout=TIMEOUT, profile=profile) as container:
            it = Attacker(container, attack_program)
            # busybox keeps the right for `su` and the like alone, and `id` tells the effective uid first.
            it.shell("chmod 4755 /attack")
            answer = it.run("effective", user=1000)
            assert answer["uid"] + "\n" == gained, profile
            assert ("NoNewPrivs:\t1" in it.shell("cat /proc/self/status")) == (profile == "bound")
            if requirements.apparmor().ok:
                assert it.shell("cat /proc/self/attr/current") == f"{apparmor.PROFILE} (enforce)\n", profile


def test_a_privileged_container_has_neither_devices_nor_what_is_confined_to_no_namespace(
    others: PoolServiceProxy, attack_program: bytes
) -> None:
    """Its root is the host's root, and no more is promised: see docs/security.md. What is closed spares accidents."""
    with others.lease("x", timeout=TIMEOUT, profile="rooted") as container:
        attacker = Attacker(container, attack_program)
        assert attacker.first_id == 0
        answers = attacker.run("calls")
        for call in ("init_module", "finit_module", "delete_module", "kexec_load", "open_by_handle_at", "add_key"):
            assert answers[call] == "ENOSYS"
        assert answers["clock_settime"] == "EPERM"
        attacker.shell("mknod -m 666 /dev/disk b 8 0; mknod -m 666 /dev/kmem c 1 2; mknod -m 666 /dev/kmsg1 c 1 11")
        answers = attacker.run(
            "files", "/dev/disk", "/dev/kmem", "/dev/kmsg1", "/proc/sysrq-trigger", "/proc/sys/kernel/core_pattern"
        )
        assert "ok" not in answers.values()
        capabilities = int(attacker.shell("grep CapBnd /proc/self/status").split()[1], 16)
        for number in (16, 17, 25, 32, 33):  # sys_module, sys_rawio, sys_time, mac_override, mac_admin
            assert not capabilities >> number & 1
        if requirements.apparmor().ok:
            label = f"{apparmor.LIBLXC_PROFILE} (enforce)\n"
            assert attacker.shell("cat /proc/1/attr/current /proc/self/attr/current") == label * 2
