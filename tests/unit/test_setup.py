"""`lxc-pool setup`, on trees that stand for a system: nothing of this machine is changed."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lxc_pool import config
from lxc_pool.cli.main import main
from lxc_pool.errors import ConfigError
from lxc_pool.host import apparmor, setup, systemd
from lxc_pool.host.setup import Site, Step
from tests.support.processes import as_nobody

needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("groupadd") is None, reason="needs root and groupadd, as setup does"
)

UNIT, SYSCTL, CONFIG = "etc/systemd/system/lxc-pool.service", "etc/sysctl.d/60-lxc-pool.conf", "etc/lxc-pool.toml"
APPARMOR = "etc/apparmor.d/lxc-pool"


@pytest.fixture
def system(tmp_path: Path) -> Path:
    """The root directory of a system with systemd, as an image has it."""
    root = tmp_path / "system"
    (root / "etc/apparmor.d").mkdir(parents=True)
    (root / "etc/group").write_text("root:x:0:\n")
    (root / "usr/lib/systemd").mkdir(parents=True)
    (root / "usr/lib/systemd/systemd").touch()
    return root


@pytest.fixture(autouse=True)
def this_machine_is_left_alone() -> Iterator[None]:
    """What setup writes is below a tree of the test's; should it not be, that is to be seen."""
    paths = [Path("/") / path for path in (UNIT, SYSCTL, CONFIG, APPARMOR)]

    def state() -> list[object]:
        return [path.exists() and path.stat().st_mtime_ns for path in paths]

    before = state()
    yield
    assert state() == before
    assert "\ntesters:" not in Path("/etc/group").read_text()


def changed(site: Site) -> dict[str, bool]:
    return {step.name: step.changed for step in setup.set_up(site)}


@needs_root
def test_everything_is_made_once(system: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["setup", "--root", str(system)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["done", "group"], ["done", "configuration"], ["done", "unit"], ["done", "limits"], ["done", "apparmor"]
    ]  # fmt: skip
    assert re.search(r"^lxc-pool:[^:]*:\d+:$", (system / "etc/group").read_text(), re.MULTILINE)
    assert (system / SYSCTL).read_text().splitlines()[1:] == ["fs.inotify.max_user_instances = 8192"]
    assert "\nprofile lxc-pool-container " in (system / APPARMOR).read_text()
    for path in (UNIT, SYSCTL, CONFIG, APPARMOR):
        assert (system / path).stat().st_mode & 0o777 == 0o644
    made = {path: path.stat().st_mtime_ns for path in system.rglob("*")}
    assert main(["setup", "--root", str(system)]) == 0
    assert all(line.startswith("ok ") for line in capsys.readouterr().out.splitlines())
    assert {path: path.stat().st_mtime_ns for path in system.rglob("*")} == made


def test_a_dry_run_says_what_it_would_do_and_does_nothing(system: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(system.rglob("*"))
    assert main(["setup", "--dry-run", "--root", str(system)]) == 0
    assert all(line.startswith("would ") for line in capsys.readouterr().out.splitlines())
    assert main(["setup", "--dry-run", "--json", "--root", str(system)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["changed"], document["dry_run"], len(document["steps"])) == (True, True, 5)
    assert sorted(system.rglob("*")) == before


@needs_root
def test_whoever_is_not_root_is_refused_before_anything_is_done(system: Path) -> None:
    system.parent.chmod(0o777)
    before = sorted(system.rglob("*"))
    assert as_nobody(lambda: main(["setup", "--root", str(system)])) == 4
    assert sorted(system.rglob("*")) == before


@needs_root
def test_what_an_administrator_has_written_is_kept(system: Path) -> None:
    words = {CONFIG: '[access]\ngroup = "testers"\n', UNIT: "[Service]\nExecStart=mine\n", SYSCTL: "# mine\n"}
    words[APPARMOR] = "profile lxc-pool-container {}\n"
    for path, text in words.items():
        (system / path).parent.mkdir(parents=True, exist_ok=True)
        (system / path).write_text(text)
    kept = dict.fromkeys(("configuration", "unit", "limits", "apparmor"), False)
    assert changed(Site(system)) == {"group": True, **kept}
    assert {path: (system / path).read_text() for path in words} == words
    assert "\ntesters:" in (system / "etc/group").read_text(), "the group that the configuration names"


@needs_root
def test_a_file_of_ours_is_brought_up_to_date(system: Path, tmp_path: Path) -> None:
    changed(Site(system))
    other = Site(system, host_dir=tmp_path / "a b", state_dir=tmp_path / "state")
    (system / APPARMOR).write_text(f"{setup.MARK}\nprofile lxc-pool-of-old {{}}\n")
    stays = dict.fromkeys(("group", "configuration", "limits"), False)
    assert changed(other) == {**stays, "unit": True, "apparmor": True}
    assert (system / APPARMOR).read_text() == apparmor.TEXT.read_text()
    assert f'--host-dir "{tmp_path}/a b" --state-dir {tmp_path}/state\n' in (system / UNIT).read_text()


@needs_root
def test_without_systemd_there_is_no_unit(system: Path) -> None:
    (system / "usr/lib/systemd/systemd").unlink()
    (step,) = [step for step in setup.set_up(Site(system)) if step.name == "unit"]
    assert (step.changed, "no systemd" in step.detail) == (False, True)
    assert not (system / UNIT).exists()


def test_limits_are_raised_at_once_and_never_lowered(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    current = system / "current"
    monkeypatch.setattr(setup, "_SYSTEM", system)  # as if it ran
    monkeypatch.setattr(setup, "_proc", lambda _name: current)
    current.write_text("100000\n")
    assert setup._limits(Site(system)).changed  # it may be so for this boot alone
    assert "fs.inotify.max_user_instances = 100000\n" in (system / SYSCTL).read_text()
    assert not setup._limits(Site(system)).changed
    assert current.read_text() == "100000\n"
    (system / SYSCTL).unlink()
    current.write_text("128\n")
    assert setup._limits(Site(system, execute=False)).changed
    assert current.read_text() == "128\n"
    assert "raised: fs.inotify.max_user_instances = 8192" in setup._limits(Site(system)).detail
    assert current.read_text() == "8192\n"
    assert not setup._limits(Site(system)).changed
    (system / SYSCTL).unlink()
    assert setup._limits(Site(system)).changed, "set up again in the boot in which it was removed"
    assert "fs.inotify.max_user_instances = 8192\n" in (system / SYSCTL).read_text()
    current.unlink()
    assert "raised" not in setup._limits(Site(system)).detail, "a kernel without it"


class Kernel:
    """A system that runs, with AppArmor: what setup asks of its kernel, and whether the parser works."""

    def __init__(self, system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.loaded: str | None = None
        self.problem: str | None = None
        self.disabled = False
        self.confined = 0
        monkeypatch.setattr(setup, "_SYSTEM", system)
        monkeypatch.setattr(apparmor, "is_on", lambda: True)
        monkeypatch.setattr(apparmor, "is_enforced", lambda _profile: self.loaded is not None)
        monkeypatch.setattr(apparmor, "load", self._load)
        monkeypatch.setattr(apparmor, "unload", self._unload)
        monkeypatch.setattr(apparmor, "confined", lambda _profile: self.confined)

    def has_it(self) -> bool:
        return self.loaded is not None

    def _load(self, path: Path) -> str | None:
        if self.problem is None and not self.disabled:
            self.loaded = path.read_text()
        return self.problem

    def _unload(self, path: Path) -> str | None:
        assert path.exists(), "the parser reads the names of the profiles there"
        self.loaded = None
        return self.problem


@pytest.fixture
def kernel(system: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return Kernel(system, monkeypatch)


def test_the_apparmor_profile_is_loaded_and_loaded_again_where_it_is_gone(system: Path, kernel: Kernel) -> None:
    assert setup._apparmor(Site(system, execute=False)).detail == "written; loaded"
    assert (kernel.has_it(), (system / APPARMOR).exists()) == (False, False)
    assert setup._apparmor(Site(system)).detail == "written; loaded"
    assert kernel.loaded == apparmor.TEXT.read_text()
    assert not setup._apparmor(Site(system)).changed
    kernel.loaded = None
    assert setup._apparmor(Site(system, execute=False)).changed
    assert not kernel.has_it()
    step = setup._apparmor(Site(system))
    assert (step.changed, step.detail) == (True, "is as it should be; loaded")
    (system / APPARMOR).write_text(f"{setup.MARK}\nprofile lxc-pool-of-old {{}}\n")
    assert setup._apparmor(Site(system)).detail == "written anew; loaded"


def test_an_apparmor_profile_that_can_not_be_loaded_is_told_of(system: Path, kernel: Kernel) -> None:
    kernel.problem = "apparmor_parser --replace: syntax error"
    assert setup._apparmor(Site(system)).detail == f"written; not loaded: {kernel.problem}"
    step = setup._apparmor(Site(system))
    assert (step.changed, "not loaded: apparmor_parser" in step.detail) == (False, True)
    kernel.problem, kernel.disabled = None, True
    assert "not loaded: lxc-pool-container is not enforced" in setup._apparmor(Site(system)).detail


def test_an_administrators_own_profile_is_not_loaded_for_them(system: Path, kernel: Kernel) -> None:
    (system / APPARMOR).write_text("profile lxc-pool-container {}\n")
    step = setup._apparmor(Site(system))
    assert (step.changed, "is kept" in step.detail) == (False, True)
    assert list(setup.remove(Site(system))) == []
    assert not kernel.has_it()


def test_a_system_without_apparmors_directory_is_told_only_if_its_kernel_has_it(system: Path, kernel: Kernel) -> None:
    (system / "etc/apparmor.d").rmdir()
    assert "apt-get install apparmor" in setup._apparmor(Site(system)).detail
    assert "not needed" in setup._apparmor(Site(system / "usr")).detail
    assert not kernel.has_it()


def test_the_apparmor_profile_is_unloaded_unless_something_runs_under_it(system: Path, kernel: Kernel) -> None:
    setup._apparmor(Site(system))
    assert [step.detail for step in setup.remove(Site(system, execute=False))] == ["would be removed"]
    assert kernel.has_it()
    kernel.confined = 3
    (step,) = setup.remove(Site(system))
    assert step.detail == "removed; stays loaded: 3 processes run under it"
    assert kernel.has_it(), "they would be unconfined"
    kernel.confined = 0
    setup._apparmor(Site(system))
    assert [step.detail for step in setup.remove(Site(system))] == ["removed"]
    assert (kernel.has_it(), (system / APPARMOR).exists()) == (False, False)


def test_a_wrong_configuration_stops_it_before_anything_is_done(
    system: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    (system / CONFIG).write_text("[pool]\nsize = 0\n")
    assert main(["setup", "--root", str(system)]) == 2
    assert "line 2: pool.size" in capsys.readouterr().err
    assert not (system / SYSCTL).exists()
    assert main(["setup", "--root", str(system / "nowhere")]) == 2


def test_a_link_that_leads_out_of_the_tree_is_not_followed(system: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (system / "etc/sysctl.d").symlink_to(outside)
    with pytest.raises(ConfigError, match="leads out"):
        setup._limits(Site(system))
    assert not list(outside.iterdir())


@needs_root
def test_a_group_that_can_not_be_made_is_an_error(
    system: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    (system / CONFIG).write_text('[access]\ngroup = "no such name"\n')
    assert main(["setup", "--root", str(system)]) == 5
    assert "the group no such name can't be made" in capsys.readouterr().err


# --- taking it away ---------------------------------------------------------------------------------------------------


@needs_root
def test_what_was_made_is_removed_but_for_the_group(system: Path) -> None:
    changed(Site(system))
    would = [step.detail for step in setup.remove(Site(system, execute=False))]
    assert would == ["would be removed"] * 4
    assert [step.detail for step in setup.remove(Site(system))] == ["removed"] * 4
    assert not any((system / path).exists() for path in (UNIT, SYSCTL, CONFIG, APPARMOR))
    assert "lxc-pool:" in (system / "etc/group").read_text()
    assert list(setup.remove(Site(system))) == []


@needs_root
def test_what_was_changed_is_not_removed(system: Path) -> None:
    changed(Site(system))
    (system / CONFIG).write_text("[pool]\nsize = 3\n")
    (system / UNIT).write_text("[Service]\nExecStart=mine\n")
    (system / APPARMOR).write_text("profile lxc-pool-container {}\n")
    steps = {step.name: step.changed for step in setup.remove(Site(system))}
    assert steps == {"limits": True, "configuration": False}
    assert (system / CONFIG).exists()
    assert (system / UNIT).exists()
    assert (system / APPARMOR).exists()


def test_only_uninstalling_the_hosts_own_service_takes_its_set_up_away(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Site] = []

    def remove(site: Site) -> Iterator[Step]:
        asked.append(site)
        return iter(())

    monkeypatch.setattr(setup, "remove", remove)
    directories = ["--host-dir", str(tmp_path / "host"), "--state-dir", str(tmp_path / "state")]
    assert main(["cleanup", "--all", *directories]) == 0
    assert not asked
    monkeypatch.setattr("lxc_pool.cli.residue_commands.DEFAULT_HOST_DIR", tmp_path / "host")
    monkeypatch.setattr("lxc_pool.cli.residue_commands.DEFAULT_STATE_DIR", tmp_path / "state")
    assert main(["cleanup", "--all", *directories]) == 0
    assert main(["cleanup", "--all", "--execute", *directories]) == 0
    assert asked == [Site(execute=False), Site(execute=True)]
    capsys.readouterr()


# --- the files --------------------------------------------------------------------------------------------------------


def test_the_template_is_the_defaults_and_names_every_key() -> None:
    text = setup.TEMPLATE.read_text()
    defaults = config.parse("", origin="defaults")
    assert config.parse(text, origin="template") == defaults
    lines = [re.sub(r"^# (\w+ =)", r"\1", line) for line in text.splitlines()]
    # Without a default of their own:
    absent = ("users", "key_file", "allow", "bridge", "subnet", "nat", "dns", "min =", "max =", "probe_timeout")
    shown = config.parse("\n".join(line for line in lines if not line.startswith(absent)), origin="template")
    assert dataclasses.replace(shown, workers=defaults.workers) == defaults
    config.parse("\n".join(lines), origin="all of it")
    keys = {line.split(" = ")[0].removeprefix("# ") for line in text.splitlines() if " = " in line}
    fields = [dataclasses.fields(kind) for kind in (config.Config, config.ProfileConfig, config.NetworkConfig)]
    names = {field.name for kind in fields for field in kind}
    assert names - {"name", "profiles", "network", "source"} <= keys


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    program = tmp_path / "odd %n $x name"
    program.symlink_to(sys.executable)
    unit = tmp_path / "lxc-pool.service"
    unit.write_text(systemd.unit([str(program), "serve", "", "a;b", 'x"$y%z\\'], Path("/var/lib/lxc-pool"), setup.MARK))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_hears_that_the_service_is_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool
) -> None:
    address = f"lxc-pool-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as waiting:
        waiting.bind("\0" + address if abstract else address)
        waiting.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + address if abstract else address)
        taken = systemd.take_notify_socket()
        assert "NOTIFY_SOCKET" not in os.environ
        systemd.notify_ready(taken)
        assert waiting.recv(100) == b"READY=1"
    systemd.notify_ready(taken)  # nobody waits any more
    assert systemd.take_notify_socket() == ""
    systemd.notify_ready("")
