"""Prove to each other, over a new channel, that both ends hold the authkey.

The challenge and answer are those of `multiprocessing.connection`: HMAC, SHA-256 from Python 3.12 on and MD5 on 3.11,
compared in constant time. The key itself never crosses the socket.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
from typing import cast

from lxc_pool.errors import AuthenticationFailed
from lxc_pool.wire.channel import Channel, ProtocolError


def prove_to_client(channel: Channel, key: bytes) -> None:
    """Run the service's side: the client has to prove itself first.

    Raises:
        AuthenticationFailed: The client's key is another one.
        ProtocolError, EOFError, TimeoutError, OSError: The client did not keep to the handshake.
    """
    _run((multiprocessing.connection.deliver_challenge, multiprocessing.connection.answer_challenge), channel, key)


def prove_to_service(channel: Channel, key: bytes) -> None:
    """Run the client's side. Raises as `prove_to_client` does."""
    _run((multiprocessing.connection.answer_challenge, multiprocessing.connection.deliver_challenge), channel, key)


def _run(steps: tuple[object, object], channel: Channel, key: bytes) -> None:
    # The functions ask for a Connection but use its send_bytes and recv_bytes only.
    connection = cast("multiprocessing.connection.Connection", channel)
    try:
        for step in steps:
            step(connection, key)  # type: ignore[operator]  # object, as typeshed types the two functions apart
    except multiprocessing.AuthenticationError as error:
        if "digest" in str(error) or "rejected" in str(error):
            raise AuthenticationFailed("the two ends hold different authkeys") from error
        raise ProtocolError(f"the handshake failed: {error}") from error
    except (AssertionError, ValueError) as error:
        raise ProtocolError(f"the handshake failed: {error!r}") from error
