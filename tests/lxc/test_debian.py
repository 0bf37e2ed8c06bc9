"""Debian containers, booted by systemd: what is started in them works, privileged or not."""

from __future__ import annotations

import functools
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lxc_pool import Container, PoolServiceProxy
from lxc_pool.host import apparmor
from lxc_pool.images import imports
from lxc_pool.images.store import ImageStore
from tests.support import debian, real_service
from tests.support.real_service import ROOT, Service
from tests.support.typist import typist
from tests.support.waiting import eventually

# Seconds: the first one builds the image, which takes 20 on an idle machine.
pytestmark = [pytest.mark.host, pytest.mark.timeout(600)]

CONFIG = """\
[pool]
workers = 2
create_timeout = 60
[profile.default]
image = "debian"
size = 1
[profile.privileged]
image = "debian"
privileged = true
size = 1
"""

PROFILES = ["default", "privileged"]


@pytest.fixture(scope="module")
def debian_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image directory with the Debian image."""
    if (reason := real_service.missing()) is not None:
        pytest.skip(reason)
    images = tmp_path_factory.mktemp("debian") / "images"
    debian.lend_images(images)
    return images


@pytest.fixture(scope="module")
def debian_service(debian_images: Path) -> Iterator[Service]:
    service = Service(debian_images)
    try:
        service.start(config=CONFIG)
        yield service
    finally:
        service.close()


@pytest.fixture
def debian_pool(debian_service: Service) -> Iterator[PoolServiceProxy]:
    with debian_service.connect() as pool:
        pool.wait_ready(timeout=90)
        yield pool


@pytest.fixture(params=PROFILES)
def container(debian_pool: PoolServiceProxy, request: pytest.FixtureRequest) -> Iterator[Container]:
    with debian_pool.lease("debian", timeout=60, profile=request.param) as container:
        yield container


def sh(container: Container, script: str, timeout: float = 30.0) -> str:
    """Run a script; return what it writes, or fail with it."""
    done = container.run(
        ["bash", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout
    )
    assert done.returncode == 0, f"{script}: {done.returncode}: {done.stdout}"
    assert isinstance(done.stdout, str)
    return done.stdout


def skip_if_apparmor_forbids(container: Container) -> None:
    """Skip a test of mounts that liblxc's AppArmor profile forbids, which only privileged containers have."""
    if container.profile == "privileged" and apparmor.is_on():
        pytest.skip("systemd can't make its mounts in privileged containers of a host with AppArmor")


def test_it_has_booted_when_it_is_handed_out_and_nothing_has_failed(container: Container) -> None:
    skip_if_apparmor_forbids(container)
    state = container.run(["systemctl", "is-system-running"], capture_output=True, text=True, timeout=30)
    failed = sh(container, "systemctl --failed --no-legend --plain; journalctl -b -p err --no-pager -q")
    assert (state.stdout, failed) == ("running\n", "")


def test_a_service_is_started_stopped_and_answers(container: Container) -> None:
    sh(container, "systemctl restart cron nginx ssh && systemctl is-active cron nginx ssh")
    page = sh(container, r"exec 3<>/dev/tcp/127.0.0.1/80; printf 'GET / HTTP/1.0\r\n\r\n' >&3; cat <&3")
    assert page.startswith("HTTP/1.1 200 OK")
    assert sh(container, "exec 3<>/dev/tcp/127.0.0.1/22; head -c 4 <&3") == "SSH-"
    sh(container, "systemctl stop nginx; ! systemctl is-active nginx; ! pgrep nginx")


def test_a_unit_may_have_limits_and_a_place_of_its_own(container: Container) -> None:
    skip_if_apparmor_forbids(container)
    sh(
        container,
        "systemd-run --quiet --wait -p MemoryMax=64M -p TasksMax=20 -p PrivateTmp=yes -p DynamicUser=yes true",
    )
    assert sh(container, "systemd-run --quiet --pipe -p ProtectSystem=strict sh -c 'touch /usr/x || echo no'") == (
        "touch: cannot touch '/usr/x': Read-only file system\nno\n"
    )


PLACES = [
    *("PrivateTmp=yes", "ProtectSystem=strict", "ProtectHome=yes", "ProtectProc=invisible", "PrivateDevices=yes"),
    *("ProtectKernelTunables=yes", "ProtectControlGroups=yes", "ProtectKernelLogs=yes", "ProtectHostname=yes"),
    *("TemporaryFileSystem=/srv", "InaccessiblePaths=/srv", "BindReadOnlyPaths=/etc:/srv", "DynamicUser=yes"),
    *("PrivateUsers=yes", "PrivateNetwork=yes", "LoadCredential=x:/etc/passwd"),
]
"""What systemd makes mounts and namespaces for. Source: systemd.exec(5), "Sandboxing"."""


def test_units_may_be_shut_in_as_systemd_can(debian_pool: PoolServiceProxy) -> None:
    """Not in privileged containers where the host has AppArmor: they have liblxc's profile, which forbids it."""
    with debian_pool.lease("debian", timeout=60) as container:
        units = "; ".join(f"systemd-run --quiet --wait -p {place} true || echo {place}" for place in PLACES)
        assert sh(container, units, 120) == ""


def test_what_is_logged_is_in_the_journal(container: Container) -> None:
    sh(
        container,
        "logger --tag lxc-pool-test hello; journalctl --sync; journalctl -t lxc-pool-test -o cat -q | grep -x hello",
    )


def test_what_systemd_said_when_it_booted_is_on_the_console(container: Container) -> None:
    said = container.console_log()
    assert "Welcome to Debian GNU/Linux" in said
    assert "Started cron.service" in said
    assert "\x1b" not in said
    sh(container, "! pgrep agetty")
    # As a login does, before and afterwards, and all that nobody has read yet is lost then.
    hang_up = "-p TTYPath=/dev/console -p TTYVHangup=yes -p TTYReset=yes -p StandardInput=tty -p StandardOutput=tty"
    sh(container, f"systemd-run --quiet --wait {hang_up} true; echo and after a hangup >/dev/console")
    eventually(lambda: container.console_log(1) == "and after a hangup\n", "the console goes on")


def test_what_is_mounted_reaches_units_that_run_with_mounts_of_their_own(container: Container, tmp_path: Path) -> None:
    skip_if_apparmor_forbids(container)
    (tmp_path / "file").write_text("words\n")
    script = "echo up; until [ -e /srv/x/file ]; do sleep 0.05; done; cat /srv/x/file"
    command = ["systemd-run", "--quiet", "--wait", "--pipe", "-p", "PrivateTmp=yes", "sh", "-c", script]
    with container.popen(command, stdout=subprocess.PIPE, text=True) as unit:
        assert unit.stdout is not None
        assert unit.stdout.readline() == "up\n"
        container.mount(tmp_path, "/srv/x")
        assert unit.communicate(timeout=30)[0] == "words\n"
    (line,) = [line for line in sh(container, "cat /proc/self/mountinfo").splitlines() if " /srv/x " in line]
    assert "shared:" not in line
    container.unmount("/srv/x")
    assert sh(container, "ls /srv/x") == ""


def test_a_command_is_run_as_subprocess_would(container: Container) -> None:
    done = container.run(
        ["bash", "-c", "tr a-z A-Z; exit 200"], input="hello", capture_output=True, text=True, timeout=30
    )
    assert (done.returncode, done.stdout) == (200, "HELLO")
    assert container.run(["bash", "-c", "kill -TERM $$"], timeout=30).returncode == -15
    script = ["bash", "-c", "echo $(id -un) $PWD $HOME $MINE; env | wc -l"]
    done = container.run(script, user="user", cwd="/srv", env={"MINE": "1"}, capture_output=True, timeout=30)
    assert done.stdout == b"user /srv /home/user 1\n8\n"  # PATH, HOME, USER, LANG, MINE; bash's PWD, SHLVL and _
    for program, error in (("no-such-program", FileNotFoundError), ("/etc/passwd", PermissionError)):
        with pytest.raises(error) as caught:
            container.run([program], timeout=30)
        assert caught.value.filename == program
    with pytest.raises(subprocess.TimeoutExpired) as late:
        container.run(["bash", "-c", "echo begun; setsid sleep 1000 & sleep 1000"], stdout=subprocess.PIPE, timeout=2)
    assert late.value.output == b"begun\n"
    assert sh(container, "pgrep -x sleep || echo none") == "none\n"


def test_what_systemd_puts_into_a_scope_is_the_commands_still_and_a_service_is_not(container: Container) -> None:
    sh(container, "systemctl start nginx")
    scope = "systemd-run --quiet --scope bash -c 'cat /proc/self/cgroup; echo begun; (setsid sleep 1000 &); sleep 1000'"
    with container.popen(["bash", "-c", f"{scope}; true"], stdout=subprocess.PIPE, text=True) as command:
        assert command.stdout is not None
        said = list(iter(command.stdout.readline, "begun\n"))
        assert [line for line in said if ".scope" in line]
        eventually(lambda: sh(container, "pgrep -x -c sleep") == "2\n", "they sleep")
        command.kill_tree()
    assert sh(container, "pgrep -x sleep || echo none; systemctl is-active nginx") == "none\nactive\n"


def test_files_go_in_and_come_back(container: Container, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "below").mkdir(parents=True)
    (tree / "below/tool").write_text("#!/bin/bash\necho works\n")
    (tree / "below/tool").chmod(0o750)
    (tree / "link").symlink_to("/etc/hostname")
    with (tree / "sparse").open("wb") as file:
        file.truncate(300 << 20)
    container.push(tree, "/home/user/new/tree", owner="user", parents=True)
    assert sh(container, "find /home/user/new -exec stat -c %U:%G {} + | sort -u") == "user:user\n"
    assert sh(container, "stat -c '%a %N' /home/user/new/tree/{below/tool,link}; /home/user/new/tree/below/tool") == (
        "750 '/home/user/new/tree/below/tool'\n777 '/home/user/new/tree/link' -> '/etc/hostname'\nworks\n"
    )
    sh(container, "mkfifo /home/user/new/tree/fifo")
    copied = container.pull("/home/user/new/tree", tmp_path / "back")
    assert copied.skipped == ("/fifo",)
    assert os.readlink(tmp_path / "back/link") == "/etc/hostname"
    assert (tmp_path / "back/below/tool").read_text() == (tree / "below/tool").read_text()
    assert (tmp_path / "back/below/tool").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "back/sparse").stat().st_size == 300 << 20
    assert (tmp_path / "back/sparse").stat().st_blocks < 100
    with pytest.raises(OSError, match="more than max_"):
        container.pull("/usr", tmp_path / "usr", max_entries=50)
    assert not (tmp_path / "usr").exists()


def test_what_is_mounted_can_not_be_made_writable(container: Container, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("words\n")
    container.mount(tmp_path, "/srv/read")
    container.mount(tmp_path, "/srv/write", readonly=False)
    sh(container, "! mount -o remount,bind,rw /srv/read; ! touch /srv/read/x; cat /srv/read/file; touch /srv/write/x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "x"]
    for path in ("/srv/read", "/srv/write"):
        container.unmount(path)
    assert sh(container, "ls /srv/read /srv/write") == "/srv/read:\n\n/srv/write:\n"


def test_it_knows_its_name_and_nothing_of_the_hosts(container: Container) -> None:
    assert sh(container, "hostname; getent hosts $(hostname) >/dev/null && echo found") == f"{container.name}\nfound\n"
    assert sh(container, "cat /etc/resolv.conf; ls /etc/hostname 2>&1 | grep -c 'No such file'") == "1\n"
    assert sh(container, "grep -rl 'lxc_pool\\|00lxc-pool' /etc | wc -l") == "0\n"


def test_no_two_containers_are_one_machine(debian_pool: PoolServiceProxy) -> None:
    ids = set()
    for profile in PROFILES:
        with debian_pool.lease("debian", timeout=60, profile=profile) as container:
            ids.add(sh(container, "cat /etc/machine-id"))
    assert len(ids) == 2
    assert all(len(machine_id.strip()) == 32 for machine_id in ids)


def test_its_users_may_log_in(container: Container) -> None:
    assert sh(container, "su - user -c 'id -un; pwd; touch x && ls'") == "user\n/home/user\nx\n"


def test_packages_may_be_removed_and_configured(container: Container) -> None:
    sh(container, "dpkg --purge --force-depends cron && ! systemctl is-active cron && ! test -e /usr/sbin/cron", 60)
    sh(container, "apt-get check && dpkg --configure -a")


@pytest.mark.parametrize("profile", PROFILES)
def test_a_released_one_is_gone_at_once(debian_service: Service, debian_pool: PoolServiceProxy, profile: str) -> None:
    container = debian_pool.get("debian", 60, profile=profile)
    assert container is not None
    sh(container, "systemctl start nginx; setsid sleep infinity >/dev/null 2>&1 & true")
    began = time.monotonic()
    container.release()
    eventually(lambda: not debian_service.has_traces(container.name), "it is removed")
    assert time.monotonic() - began < 5  # 0.05 to 0.1 s on an idle machine


def test_a_probe_of_the_profile_comes_before_the_images(debian_images: Path) -> None:
    service = Service(debian_images)
    config = CONFIG + 'probe = ["sh", "-c", "echo never; false"]\n'
    try:
        pool = service.start(config=config.replace("create_timeout = 60", "create_timeout = 6"))
        eventually(
            lambda: "echo never" in (pool.status().last_error or ""), "the profile's probe has failed", timeout=30
        )
        pool.wait_ready(1, timeout=60)
    finally:
        service.close()


def tells(pool: PoolServiceProxy, profile: str, words: str) -> bool:
    """Return whether that is why a profile is not ready."""
    return words in str(pool.status().profiles[profile].last_error)


def test_a_profiles_probe_waits_for_the_system_or_for_a_service_and_no_longer_than_it_may(debian_images: Path) -> None:
    service = Service(debian_images)
    config = """
    [pool]
    workers = 2
    create_timeout = 60
    [profile.default]
    image = "debian"
    size = 1
    probe = ["systemctl", "is-system-running", "--wait"]
    probe_timeout = 60
    [profile.web]
    image = "debian"
    probe = ["sh", "-c", "systemctl start nginx && systemctl is-active $UNIT"]
    env = { UNIT = "nginx" }
    [profile.never]
    image = "debian"
    probe = ["systemctl", "is-active", "--wait", "no-such.service"]
    probe_timeout = 3
    [profile.hangs]
    image = "debian"
    probe = ["sh", "-c", "systemctl is-system-running --wait; systemd-run --quiet --wait sleep 1000"]
    probe_timeout = 8
    """
    try:
        pool = service.start(config=config)
        with pool.lease("x", timeout=100) as container:
            assert sh(container, "systemctl is-system-running") == "running\n"
        with pool.lease("x", timeout=100, profile="web") as container:
            assert sh(container, "systemctl is-active nginx") == "active\n"
        for profile, words in (("never", "still ends with"), ("hangs", "has not ended in time: running")):
            eventually(functools.partial(tells, pool, profile, words), words, timeout=100)
        assert "a lane hangs" not in service.log
    finally:
        service.close()


def test_a_degraded_system_counts_as_booted(debian_images: Path, tmp_path: Path) -> None:
    """And a tree like Debian's survives being imported."""
    (image,) = ImageStore(debian_images).list()
    root = tmp_path / "root"
    subprocess.run(["cp", "-al", image.rootfs, root], check=True)
    unit = "[Service]\nType=oneshot\nExecStart=/bin/false\n[Install]\nWantedBy=multi-user.target\n"
    (root / "etc/systemd/system/broken.service").write_text(unit)
    (root / "etc/systemd/system/multi-user.target.wants/broken.service").symlink_to("../broken.service")
    (root / "etc/systemd/system/sys-kernel-debug.mount").unlink()
    imported = ImageStore(tmp_path / "images").build("broken", lambda _line: None, imports.builder(str(root)))
    assert imported.probe == image.probe
    service = Service(tmp_path / "images")
    try:
        pool = service.start(config='[pool]\ncreate_timeout = 60\n[profile.default]\nimage = "broken"\nsize = 1\n')
        with pool.lease("x", timeout=90) as container:
            state = container.run(["systemctl", "is-system-running"], capture_output=True, text=True, timeout=30)
            assert state.stdout == "degraded\n"
            assert "broken.service" in sh(container, "systemctl --failed --no-legend --plain")
            sh(container, "systemctl start nginx")
    finally:
        service.close()


def test_bash_at_a_terminal_has_job_control(container: Container, debian_service: Service) -> None:
    with typist(debian_service.command("exec", container.name, "--", "bash", "--norc"), ROOT) as somebody:
        somebody.sees(b"bash-[0-9.]+# ")
        somebody.type(b"tty; stty size; echo $TERM\n")
        somebody.sees(rb"/dev/pts/\d+\r\n24 80\r\nvt220\r\n")
        somebody.type(b"sh -c 'while read x; do echo got $x; done'\n")
        for word in (b"first", b"second"):
            somebody.type(word + b"\n")
            somebody.sees(b"got " + word + b"\r\n")
            somebody.type(b"\x1a")
            somebody.sees(b"Stopped")
            somebody.type(b"fg\n")
        somebody.type(b"third\n")
        somebody.sees(b"got third\r\n")
        somebody.type(b"\x03")
        somebody.sees(b"bash-[0-9.]+# ")
        somebody.type(b"exit 3\n")
        assert somebody.ends() == 3
        assert b"no job control" not in somebody.shown
        assert somebody.is_as_before
