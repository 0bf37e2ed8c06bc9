"""What the service does for each call: check who asks, ask the pool, put the answer into the shared shapes."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from lxc_pool.config import Config, ProfileConfig
from lxc_pool.errors import AccessDenied, DestroyFailed, ExecFailed, LeaseExpired, LxcPoolError, QuotaExceeded
from lxc_pool.execution.launcher import Launcher, check_stdio
from lxc_pool.execution.operations import READONLY, WRITABLE
from lxc_pool.execution.protocol import MOUNT, ExecRequest, ProtocolError
from lxc_pool.host import addresses
from lxc_pool.host.ends import is_pidfd
from lxc_pool.model import ContainerInfo, LeaseId, PoolStatus, check_id
from lxc_pool.service import trail
from lxc_pool.service.access import Peer, Policy, owner_of
from lxc_pool.service.census import WarmWait
from lxc_pool.service.fairness import Pace, Quietly, Turns
from lxc_pool.service.leases import Quota
from lxc_pool.service.netwait import NetworkWait
from lxc_pool.service.pool import Pool
from lxc_pool.service.waiters import Ticket
from lxc_pool.service.watchdog import Watched
from lxc_pool.wire import messages


class Caller(Protocol):
    """What the service needs of the connection that a call came on."""

    @property
    def peer(self) -> Peer:
        """Who asks."""

    def wait(self, ready: Callable[[], bool], timeout: float | None, also: Sequence[int] = ()) -> None:
        """Wait until *ready* or until *timeout* seconds have passed.

        It is looked at after each `notify`, and when a descriptor of *also* becomes readable, which it has to undo.

        Raises:
            EOFError: The client is gone.
        """

    def notify(self) -> None:
        """Let `wait` look again; callable from any thread."""

    def after_answer(self, work: Callable[[], None]) -> None:
        """Let *work* be done once the answer to this call has been sent, or the connection has ended."""

    def offered(self, request: str) -> None:
        """Take note that the next message has to confirm *request*."""


class PoolService:
    """The object behind the proxy. Shared by all connections' threads; all state is the pool's."""

    def __init__(
        self,
        config: Config,
        pool: Pool,
        launcher: Launcher,
        *,
        socket_path: str,
        console_log: Callable[[str], bytes],
        disk_bound: Callable[[], str],
        ledger_notice: Callable[[], str | None],
        stop: Callable[[float, bool], None],
    ) -> None:
        """Put the service together.

        Args:
            config: Its configuration.
            pool: What it serves.
            launcher: What starts commands.
            socket_path: Where it listens.
            console_log: Returns the last of what was written to a container's console.
            disk_bound: Returns what bounds what containers write, see `Backend.disk_bound`.
            ledger_notice: Returns what people should know of the ledger, if anything.
            stop: Called with grace and keep_leases to end the service; returns at once.
        """
        self.config = config
        self.policy = Policy(config)
        self.pace = Pace(config.max_calls)
        self.turns = Turns()
        self.quietly = Quietly()
        self.quietly_of_faults = Quietly()  # of their own: whoever is refused often is not to hide them
        self._pool = pool
        self._launcher = launcher
        self._socket_path = socket_path
        self._console_log = console_log
        self._disk_bound = disk_bound
        self._ledger_notice = ledger_notice
        self._stop = stop
        self._began = time.monotonic()
        self.stopped = threading.Event()
        self.left: str | None = None
        self.configuration_notice: str | None = None
        self.stopping = False
        self.client_count: Callable[[], int] = lambda: 0
        self.connections_of: Callable[[int], int] = lambda _uid: 0

    def answer(self, caller: Caller, call: messages.AnyCall, descriptors: list[int]) -> Any:
        """Do what *call* asks and return its result.

        Raises:
            LxcPoolError, TypeError, ValueError: For the client.
            EOFError: The client is gone.
        """
        match call:
            case messages.Get():
                return self._get(caller, call)
            case messages.Confirm(request):
                info = self._pool.confirm(
                    caller.peer.uid, request, lambda profile: self.policy.require_profile(caller.peer, profile)
                )
                caller.after_answer(functools.partial(self._after_confirmation, caller.peer, info))
                return info
            case messages.Abandon(request):
                return self._pool.abandon(caller.peer.uid, request, _by(caller.peer))
            case messages.Echo(text):
                return text
            case messages.GetStatus():
                return self.status()
            case messages.ListContainers():
                return self._pool.containers(caller.peer.lease_scope)
            case messages.AwaitWarm(count, timeout):
                return self._await_warm(caller, count, timeout)
            case (
                messages.Resize()
                | messages.Drain()
                | messages.Resume()
                | messages.LookForImages()
                | messages.Shutdown()
            ):
                return self._administer(caller.peer, call)
            case messages.Hello():
                raise ValueError("hello comes first, and once")
            case messages.Mount():
                return self._mount(caller.peer, call, descriptors)
            case messages.AwaitNetwork(name, timeout):
                return self._await_network(caller, name, timeout)
            case _:
                return self._answer_holder(caller, call, descriptors)

    def _answer_holder(self, caller: Caller, call: messages.LeaseCall, descriptors: list[int]) -> Any:
        """Do what the holder of a lease asks."""
        scope = caller.peer.lease_scope
        match call:
            case messages.Execute():
                return self._execute(caller.peer, call, descriptors)
            case messages.Release(name):
                return self._pool.release(name, scope, _by(caller.peer))
            case messages.Inspect(name):
                return self._pool.leased(name, scope)
            case messages.Addresses(name):
                return self._addresses(name, scope)
            case messages.ConsoleLog(name):
                return self._console_log(self._pool.leased(name, scope).name)
            case messages.Renew(name, ttl):
                return self._pool.set_ttl(name, scope, _check_seconds("ttl", ttl))
            case messages.Keep(name, ttl):
                return self._pool.set_ttl(name, scope, _check_seconds("ttl", ttl), drop_owner=True)

    def _administer(self, peer: Peer, call: messages.AdminCall) -> None:
        """Do what only an administrator may ask."""
        if not peer.is_admin:
            what = str(type(call).__struct_config__.tag)
            raise AccessDenied(f"only an administrator (root) may ask for {what}; you are uid {peer.uid}")
        match call:
            case messages.Resize(size):
                self._pool.resize(size)
            case messages.Drain():
                self._pool.drain()
            case messages.Resume():
                self._pool.resume()
            case messages.LookForImages():
                self._pool.look_for_images()
            case messages.Shutdown(grace, keep_leases):
                self._stop(_check_seconds("grace", grace), keep_leases)
                self.stopped.wait()
                if self.left is not None:
                    raise DestroyFailed(self.left)

    def reconfigure(self, config: Config, policy: Policy) -> None:
        """Let another configuration be in force: for those who are connected, from their next call on."""
        if config.max_calls != self.config.max_calls:
            self.pace = Pace(config.max_calls)
        self.config = config
        self.policy = policy

    def require_connection(self, peer: Peer) -> None:
        """Refuse a user's connection beyond those that one may have.

        Raises:
            QuotaExceeded: It is one too many.
        """
        limit = self.config.max_connections
        if not peer.is_admin and self.connections_of(peer.uid) > limit:
            raise QuotaExceeded(f"uid {peer.uid} has {limit} connections already: close some, or ask for more")

    def status(self) -> PoolStatus:
        """Return the counts of everything."""
        census = self._pool.census()
        return PoolStatus(
            running=not self.stopping,
            socket_path=self._socket_path,
            pid=os.getpid(),
            uptime=time.monotonic() - self._began,
            capacity=census.total("capacity"),
            size=census.total("size"),
            building=census.total("building"),
            reserved=census.total("reserved"),
            leased=census.total("leased"),
            reaping=census.total("reaping"),
            stuck=census.total("stuck"),
            waiting=census.total("waiting"),
            worker_count=self.config.workers,
            client_count=self.client_count(),
            error_count=census.error_count,
            last_error=census.last_error,
            backoff=census.backoff,
            draining=census.draining,
            ledger=self._ledger_notice(),
            disk_bound=self._disk_bound(),
            configuration=self.configuration_notice,
            profiles=census.profiles,
        )

    def _get(self, caller: Caller, call: messages.Get) -> messages.Offer | str:
        if not 1 <= len(call.request) <= 64:
            raise ValueError("a request's name has 1 to 64 characters")
        if call.timeout is not None:
            _check_seconds("timeout", call.timeout)
        if call.ttl is not None:
            _check_seconds("ttl", call.ttl)
        identity: LeaseId = check_id(call.id)
        owner = owner_of(caller.peer, call.owner)
        self.policy.require_profile(caller.peer, call.profile)
        ticket = Ticket(call.request, caller.peer.uid, call.profile, identity, owner, call.ttl, caller, caller.notify)
        quota = None if caller.peer.is_admin else Quota(self.config.max_leases, self.config.max_waiters)
        self._pool.request(ticket, quota)
        if not ticket.answered and call.timeout != 0:
            try:
                caller.wait(lambda: ticket.answered, call.timeout)
            except BaseException:
                self._pool.withdraw(ticket)
                if ticket.offer is not None:
                    self._pool.take_back(ticket.uid, ticket.request, caller)
                raise
        words = "" if ticket.answered else self._pool.withdraw(ticket)
        if ticket.error is not None:
            raise ticket.error
        if ticket.offer is None:
            return words
        caller.offered(call.request)
        return messages.Offer(ticket.offer.name, ticket.offer.profile)

    def _after_confirmation(self, peer: Peer, info: ContainerInfo | None) -> None:
        self._pool.settle()
        if info is not None:
            with contextlib.suppress(LxcPoolError, OSError), self._init(info.name, None) as (pidfd, pid, _profile):
                self._launcher.prepare(peer.uid, (pidfd, pid))
            trail.record(
                "lease",
                name=info.name,
                id=info.id,
                uid=peer.uid,
                pid=peer.process.pid,
                program=peer.program,
                owner=info.owner_pid,
                profile=info.profile,
            )

    def _await_warm(self, caller: Caller, count: int | None, timeout: float | None) -> PoolStatus:
        wait = WarmWait(count, caller.notify)
        self._pool.await_warm(wait)
        try:
            caller.wait(lambda: wait.reached or self.stopping, timeout)
        finally:
            self._pool.forget_wait(wait)
        return self.status()

    def _addresses(self, name: str, scope: int | None) -> tuple[str, ...]:
        info = self._pool.leased(name, scope)
        try:
            return addresses.of_process(_init_pid(info))
        except ProcessLookupError as error:
            raise LeaseExpired(f"{name} has just ended") from error

    def _await_network(self, caller: Caller, name: str, timeout: float | None) -> tuple[str, ...] | str:
        if timeout is not None:
            _check_seconds("timeout", timeout)
        with self._init(name, caller.peer.lease_scope) as (pidfd, pid, _profile):
            try:
                with contextlib.closing(NetworkWait(pidfd, pid)) as wait:
                    caller.wait(wait.look, timeout, also=(wait.observer.fileno(), pidfd))
                    return wait.missing or wait.addresses
            except ProcessLookupError as error:
                raise LeaseExpired(f"{name} has just ended") from error

    def _execute(self, peer: Peer, call: messages.Execute, descriptors: list[int]) -> None:
        if len(descriptors) != 4:
            raise ValueError(
                f"a command needs stdin, stdout, stderr and a control socket, not {len(descriptors)} descriptors"
            )
        for descriptor in descriptors[:3]:
            check_stdio(descriptor)
        try:
            request = ExecRequest.decode(call.request)
        except ProtocolError as error:
            raise ValueError(f"not a command: {error}") from error
        stdin, stdout, stderr, control = descriptors
        with self._init(call.name, peer.lease_scope) as (pidfd, pid, profile):
            if profile.env and not request.operation:
                request = request._replace(env=dict(profile.env) | request.env)
            self._launcher.launch(peer.uid, request, (stdin, stdout, stderr, control), (pidfd, pid))

    def _mount(self, peer: Peer, call: messages.Mount, descriptors: list[int]) -> None:
        if len(descriptors) != 3:
            raise ValueError(
                f"a mount needs its source, a pipe and a control socket, not {len(descriptors)} descriptors"
            )
        source, stdout, control = descriptors
        access = READONLY if call.readonly else WRITABLE
        # By the kernel's word who is at the other end, not the client's: whose files these are depends on it.
        request = ExecRequest.for_operation(MOUNT, call.dst, access, str(peer.uid), str(peer.gid))
        with self._init(call.name, peer.lease_scope) as (pidfd, pid, _profile):
            self._launcher.mount(peer.uid, request, (source, stdout, control), (pidfd, pid))
        speak, left_out = (True, 0) if peer.is_admin else self.quietly.may_speak(peer.uid)
        if speak:
            trail.record(
                "mount",
                name=call.name,
                uid=peer.uid,
                pid=peer.process.pid,
                program=peer.program,
                host_path=_path_of(source),
                dst=os.fsdecode(call.dst),
                access="read-only" if call.readonly else "writable",
                left_out=left_out or None,
            )

    @contextlib.contextmanager
    def _init(self, name: str, scope: int | None) -> Iterator[tuple[int, int, ProfileConfig]]:
        """Have a pidfd of a leased container's init, its pid, and its profile, for the time of a `with`."""
        held: list[tuple[int, ProfileConfig]] = []

        def hold(init: Watched, profile: ProfileConfig) -> int:
            if not is_pidfd(init.descriptor):
                raise ExecFailed("commands can't be run: this host refuses pidfd_open(2); see `lxc-pool check`")
            held.append((init.identity.pid, profile))
            return os.dup(init.descriptor)

        pidfd = self._pool.with_init(name, scope, hold)
        try:
            yield pidfd, *held[0]
        finally:
            os.close(pidfd)


def _by(peer: Peer) -> dict[str, object]:
    """Return what the trail says of who has ended a lease; it may be an administrator, or a child of the owner."""
    return {"by": peer.uid, "pid": peer.process.pid, "program": peer.program}


def _path_of(descriptor: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError as error:  # it may be longer than a path can be
        return f"({error.strerror})"


def _init_pid(info: ContainerInfo) -> int:
    if info.init_pid is None:
        raise LeaseExpired(f"{info.name} has no init any more")
    return info.init_pid


def _check_seconds(name: str, value: float) -> float:
    if math.isnan(value) or value < 0:
        raise ValueError(f"{name} must be seconds, 0 or more, not {value!r}")
    return value
