"""Stop a container and remove every trace of it: processes, cgroups, directory, lock file.

Works from whatever is there, since a container may be half made, half removed, running unknown to anyone, or hung.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from pathlib import Path

import psutil

from lxc_pool.backend.lxc import binding, container_config
from lxc_pool.errors import DestroyFailed
from lxc_pool.host import cgroups, idranges
from lxc_pool.host.residue import LOCKS


def remove(name: str, lxcpath: Path, *, force: bool) -> None:
    """Remove the container *name*. See `Backend.destroy`."""
    directory = lxcpath / name
    if force:
        _kill_starters(name, lxcpath)
    elif (directory / "config").exists():
        binding.container(name, lxcpath).stop()
    first_id = container_config.first_id(directory)
    problems = _remove_cgroups(name)
    try:
        shutil.rmtree(directory)
    except FileNotFoundError:
        pass
    except OSError as error:
        problems.append(f"{error.filename}: {error.strerror}")
    with contextlib.suppress(FileNotFoundError):
        (LOCKS / str(lxcpath).lstrip("/") / f".{name}").unlink()
    if not problems:
        idranges.give_back(str(directory), first_id)  # only now that nothing of these ids is left
    if problems:
        raise DestroyFailed(f"{name} is not quite gone: {'; '.join(problems)[:1000]}")


def unmount(path: Path) -> None:
    """Take a mount off, at once or as soon as nobody uses it any more.

    Raises:
        DestroyFailed: It can't be.
    """
    done = subprocess.run(["umount", "--lazy", str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise DestroyFailed(f"can't unmount {path}: {done.stderr.strip()}")


def _kill_starters(name: str, lxcpath: Path) -> None:
    """Kill what may still bring the container up: one start in six survives its starter's death (measured).

    `lxc-start -P PATH -n NAME` is in no cgroup of the container's yet; its monitor calls itself `[lxc monitor] PATH
    NAME`.
    """
    for process in psutil.process_iter(["cmdline"]):
        words = " ".join(process.info["cmdline"] or ()).split()
        if name in words and str(lxcpath) in words and "lxc" in words[0]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def _remove_cgroups(name: str) -> list[str]:
    """Kill what still runs in the container's cgroups, the monitor included, and remove the cgroups."""
    paths = cgroups.container_cgroups(name)
    if not paths:
        return []
    if alive := cgroups.kill(*paths):
        return [f"processes {', '.join(map(str, alive))} do not die"]
    try:
        cgroups.remove(*paths)
    except DestroyFailed as error:
        return [str(error)]
    return []
