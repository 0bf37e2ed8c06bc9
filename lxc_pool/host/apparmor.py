"""Which AppArmor profiles the kernel has, and which one a container is to run under.

Ours is for unprivileged containers; `setup` loads it. A container that names none has liblxc's own, which is stricter
about mounts: systemd comes up `degraded` in it. Where ours is not enforced, liblxc's is used; nothing runs under none
because one is missing.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path

PROFILE = "lxc-pool-container"
"""Ours. What it has to begin with: the profile of lxc-start may change to `lxc-*` alone (Debian's lxc 5.0.2)."""

LIBLXC_PROFILE = "lxc-container-default-cgns"
"""That of containers which name none. Source: liblxc 5.0.2, src/lxc/lsm/apparmor.c, apparmor_prepare."""

TEXT = Path(__file__).with_name("apparmor.profile")
"""Ours as it is shipped."""

PARSER = "apparmor_parser"

_SYSFS = Path("/sys")

_HELD_TO = frozenset({"enforce", "kill"})
"""Modes in which what a profile forbids is forbidden. Source: apparmor.d(5), "Flags"."""

_TIMEOUT = 60.0
"""Seconds. A guess: compiling ours takes 0.4 s on an emulated processor."""


def is_on(sysfs: Path = _SYSFS) -> bool:
    """Return whether the running kernel has AppArmor, and uses it."""
    try:
        return (sysfs / "module/apparmor/parameters/enabled").read_text(encoding="ascii").strip() == "Y"
    except OSError:
        return False


def modes(sysfs: Path = _SYSFS) -> dict[str, str]:
    """Return the mode of each profile that is loaded.

    Raises:
        PermissionError: Only root may know.
        OSError: securityfs is not mounted.
    """
    loaded = (sysfs / "kernel/security/apparmor/profiles").read_text(encoding="utf-8", errors="replace")
    # `NAME (MODE)`
    return {name: mode.rstrip(")") for name, _, mode in (line.rpartition(" (") for line in loaded.splitlines())}


def is_enforced(profile: str, sysfs: Path = _SYSFS) -> bool:
    """Return whether a profile is loaded and forbids what it says; not, if that can't be known."""
    with contextlib.suppress(OSError):
        return modes(sysfs).get(profile) in _HELD_TO
    return False


def load(path: Path) -> str | None:
    """Load the profiles of a file, or replace them, for what runs under them, too; return what went wrong.

    None: nothing did.
    """
    return _parser("--replace", path)


def unload(path: Path) -> str | None:
    """Take the profiles of a file out of the kernel; return what went wrong, None if nothing.

    What still runs under them would be unconfined from then on: see `confined`.
    """
    return _parser("--remove", path)


def confined(profile: str, proc: Path = Path("/proc")) -> int:
    """Return how many processes run under a profile."""
    count = 0
    for process in os.listdir(proc):
        if process.isdecimal():
            with contextlib.suppress(OSError):  # it has ended
                label = (proc / process / "attr/apparmor/current").read_text(encoding="utf-8", errors="replace")
                count += label.rpartition(" (")[0] == profile
    return count


def _parser(action: str, path: Path) -> str | None:
    try:
        done = subprocess.run(
            [PARSER, action, str(path)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
            check=False,
        )
    except FileNotFoundError:
        return f"there is no {PARSER} here (Debian: apt-get install apparmor)"
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{PARSER} {action} {path}: {error}"
    return None if done.returncode == 0 else f"{PARSER} {action} {path}: {' '.join(done.stderr.split())}"
