"""Which AppArmor profile a container is to run under; what the kernel says was recorded on Debian 12, Linux 6.1."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import pytest

from lxc_pool.backend.lxc import container_config
from lxc_pool.backend.lxc.engine import LxcBackend
from lxc_pool.backend.protocol import Blueprint
from lxc_pool.config import ProfileConfig
from lxc_pool.host import apparmor, idranges, setup
from lxc_pool.images.store import Image

IMAGE = Image("busybox", "1", Path("/nonexistent"), 0, 0.0, "")


@pytest.mark.parametrize(
    ("profiles", "modes", "enforced"),
    [
        ("/usr/bin/lxc-start (enforce)\nlxc-pool-container (enforce)\n", {"/usr/bin/lxc-start": "enforce"}, True),
        ("lxc-pool-container (kill)\n", {}, True),
        ("lxc-pool-container (complain)\n", {}, False),
        ("lxc-pool-container (unconfined)\n", {}, False),
        ("lxc-pool-container//hat (enforce)\nlxc-pool-container-2 (enforce)\n", {}, False),
        ("an odd (name) (enforce)\n", {"an odd (name)": "enforce"}, False),
        ("", {}, False),
    ],
)
def test_a_profile_is_enforced_if_the_kernel_says_so(
    tmp_path: Path, profiles: str, modes: dict[str, str], enforced: bool
) -> None:
    (tmp_path / "kernel/security/apparmor").mkdir(parents=True)
    (tmp_path / "kernel/security/apparmor/profiles").write_text(profiles)
    assert modes.items() <= apparmor.modes(tmp_path).items()
    assert apparmor.is_enforced(apparmor.PROFILE, tmp_path) is enforced


def test_a_profile_is_not_taken_to_be_enforced_where_the_kernel_can_not_be_asked(tmp_path: Path) -> None:
    assert not apparmor.is_enforced(apparmor.PROFILE, tmp_path)
    assert not apparmor.is_on(tmp_path)


def test_processes_under_a_profile_are_counted(tmp_path: Path) -> None:
    labels = {"1": "unconfined\n", "12": "lxc-pool-container (enforce)\n", "13": "lxc-pool-container (complain)\n"}
    labels |= {"14": "lxc-pool-container-2 (enforce)\n", "sys": "lxc-pool-container (enforce)\n"}
    for process, label in labels.items():
        (tmp_path / process / "attr/apparmor").mkdir(parents=True)
        (tmp_path / process / "attr/apparmor/current").write_text(label)
    (tmp_path / "15").mkdir()  # it has ended meanwhile
    assert apparmor.confined(apparmor.PROFILE, tmp_path) == 2


def test_what_the_parser_says_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert apparmor.load(Path("/p")) == "there is no apparmor_parser here (Debian: apt-get install apparmor)"
    program = tmp_path / "apparmor_parser"
    program.write_text('#!/bin/sh\necho "$@" >&2\nexit 1\n')
    program.chmod(0o700)
    assert apparmor.load(Path("/p")) == "apparmor_parser --replace /p: --replace /p"
    assert apparmor.unload(Path("/p")) == "apparmor_parser --remove /p: --remove /p"
    program.write_text("#!/bin/sh\n")
    assert apparmor.load(Path("/p")) is None
    program.chmod(0o600)
    assert "Permission denied" in (apparmor.load(Path("/p")) or "")


# --- the profile ------------------------------------------------------------------------------------------------------


def test_the_profile_that_is_shipped_is_the_one_that_is_named_and_may_be_replaced() -> None:
    text = apparmor.TEXT.read_text(encoding="utf-8")
    assert text.startswith(f"{setup.MARK}\n")
    assert f"\nprofile {apparmor.PROFILE} " in text
    rules = [line.strip() for line in text.splitlines() if not line.lstrip().startswith("#")]
    assert not [rule for rule in rules if "change_profile" in rule or "unconfined" in rule]


# --- containers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", [apparmor.PROFILE, None])
def test_a_container_names_the_profile_that_it_is_to_run_under(tmp_path: Path, profile: str | None) -> None:
    blueprint = Blueprint("c1", ProfileConfig("default", 1), IMAGE, 0.0)
    text = container_config.render(blueprint, tmp_path, 100_000, profile)
    named = [line for line in text.splitlines() if line.startswith("lxc.apparmor")]
    assert named == ([] if profile is None else [f"lxc.apparmor.profile = {profile}"])


class Kernel:
    """What the kernel says of AppArmor, and whose containers are made there."""

    def __init__(self, state_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.on, self.enforced = True, True
        monkeypatch.setattr(apparmor, "is_on", lambda: self.on)
        monkeypatch.setattr(apparmor, "is_enforced", lambda profile: profile == apparmor.PROFILE and self.enforced)
        monkeypatch.setattr("lxc_pool.backend.lxc.layers.make", lambda *_arguments: None)
        self.backend = LxcBackend(state_dir)
        self.backend.lxcpath.mkdir()

    def named(self, *, privileged: bool = False) -> str | None:
        """Return the AppArmor profile that a new container names."""
        directory = self.backend.lxcpath / "c1"
        self.backend._clone(Blueprint("c1", ProfileConfig("default", 1, privileged=privileged), IMAGE, 0.0), directory)
        text = (directory / "config").read_text()
        shutil.rmtree(directory)
        idranges.give_back(str(directory))
        return next((line.split(" = ")[1] for line in text.splitlines() if "apparmor" in line), None)


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return Kernel(tmp_path, monkeypatch)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, as ranges of ids do")
def test_unprivileged_containers_run_under_ours_and_privileged_ones_under_liblxcs(kernel: Kernel) -> None:
    assert kernel.named() == apparmor.PROFILE
    assert kernel.named(privileged=True) is None
    kernel.on = False
    assert kernel.named() is None


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, as ranges of ids do")
def test_where_ours_is_not_enforced_liblxcs_is_used_and_the_log_says_so_once(
    kernel: Kernel, caplog: pytest.LogCaptureFixture
) -> None:
    kernel.enforced = False
    with caplog.at_level(logging.WARNING):
        assert [kernel.named(), kernel.named()] == [None, None]
        assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
            "the AppArmor profile lxc-pool-container is not enforced"
        ]
        kernel.enforced = True
        assert kernel.named() == apparmor.PROFILE, "it has been loaded meanwhile"
        kernel.enforced = False
        assert kernel.named() is None
        assert len(caplog.records) == 2
