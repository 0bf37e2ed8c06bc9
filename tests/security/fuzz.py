"""Throw at the codec and at a whole server what Hypothesis comes up with; see that nothing crashes, hangs or grows.

    python -m tests.security.fuzz --cases 200000 [--seed N]

A case is what one client sends before it closes its end: declared calls with values of all kinds in any order, the same
with bytes changed, or mere noise; in one piece or many, with descriptors or without, before or after the handshake. The
server is the real one, in this process, over containers in memory; it may start no commands.

What a run finds is kept in `corpus/`, one client's bytes a file, and sent again by each run of the tests.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import dataclasses
import functools
import gc
import hashlib
import logging
import os
import random
import resource
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from lxc_pool import PoolManager, hostdir
from lxc_pool.config import Config, ProfileConfig
from lxc_pool.errors import LxcPoolError
from lxc_pool.execution import launcher, protocol
from lxc_pool.execution.protocol import ExecRequest
from lxc_pool.host.processes import identify
from lxc_pool.model import ContainerId
from lxc_pool.service.access import Peer, Policy
from lxc_pool.service.fairness import Quietly
from lxc_pool.wire import handshake, messages
from lxc_pool.wire.channel import Channel, ProtocolError
from tests.support import memory_service as support
from tests.support.memory_service import MemoryService, say

CORPUS = Path(__file__).with_name("corpus")

USER = 64001
"""Whom the server takes the fuzzer for: somebody who may use it, and not administrate."""

HANG = 20.0
"""Seconds in which the server must have closed a connection whose other end is closed. It takes milliseconds."""

GROWTH = 32 << 20
"""Bytes of memory that a run may add after its first batches. A guess: 200 bytes leaked in each case would be more."""

_BATCH = 10_000
_SETTLED = 3
"""Cases of a batch, and batches until Hypothesis and the allocator have what they keep."""

LEASED = "<leased>"
"""Stands for the name of a container that the fuzzer has."""

_SIZE = 3
"""Containers of the server."""

_ROUND = 250
"""Cases after which it is looked whether everything is as before."""


# --- what is sent -----------------------------------------------------------------------------------------------------

_names = st.sampled_from([LEASED, LEASED, "", "x", "../x", "lxp-000000-1"]) | st.text(max_size=20)
_requests = st.sampled_from(["r1", "r2", "r3"]) | st.text(max_size=70)
_seconds = st.sampled_from([0.0, 0.01, 1.0, -1.0, float("nan"), float("inf"), -0.0, 1e308, 5e-324]) | st.floats()
_numbers = st.sampled_from([0, 1, -1, 2, 2**31, 2**63 - 1, -(2**63), 2**64 - 1]) | st.integers(-(2**63), 2**64 - 1)
_ids = st.one_of(
    st.sampled_from(["job", "", "x" * 129, "\x1b[31m"]),
    st.text(max_size=20),
    _numbers,
    st.builds(ContainerId, st.text(max_size=5), _numbers, _numbers),
)
_commands = st.one_of(
    st.binary(max_size=64),
    st.lists(st.text(max_size=8), min_size=1, max_size=4).map(lambda argv: _encoded(tuple(argv), {})),
    st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=3).map(lambda env: _encoded(("x",), env)),
)

BY_CALL: dict[type[messages.Call], st.SearchStrategy[messages.Call]] = {
    messages.Hello: st.builds(messages.Hello, _numbers),
    messages.Echo: st.builds(messages.Echo, st.text(max_size=40)),
    messages.GetStatus: st.just(messages.GetStatus()),
    messages.ListContainers: st.just(messages.ListContainers()),
    messages.AwaitWarm: st.builds(messages.AwaitWarm, st.none() | _numbers, st.none() | _seconds),
    messages.Get: st.builds(
        messages.Get,
        _requests,
        _ids,
        st.just(0.0) | st.none() | _seconds,
        st.just("default") | st.text(max_size=10),
        st.none() | _numbers | st.just(os.getpid()),
        st.none() | _seconds,
    ),
    messages.Confirm: st.builds(messages.Confirm, _requests),
    messages.Abandon: st.builds(messages.Abandon, _requests),
    messages.Release: st.builds(messages.Release, _names),
    messages.Inspect: st.builds(messages.Inspect, _names),
    messages.Addresses: st.builds(messages.Addresses, _names),
    messages.AwaitNetwork: st.builds(messages.AwaitNetwork, _names, st.none() | _seconds),
    messages.ConsoleLog: st.builds(messages.ConsoleLog, _names),
    messages.Renew: st.builds(messages.Renew, _names, _seconds),
    messages.Keep: st.builds(messages.Keep, _names, _seconds),
    messages.Execute: st.builds(messages.Execute, _names, _commands),
    messages.Mount: st.builds(messages.Mount, _names, st.binary(max_size=20), st.booleans()),
    messages.Resize: st.builds(messages.Resize, _numbers),
    messages.Drain: st.just(messages.Drain()),
    messages.Resume: st.just(messages.Resume()),
    messages.LookForImages: st.just(messages.LookForImages()),
    messages.Shutdown: st.builds(messages.Shutdown, _seconds, st.booleans()),
}
"""Every declared call."""

_OFTEN = {messages.Get: 3, messages.Confirm: 2, messages.Execute: 2}

CALLS: st.SearchStrategy[messages.Call] = st.one_of(
    *(strategy for kind, strategy in BY_CALL.items() for _ in range(_OFTEN.get(kind, 1)))
)
"""Any of them."""

_plain = st.recursive(
    st.none() | st.booleans() | _numbers | st.floats() | st.text(max_size=8) | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
_tags = st.sampled_from(sorted(str(call.__struct_config__.tag) for call in messages.AnyCall.__args__))
_wrong_calls = st.builds(
    lambda tag, values: msgspec.msgpack.encode([tag, *values]),
    _tags | st.text(max_size=6),
    st.lists(_plain, max_size=7),
)
"""Arrays that look like calls and have anything in them."""


@dataclasses.dataclass(frozen=True)
class Change:
    """One change to the bytes of a case."""

    kind: str
    place: float
    value: int

    def apply(self, data: bytearray) -> None:
        at = int(self.place * len(data))
        if self.kind == "flip" and data:
            data[min(at, len(data) - 1)] ^= 1 << self.value % 8
        elif self.kind == "set" and data:
            data[min(at, len(data) - 1)] = self.value
        elif self.kind == "insert":
            data[at:at] = bytes([self.value]) * (1 + self.value % 7)
        elif self.kind == "cut":
            del data[at : at + 1 + self.value % 16]
        elif self.kind == "end":
            del data[at:]
        elif self.kind == "double":
            data[at:at] = data[: self.value]


_changes = st.builds(
    Change,
    st.sampled_from(["flip", "set", "insert", "cut", "end", "double"]),
    st.floats(0, 1),
    st.integers(0, 255),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """What one client sends.

    Attributes:
        greeted: After the handshake and hello; else at once.
        bodies: The messages: declared calls, or bytes.
        changes: What happens to them on the way.
        kinds: What descriptors go with the first piece.
        step: Bytes in one piece; 0: all in one.
    """

    greeted: bool
    bodies: Sequence[messages.Call | bytes]
    changes: Sequence[Change]
    kinds: Sequence[str]
    step: int

    def data(self, leased: str) -> bytes:
        """Return its bytes; *leased* is put in where a call names a container that is the fuzzer's."""
        data = bytearray()
        for body in self.bodies:
            encoded = body if isinstance(body, bytes) else _encode(body, leased)
            data += struct.pack("!i", len(encoded)) + encoded
        for change in self.changes:
            change.apply(data)
        return bytes(data)


CASES = st.builds(
    Case,
    st.sampled_from([True, True, True, False]),
    st.lists(CALLS | CALLS | CALLS | _wrong_calls | st.binary(max_size=60), max_size=6),
    st.just(()) | st.lists(_changes, max_size=3),
    st.just(()) | st.lists(st.sampled_from(["pipe", "null", "file", "socket", "control", "directory"]), max_size=7),
    st.sampled_from([0, 0, 0, 1, 5, 64]),
)


def _encoded(argv: tuple[str, ...], env: dict[str, str]) -> bytes:
    try:
        return ExecRequest(argv, env).encode()
    except ValueError:  # a lone surrogate
        return b""


def _encode(call: messages.Call, leased: str) -> bytes:
    if getattr(call, "name", "") == LEASED:
        call = msgspec.structs.replace(call, name=leased)
    try:
        return messages.encode_call(call)
    except ValueError:
        return b""


def example(kind: type[messages.Call], **known: object) -> messages.Call:
    """Return a call of that kind, with what is *known* in its fields, and elsewhere something that they may hold."""
    values = {}
    for field in msgspec.structs.fields(kind):
        fitting = (value for value in ("x", True, 1, 1.0, b"/x") if _fits(value, field.type))
        values[field.name] = known[field.name] if field.name in known else next(fitting)
    return kind(**values)


def _fits(value: object, kind: Any) -> bool:
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError:
        return False
    return True


EXAMPLES = tuple(map(example, BY_CALL))
"""A call of each kind."""


# --- the codec alone --------------------------------------------------------------------------------------------------


def decode_everything(body: bytes) -> None:
    """Give *body* to everything that reads what others have sent; each may refuse it in its own declared way only."""
    with contextlib.suppress(ProtocolError):
        messages.decode_call(body)
    for call in EXAMPLES:
        with contextlib.suppress(ProtocolError, LxcPoolError, TypeError, ValueError):
            messages.decode_reply(call, body)
    for decode in (protocol.decode_event, protocol.decode_order, ExecRequest.decode):
        with contextlib.suppress(protocol.ProtocolError):
            decode(body)


def receive_everything(data: bytes) -> None:
    """Let a channel take *data* to its end; what it takes are messages, then it ends as declared."""
    theirs, ours = socket.socketpair()
    channel = Channel(ours, accept_descriptors=True)
    channel.deadline = time.monotonic() + HANG
    with contextlib.closing(channel):
        with theirs:
            theirs.sendall(data[:60_000])
        with contextlib.suppress(EOFError, ProtocolError):
            while True:
                assert len(channel.recv_bytes()) <= len(data)


# --- the server -------------------------------------------------------------------------------------------------------


class _NoLauncher(launcher.Launcher):
    """Checks what it is given, and starts nothing: the `containers` here are the host itself."""

    def _send(self, uid: int, request: ExecRequest, fds: list[int], init: tuple[int, int]) -> None:
        init_pidfd, init_pid = init
        assert uid >= 0
        assert ExecRequest.decode(request.encode(), trusted=True).encode() == request.encode()
        os.fstat(init_pidfd)
        assert identify(init_pid).pid == init_pid
        for descriptor in fds:
            os.fstat(descriptor)


class Complaints(logging.Handler):
    """Keeps what the service logs as its own error."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(record.getMessage() + (f": {record.exc_info[1]!r}" if record.exc_info else ""))


class Target:
    """A server that is thrown at."""

    def __init__(self, service: MemoryService, complaints: Complaints) -> None:
        self.service = service
        self.cases = 0
        self.answers: collections.Counter[str] = collections.Counter()
        self.slowest = 0.0
        self._complaints = complaints
        self._key = hostdir.read_key(service.host_dir)
        self._pool = PoolManager.connect(service.host_dir)
        self._directory = os.open("/", os.O_RDONLY)
        self._file = os.open(__file__, os.O_RDONLY)
        self._null = os.open("/dev/null", os.O_RDWR)
        self._pipe = os.pipe()
        self._pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._before = (sys.maxsize, sys.maxsize)
        self.look()  # this process is watched as an owner of leases from now on
        self._before = self._usage()

    def close(self) -> None:
        """Close what was opened to be thrown."""
        self._pool.close()
        for descriptor in (self._directory, self._file, self._null, *self._pipe):
            os.close(descriptor)
        for end in self._pair:
            end.close()

    def throw(self, case: Case) -> None:
        """Be that client."""
        self.send(case.data(self._leased()), greeted=case.greeted, kinds=case.kinds, step=case.step)
        self.cases += 1
        if self.cases % _ROUND == 0:
            self.look()

    def send(self, data: bytes, *, greeted: bool, kinds: Sequence[str] = (), step: int = 0) -> None:
        """Send *data* and read until the server has closed the connection."""
        began = time.monotonic()
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(HANG)
            sock.connect(str(self.service.socket_path))
            if greeted:
                channel = Channel(sock)
                handshake.prove_to_service(channel, self._key)
                say(channel, messages.Hello(messages.PROTOCOL))
                sock.settimeout(HANG)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self._send_pieces(sock, data, kinds, step)
                sock.shutdown(socket.SHUT_WR)
            said = 0
            with contextlib.suppress(ConnectionResetError):
                while more := sock.recv(65536):
                    said += len(more)
        self.answers["answered" if said else "closed"] += 1
        self.slowest = max(self.slowest, time.monotonic() - began)
        if self._complaints.found:
            raise AssertionError(f"the service complains: {self._complaints.found}")

    def look(self) -> None:
        """See that another client is served, and that nothing is left of all clients that are gone."""
        for info in self.service.pool.containers(None):
            if info.state in ("leased", "reserved"):
                with contextlib.suppress(LxcPoolError):
                    self.service.pool.release(info.name, None)
        assert self._pool.echo("still there") == "still there"
        with self._pool.lease("another", timeout=HANG):
            pass
        self.service.sessions(1)
        self.service.reaches(size=_SIZE, reserved=0, leased=0, reaping=0, building=0, waiting=0)
        deadline = time.monotonic() + HANG
        while (now := self._usage()) > self._before:
            assert time.monotonic() < deadline, f"it grows: descriptors, threads {now}, not {self._before}"
            time.sleep(0.01)  # a lane's thread may still be ending

    def _send_pieces(self, sock: socket.socket, data: bytes, kinds: Sequence[str], step: int) -> None:
        pieces = [data] if not step else [data[at : at + step] for at in range(0, min(len(data), 40 * step), step)]
        for number, piece in enumerate(pieces):
            if kinds and piece and not number:
                sent = socket.send_fds(sock, [piece], [self._descriptor(kind) for kind in kinds])
                piece = piece[sent:]  # noqa: PLW2901  # what is left of it
            sock.sendall(piece)

    def _descriptor(self, kind: str) -> int:
        return {
            "pipe": self._pipe[1],
            "null": self._null,
            "file": self._file,
            "socket": self._pair[0].fileno(),
            "control": self._pair[1].fileno(),
            "directory": self._directory,
        }[kind]

    def _leased(self) -> str:
        for member, lease in self.service.pool._leases:
            if lease.uid == USER:
                return member.name
        return "none yet"

    @staticmethod
    def _usage() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()


@contextlib.contextmanager
def served(
    size: int, who: Callable[[], int], complaints: Complaints, profiles: tuple[ProfileConfig, ...] = ()
) -> Iterator[MemoryService]:
    """Have a service that takes whoever connects for user *who()*, without further rights, and starts no commands.

    Afterwards it must not have had anything to complain about.
    """
    root = logging.getLogger()
    root.addHandler(complaints)
    process = identify(os.getpid())
    config = functools.partial(Config, max_calls=1_000_000)

    def peer_of(_policy: Policy, _sock: socket.socket) -> Peer:
        return Peer(process, who(), who(), frozenset({0}), "fuzz", is_admin=False)

    try:
        with (
            # Not with return_value: a Mock remembers each of its calls.
            mock.patch.object(Policy, "peer_of", peer_of),
            mock.patch.object(Policy, "require_user", lambda _policy, _peer: None),  # noqa: PT008
            mock.patch.object(support, "Config", config),
            support.memory_service(size, profiles=profiles) as service,
        ):
            service.service._launcher = _NoLauncher()
            service.service.quietly_of_faults = Quietly(sys.maxsize)  # none is to be missed
            service.reaches(size=size)
            yield service
            for info in service.pool.containers(None):
                with contextlib.suppress(LxcPoolError):
                    service.pool.release(info.name, None)
    finally:
        root.removeHandler(complaints)
    assert not complaints.found


@contextlib.contextmanager
def target() -> Iterator[Target]:
    """Have a server to throw at, which takes its clients for a user without further rights."""
    complaints = Complaints()
    with served(_SIZE, lambda: USER, complaints) as service:
        it = Target(service, complaints)
        try:
            yield it
        finally:
            it.close()


def keep(case: Case, leased: str = "x") -> Path:
    """Put what a case sends into the corpus."""
    data = case.data(leased)
    path = CORPUS / f"{'call' if case.greeted else 'early'}-{hashlib.sha256(data).hexdigest()[:12]}.bin"
    path.write_bytes(data)
    return path


# --- the long run -----------------------------------------------------------------------------------------------------


def run(cases: int, number: int, act: Callable[[Any], None], strategy: st.SearchStrategy[Any]) -> None:
    """Give *act* so many examples; an example that fails is made small first."""

    @seed(number)
    @settings(
        max_examples=cases,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def execute(example: Any) -> None:
        act(example)

    execute()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    arguments = parser.parse_args()
    logging.basicConfig(handlers=[logging.NullHandler()])
    began = time.monotonic()
    done = 0
    memory: list[int] = []
    print(f"seed {arguments.seed}", flush=True)  # noqa: T201  # it is a program
    with target() as it:
        while done < arguments.cases:
            count = min(_BATCH, arguments.cases - done)
            number = arguments.seed + done
            # Half to the codec alone, half to the server. What Hypothesis takes longest for is to make an example, so
            # each is also sent with other changes.
            quarter = count // 4
            run(quarter // 10, number, _decode_variants, st.binary(max_size=200) | _wrong_calls | _commands)
            run(quarter // 10, number, _receive_variants, CASES)
            run(quarter, number, functools.partial(_throw_variants, it), CASES)
            it.look()
            done += count
            memory.append(_memory_in_use())
            print(  # noqa: T201  # as above
                f"{done} cases in {time.monotonic() - began:.0f} s, {it.cases} to the server "
                f"({dict(it.answers)}, slowest {it.slowest:.2f} s), {memory[-1] >> 20} MiB of memory",
                flush=True,
            )
            growth = memory[-1] - min(memory[:_SETTLED])
            assert len(memory) <= _SETTLED or growth < GROWTH, f"memory has grown by {growth} bytes"


def _memory_in_use() -> int:
    """Return the bytes of memory that this process has in use."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _decode_variants(body: bytes) -> None:
    for data in (body, *_changed(body, 9)):
        decode_everything(data)


def _receive_variants(case: Case) -> None:
    for data in (case.data("x"), *_changed(case.data("x"), 9)):
        receive_everything(data)


def _throw_variants(it: Target, case: Case) -> None:
    other = dataclasses.replace(case, changes=(*case.changes, *_random_changes(case.data("x"), 1)))
    for each in (case, other):
        try:
            it.throw(each)
        except Exception as error:
            sys.stderr.write(f"kept as {keep(each)}: {error!r}\n{each}\n")
            raise


def _changed(data: bytes, times: int) -> Iterator[bytes]:
    """Go through *data* with one change each, so many times."""
    for change in _random_changes(data, times):
        changed = bytearray(data)
        change.apply(changed)
        yield bytes(changed)


def _random_changes(data: bytes, times: int) -> list[Change]:
    """Return changes that *data* decides, so that an example can be repeated."""
    chance = random.Random(data)  # noqa: S311  # for tests
    kinds = ["flip", "set", "insert", "cut", "end", "double"]
    return [Change(chance.choice(kinds), chance.random(), chance.randrange(256)) for _ in range(times)]


if __name__ == "__main__":
    main()
