"""The manager's server: it listens in the host dir and gives each connection a thread.

`multiprocessing.managers` has the place for it (`Server`, `Listener`); what it does there, unpickling whatever comes
and offering `create` and `debug_info` to everybody, is replaced as a whole.

```
 main thread ─ serve_forever: waits for the end
 accepter    ─ accept ─► a thread per connection: Session.run
```
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import stat
import threading
import time
from multiprocessing import managers
from pathlib import Path
from typing import Any, cast

from lxc_pool.manager import SERIALIZER, PoolManager, connect_channel
from lxc_pool.service.pool import Pool
from lxc_pool.service.service import PoolService
from lxc_pool.service.session import Session
from lxc_pool.wire.channel import credentials

log = logging.getLogger(__name__)

_MAX_STRANGERS = 64
"""Connections of one user that have not proved themselves yet: each is a thread. A guess: that takes a millisecond."""

_BACKLOG = 512
"""Connections that may wait to be accepted. A guess: many times the clients that start at one moment."""


class SocketListener:
    """A Unix socket that is listened on; the `Listener` that `multiprocessing.managers.Server` asks for."""

    def __init__(self, address: str, backlog: int = 1) -> None:
        """Listen, though not yet at *address*: see `open_to`. Whoever calls this holds the lock of the host dir."""
        self.address = address
        self._hidden = f"{address}.new"
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISSOCK(os.lstat(address).st_mode):
                raise FileExistsError(f"{address} is in the way: it is not a socket")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._hidden)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.bind(self._hidden)
            self._socket.listen(max(backlog, _BACKLOG))
        except BaseException:
            self._socket.close()
            raise

    def open_to(self, group: int) -> None:
        """Let *group* connect, in the place of a stale socket that may be there.

        By rename: a client finds the stale socket, and tries again, or one that it may use, never a refusal between.
        """
        os.chown(self._hidden, -1, group)
        os.chmod(self._hidden, 0o660)
        os.rename(self._hidden, self.address)

    def accept(self) -> socket.socket:
        """Return the next connection, with nothing said on it yet."""
        return self._socket.accept()[0]

    def close(self) -> None:
        """Stop listening, wake whoever accepts, and remove the socket."""
        for path in (self._hidden, self.address):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


managers.listener_client[SERIALIZER] = (SocketListener, connect_channel)  # type: ignore[attr-defined]  # not in typeshed


class PoolServer(managers.Server):
    """Serves one `PoolService`. `_lock` guards `_sessions`.

    Attributes:
        signals: A descriptor that becomes readable when a signal has come, see `signal.set_wakeup_fd`; -1: none.
    """

    public = []  # noqa: RUF012  # as the stock one has it, but empty: the stock calls: none of them is reachable

    def __init__(self, registry: dict[str, Any], address: str, authkey: bytes, serializer: str) -> None:
        super().__init__(registry, address, authkey, serializer)
        self._key = authkey
        self._lock = threading.Lock()
        self._sessions: dict[Session, threading.Thread] = {}
        self._service: PoolService | None = None
        self._pool: Pool | None = None
        self._closing = False
        self._accepter: threading.Thread | None = None
        self._end = os.eventfd(0, os.EFD_CLOEXEC)
        self.signals = -1

    @property
    def path(self) -> str:
        """Where it listens."""
        return self.socket_listener.address

    @property
    def socket_listener(self) -> SocketListener:
        """The listener."""
        return cast("SocketListener", self.listener)  # type: ignore[attr-defined]  # not in typeshed

    def attach(self, service: PoolService, pool: Pool) -> None:
        """Name what is served."""
        self._service, self._pool = service, pool
        service.client_count = lambda: len(self._sessions)
        service.connections_of = self._connections_of

    def open(self) -> None:
        """Begin to accept connections."""
        self._accepter = threading.Thread(target=self.accepter, name="accepter", daemon=True)
        self._accepter.start()

    def serve_forever(self) -> None:
        """Wait until `stop` is called; unlike the stock one, return then, with connections still served."""
        poll = select.poll()
        poll.register(self._end, select.POLLIN)
        if self.signals >= 0:
            poll.register(self.signals, select.POLLIN)
        while True:
            ready = dict(poll.poll())
            if self.signals in ready:
                os.read(self.signals, 512)  # before the next line, Python runs the signals' handlers
            if self._end in ready:
                os.eventfd_read(self._end)
                return

    def close(self) -> None:
        """Stop listening; connections that there are go on."""
        self._closing = True
        self.socket_listener.close()
        if self._accepter is not None:
            self._accepter.join()

    def stop(self) -> None:
        """Let `serve_forever` return; callable from a signal handler, which may not take locks, and more than once."""
        os.eventfd_write(self._end, 1)

    def accepter(self) -> None:
        """Give each connection a thread."""
        while not self._closing:
            try:
                sock = self.socket_listener.accept()
            except OSError as error:
                if not self._closing:
                    log.warning("can't accept a connection: %s", error)
                    time.sleep(0.1)  # out of descriptors, most likely: some will come free, but nothing says when
                continue
            self.handle_request(sock)

    def handle_request(self, conn: socket.socket) -> None:  # type: ignore[override]  # the stock type
        """Start a session on a new connection."""
        if self._service is None or self._pool is None:
            conn.close()
            return
        uid = credentials(conn)[1]
        if self._strangers_of(uid) >= _MAX_STRANGERS:
            conn.close()  # it may come again when those that are there have proved themselves, or have been dropped
            return
        session = Session(conn, self._key, self._service, self._pool)
        thread = threading.Thread(target=self._run, args=(session,), name="session", daemon=True)
        with self._lock:
            self._sessions[session] = thread
        try:
            thread.start()
        except RuntimeError as error:
            log.warning("can't start a thread for a connection: %s", error)
            with self._lock:
                del self._sessions[session]
            conn.close()

    def close_sessions(self, timeout: float) -> None:
        """End all connections, but let those that asked for the end have their answer; wait for their threads.

        Args:
            timeout: Seconds that they have to end, all together.
        """
        with self._lock:
            threads = dict(self._sessions)
        for session in threads:
            session.end()
        deadline = time.monotonic() + timeout
        for thread in threads.values():
            thread.join(max(0.0, deadline - time.monotonic()))

    def _connections_of(self, uid: int) -> int:
        with self._lock:
            return sum(session.uid == uid for session in self._sessions)

    def _strangers_of(self, uid: int) -> int:
        with self._lock:
            return sum(session.uid == uid and not session.let_in for session in self._sessions)

    def _run(self, session: Session) -> None:
        try:
            session.run()
        finally:
            with self._lock:
                self._sessions.pop(session, None)


class ServiceManager(PoolManager):
    """The service's end of `PoolManager`: the one that can serve."""

    def get_server(self) -> PoolServer:
        """Listen, and return the server; unlike the stock one, which ignores the class's `_Server`."""
        return PoolServer(self._registry, str(self._address), bytes(self._authkey), self._serializer)  # type: ignore[attr-defined]  # not in typeshed


def listen(host_dir: Path, key: bytes) -> PoolServer:
    """Open the socket of *host_dir*, for root alone as yet, and return its server."""
    return ServiceManager(host_dir, key).get_server()
