"""Put a service together, run it, and take it apart in order.

```
 main thread ── PoolServer.serve_forever ── (signal or shutdown call) ── the end, step by step
 threads: accepter, one a connection, dispatcher, watchdog, and the executors' own
```
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import resource
import secrets
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

from lxc_pool.backend.protocol import Backend
from lxc_pool.config import Config
from lxc_pool.execution.launcher import Launcher
from lxc_pool.host import own_processes, residue
from lxc_pool.model import State
from lxc_pool.service import authkey, directories
from lxc_pool.service.access import Policy
from lxc_pool.service.directories import name_prefix
from lxc_pool.service.dispatcher import Dispatcher
from lxc_pool.service.lanes import ProcessLane
from lxc_pool.service.ledger import Entry, Ledger
from lxc_pool.service.ledger import read as read_ledger
from lxc_pool.service.network import pool_network
from lxc_pool.service.pool import Pool
from lxc_pool.service.recovery import judge
from lxc_pool.service.reload import reload
from lxc_pool.service.server import PoolServer, listen
from lxc_pool.service.service import PoolService
from lxc_pool.service.sweeper import Sweeper
from lxc_pool.service.watchdog import Watchdog
from lxc_pool.service.worker import fork_server_in

log = logging.getLogger(__name__)

DEFAULT_GRACE = 10.0
"""Seconds that leases have when a signal ends the service. Origin: the public contract, `shutdown(grace=10.0)`."""

_REMOVAL_TIMEOUT = 60.0
"""Seconds that the removal of all containers may take at the end; what is left then is named in the log, and
to whoever asked for the end."""

_ENDING = (State.BUILDING, State.REAPING, State.STUCK)
"""The states of containers that have no place in a service that has ended."""


class Ending:
    """How the service is to end, and whether it is to read its configuration again before that.

    Set by a signal handler or a shutdown call, read by the main thread.

    Attributes:
        left: What could not be removed, in words; None: nothing.
    """

    def __init__(self) -> None:
        self.grace = DEFAULT_GRACE
        self.begun = False
        self.reload = False
        self.hurry = False
        self.keep_leases = False
        self.emptied = False
        self.left: str | None = None


def serve(
    config: Config,
    backend: Backend,
    *,
    host_dir: Path,
    state_dir: Path,
    ready: Callable[[str], None],
    load: Callable[[], Config] | None = None,
) -> None:
    """Run a service until it is told to end; return when all is closed and its containers are gone.

    Args:
        config: The configuration.
        backend: The engine.
        host_dir: Where clients meet it.
        state_dir: Where containers and images are.
        ready: Called with the socket's path once connections are accepted.
        load: Reads the configuration again, for SIGHUP; None: it stays as it is.

    Raises:
        HostDirError: Another service has one of the directories, or one is not fit for use.
    """
    _raise_descriptor_limit()
    group = Policy(config).group
    with contextlib.ExitStack() as stack:
        instance = stack.enter_context(directories.state_dir(state_dir))
        key = authkey.new() if config.key_file is None else authkey.read(config.key_file)
        stack.enter_context(directories.host_dir(host_dir, group, key))
        watchdog = Watchdog()
        watchdog.open()
        stack.callback(watchdog.close)
        stack.enter_context(own_processes.marked(instance))
        stack.enter_context(fork_server_in(host_dir, name_prefix(instance)))
        lanes, sweeper = _workers(stack, backend, config.workers)
        dispatcher = Dispatcher(lambda: pool.dispatch())  # noqa: PLW0108  # the pool comes two lines on
        ledger = Ledger(state_dir / "ledger.db")
        stack.callback(ledger.close)
        entries = ledger.open()
        _end_left(instance, entries)
        network = stack.enter_context(pool_network(config, instance, functools.partial(read_ledger, ledger.path)))
        pool = Pool(
            config,
            lanes,
            watchdog,
            ledger,
            new_name=_names(instance).__next__,
            wake=dispatcher.wake,
            is_idle=backend.is_idle,
            obstacle=lambda min_free: network.obstacle() or _obstacle(state_dir, min_free),
            addresses=network.addresses,
        )
        stack.callback(pool.let_go)
        present = _present(backend, instance, state_dir, host_dir)
        ledger.note_unknown(_made(backend, instance, state_dir))
        pool.restore(judge(entries, present, config, backend.newest, watchdog.now(), fits=network.addresses.fits))
        sweeper.wake()
        dispatcher.open()
        stack.callback(dispatcher.close)
        launcher = Launcher(lambda seconds, act: watchdog.call_at(watchdog.now() + seconds, act))
        launcher.open()
        stack.callback(launcher.close)
        server = listen(host_dir, key)
        stack.callback(server.close)
        ending = Ending()
        service = PoolService(
            config,
            pool,
            launcher,
            socket_path=server.path,
            console_log=backend.console_log,
            disk_bound=backend.disk_bound,
            ledger_notice=lambda: ledger.notice,
            stop=_stopper(ending, server),
        )
        server.attach(service, pool)
        with _signals(ending, server), _emptied(pool, service, ending, server, instance):
            server.socket_listener.open_to(group)
            server.open()
            dispatcher.wake()
            ready(server.path)
            while not ending.begun:
                server.serve_forever()
                if ending.reload and not ending.begun:
                    ending.reload = False
                    reload(load or (lambda: config), pool, service, network)
        stack.pop_all().close()
        service.left = ending.left
        service.stopped.set()
        server.close_sessions(timeout=5.0)
    log.info("the service has ended")


def _workers(stack: contextlib.ExitStack, backend: Backend, number: int) -> tuple[list[ProcessLane], Sweeper]:
    """Return lanes, open, and who removes what they put off; the stack takes them apart again, that one last."""
    sweeper = Sweeper(backend)
    stack.callback(sweeper.close, _REMOVAL_TIMEOUT)
    lanes = [ProcessLane(backend, sweeper.wake) for _ in range(number)]
    for lane in lanes:
        lane.open()
        stack.callback(lane.close)
    return lanes, sweeper


def _end_left(instance: str, entries: Sequence[Entry]) -> None:
    """End what an earlier service has left of its own processes, because somebody had stopped them, say.

    Those that run commands of leases stay.
    """
    inits = {entry.init.pid for entry in entries if entry.init is not None and entry.lease is not None}
    for process in own_processes.left(instance):
        if not process.is_needed(inits):
            log.info("ended what the service with pid %s has left: %s", process.service.pid, process.words)
            own_processes.end(process.identity)


def _made(backend: Backend, instance: str, state_dir: Path) -> set[str]:
    """Return the names of the containers that the ledger has to know: none is made before it is written down."""
    prefix = name_prefix(instance)
    made = {name for name in backend.names() if name.startswith(prefix)}
    return made - set(residue.discarded(prefix, state_dir / "containers"))


def _present(backend: Backend, instance: str, state_dir: Path, host_dir: Path) -> list[str]:
    """Return the names of all containers of which anything is there."""
    prefix = name_prefix(instance)
    discarded = residue.discarded(prefix, state_dir / "containers")
    return [
        *(name for name in backend.names() if name.startswith(prefix)),
        # Whatever else is left of a container, should the ledger have been lost; but what the sweeper removes.
        *(
            trace.name
            for trace in residue.traces(prefix, state_dir / "containers", host_dir)
            if trace.kind != "netdev" and trace.name not in discarded
        ),
    ]


def _obstacle(state_dir: Path, min_free: int) -> str | None:
    """Return why nothing can be created, if the state dir has too little room, or is gone."""
    try:
        status = os.statvfs(state_dir)
    except OSError as error:
        return f"can't look at the state dir {state_dir}: {error.strerror}"
    free = status.f_bavail * status.f_frsize
    if free >= min_free:
        return None
    return f"{free >> 20} MiB are free in {state_dir}, min_free is {min_free >> 20} MiB: make room, or change it"


@contextlib.contextmanager
def _emptied(pool: Pool, service: PoolService, ending: Ending, server: PoolServer, instance: str) -> Iterator[None]:
    """Empty the pool at the end of the block, also if that fails: leases are left to the next service then."""
    try:
        yield
    except BaseException:
        ending.keep_leases = True  # nobody has asked for their end
        raise
    finally:
        service.stopping = True
        own_processes.let_go_on(instance)
        _end(pool, ending, server)


def _end(pool: Pool, ending: Ending, server: PoolServer) -> None:
    """Empty the pool on another thread, while this one, which gets the signals, waits for that or a second signal."""
    thread = threading.Thread(target=_empty, args=(pool, ending, server), name="ending", daemon=True)
    thread.start()
    while not ending.emptied:
        server.serve_forever()
        pool.interrupt()
    thread.join()


def _empty(pool: Pool, ending: Ending, server: PoolServer) -> None:
    """Send waiters away, give leases their grace, remove everything."""
    try:
        log.info("the service is ending; leases have %.1f s", ending.grace)
        pool.close_to_new()
        if not ending.keep_leases:
            pool.wait_until(State.LEASED, State.RESERVED, timeout=ending.grace, unless=lambda: ending.hurry)
            pool.end_leases()
        # STUCK ones too: their removal is being tried again.
        if not pool.wait_until(*_ENDING, timeout=_REMOVAL_TIMEOUT):
            ending.left = _left(pool)
            log.error("%s", ending.left)
    finally:
        ending.emptied = True
        server.stop()


def _left(pool: Pool) -> str:
    names = [f"{info.name} ({info.reason or info.state})" for info in pool.containers(None) if info.state in _ENDING]
    return (
        f"the service has ended, but could not remove all containers in {_REMOVAL_TIMEOUT:.0f} s: {', '.join(names)}; "
        "once the cause is gone, the next service or `lxc-pool cleanup --execute` does"
    )


def _stopper(ending: Ending, server: PoolServer) -> Callable[[float, bool], None]:
    def stop(grace: float, keep_leases: bool) -> None:
        if not ending.begun:
            ending.grace, ending.keep_leases = grace, keep_leases
            ending.begun = True
        server.stop()

    return stop


@contextlib.contextmanager
def _signals(ending: Ending, server: PoolServer) -> Iterator[None]:
    """Let SIGTERM and SIGINT end the service, and a second one end the grace; SIGHUP, reload the configuration."""

    def hang_up(_number: int, _frame: FrameType | None) -> None:
        ending.reload = True
        server.stop()

    def handle(_number: int, _frame: FrameType | None) -> None:
        ending.hurry = ending.begun
        ending.begun = True
        server.stop()

    # A signal may come to any thread; without this, the main thread would sleep on, and its handler never run.
    server.signals, wakeup = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    handlers = {signal.SIGTERM: handle, signal.SIGINT: handle, signal.SIGHUP: hang_up}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    earlier = signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(earlier)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(wakeup)
        os.close(server.signals)
        server.signals = -1


def _names(instance: str) -> Iterator[str]:
    """Make names that no container has had: this instance's, with a random word for this run and a number."""
    run = secrets.token_hex(4)
    return (f"{name_prefix(instance)}{run}-{number}" for number in itertools.count(1))


def _raise_descriptor_limit() -> None:
    """Take as many descriptors as root allows: each container and each client takes one or two."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    log.debug("at most %s descriptors, pid %s", hard, os.getpid())
