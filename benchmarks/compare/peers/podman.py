"""Podman, by its command line: there is no daemon, each command does its work itself."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from benchmarks.compare.commands import Commands
from benchmarks.compare.peers.ready import Ready, archive, by_commands
from benchmarks.compare.place import Place
from benchmarks.lab import Lab
from lxc_pool.images.store import Image

_IMAGE = "localhost/lxpb:1"

_TRACES = (
    Path("/var/lib/containers/cache/blob-info-cache-v1.boltdb"),
    Path("/var/lib/containers/cache/blob-info-cache-v1.sqlite"),
    Path("/var/lib/containers/cache"),
    Path("/var/lib/containers"),
    Path("/var/cache/containers/short-name-aliases.conf.lock"),
    Path("/var/cache/containers"),
    Path("/run/runc"),
    Path("/run/crun"),
)
"""What Podman and its runtimes make wherever its data is. Source: Podman 4.3, by looking (measured)."""


@contextlib.contextmanager
def ready(lab: Lab, image: Image) -> Iterator[Ready]:
    """Have the image, in a storage of its own.

    Raises:
        LabError: It can't be imported.
    """
    with Place(lab, "podman", _TRACES) as place:
        directory = place.directory
        # Limits as they are: Podman would raise them to what not every machine's root may.
        # crun 1.8 fails on hosts with both versions of cgroups (measured).
        runtime = "runc" if shutil.which("runc") else "crun"
        files = {
            "containers.conf": f"""
                [containers]
                default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
                [engine]
                cgroup_manager = "cgroupfs"
                events_logger = "none"
                lock_type = "file"
                runtime = "{runtime}"
                tmp_dir = "{directory}/state"
                volume_path = "{directory}/volumes"
                [network]
                network_config_dir = "{directory}/networks"
                """,
            "storage.conf": f"""
                [storage]
                driver = "overlay"
                graphroot = "{directory}/storage"
                runroot = "{directory}/run"
                """,
            "policy.json": '{"default": [{"type": "insecureAcceptAnything"}]}',
        }
        for name, text in files.items():
            (directory / name).write_text(text, encoding="utf-8")
        place.set(CONTAINERS_CONF=f"{directory}/containers.conf", CONTAINERS_STORAGE_CONF=f"{directory}/storage.conf")
        policy = f"--signature-policy={directory}/policy.json"
        place.run("podman", "import", policy, archive(place, str(image.rootfs)), _IMAGE)
        commands = Commands(
            prefix=place.prefix,
            environment=place.environment,
            start=(
                *("podman", "run", "--detach", "--network=none", f"--cgroup-parent=/{place.prefix}"),
                *("--pull=never", "--name={name}", _IMAGE, "/sbin/init"),
            ),
            run=("podman", "exec", "{name}"),
            push=("podman", "cp", "{src}", "{name}:{dst}"),
            # busybox's init does not end when it is asked to, and Podman would wait for it.
            remove=("podman", "rm", "--force", "--time=0", "{name}"),
        )
        yield by_commands(place, commands)
