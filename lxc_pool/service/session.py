"""One connection, from its acceptance to its end, on a thread of its own.

```
 accepted ─► who is it (SO_PEERCRED) ─► handshake (deadline) ─► hello ─► call ─► answer ─► call … ─► end
```

Whatever a client sends that is no call of ours ends this connection, and nothing else. What it had reserved and not
confirmed goes back to the pool.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import time
from collections.abc import Callable, Sequence

from lxc_pool.errors import AccessDenied, AuthenticationFailed, InternalError, LxcPoolError, QuotaExceeded, UnknownLease
from lxc_pool.service import trail
from lxc_pool.service.access import Peer, Policy
from lxc_pool.service.fairness import CALL_TIME, CONNECTION_COST
from lxc_pool.service.pool import Pool
from lxc_pool.service.service import PoolService
from lxc_pool.service.shortage import as_shortage
from lxc_pool.wire import handshake, messages
from lxc_pool.wire.channel import Channel, ProtocolError, credentials

log = logging.getLogger(__name__)

HANDSHAKE_TIMEOUT = 5.0
"""Seconds that a client has to prove itself and say hello. A guess: it takes under a millisecond."""

MESSAGE_TIMEOUT = 10.0
"""Seconds that the rest of a message may take once it has begun, and that a client may take to read. A guess."""


class Session:
    """One client's connection. `notify` and `end` may be called from any thread, all else is its own thread's."""

    def __init__(self, sock: socket.socket, key: bytes, service: PoolService, pool: Pool) -> None:
        self._socket = sock
        self._channel = Channel(sock, accept_descriptors=True)
        self._key = key
        self._service = service
        self._pool = pool
        self._policy: Policy | None = None
        self._peer: Peer | None = None
        self._wake = -1
        self._offer: str | None = None
        self._last_call = False
        self.uid = credentials(sock)[1]
        self.let_in = False
        self._work: Callable[[], None] | None = None
        self._turn: contextlib.ExitStack | None = None

    @property
    def peer(self) -> Peer:
        """See `Caller.peer`."""
        if self._peer is None:
            raise InternalError("nobody has been let in on this connection")
        return self._peer

    def run(self) -> None:
        """Serve the connection until it ends; closes it."""
        try:
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            if self._let_in():
                self._channel.before_large = self._take_turn
                while self._serve_one():
                    pass
        except EOFError:
            pass
        except (ProtocolError, AuthenticationFailed, TimeoutError) as error:
            self._record_refusal(error)
        except OSError as error:
            speak, left_out = self._service.quietly.may_speak(self.uid)
            if speak:
                log.info("connection of %s broke: %s%s", self._peer, error, _told(left_out))
        except Exception:  # noqa: BLE001  # one connection's bug must not end the service; the log has it
            self._log_fault(f"connection of {self._peer} failed")
        finally:
            self._take_back_offer()
            self._channel.close()
            if self._wake >= 0:
                # `notify` may come until the pool has forgotten all our tickets, which it has by now.
                wake, self._wake = self._wake, -1
                os.close(wake)

    def end(self) -> None:
        """Break the connection off, so that its thread ends; not if it is about to end with a last answer."""
        if not self._last_call:
            self._channel.break_off()

    def notify(self) -> None:
        """See `Caller.notify`."""
        with contextlib.suppress(BlockingIOError):  # the counter is full: it will wake as it is
            os.eventfd_write(self._wake, 1)

    def offered(self, request: str) -> None:
        """See `Caller.offered`."""
        self._offer = request

    def after_answer(self, work: Callable[[], None]) -> None:
        """See `Caller.after_answer`."""
        self._work = work

    def wait(self, ready: Callable[[], bool], timeout: float | None, also: Sequence[int] = ()) -> None:
        """See `Caller.wait`."""
        deadline = None if timeout is None else time.monotonic() + timeout
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        poll.register(self._channel, select.POLLIN | select.POLLRDHUP)
        for descriptor in also:
            poll.register(descriptor, select.POLLIN)
        while not ready():
            remaining = None if deadline is None else deadline - time.monotonic()
            if remaining is not None and remaining <= 0:
                return
            # A day at a time: poll(2) counts milliseconds in 32 bits.
            events = dict(poll.poll(min(86_400_000.0, 86_400_000.0 if remaining is None else remaining * 1000 + 0.5)))
            if self._channel.fileno() in events:
                self._expect_silence()
            if self._wake in events:
                os.eventfd_read(self._wake)

    def _let_in(self) -> bool:
        """Find out who the client is and let it prove itself; return whether it may go on."""
        self._channel.deadline = time.monotonic() + HANDSHAKE_TIMEOUT
        denied: LxcPoolError | None = None
        try:
            policy = self._policy = self._service.policy
            self._peer = policy.peer_of(self._socket)
            self._keep_pace(CONNECTION_COST)
            policy.require_user(self._peer)
            self._service.require_connection(self._peer)
        except (AccessDenied, QuotaExceeded) as error:
            denied = error
        handshake.prove_to_client(self._channel, self._key)
        call = messages.decode_call(self._channel.recv_bytes(256))
        if not isinstance(call, messages.Hello):
            raise ProtocolError(f"the first call was {type(call).__name__}, not Hello")
        if denied is None and call.protocol != messages.PROTOCOL:
            denied = AccessDenied(
                f"this service speaks version {messages.PROTOCOL} of the protocol, the client {call.protocol}: "
                "install the same lxc-pool on both sides"
            )
        if denied is not None:
            self._record_refusal(denied)
        self.let_in = denied is None  # before it is told: from then on it takes no stranger's place
        self._send(messages.encode_failure(denied) if denied else messages.encode_result(messages.PROTOCOL))
        return self.let_in

    def _serve_one(self) -> bool:
        """Take one call and answer it; return whether to go on."""
        began = None if self.peer.is_admin else time.thread_time()
        try:
            return self._take_and_answer()
        finally:
            if began is not None and (calls := int((time.thread_time() - began) / CALL_TIME)):
                self._service.pace.delay(self.peer.uid, calls)  # the next one will have to wait for that
            if self._turn is not None:
                turn, self._turn = self._turn, None
                turn.close()

    def _take_turn(self) -> None:
        """Wait until this user has few enough large messages in the service; ours is one until it is answered."""
        if not self.peer.is_admin:
            self._turn = contextlib.ExitStack()
            self._turn.enter_context(self._service.turns.taken(self.peer.uid, MESSAGE_TIMEOUT))

    def _take_and_answer(self) -> bool:
        channel = self._channel
        # Whoever was made an offer has to say something soon: others may be waiting for that container.
        channel.deadline = None if self._offer is None else time.monotonic() + self._service.config.confirm_timeout
        try:
            body = channel.recv_bytes(rest_within=MESSAGE_TIMEOUT)
        except TimeoutError:
            if self._offer is None or channel.pending:
                raise
            self._take_back_offer()
            return True
        self._keep_pace(1)
        call = messages.decode_call(body)
        self._last_call = isinstance(call, messages.Shutdown)
        descriptors: list[int] = []
        denied = self._denied()
        offer, self._offer = self._offer, None
        answers = isinstance(call, (messages.Confirm, messages.Abandon)) and call.request == offer
        if offer is not None and (denied is not None or not answers):
            self._pool.take_back(self.peer.uid, offer, self)
        try:
            descriptors = channel.take_descriptors()
            if denied is not None:
                raise denied
            reply = messages.encode_result(self._service.answer(self, call, descriptors))
        except (AccessDenied, QuotaExceeded, UnknownLease) as error:
            self._record_refusal(error)
            reply = messages.encode_failure(error)
        except (LxcPoolError, TypeError, ValueError) as error:
            reply = messages.encode_failure(error)
        except (EOFError, ProtocolError):
            raise
        except Exception as error:  # noqa: BLE001  # a shortage, or our bug: the client is told, the log has the rest
            self._log_fault(f"{type(call).__name__} of {self._peer} failed")
            reply = messages.encode_failure(as_shortage(error) or error)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        try:
            self._send(reply)
        finally:
            work, self._work = self._work, None
            if work is not None:
                work()
        return not (self._last_call and self._service.stopped.is_set())

    def _denied(self) -> AccessDenied | None:
        """Return why the client may use the service no more, if the configuration has changed since it was let in."""
        policy = self._service.policy
        if policy is not self._policy:
            self._peer = policy.look_again(self.peer)
            try:
                policy.require_user(self._peer)
            except AccessDenied as error:
                return error
            self._policy = policy
        return None

    def _keep_pace(self, calls: int) -> None:
        """Wait until this user's turn has come, if it asks more than it may."""
        if not self.peer.is_admin and (delay := self._service.pace.delay(self.peer.uid, calls)) > 0:
            time.sleep(delay)

    def _record_refusal(self, error: Exception) -> None:
        pid, uid, _gid = self._channel.peer
        speak, left_out = self._service.quietly.may_speak(uid)
        if speak:
            trail.record(
                "refusal",
                uid=uid,
                pid=pid,
                program=self._peer.program if self._peer else None,
                kind=type(error).__name__,
                why=str(error),
                left_out=left_out or None,
            )

    def _log_fault(self, words: str) -> None:
        """Write the error that is being handled into the log, unless this user has caused too many of late."""
        speak, left_out = self._service.quietly_of_faults.may_speak(self.uid)
        if speak:
            log.log(logging.ERROR, "%s%s", words, _told(left_out), exc_info=True)

    def _send(self, reply: bytes) -> None:
        self._channel.deadline = time.monotonic() + MESSAGE_TIMEOUT
        self._channel.send_bytes(reply)

    def _take_back_offer(self) -> None:
        offer, self._offer = self._offer, None
        if offer is not None:
            self._pool.take_back(self.peer.uid, offer, self)

    def _expect_silence(self) -> None:
        """Look at what came while a call is being answered: nothing should, but the end."""
        if not self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
            raise EOFError("the client closed the connection while it waited")
        raise ProtocolError("the client sent something while it waited for an answer")


def _told(left_out: int) -> str:
    return f" ({left_out} such lines were left out)" if left_out else ""
