"""Both ends prove that they hold the key, over our frames, with the standard library's challenge."""

from __future__ import annotations

import contextlib
import hmac
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge

import pytest

from lxc_pool.errors import AuthenticationFailed
from lxc_pool.wire.channel import Channel, ProtocolError
from lxc_pool.wire.handshake import prove_to_client, prove_to_service


@contextlib.contextmanager
def pair() -> Iterator[tuple[Channel, Channel]]:
    ends = tuple(Channel(sock) for sock in socket.socketpair())
    for end in ends:
        end.deadline = time.monotonic() + 5
    try:
        yield ends  # type: ignore[misc]  # two of them
    finally:
        for end in ends:
            end.close()


class Aside:
    """Does something on a thread, and keeps what it raised."""

    def __init__(self, action: Callable[[], object]) -> None:
        self.error: BaseException | None = None
        self._action = action
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._action()
        except Exception as error:  # noqa: BLE001  # the test judges it
            self.error = error

    def join(self) -> BaseException | None:
        self._thread.join(10)
        assert not self._thread.is_alive()
        return self.error


def test_two_ends_with_the_same_key_let_each_other_in() -> None:
    with pair() as (service, client):
        aside = Aside(lambda: prove_to_client(service, b"key"))
        prove_to_service(client, b"key")
        assert aside.join() is None


def test_another_key_is_refused_on_both_sides_by_the_same_error() -> None:
    with pair() as (service, client):
        aside = Aside(lambda: prove_to_client(service, b"key"))
        with pytest.raises(AuthenticationFailed, match="different authkeys"):
            prove_to_service(client, b"other")
        assert isinstance(aside.join(), AuthenticationFailed)


def test_a_proof_is_judged_by_a_comparison_that_tells_nothing_by_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[tuple[bytes, bytes]] = []

    def deny(one: bytes, other: bytes) -> bool:
        judged.append((one, other))
        return False

    monkeypatch.setattr(hmac, "compare_digest", deny)
    with pair() as (service, client):
        aside = Aside(lambda: prove_to_client(service, b"key"))
        with pytest.raises(AuthenticationFailed):
            prove_to_service(client, b"key")
        assert isinstance(aside.join(), AuthenticationFailed)
    ((proof, expected),) = judged
    assert proof == expected  # the right one, whole: nothing else has judged it


def test_a_service_that_does_not_hold_the_key_is_found_out_too() -> None:
    # It lets anybody in, and hopes to be believed.
    with pair() as (service, client):

        def impostor() -> None:
            service.send_bytes(b"#CHALLENGE#{sha256}" + b"x" * 32)
            service.recv_bytes()
            service.send_bytes(b"#WELCOME#")
            service.recv_bytes()
            service.send_bytes(b"{sha256}" + b"x" * 32)
            service.recv_bytes()

        aside = Aside(impostor)
        with pytest.raises((AuthenticationFailed, ProtocolError)):
            prove_to_service(client, b"key")
        client.close()
        aside.join()


@pytest.mark.skipif(sys.version_info < (3, 12), reason="the standard library knows only MD5 before")
def test_it_is_the_standard_librarys_handshake() -> None:
    with pair() as (service, client):
        stock = Connection(client._socket.detach())

        def prove() -> None:
            answer_challenge(stock, b"key")
            deliver_challenge(stock, b"key")

        aside = Aside(prove)
        prove_to_client(service, b"key")
        assert aside.join() is None
        stock.close()


@pytest.mark.parametrize("digest", ["md5", "sha1"])
def test_a_weaker_hash_is_refused_by_both_sides(digest: str) -> None:
    with pair() as (service, client):

        def prove() -> None:
            message = client.recv_bytes().removeprefix(b"#CHALLENGE#")
            client.send_bytes((b"" if digest == "md5" else b"{sha1}") + hmac.digest(b"key", message, digest))

        aside = Aside(prove)
        with pytest.raises(AuthenticationFailed):
            prove_to_client(service, b"key")
        assert aside.join() is None
    with pair() as (service, client):
        service.send_bytes(b"#CHALLENGE#" + (b"" if digest == "md5" else b"{sha1}") + b"x" * 40)
        with pytest.raises(ProtocolError, match="no challenge for SHA-256"):
            prove_to_service(client, b"key")


@pytest.mark.parametrize("answer", [b"", b"garbage", b"x" * 256, b"#CHALLENGE#"])
def test_a_client_that_answers_nonsense_is_refused(answer: bytes) -> None:
    with pair() as (service, client):
        client.send_bytes(answer)
        with pytest.raises((AuthenticationFailed, ProtocolError)):
            prove_to_client(service, b"key")


@pytest.mark.parametrize("challenge", [b"", b"garbage", b"x" * 256, b"#CHALLENGE#{none}x"])
def test_a_service_that_asks_nonsense_is_none_of_ours(challenge: bytes) -> None:
    with pair() as (service, client):
        service.send_bytes(challenge)
        service.send_bytes(b"#WELCOME# or not")
        with pytest.raises((AuthenticationFailed, ProtocolError)):
            prove_to_service(client, b"key")


def test_a_message_longer_than_the_handshakes_own_is_refused_unread() -> None:
    with pair() as (service, client):
        client.send_bytes(b"x" * 257)
        with pytest.raises(ProtocolError, match="at most 256"):
            prove_to_client(service, b"key")


def test_a_peer_that_says_nothing_is_waited_for_until_the_deadline_only() -> None:
    with pair() as (service, client):
        service.deadline = time.monotonic() + 0.02
        with pytest.raises(TimeoutError):
            prove_to_client(service, b"key")
        client.deadline = time.monotonic() + 0.02
        client.recv_bytes()
        with pytest.raises(TimeoutError):
            prove_to_service(client, b"key")


def test_a_peer_that_leaves_is_an_end() -> None:
    with pair() as (service, client):
        client.close()
        with pytest.raises((EOFError, OSError)):
            prove_to_client(service, b"key")
