"""Docker, by its command line, with a dockerd and a containerd of the benchmark's own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from benchmarks.compare.commands import Commands
from benchmarks.compare.peers.ready import Ready, archive, by_commands
from benchmarks.compare.place import Place
from benchmarks.lab import Lab
from lxc_pool.images.store import Image

_IMAGE = "lxpb:1"

_TRACES = (
    Path("/etc/docker/key.json"),
    Path("/etc/docker"),
    Path("/run/docker/plugins"),
    Path("/run/docker"),
    Path("/run/containerd/s"),
    Path("/run/containerd"),
    Path("/opt/containerd/bin"),
    Path("/opt/containerd/lib"),
    Path("/opt/containerd"),
)
"""What dockerd makes wherever its data is. Source: Docker 20.10, by looking (measured)."""


@contextlib.contextmanager
def ready(lab: Lab, image: Image) -> Iterator[Ready]:
    """Have a daemon with the image.

    Raises:
        LabError: It does not start.
    """
    with Place(lab, "docker", _TRACES) as place:
        socket = f"unix://{place.directory}/sock"
        configuration = place.directory / "daemon.json"
        configuration.write_text("{}\n", encoding="ascii")  # not the machine's
        place.start_daemon(
            "dockerd",
            f"--config-file={configuration}",
            f"--data-root={place.directory}/data",
            f"--exec-root={place.directory}/run",
            f"--pidfile={place.directory}/pid",
            f"--host={socket}",
            f"--cgroup-parent=/{place.prefix}",
            "--exec-opt=native.cgroupdriver=cgroupfs",
            "--bridge=none",
            "--iptables=false",
            "--ip6tables=false",
            "--ip-forward=false",
            "--ip-masq=false",
            "--shutdown-timeout=1",
        )
        docker = ("docker", "--host", socket)
        place.await_daemon(*docker, "version")
        place.run(*docker, "import", archive(place, str(image.rootfs)), _IMAGE)
        commands = Commands(
            prefix=place.prefix,
            environment=place.environment,
            start=(*docker, "run", "--detach", "--network=none", "--name={name}", _IMAGE, "/sbin/init"),
            run=(*docker, "exec", "{name}"),
            push=(*docker, "cp", "{src}", "{name}:{dst}"),
            remove=(*docker, "rm", "--force", "{name}"),
        )
        yield by_commands(place, commands)
