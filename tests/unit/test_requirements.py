"""What `lxc-pool check` finds out about a host, and that looking leaves nothing behind."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from ipaddress import IPv4Network
from pathlib import Path
from types import ModuleType

import pytest

from lxc_pool.config import NetworkConfig
from lxc_pool.errors import ImageError
from lxc_pool.host import apparmor, bridge, cgroups, firewall, requirements
from lxc_pool.images import busybox

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def answer(returncode: int, stdout: str = "", stderr: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess([], returncode, stdout, stderr)


def test_each_failure_names_its_fix_and_each_success_none(tmp_path: Path) -> None:
    found = requirements.check(tmp_path)
    assert len({requirement.name for requirement in found}) == len(found)
    for requirement in found:
        assert requirement.detail
        assert bool(requirement.fix) is not requirement.ok, requirement


def test_looking_leaves_nothing(tmp_path: Path) -> None:
    before = Path("/proc/self/mountinfo").read_text()
    requirements.check(tmp_path / "not/there/yet")
    assert list(tmp_path.iterdir()) == []
    assert Path("/proc/self/mountinfo").read_text() == before


def test_looking_does_not_load_liblxc() -> None:
    program = (
        "import sys; from pathlib import Path; from lxc_pool.host import requirements\n"
        "requirements.check(Path('/tmp')); assert not {'lxc', '_lxc'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    ("system", "release", "ok", "advice"),
    [
        ("Linux", "6.1.0-18-amd64", True, False),
        ("Linux", "5.19", True, False),
        ("Linux", "5.10.0-28", False, True),
        ("Linux", "5.4.0", False, False),
        ("Linux", "unknown", False, False),
        ("Darwin", "23.4.0", False, False),
    ],
)
def test_a_kernel_is_judged_by_its_version(system: str, release: str, ok: bool, advice: bool) -> None:
    found = requirements.kernel(system, release)
    assert (found.ok, found.advice) == (ok, advice)
    assert release in found.detail


def test_another_user_than_root_is_told_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "as root" in requirements.root().fix
    assert "as root" in requirements.overlay(tmp_path).fix


def test_missing_lxc_programs_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda program: None if program == "lxc-attach" else program)
    found = requirements.lxc_programs()
    assert (found.ok, found.detail, found.fix) == (False, "not found: lxc-attach", "apt-get install lxc")


@pytest.mark.parametrize(
    ("reply", "detail"),
    [
        (answer(0, "3.0.4\n"), "liblxc 3.0.4"),
        (answer(127, stderr="liblxc.so.1: cannot open shared object file\n"), "lxc-start --version: liblxc.so.1"),
    ],
)
def test_old_or_broken_lxc_programs_are_reported(
    monkeypatch: pytest.MonkeyPatch, reply: subprocess.CompletedProcess[str], detail: str
) -> None:
    monkeypatch.setattr("shutil.which", lambda program: program)
    monkeypatch.setattr(requirements, "_run", lambda _command: reply)
    found = requirements.lxc_programs()
    assert not found.ok
    assert found.detail.startswith(detail)


def test_current_lxc_programs_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda program: program)
    monkeypatch.setattr(requirements, "_run", lambda _command: answer(0, "6.0.4\n"))
    assert requirements.lxc_programs() == requirements.Requirement("lxc", True, "liblxc 6.0.4")


def test_a_binding_that_python_does_not_find_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert "lxc-dev" in requirements.python_binding().fix


def test_a_directory_called_lxc_is_no_binding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "lxc").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert not requirements.python_binding().ok


def test_a_missing_busybox_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def find() -> Path:
        raise ImageError("no static busybox")

    monkeypatch.setattr(busybox, "find", find)
    assert requirements.static_busybox().fix == "apt-get install busybox-static"


def test_a_host_without_cgroups_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "hierarchies", lambda: ())
    assert "mount -t cgroup2" in requirements.control_groups().fix


@needs_root
@pytest.mark.parametrize("name", ["plain", "comma,colon:blank "])
def test_an_overlay_works_whatever_the_state_dir_is_called(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    found = requirements.overlay(tmp_path / name)
    assert found.ok, found
    assert list((tmp_path / name).iterdir()) == []


@needs_root
def test_an_overlay_is_no_place_for_upper_directories(tmp_path: Path) -> None:
    for name in ("lower", "upper", "work", "merged"):
        (tmp_path / name).mkdir()
    program = (
        "import sys; from pathlib import Path; from lxc_pool.host import requirements\n"
        "found = requirements.overlay(Path(sys.argv[1])); print(found.ok, found.fix)"
    )
    script = 'mount -t overlay overlay -o lowerdir=lower,upperdir=upper,workdir=work merged && exec "$@"'
    checked = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", sys.executable, "-c", program, str(tmp_path / "merged")],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(requirements.__file__).parents[2])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert checked.stdout.startswith("False put the state dir (--state-dir) on ext4")
    assert list((tmp_path / "upper").iterdir()) == []


@needs_root
@pytest.mark.parametrize(
    ("stderr", "known", "fix"),
    [
        ("unshare: unshare failed: Operation not permitted", True, "CAP_SYS_ADMIN"),
        ("mount: unknown filesystem type 'overlay'.", False, "modprobe overlay"),
        ("mount: wrong fs type", True, "--state-dir"),
    ],
)
def test_why_an_overlay_fails_decides_the_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stderr: str, known: bool, fix: str
) -> None:
    monkeypatch.setattr(requirements, "_run", lambda _command, cwd: answer(32, stderr=f"{stderr}\n"))  # noqa: ARG005
    monkeypatch.setattr(requirements, "_knows_overlay", lambda: known)
    found = requirements.overlay(tmp_path)
    assert stderr in found.detail
    assert fix in found.fix


@needs_root
def test_a_state_dir_that_can_not_be_written_is_reported() -> None:
    found = requirements.overlay(Path("/proc/sys"))
    assert not found.ok
    assert "can write" in found.fix


def test_the_kernel_knows_overlay_once_one_was_mounted() -> None:
    assert isinstance(requirements._knows_overlay(), bool)


@pytest.mark.parametrize(("limit", "ok"), [(None, False), (0, False), (15000, True)])
def test_user_namespaces_need_a_limit_above_zero(monkeypatch: pytest.MonkeyPatch, limit: int | None, ok: bool) -> None:
    monkeypatch.setattr(requirements, "_number", lambda _path: limit)
    found = requirements.user_namespaces()
    assert (found.ok, bool(found.fix)) == (ok, not ok)


@pytest.mark.parametrize(("hard", "ok"), [(1024, False), (65536, True), (resource.RLIM_INFINITY, True)])
def test_the_hard_limit_of_descriptors_is_what_counts(monkeypatch: pytest.MonkeyPatch, hard: int, ok: bool) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (64, hard))
    found = requirements.descriptors()
    assert (found.ok, bool(found.fix)) == (ok, not ok)


@pytest.mark.parametrize(("limit", "ok"), [(None, False), (128, False), (8192, True)])
def test_few_inotify_instances_are_advice_only(monkeypatch: pytest.MonkeyPatch, limit: int | None, ok: bool) -> None:
    monkeypatch.setattr(requirements, "_number", lambda _path: limit)
    found = requirements.inotify()
    assert found.ok is ok
    assert found.ok or found.advice


@pytest.mark.parametrize(("value", "ok"), [(None, True), (0, True), (1, False), (2, True)])
def test_a_host_that_opens_who_changes_its_user_is_told_so(
    monkeypatch: pytest.MonkeyPatch, value: int | None, ok: bool
) -> None:
    monkeypatch.setattr(requirements, "_number", lambda _path: value)
    found = requirements.changes_of_user()
    assert (found.ok, found.advice, bool(found.fix)) == (ok, not ok, not ok)


def test_a_program_that_hangs_or_is_missing_counts_as_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "_TIMEOUT", 0.01)
    assert requirements._run(["sleep", "60"]).returncode == 127
    assert requirements._run(["/nonexistent/program"]).returncode == 127


def test_a_number_that_is_not_there_is_none(tmp_path: Path) -> None:
    assert requirements._number(str(tmp_path / "absent")) is None
    (tmp_path / "word").write_text("max\n")
    assert requirements._number(str(tmp_path / "word")) is None


def test_a_bridge_is_looked_at_only_if_a_profile_wants_one(tmp_path: Path) -> None:
    assert "bridge" not in {requirement.name for requirement in requirements.check(tmp_path)}
    found = {requirement.name: requirement for requirement in requirements.check(tmp_path, NetworkConfig(dns=()))}
    assert found["bridge"].detail


def test_what_a_bridge_needs_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "ip").touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = requirements.bridge_network(NetworkConfig(), "000000")
    assert (found.ok, found.detail, found.fix) == (False, "not found: nft", "apt-get install nftables")


@needs_root
@pytest.mark.parametrize(("slow", "tool"), [("nft --check -f -", firewall), ("ip -json", bridge)])
def test_a_program_that_does_not_end_is_told_as_that_and_not_as_a_kernel_without_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, slow: str, tool: ModuleType
) -> None:
    program = slow.partition(" ")[0]
    (tmp_path / program).write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(tool, "_TIMEOUT", 0.1)
    found = requirements.bridge_network(NetworkConfig(dns=()), "000000")
    assert not found.ok
    assert f"`{slow}" in found.detail
    assert "did not end within 0.1 s" in found.detail
    assert found.fix.startswith("check again when the host is less busy")
    assert "CONFIG" not in found.fix


@needs_root
def test_a_subnet_that_is_in_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = [{"ifname": "eth7", "addr_info": [{"local": "10.60.0.1", "prefixlen": 24}]}]
    monkeypatch.setattr(bridge, "_ip", lambda *_arguments: addresses if "address" in _arguments else [])
    monkeypatch.setattr(shutil, "which", lambda program: f"/usr/sbin/{program}")
    found = requirements.bridge_network(NetworkConfig(subnet=IPv4Network("10.60.0.0/25"), dns=()), "000000")
    assert not found.ok
    assert "overlaps 10.60.0.1/24 on eth7" in found.fix


class Sysfs:
    """A tree as sysfs and securityfs show AppArmor; both recorded on Debian 12, Linux 6.1."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.security = root / "kernel/security"
        self.security.mkdir(parents=True)

    def switch(self, value: str) -> None:
        parameters = self.root / "module/apparmor/parameters"
        parameters.mkdir(parents=True)
        (parameters / "enabled").write_text(f"{value}\n")

    def load(self, *profiles: str) -> None:
        (self.security / "apparmor").mkdir()
        (self.security / "apparmor/profiles").write_text("".join(f"{profile}\n" for profile in profiles))


@pytest.fixture
def sysfs(tmp_path: Path) -> Sysfs:
    return Sysfs(tmp_path)


LOADED = (
    "lxc-container-default-with-nesting (enforce)",
    "lxc-container-default (enforce)",
    "/usr/bin/lxc-start (enforce)",
)


LIBLXCS, OURS = "lxc-container-default-cgns (enforce)", "lxc-pool-container (enforce)"


def test_apparmor_with_our_profile_and_liblxcs_is_well(sysfs: Sysfs) -> None:
    sysfs.switch("Y")
    sysfs.load(*LOADED, LIBLXCS, OURS)
    found = requirements.apparmor(sysfs.root)
    assert (found.ok, found.fix) == (True, "")
    assert found.detail == "lxc-pool-container is enforced; lxc-container-default-cgns if privileged"


def test_that_liblxcs_stricter_profile_is_used_for_ours_is_told(sysfs: Sysfs) -> None:
    sysfs.switch("Y")
    sysfs.load(*LOADED, LIBLXCS)
    found = requirements.apparmor(sysfs.root)
    assert (found.ok, found.advice, found.fix) == (False, True, "lxc-pool setup")
    assert "lxc-pool-container is not loaded: lxc-container-default-cgns is used in its place" in found.detail


def test_a_host_without_apparmor_is_advised_to_have_it(sysfs: Sysfs) -> None:
    absent = requirements.apparmor(sysfs.root)
    sysfs.switch("N")
    off = requirements.apparmor(sysfs.root)
    assert absent == off
    assert (off.ok, off.advice) == (False, True)
    assert "boot with apparmor=1 security=apparmor" in off.fix


def test_a_profile_that_is_not_loaded_is_lacking_for_nothing_starts_then(sysfs: Sysfs) -> None:
    sysfs.switch("Y")
    sysfs.load(*LOADED)
    found = requirements.apparmor(sysfs.root)
    assert (found.ok, found.advice) == (False, False)
    assert "lxc-container-default-cgns is not loaded, without which no container starts" in found.detail
    assert "apparmor_parser -r" in found.fix


def test_without_liblxcs_profile_only_privileged_containers_do_not_start_if_ours_is_there(sysfs: Sysfs) -> None:
    sysfs.switch("Y")
    sysfs.load(*LOADED, OURS)
    found = requirements.apparmor(sysfs.root)
    assert (found.ok, found.advice) == (False, True)
    assert "lxc-container-default-cgns is not loaded, without which no privileged container starts" in found.detail


@pytest.mark.parametrize(
    ("profiles", "until_then"),
    [
        (("lxc-container-default-cgns (complain)", OURS), "until then it forbids containers nothing"),
        ((LIBLXCS, "lxc-pool-container (complain)"), "until then lxc-container-default-cgns is used in its place"),
    ],
)
def test_a_profile_that_only_complains_is_advised_against(
    sysfs: Sysfs, profiles: tuple[str, str], until_then: str
) -> None:
    sysfs.switch("Y")
    sysfs.load(*LOADED, *profiles)
    found = requirements.apparmor(sysfs.root)
    assert (found.ok, found.advice) == (False, True)
    assert "in mode complain" in found.detail
    assert until_then in found.fix


def test_securityfs_that_is_not_mounted_is_named(sysfs: Sysfs) -> None:
    sysfs.switch("Y")
    found = requirements.apparmor(sysfs.root)
    assert (found.ok, found.advice) == (False, False)
    assert found.fix == f"mount -t securityfs securityfs {sysfs.security}"


def test_the_profiles_can_be_seen_by_root_alone(sysfs: Sysfs, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_path: Path, **_how: str) -> str:
        raise PermissionError

    sysfs.switch("Y")
    monkeypatch.setattr(apparmor, "is_on", lambda _sysfs: True)
    monkeypatch.setattr(Path, "read_text", refuse)
    assert requirements.apparmor(sysfs.root).fix == "run this check as root"
