"""What `status`, `ls` and `top` show of the pool, as lines for people."""

from __future__ import annotations

from collections.abc import Sequence

from lxc_pool.cli.output import table
from lxc_pool.model import ContainerInfo, PoolStatus


def status(status: PoolStatus) -> list[str]:
    """Return the counts, and what people should know beside them."""
    state = "ending" if not status.running else "drained" if status.draining else "running"
    lines = [
        f"{state}, pid {status.pid}, up {status.uptime:.0f} s, at {status.socket_path}",
        f"{status.worker_count} lanes, {status.client_count} clients, {status.waiting} waiting",
    ]
    lines[-1] += f"; new disks are bounded by {status.disk_bound}"
    counts = ("building", "reserved", "leased", "reaping", "stuck", "waiting")
    columns = ("capacity", "min", "max", "size", *counts, "outdated", "image")
    lines += table(
        ("profile", *columns),
        [(name, *(getattr(profile, column) for column in columns)) for name, profile in status.profiles.items()],
    )
    for name, profile in status.profiles.items():
        if profile.last_error:
            lines.append(f"profile {name} is not ready: {profile.last_error}")
    if status.error_count:
        lines.append(f"{status.error_count} errors, the last one: {status.last_error}")
    lines += [notice for notice in (status.configuration, status.ledger) if notice]
    if status.backoff:
        lines.append(f"creation is held back for {status.backoff:.1f} s after failures")
    return lines


def containers(infos: Sequence[ContainerInfo]) -> list[str]:
    """Return a line for each container, below a header."""
    return table(
        ("name", "profile", "state", "id", "owner", "uid", "age", "init", "reason"),
        [
            (
                info.name,
                info.profile,
                info.state,
                info.id,
                info.owner_pid,
                info.owner_uid,
                f"{info.age:.1f}",
                info.init_pid,
                info.reason,
            )
            for info in infos
        ],
    )
