"""Limits on the cgroup layouts that this machine may not have, from trees as liblxc leaves them there."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from lxc_pool.backend.lxc import limits
from lxc_pool.config import ProfileConfig

PROFILE = ProfileConfig("default", 1, memory=64 << 20, pids=50, cpu=200)
RANGE = 0x70000000

V1 = {
    "pids": {"pids.max": "50", "pids.current": "1"},
    "memory": {"memory.limit_in_bytes": str(64 << 20), "memory.memsw.limit_in_bytes": str(1 << 62)},
    "cpu": {"cpu.shares": "2048"},
    "devices": {"devices.list": "a *:* rwm"},
    "systemd": {},
}
"""Version 1: a hierarchy for each controller, and one without, for systemd."""

V2 = {
    "pids.max": "50",
    "memory.max": str(64 << 20),
    "memory.swap.max": "max",
    "cpu.weight": "200",
    "cgroup.max.descendants": "max",
    "cgroup.subtree_control": "",
    "cgroup.threads": "",
}
"""Version 2: one for all."""


def v1(root: Path) -> list[Path]:
    return [_tree(root / name, {"tasks": "", "notify_on_release": "0"} | files) for name, files in V1.items()]


def hybrid(root: Path) -> list[Path]:
    return [*v1(root), _tree(root / "unified", {"cgroup.max.descendants": "max", "cgroup.threads": ""})]


def v2(root: Path) -> list[Path]:
    return [_tree(root, V2)]


def _tree(hierarchy: Path, files: dict[str, str]) -> Path:
    """Make a container's cgroup as liblxc leaves it: its directory and cgroup.procs belong to the container's root."""
    cgroup = hierarchy / "lxc.payload.x"
    cgroup.mkdir(parents=True)
    for name, text in {"cgroup.procs": "1\n", **files}.items():
        (cgroup / name).write_text(f"{text}\n")
    for path in (cgroup, cgroup / "cgroup.procs", cgroup / "tasks"):
        if path.exists() and os.geteuid() == 0:
            os.chown(path, RANGE, 0)
            path.chmod(0o775)
    return cgroup


@pytest.mark.parametrize("layout", [v1, hybrid, v2])
def test_limits_are_read_back_on_every_layout(layout: object, tmp_path: Path) -> None:
    cgroups = layout(tmp_path)  # type: ignore[operator]  # one of the three above
    assert limits.problems(PROFILE, cgroups) == []
    for file, wrong in {"pids.max": "max", "memory.limit_in_bytes": "9223372036854771712", "memory.max": "max"}.items():
        for cgroup in cgroups:
            if (path := cgroup / file).exists():
                before = path.read_text()
                path.write_text(wrong)
                (problem,) = limits.problems(PROFILE, cgroups)
                assert f"{file} is {wrong}, not " in problem
                path.write_text(before)


@pytest.mark.parametrize("layout", [v1, hybrid, v2])
def test_a_limit_that_the_layout_has_no_file_for_is_a_problem(layout: object, tmp_path: Path) -> None:
    cgroups = layout(tmp_path)  # type: ignore[operator]  # as above
    for cgroup in cgroups:
        (cgroup / "pids.max").unlink(missing_ok=True)
    assert limits.problems(PROFILE, cgroups) == ["number of processes: this host has no pids.max for it"]
    assert len(limits.problems(PROFILE, [])) == 3


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it gives files away")
@pytest.mark.parametrize("layout", [v1, hybrid, v2])
def test_a_containers_root_may_make_cgroups_only_where_their_number_is_bounded(layout: object, tmp_path: Path) -> None:
    cgroups = layout(tmp_path)  # type: ignore[operator]  # as above
    made_early = cgroups[0] / "made by its init"
    if layout is not v2:
        made_early.mkdir()
        for name in ("cgroup.procs", "tasks"):
            (made_early / name).touch()
            os.chown(made_early / name, RANGE, 0)
        os.chown(made_early, RANGE, 0)
    limits.seal(PROFILE, cgroups)
    open_to_it = [path.parent.name for path in cgroups if path.stat().st_uid == RANGE]
    if layout is v2:
        assert (cgroups[0] / "cgroup.max.descendants").read_text() == "500"
        assert (cgroups[0] / "memory.swap.max").read_text().strip().startswith("0")
        return
    # systemd needs its own, and there is nothing in it to exhaust but names.
    assert open_to_it == (["systemd"] if layout is v1 else ["systemd", "unified"])
    assert made_early.stat().st_uid == 0
    for path in cgroups:
        if path.parent.name in ("pids", "memory", "cpu", "devices"):
            assert path.stat().st_uid == 0
            assert not stat.S_IMODE(path.stat().st_mode) & stat.S_IWOTH
    memory = next(path for path in cgroups if path.parent.name == "memory")
    assert (memory / "memory.memsw.limit_in_bytes").read_text().startswith(str(64 << 20))


def test_a_host_that_does_not_count_swap_is_none_the_worse(tmp_path: Path) -> None:
    (cgroup,) = v2(tmp_path)
    (cgroup / "memory.swap.max").unlink()
    limits.seal(PROFILE, [cgroup])
    assert not (cgroup / "memory.swap.max").exists()
