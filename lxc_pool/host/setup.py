"""Make ready what the service wants of a host, and take it away again: group, configuration, unit, limits, AppArmor.

Each step looks before it acts, so that doing it all again changes nothing. What an administrator has written is kept:
a file of ours is known by its first line, and the configuration is theirs once it is there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import grp
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lxc_pool import config
from lxc_pool.errors import ConfigError
from lxc_pool.host import apparmor, requirements, systemd

MARK = "# Made by `lxc-pool setup`, which writes it anew."
"""The first line of a file that may be written over and removed."""

TEMPLATE = Path(__file__).with_name("lxc-pool.toml")
"""The configuration that a host begins with: every key with its default, commented out."""

_SYSTEM = Path("/")
_UNIT = Path("etc/systemd/system") / systemd.UNIT
_SYSCTL = Path("etc/sysctl.d/60-lxc-pool.conf")
_APPARMOR = Path("etc/apparmor.d/lxc-pool")
_SYSTEMD = (Path("usr/lib/systemd/systemd"), Path("lib/systemd/systemd"))

_FOREIGN = "is kept: it is not of our making"

_GROUPADD_TIMEOUT = 30.0
"""Seconds. A guess: it waits for the lock of /etc/group."""

LIMITS = {"fs.inotify.max_user_instances": requirements.GOOD_INOTIFY * 8}
"""Containers' inotify instances all count as root's. `check` explains each."""


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """What was, or would be, done about one thing.

    Attributes:
        name: group, configuration, unit, limits or apparmor.
        target: The thing itself.
        changed: Whether it was changed, or would be.
        detail: What about it, in words.
    """

    name: str
    target: str
    changed: bool
    detail: str


@dataclasses.dataclass(frozen=True, slots=True)
class Site:
    """Where to set up, and for which service.

    Attributes:
        root: The root directory of the system; anything but `/` is a tree that is not running.
        host_dir, state_dir: The service's.
        execute: Whether to change anything; else only say what would be.
    """

    root: Path = _SYSTEM
    host_dir: Path = config.DEFAULT_HOST_DIR
    state_dir: Path = config.DEFAULT_STATE_DIR
    execute: bool = True

    @property
    def runs(self) -> bool:
        """Whether the system is the one that we run on."""
        return self.root == _SYSTEM

    def path(self, path: Path) -> Path:
        """Return where *path* of the system is, seen from here.

        Raises:
            ConfigError: A link leads out of the tree.
        """
        found = self.root / (path.relative_to("/") if path.is_absolute() else path)
        if not found.parent.resolve().is_relative_to(self.root.resolve()):
            raise ConfigError(f"{found.parent} leads out of {self.root}: nothing was written there")
        return found


def set_up(site: Site) -> Iterator[Step]:
    """Do what is missing, step by step.

    Raises:
        ConfigError: There is a configuration, and it is wrong.
        OSError: A step could not be done; those before it are.
    """
    configuration = site.path(config.DEFAULT_CONFIG)
    # Read first: nothing is changed for a service that would not start.
    group = config.load(configuration).group if configuration.exists() else config.parse("", origin="").group
    yield _group(site, group)
    yield _configuration(site, configuration)
    yield _unit(site)
    yield _limits(site)
    yield _apparmor(site)


def remove(site: Site) -> Iterator[Step]:
    """Take away what `set_up` has made, but for the group, which files and users may have by now.

    Raises:
        OSError: A step could not be done; those before it are.
    """
    unit = site.path(_UNIT)
    if _is_ours(unit):
        if site.execute and site.runs and systemd.is_init():
            systemd.systemctl("disable", systemd.UNIT)
        yield _remove(site, "unit", unit)
        if site.execute and site.runs and systemd.is_init():
            systemd.systemctl("daemon-reload")
    if _is_ours(site.path(_SYSCTL)):
        yield _remove(site, "limits", site.path(_SYSCTL))
    if _is_ours(site.path(_APPARMOR)):
        yield _remove_apparmor(site, site.path(_APPARMOR))
    configuration = site.path(config.DEFAULT_CONFIG)
    with contextlib.suppress(FileNotFoundError):
        if configuration.read_bytes() == TEMPLATE.read_bytes():
            yield _remove(site, "configuration", configuration)
        else:
            yield Step("configuration", str(configuration), False, "stays: it has been changed")


def _group(site: Site, name: str) -> Step:
    if _has_group(site, name):
        return Step("group", name, False, "is there")
    if site.execute:
        prefix = [] if site.runs else ["--prefix", str(site.root)]
        done = subprocess.run(
            ["groupadd", "--system", *prefix, name],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_GROUPADD_TIMEOUT,
            check=False,
        )
        if done.returncode != 0:
            raise OSError(f"the group {name} can't be made: {done.stderr.strip()}")
    return Step("group", name, True, f"made; its members may use the service: usermod -aG {name} USER")


def _has_group(site: Site, name: str) -> bool:
    if site.runs:
        try:
            grp.getgrnam(name)
        except KeyError:
            return False
        return True
    groups = site.path(Path("etc/group"))
    return groups.exists() and any(line.startswith(f"{name}:") for line in groups.read_text().splitlines())


def _configuration(site: Site, path: Path) -> Step:
    if path.exists():
        return Step("configuration", str(path), False, "is there, and is kept")
    _write(site, path, TEMPLATE.read_text(encoding="utf-8"))
    return Step("configuration", str(path), True, "written: all defaults, commented out")


def _unit(site: Site) -> Step:
    path = site.path(_UNIT)
    if not any((site.root / program).exists() for program in _SYSTEMD):
        return Step("unit", str(path), False, "not needed: there is no systemd here; start `lxc-pool serve` your way")
    directories = []
    if site.host_dir != config.DEFAULT_HOST_DIR:
        directories += ["--host-dir", str(site.host_dir)]
    if site.state_dir != config.DEFAULT_STATE_DIR:
        directories += ["--state-dir", str(site.state_dir)]
    command = [sys.executable, "-P", "-m", "lxc_pool", "serve", *directories]
    step = _write_ours(site, "unit", path, systemd.unit(command, site.state_dir, MARK))
    if step.changed:
        problem = systemd.systemctl("daemon-reload") if site.execute and site.runs and systemd.is_init() else None
        todo = problem or f"systemctl enable --now {systemd.UNIT.removesuffix('.service')}"
        return dataclasses.replace(step, detail=f"{step.detail}; now: {todo}")
    return step


def _limits(site: Site) -> Step:
    """Write the limits down, and raise what is lower now; none is lowered.

    They are written down even if none is: what raised it may have been for this boot alone, ourselves before a removal,
    say.
    """
    path = site.path(_SYSCTL)
    now = {name: _current(name) if site.runs else 0 for name in LIMITS}
    wanted = {name: max(value, current) for name, value in LIMITS.items() if (current := now[name]) is not None}
    if path.exists() and not _is_ours(path):
        return Step("limits", str(path), False, _FOREIGN)
    lines = [MARK, *(f"{name} = {value}" for name, value in wanted.items())]
    step = _write_ours(site, "limits", path, "\n".join(lines) + "\n")
    low = {name: value for name, value in wanted.items() if site.runs and now[name] != value}
    if site.execute:
        for name, value in low.items():
            _proc(name).write_text(f"{value}\n", encoding="ascii")
    if low:
        raised = ", ".join(f"{name} = {value}" for name, value in low.items())
        return dataclasses.replace(step, changed=True, detail=f"{step.detail}; raised: {raised}")
    return step


def _apparmor(site: Site) -> Step:
    """Put our AppArmor profile in place, and load it if the system runs; at boot, the host's own service does."""
    path = site.path(_APPARMOR)
    on = site.runs and apparmor.is_on()
    if not path.parent.is_dir():
        detail = f"not needed: there is no {path.parent} here"
        if on:
            detail = f"not written: there is no {path.parent} here; apt-get install apparmor, then do this again"
        return Step("apparmor", str(path), False, detail)
    step = _write_ours(site, "apparmor", path, apparmor.TEXT.read_text(encoding="utf-8"))
    if not on or step.detail == _FOREIGN or (not step.changed and apparmor.is_enforced(apparmor.PROFILE)):
        return step
    if not site.execute:
        return dataclasses.replace(step, changed=True, detail=f"{step.detail}; loaded")
    problem = apparmor.load(path)
    if problem is None and not apparmor.is_enforced(apparmor.PROFILE):  # it is in /etc/apparmor.d/disable, say
        problem = f"{apparmor.PROFILE} is not enforced"
    detail = f"{step.detail}; {'loaded' if problem is None else f'not loaded: {problem}'}"
    return dataclasses.replace(step, changed=step.changed or problem is None, detail=detail)


def _remove_apparmor(site: Site, path: Path) -> Step:
    """Take our AppArmor profile away; not out of the kernel while something runs under it, which would be free then."""
    if not site.runs or not apparmor.is_on():
        return _remove(site, "apparmor", path)
    problem = None
    if site.execute:
        count = apparmor.confined(apparmor.PROFILE)
        problem = f"{count} processes run under it" if count else apparmor.unload(path)
    step = _remove(site, "apparmor", path)
    return step if problem is None else dataclasses.replace(step, detail=f"{step.detail}; stays loaded: {problem}")


def _write_ours(site: Site, name: str, path: Path, text: str) -> Step:
    """Write a file that is ours, unless it is so already, or is somebody else's."""
    if not path.exists():
        _write(site, path, text)
        return Step(name, str(path), True, "written")
    if not _is_ours(path):
        return Step(name, str(path), False, _FOREIGN)
    if path.read_text(encoding="utf-8") == text:
        return Step(name, str(path), False, "is as it should be")
    _write(site, path, text)
    return Step(name, str(path), True, "written anew")


def _write(site: Site, path: Path, text: str) -> None:
    """Put a file in place, whole or not at all."""
    if not site.execute:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            os.fchmod(descriptor, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _is_ours(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.readline().rstrip("\n") == MARK
    except FileNotFoundError:
        return False


def _remove(site: Site, name: str, path: Path) -> Step:
    if site.execute:
        path.unlink()
    return Step(name, str(path), True, "removed" if site.execute else "would be removed")


def _proc(name: str) -> Path:
    return Path("/proc/sys", *name.split("."))


def _current(name: str) -> int | None:
    """Return a limit of the running kernel; None: it does not have that."""
    try:
        return int(_proc(name).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
