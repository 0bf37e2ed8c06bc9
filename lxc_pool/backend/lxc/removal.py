"""Stop a container and remove every trace of it: processes, cgroups, directory, lock file.

An upper layer on the disk is put aside, with all that goes with it; see `discarded`.

Works from whatever is there, since a container may be half made, half removed, running unknown to anyone, or hung.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from pathlib import Path

import psutil

from lxc_pool.backend.lxc import binding, container_config, discarded, layers
from lxc_pool.errors import BackendError, DestroyFailed
from lxc_pool.host import bridge, cgroups, idranges, mounts
from lxc_pool.host.residue import LOCKS, mount_points

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")

_MOST_PASSES = 20
"""Looks for processes that start a container; each but the last has killed some. A guess: it takes two."""


def remove(name: str, lxcpath: Path, *, force: bool) -> None:
    """Remove the container *name*. See `Backend.destroy`."""
    if not _NAME.fullmatch(name):  # whoever told us: it would lead elsewhere
        raise DestroyFailed(f"{name!r} is no container's name: nothing was removed")
    directory = lxcpath / name
    if force:
        _kill_starters(name, lxcpath)
    elif (directory / "config").exists():
        binding.container(name, lxcpath).stop()
    first_id, port = container_config.first_id(directory), container_config.port(directory)
    problems = [*_remove_cgroups(name), *_unmount_below(directory), *_disconnect(port, directory)]
    try:
        if not problems:
            discarded.put_aside(directory) if layers.path(directory).exists() else shutil.rmtree(directory)
    except FileNotFoundError:
        pass
    except OSError as error:
        problems.append(f"{error.filename}, below {directory}: {error.strerror}")  # rmtree tells no path
    with contextlib.suppress(FileNotFoundError):
        (LOCKS / str(lxcpath).lstrip("/") / f".{name}").unlink()
    if not problems and not discarded.is_there(lxcpath, name):
        if first_id is None:
            layers.forget(lxcpath, name)
        idranges.give_back(str(directory), first_id)  # only now that nothing of these ids is left
    if problems:
        raise DestroyFailed(f"{name} is not quite gone: {'; '.join(problems)[:1000]}")


def _disconnect(port: str | None, directory: Path) -> list[str]:
    """Remove a container's port: liblxc has, and the kernel does with the container, unless something went wrong.

    After the ledger was lost, another one may have the same by now: the port of this one was removed before that.
    """
    try:
        if port is not None and port in bridge.devices():
            others = (other for other in directory.parent.iterdir() if other != directory)
            if not any(container_config.port(other) == port for other in others):
                bridge.remove_device(port)
    except BackendError as error:
        return [str(error)]
    return []


def _unmount_below(directory: Path) -> list[str]:
    """Take off whatever is mounted in a container's directory: what is in there must not be removed with it.

    A lane does so in its own mount namespace; if somebody has mounted it in the host's, the kernel takes it off there
    when the directory goes. Source: Linux commit 8ed936b5671b (3.18).
    """
    problems = []
    for mount in reversed(mount_points()):
        if Path(mount).is_relative_to(directory):
            try:
                mounts.unmount(Path(mount))
            except OSError as error:
                problems.append(f"{mount} is mounted there and can't be unmounted: {error.strerror}")
    return problems


def _kill_starters(name: str, lxcpath: Path) -> None:
    """Kill what may still bring the container up: one start in six survives its starter's death (measured).

    `lxc-start -P PATH -n NAME` is in no cgroup of the container's yet; its monitor calls itself `[lxc monitor] PATH
    NAME`. It is looked for until there is none: one that is killed may have forked just before.
    """
    for _ in range(_MOST_PASSES):
        if not _kill_starters_once(name, lxcpath):
            return


def _kill_starters_once(name: str, lxcpath: Path) -> bool:
    """Return whether there was any."""
    doomed = []
    for process in psutil.process_iter(["cmdline"]):
        words = " ".join(process.info["cmdline"] or ()).split()
        if name in words and str(lxcpath) in words and "lxc" in words[0]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
                doomed.append(process)
    psutil.wait_procs(doomed, timeout=1.0)
    return bool(doomed)


def _remove_cgroups(name: str) -> list[str]:
    """Kill what still runs in the container's cgroups, the monitor included, and remove the cgroups."""
    try:
        paths = cgroups.container_cgroups(name)
        if not paths:
            return []
        if alive := cgroups.kill(*paths):
            return [f"processes {', '.join(map(str, alive))} do not die"]
        cgroups.remove(*paths)
    except (DestroyFailed, OSError) as error:
        return [str(error)]
    return []
