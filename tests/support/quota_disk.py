"""A file system with project quotas, in a file: most hosts have none."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lxc_pool.host import idranges, quota

KINDS = {
    "ext4": (["mkfs.ext4", "-q", "-O", "project,quota", "-E", "quotatype=prjquota"], "loop,prjquota", "CONFIG_QFMT_V2"),
    "xfs": (["mkfs.xfs", "-q"], "loop,pquota", "CONFIG_XFS_QUOTA"),
}
"""How each is made and mounted, and what the kernel needs for it."""

_lacking: dict[str, str] = {}
"""Why there is none on this machine, once that is known."""

_SIZE = 3 << 30
"""Bytes, of a sparse file."""


@contextlib.contextmanager
def mounted(kind: str, directory: Path) -> Iterator[Path]:
    """Have one at *directory*, which is made; skip the test where the kernel or a program for it is missing.

    When it is over, the kernel must not know of any project on it any more.
    """
    make, options, wanted = KINDS[kind]
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    if os.geteuid() != 0:
        pytest.skip("needs root: a file system is mounted")
    if (program := shutil.which(make[0], path=path)) is None:
        pytest.skip(f"needs {make[0]}: apt-get install {'xfsprogs' if kind == 'xfs' else 'e2fsprogs'}")
    if kind in _lacking:
        pytest.skip(_lacking[kind])
    directory.mkdir(mode=0o755)
    image = directory.with_name(f"{directory.name}.image")
    with image.open("wb") as file:
        file.truncate(_SIZE)
    subprocess.run([program, *make[1:], image], check=True)
    # None of them is loaded by being asked for. Without a modprobe, this is a container, or a kernel without modules.
    if (modprobe := shutil.which("modprobe", path=path)) is not None:
        subprocess.run([modprobe, "-qa", "loop", kind, "quota_v2"], check=False)
    done = subprocess.run(["mount", "-o", options, image, directory], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        _lacking[kind] = f"this kernel has no project quotas on {kind} ({wanted}): {done.stderr.splitlines()[0]}"
        pytest.skip(_lacking[kind])
    try:
        yield directory
        assert projects(directory) == {}
    finally:
        subprocess.run(["umount", directory], check=True)
        image.unlink()


def projects(directory: Path) -> dict[int, quota.Quota]:
    """Return what the file system says of projects that containers can have had."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        ids = range(idranges.DEFAULT_BASE, idranges.DEFAULT_BASE + 100 * idranges.SIZE, idranges.SIZE)
        records = {project: quota.of_project(descriptor, project) for project in ids}
    finally:
        os.close(descriptor)
    return {project: record for project, record in records.items() if not record.blank}
