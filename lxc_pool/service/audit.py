"""Find what nothing owns, and remove just that; whether or not the service runs.

The host is read first and the ledger after: what a running service makes is in the ledger before it is on the host.
What it removes leaves the ledger last, so a trace that the ledger does not know is looked at once more.
"""

from __future__ import annotations

import dataclasses
import errno
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from lxc_pool import hostdir
from lxc_pool.backend.lxc import discarded, removal
from lxc_pool.errors import BackendError, HostDirError, LxcPoolError
from lxc_pool.host import bridge, firewall, locks, own_processes, residue
from lxc_pool.host.own_processes import OwnProcess
from lxc_pool.host.processes import ProcessIdentity, identify
from lxc_pool.host.residue import Trace
from lxc_pool.images.store import ImageStore
from lxc_pool.model import State
from lxc_pool.service import ledger
from lxc_pool.service.directories import name_prefix, read_instance, running_service
from lxc_pool.service.ledger import Entry

_ENDING = 0.5
"""Seconds that a process has to end before it is residue, beside a running service. A guess: a monitor takes 1 ms."""

_COUNTING = 10.0
"""Seconds that the kernel may go on counting files of an upper layer that is removed. A guess: XFS does for some
milliseconds."""


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """What an audit found.

    Attributes:
        findings: Every trace that is unaccounted for, in the order in which they are to be removed.
        running: The pid of the running service; None: none runs.
    """

    findings: tuple[Trace, ...]
    running: int | None


@dataclasses.dataclass(frozen=True, slots=True)
class Removal:
    """What became of one finding; *problem* is None if it is gone."""

    finding: Trace
    problem: str | None


def audit(state_dir: Path, host_dir: Path, *, everything: bool = False) -> Report:
    """Look at the host.

    Args:
        state_dir: The service's.
        host_dir: The service's.
        everything: Count live leases as residue too, for an uninstallation.

    Raises:
        BackendError: The ledger can't be read, or is gone: what is owned is not known.
        HostDirError: The state dir has no proper instance id.
    """
    instance = read_instance(state_dir)
    if instance is None:
        return Report((), None)
    lxcpath = state_dir / "containers"
    own = own_processes.left(instance)
    discarded_before = residue.discarded(name_prefix(instance), lxcpath)
    found = (*residue.traces(name_prefix(instance), lxcpath, host_dir), *_partial_images(state_dir))
    running = running_service(state_dir)
    entries = () if everything else _known(state_dir / "ledger.db", found)
    owned = set() if everything else _owned(entries, instance, running=running is not None)
    if running is not None:  # it removes those; looked at on both sides, since they come and go meanwhile
        owned |= discarded_before | residue.discarded(name_prefix(instance), lxcpath)
    findings = [trace for trace in found if trace.name not in owned and residue.is_there(trace)]
    if running is not None:
        findings = _without_ending(findings)
    return Report((*_left_behind(own, entries), *findings), running)


def _left_behind(own: Iterable[OwnProcess], entries: Iterable[Entry]) -> list[Trace]:
    """Return the processes of a service that has ended, but for those that serve live leases, or are about to end."""
    inits = {entry.init.pid for entry in entries if entry.init is not None and _is_live_lease(entry)}
    return _without_ending([_trace_of(process) for process in own if not process.is_needed(inits)])


def _trace_of(process: OwnProcess) -> Trace:
    pid = process.identity.pid
    detail = f"{pid} {process.words}: of the service with pid {process.service.pid}, which has ended"
    return Trace("process", f"pid {pid}", detail, residue.age_of_process(pid), process=process.identity)


def _partial_images(state_dir: Path) -> Iterator[Trace]:
    """Find what builds of images have left that were killed."""
    for path in ImageStore(state_dir / "images").partial():
        detail = f"{path}: of an image that nobody builds any more"
        yield Trace("directory", str(path), detail, residue.age(path), path=path)


def _known(path: Path, found: Iterable[Trace]) -> tuple[Entry, ...]:
    """Return what the ledger knows.

    Raises:
        BackendError: It can't be read; or it is not there, and containers are. None is made before there is a ledger.
    """
    ours = (trace for trace in found if trace.of_container or trace.kind == "netdev")
    if not path.exists() and any(residue.is_there(trace) for trace in ours):
        raise BackendError(
            f"the ledger {path} is gone: put it back, or restart the service, which begins a new one and removes all "
            "containers but those whose leases are written down beside them"
        )
    return ledger.read(path)


def _without_ending(findings: list[Trace]) -> list[Trace]:
    """Leave out processes that are about to end: a container's monitor outlives, by a moment, all else of it."""
    deadline = time.monotonic() + _ENDING
    while any(trace.process for trace in findings) and time.monotonic() < deadline:
        time.sleep(_ENDING / 50)  # they may be many; it is the exception
        findings = [trace for trace in findings if trace.process is None or residue.is_there(trace)]
    return findings


def only_older(report: Report, seconds: float) -> Report:
    """Leave out what belongs to a container any trace of which is younger than *seconds*."""
    young = {trace.name for trace in report.findings if trace.age < seconds}
    return dataclasses.replace(report, findings=tuple(trace for trace in report.findings if trace.name not in young))


def refuse_if_running(state_dir: Path, host_dir: Path) -> None:
    """Refuse to go on beside a running service.

    Raises:
        HostDirError: One has one of the directories; the message names its pid.
    """
    for directory in (state_dir, host_dir):
        running = running_service(directory)
        if running is not None:
            raise HostDirError(f"the service with pid {running} runs on {directory}: `lxc-pool stop` it first")


def clean(
    report: Report, state_dir: Path, *, report_to: Callable[[Removal], None] = lambda _removal: None
) -> tuple[Removal, ...]:
    """Remove what an audit found; go on past failures; return what became of each finding.

    What was nobody's when no service ran may be one's that begins meanwhile: it is left to that one.

    Args:
        report: The audit's.
        state_dir: The service's.
        report_to: Called as things go.
    """
    lxcpath = state_dir / "containers"
    failed: dict[str, str] = {}
    of_containers = []
    for trace in report.findings:
        try:
            if trace.kind == "socket":
                _remove_socket(trace)
            elif trace.kind == "netdev":
                _remove_netdev(trace, report, state_dir)
            elif trace.is_semaphore:
                _remove_semaphore(trace)
            elif trace.process is not None and not trace.of_container:
                own_processes.end(trace.process)
            elif not trace.of_container:
                ImageStore(state_dir / "images").sweep()
            else:
                of_containers.append(trace.name)
        except (OSError, LxcPoolError) as error:
            failed[trace.name] = str(error)
    for name in dict.fromkeys(of_containers):
        if report.running is None and running_service(state_dir) is not None:
            failed[name] = "a service has begun meanwhile, which takes it up or removes it"
            continue
        try:
            removal.remove(name, lxcpath, force=True)
            discarded.remove(lxcpath, name, patience=_COUNTING)
            discarded.remove_place(lxcpath)
        except (LxcPoolError, OSError) as error:
            failed[name] = str(error)
    removals = []
    for trace in report.findings:
        problem = (failed.get(trace.name) or "it is still there") if residue.is_there(trace) else None
        removals.append(Removal(trace, problem))
        report_to(removals[-1])
    return tuple(removals)


def _remove_socket(trace: Trace) -> None:
    """Remove a socket or key, unless a service has just begun to use that place."""
    assert trace.path is not None, "a socket has a path"
    with open(trace.path.with_name("service.lock"), "a", encoding="ascii") as file:
        if locks.take(file.fileno()):
            trace.path.unlink()


def _remove_semaphore(trace: Trace) -> None:
    """Remove a semaphore: a service that has begun since it was found gives its own other names."""
    assert trace.path is not None, "a semaphore has a file"
    trace.path.unlink(missing_ok=True)


def _remove_netdev(trace: Trace, report: Report, state_dir: Path) -> None:
    """Remove a device or rules, unless a service has just begun, whose they are then."""
    if report.running is not None or running_service(state_dir) is None:
        remove = bridge.remove_device if trace.name in bridge.devices() else firewall.remove_table
        remove(trace.name)


def uninstall(state_dir: Path, host_dir: Path) -> tuple[str, ...]:
    """Remove the service's own files and directories, once all containers are gone; return what stays, and why.

    Raises:
        HostDirError: A service runs on them.
    """
    refuse_if_running(state_dir, host_dir)
    problems: list[str] = []
    if read_instance(state_dir) is None:
        return ()  # whatever this directory is, no service has used it

    def note(_function: object, path: str, info: tuple[type[BaseException], BaseException, object]) -> None:
        if not isinstance(info[1], FileNotFoundError):
            problems.append(f"{path}: {info[1]}")

    discarded.remove_place(state_dir / "containers")
    lock_dir = residue.LOCKS / str(state_dir).lstrip("/")
    for path in (lock_dir / "containers", lock_dir, state_dir / "containers"):
        _remove_directory(path, problems)
    shutil.rmtree(state_dir / "images", onerror=note)
    for path in (*hostdir.left_by_a_killed_service(host_dir), host_dir / "service.lock"):
        path.unlink(missing_ok=True)
    _remove_directory(host_dir, problems)
    # The id last: as long as it is there, this can be done again.
    for path in (*state_dir.glob("ledger.db*"), state_dir / "service.lock", state_dir / "instance"):
        path.unlink(missing_ok=True)
    _remove_directory(state_dir, problems)
    return tuple(problems)


def _remove_directory(path: Path, problems: list[str]) -> None:
    """Remove a directory, but for one with something in it that is not ours, or one that is a mount of its own."""
    try:
        path.rmdir()
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno == errno.ENOTEMPTY:
            problems.append(f"{path} stays: there is something in it that is not the service's")
        elif error.errno != errno.EBUSY:
            problems.append(f"{path}: {error.strerror}")


def _owned(entries: Iterable[Entry], instance: str, *, running: bool) -> set[str]:
    """Return the names that are accounted for: what a running service knows, else live leases; and their network."""
    owners = [entry for entry in entries if running or _is_live_lease(entry)]
    ports = {entry.endpoint.port for entry in owners if entry.endpoint is not None}
    network = {bridge.device_prefix(instance), *firewall.tables(instance)} if running or ports else set()
    return {entry.name for entry in owners} | ports | network


def _is_live_lease(entry: Entry) -> bool:
    if entry.state is not State.LEASED or entry.lease is None or not _alive(entry.init):
        return False
    if entry.lease.expires is not None and entry.lease.expires <= time.monotonic():
        return False
    return entry.lease.owner is None or _alive(entry.lease.owner)


def _alive(identity: ProcessIdentity | None) -> bool:
    if identity is None:
        return False
    try:
        return identify(identity.pid) == identity
    except ProcessLookupError:
        return False
