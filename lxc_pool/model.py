"""The plain data that client and service share: names of states, ids, and what `status` and `ls` report."""

from __future__ import annotations

import dataclasses
import enum
import os
import time
from typing import Any, NamedTuple

MAX_ID_LENGTH = 128
"""Characters in an id once it is written out. Origin: the public contract."""


class State(enum.StrEnum):
    """What a container of the pool is doing; `service/lifecycle.py` has the moves between states."""

    BUILDING = "building"
    WARM = "warm"
    RESERVED = "reserved"
    LEASED = "leased"
    REAPING = "reaping"
    STUCK = "stuck"


class ContainerId(NamedTuple):
    """Name a lease after the test job that asks for it.

    Attributes:
        job_id: The caller's name for the job.
        creation_time: When the id was made, in whole seconds since the epoch.
        pid: The process that made it.
    """

    job_id: str
    creation_time: int
    pid: int

    @classmethod
    def create(cls, job_id: str | int) -> ContainerId:
        """Make an id for *job_id* from now and this process."""
        return cls(str(job_id), int(time.time()), os.getpid())

    def __str__(self) -> str:
        """Return `test_<job_id>_<creation_time>_<pid>`."""
        return f"test_{self.job_id}_{self.creation_time}_{self.pid}"


LeaseId = ContainerId | str | int
"""What a caller may name a lease with: data only, never part of a path, need not be unique."""


def check_id(value: object) -> LeaseId:
    """Return *value* if it can be a lease's id.

    Raises:
        TypeError: It is not a ContainerId, a str or an int.
        ValueError: Written out, it is empty, has more than 128 characters, or one that is not printable; or it is an
            int of more than 64 bits.
    """
    if isinstance(value, str):
        _check_text(value)
        return value
    if isinstance(value, ContainerId):
        if not isinstance(value.job_id, str):
            raise TypeError(f"id.job_id must be a str, not {value.job_id!r}; ContainerId.create takes numbers too")
        _check_text(value.job_id)
        _check_number("id.creation_time", value.creation_time)
        _check_number("id.pid", value.pid)
        _check_text(str(value))
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        _check_number("id", value)
        return value
    raise TypeError(f"id must be a ContainerId, a str or an int, not {value!r}")


def _check_text(text: str) -> None:
    if not text or len(text) > MAX_ID_LENGTH or not text.isprintable():
        raise ValueError(f"id must be 1 to {MAX_ID_LENGTH} printable characters, not {text[:200]!r}")


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, not {value!r}")
    if not -(2**63) <= value < 2**64:
        raise ValueError(f"{name} must fit in 64 bits: be -2**63 to 2**64 - 1")


@dataclasses.dataclass(frozen=True, slots=True)
class ProfileStatus:
    """The counts of one profile.

    Attributes:
        capacity: Warm containers that are kept now; it goes up and down between *min* and *max*.
        image: The image version that new containers are cloned from, `name:version`; None until it is there.
        outdated: Warm ones that are to be replaced, since the image or the configuration has changed.
        backoff: Seconds until creation is tried again after failures; 0 when it is not held back.
        last_error: Why the newest image or container did not become ready: a probe that failed, say; None once one has.
    """

    capacity: int
    size: int
    building: int
    reserved: int
    leased: int
    reaping: int
    stuck: int
    waiting: int
    image: str | None
    min: int = 0
    max: int = 0
    outdated: int = 0
    backoff: float = 0.0
    last_error: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class PoolStatus:
    """What the service says of itself.

    Attributes:
        running: False while the service is draining to end.
        uptime: Seconds since the service began.
        capacity: Warm containers that the pool keeps now.
        size: Containers that are warm now.
        waiting: Callers that wait for a container now.
        error_count: Creations and removals that have failed since the service began.
        last_error: The newest failure, in the engine's own words; None if there was none.
        backoff: Seconds until creation is tried again after failures; 0 when it is not held back.
        draining: Whether an administrator has drained the pool.
        ledger: What people should know of the ledger; None: all is well.
        configuration: What people should know of the configuration: that it was refused, or what of it waits for a
            restart; None: all of it is in force.
        disk_bound: What bounds what a container made now can write to its disk: `project quota` or `tmpfs`.
    """

    running: bool
    socket_path: str
    pid: int
    uptime: float
    capacity: int
    size: int
    building: int
    reserved: int
    leased: int
    reaping: int
    stuck: int
    waiting: int
    worker_count: int
    client_count: int
    error_count: int
    last_error: str | None
    backoff: float
    draining: bool
    ledger: str | None
    profiles: dict[str, ProfileStatus]
    configuration: str | None = None
    disk_bound: str = "tmpfs"

    def as_dict(self) -> dict[str, Any]:
        """Return the same as dicts, lists, str, int, float, bool and None."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True, slots=True)
class ContainerInfo:
    """One container of the pool.

    Attributes:
        id: What the lease was named by its owner; None if not leased, or another user's.
        owner_pid: The process that holds the lease; None as for `id`, or after `keep`.
        age: Seconds since the container came up, or since its building began.
        init_pid: The pid, on the host, of the container's init; None until it runs.
        reason: Why the container is where it is, if that is not the usual way.
    """

    name: str
    profile: str
    state: State
    id: LeaseId | None
    owner_pid: int | None
    owner_uid: int | None
    age: float
    init_pid: int | None
    reason: str | None

    def as_dict(self) -> dict[str, Any]:
        """Return the same as plain types; a ContainerId is written out as a string."""
        fields = dataclasses.asdict(self)
        fields["state"] = str(self.state)
        if isinstance(self.id, ContainerId):
            fields["id"] = str(self.id)
        return fields
