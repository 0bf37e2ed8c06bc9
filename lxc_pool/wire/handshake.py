"""Prove to each other, over a new channel, that both ends hold the authkey.

The messages are those of `multiprocessing.connection` from Python 3.12 on: a challenge, and its HMAC under the key. The
hash is SHA-256 with every Python: the standard library's own functions use MD5 on 3.11, and take it from a peer who
asks for it on the later ones. The key itself never crosses the socket.

Source: CPython 3.12, Lib/multiprocessing/connection.py, "Authentication stuff".
"""

from __future__ import annotations

import hmac
import secrets

from lxc_pool.errors import AuthenticationFailed
from lxc_pool.wire.channel import Channel, ProtocolError

_CHALLENGE, _WELCOME, _FAILURE = b"#CHALLENGE#", b"#WELCOME#", b"#FAILURE#"
_DIGEST = b"{sha256}"
_NONCE_BYTES = 40
_MAX_MESSAGE = 256
"""Bytes of one message at most. Origin: the standard library."""


def prove_to_client(channel: Channel, key: bytes) -> None:
    """Run the service's side: the client has to prove itself first.

    Raises:
        AuthenticationFailed: The client's key is another one.
        ProtocolError, EOFError, TimeoutError, OSError: The client did not keep to the handshake.
    """
    _challenge(channel, key)
    _answer(channel, key)


def prove_to_service(channel: Channel, key: bytes) -> None:
    """Run the client's side. Raises as `prove_to_client` does."""
    _answer(channel, key)
    _challenge(channel, key)


def _challenge(channel: Channel, key: bytes) -> None:
    message = _DIGEST + secrets.token_bytes(_NONCE_BYTES)
    channel.send_bytes(_CHALLENGE + message)
    if not hmac.compare_digest(channel.recv_bytes(_MAX_MESSAGE), _DIGEST + hmac.digest(key, message, "sha256")):
        channel.send_bytes(_FAILURE)
        raise AuthenticationFailed("the two ends hold different authkeys")
    channel.send_bytes(_WELCOME)


def _answer(channel: Channel, key: bytes) -> None:
    challenge = channel.recv_bytes(_MAX_MESSAGE)
    message = challenge.removeprefix(_CHALLENGE)
    if message == challenge or not message.startswith(_DIGEST) or len(message) < len(_DIGEST) + _NONCE_BYTES // 2:
        raise ProtocolError("the handshake failed: what came is no challenge for SHA-256")
    channel.send_bytes(_DIGEST + hmac.digest(key, message, "sha256"))
    verdict = channel.recv_bytes(_MAX_MESSAGE)
    if verdict == _FAILURE:
        raise AuthenticationFailed("the two ends hold different authkeys")
    if verdict != _WELCOME:
        raise ProtocolError("the handshake failed: the answer to a proof is neither welcome nor refusal")
