"""The machine that is measured on: what a reader has to know to compare numbers."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path


def describe(directory: Path) -> dict[str, str | int | float]:
    """Describe this machine, and the file system that *directory* is on. Nothing in it names the machine."""
    load = os.getloadavg()
    return {
        "cpu": _cpu_model(),
        "cpus": len(os.sched_getaffinity(0)),
        "virtual_machine": "hypervisor" in _cpu_field("flags").split(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "system": platform.freedesktop_os_release().get("PRETTY_NAME", "unknown"),
        # Without the local part, which says who built it.
        "kernel": _leading_version(platform.release()),
        "liblxc": output_of("lxc-start", "--version"),
        "python": platform.python_version(),
        "lxc_pool": _version(),
        "cgroups": _cgroup_layout(),
        "state_file_system": _file_system(directory),
        "load_1min": round(load[0], 2),
        "load_5min": round(load[1], 2),
    }


def _cpu_field(name: str) -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        key, _colon, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def _cpu_model() -> str:
    return _cpu_field("model name") or platform.machine()


def _leading_version(text: str) -> str:
    match = re.match(r"[0-9.]+", text)
    return match[0] if match else text


def output_of(*argv: str) -> str:
    """Return what a program says of itself, or `unknown`."""
    try:
        return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _version() -> str:
    return output_of("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--tags")


def _cgroup_layout() -> str:
    kinds = {fields[-3] for fields in _mounts() if fields[4].startswith("/sys/fs/cgroup")}
    if kinds >= {"cgroup", "cgroup2"}:
        return "hybrid: v1 controllers, v2 beside them"
    return "v2" if "cgroup2" in kinds else "v1" if "cgroup" in kinds else "none"


def _file_system(directory: Path) -> str:
    path = directory.resolve()
    # The last of those mounted at the longest prefix is on top.
    found = max(
        (
            (len(fields[4]), number, fields[-3])
            for number, fields in enumerate(_mounts())
            if path.is_relative_to(fields[4])
        ),
        default=(0, 0, "unknown"),
    )
    return found[2]


def _mounts() -> list[list[str]]:
    """Return the fields of each line: [4] is the mount point, [-3] the type. Source: proc_pid_mountinfo(5)."""
    text = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
    return [line.split(" ") for line in text.splitlines()]
