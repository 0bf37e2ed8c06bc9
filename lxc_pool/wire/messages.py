"""The declared messages: one class for each call, the type of its result, and the two shapes of a reply.

A message is msgpack of exactly these types. Whatever does not decode as one of them ends the connection; nothing that
the peer sends ever names a class, an attribute or a method of ours. Durations are seconds, None meaning "for ever".
"""

from __future__ import annotations

from typing import Any, ClassVar, Final

import msgspec

from lxc_pool import errors
from lxc_pool.model import ContainerId, ContainerInfo, PoolStatus
from lxc_pool.wire.channel import ProtocolError

PROTOCOL: Final = 1
"""Version of these messages; client and service have to agree on it."""

_MAX_WORDS: Final = 10_000
"""Characters of an error's message that are sent. A guess: more than anybody reads."""


class Call(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True, tag=True):
    """Base of all calls."""

    RESULT: ClassVar[Any] = None


class Hello(Call, frozen=True, tag="hello"):
    """Open the conversation: which version the client speaks; the service answers with its own."""

    RESULT: ClassVar[Any] = int
    protocol: int


class Echo(Call, frozen=True, tag="echo"):
    """Return *text*."""

    RESULT: ClassVar[Any] = str
    text: str


class GetStatus(Call, frozen=True, tag="status"):
    """Report the pool's counts."""

    RESULT: ClassVar[Any] = PoolStatus


class ListContainers(Call, frozen=True, tag="containers"):
    """Report every container."""

    RESULT: ClassVar[Any] = tuple[ContainerInfo, ...]


class AwaitWarm(Call, frozen=True, tag="await_warm"):
    """Wait until *count* containers (None: the capacity) are warm, or *timeout* has passed; report the counts then."""

    RESULT: ClassVar[Any] = PoolStatus
    count: int | None
    timeout: float | None


class Offer(msgspec.Struct, array_like=True, frozen=True):
    """A container that is reserved for the caller until it confirms."""

    name: str
    profile: str


class Get(Call, frozen=True, tag="get"):
    """Reserve a container, waiting up to *timeout*; *request* is the client's name for this one wish.

    The result is an offer, or the words for why there is none.
    """

    RESULT: ClassVar[Any] = Offer | str
    request: str
    id: ContainerId | str | int
    timeout: float | None
    profile: str
    owner: int | None
    ttl: float | None


class Confirm(Call, frozen=True, tag="confirm"):
    """Turn the offer for *request* into a lease; False: too late, it was taken back."""

    RESULT: ClassVar[Any] = ContainerInfo | None
    request: str


class Abandon(Call, frozen=True, tag="abandon"):
    """Give back whatever *request* got, in whichever step it is."""

    request: str


class Release(Call, frozen=True, tag="release"):
    """End the lease of the container *name*; not an error if it has ended."""

    name: str


class Inspect(Call, frozen=True, tag="inspect"):
    """Report the leased container *name*."""

    RESULT: ClassVar[Any] = ContainerInfo
    name: str


class Addresses(Call, frozen=True, tag="addresses"):
    """Report the network addresses of the leased container *name*."""

    RESULT: ClassVar[Any] = tuple[str, ...]
    name: str


class AwaitNetwork(Call, frozen=True, tag="await_network"):
    """Wait until the leased container *name* has its network, or *timeout* has passed.

    The result is its addresses, or the words for what is missing.
    """

    RESULT: ClassVar[Any] = tuple[str, ...] | str
    name: str
    timeout: float | None


class ConsoleLog(Call, frozen=True, tag="console_log"):
    """Report the last of what was written to the console of the leased container *name*: any bytes."""

    RESULT: ClassVar[Any] = bytes
    name: str


class Renew(Call, frozen=True, tag="renew"):
    """Let the lease of *name* end *ttl* seconds from now."""

    name: str
    ttl: float


class Keep(Call, frozen=True, tag="keep"):
    """Let the lease of *name* outlive its owner and end *ttl* seconds from now."""

    name: str
    ttl: float


class Execute(Call, frozen=True, tag="execute"):
    """Start a command in the leased container *name*.

    Beside it come four descriptors: stdin, stdout, stderr, and the control socket on which the command's supervisor
    talks with the client.
    """

    name: str
    request: bytes
    """An encoded `execution.protocol.ExecRequest`, which may hold what no msgpack string can: any bytes but NUL."""


class Mount(Call, frozen=True, tag="mount"):
    """Mount something of the client's on *dst* in the leased container *name*.

    Beside it come three descriptors: what is to be mounted, opened with O_PATH; a pipe for the answer; the control
    socket as for `Execute`.
    """

    name: str
    dst: bytes
    """An absolute path of the container: any bytes but NUL."""
    readonly: bool


class Resize(Call, frozen=True, tag="resize"):
    """Change the number of warm containers."""

    size: int


class Drain(Call, frozen=True, tag="drain"):
    """Discard warm containers and hand out nothing."""


class Resume(Call, frozen=True, tag="resume"):
    """Hand out containers again."""


class LookForImages(Call, frozen=True, tag="look_for_images"):
    """See whether there are newer versions of the images that the pool makes containers of."""


class Shutdown(Call, frozen=True, tag="shutdown"):
    """End the service; answered when all is closed."""

    grace: float
    keep_leases: bool


LeaseCall = Release | Inspect | Addresses | AwaitNetwork | ConsoleLog | Renew | Keep | Execute | Mount
"""What the holder of a lease asks."""

AdminCall = Resize | Drain | Resume | LookForImages | Shutdown
"""What only an administrator may ask."""

AnyCall = Hello | Echo | GetStatus | ListContainers | AwaitWarm | Get | Confirm | Abandon | LeaseCall | AdminCall


class Result(msgspec.Struct, array_like=True, frozen=True, tag="result"):
    """The call's result, encoded on its own."""

    value: msgspec.Raw


class Failure(msgspec.Struct, array_like=True, frozen=True, tag="failure"):
    """The call failed with the error class *kind*."""

    kind: str
    message: str


_ERRORS: Final[dict[str, type[Exception]]] = {
    "TypeError": TypeError,
    "ValueError": ValueError,
    **{
        name: value
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.LxcPoolError)
    },
}

_encoder = msgspec.msgpack.Encoder()
_call_decoder: msgspec.msgpack.Decoder[AnyCall] = msgspec.msgpack.Decoder(AnyCall)
_reply_decoder: msgspec.msgpack.Decoder[Result | Failure] = msgspec.msgpack.Decoder(Result | Failure)
_result_decoders: dict[type[Call], msgspec.msgpack.Decoder[Any]] = {}


def encode_call(call: Call) -> bytes:
    """Encode *call* for the service.

    Raises:
        ValueError: It holds a number of more than 64 bits, or a string that is no Unicode.
    """
    try:
        return _encoder.encode(call)
    except OverflowError as error:
        raise ValueError(f"a number is too large, more than 64 bits, in {str(call)[:200]}") from error


def decode_call(body: bytes) -> AnyCall:
    """Decode what a client sent.

    Raises:
        ProtocolError: It is none of the declared calls.
    """
    try:
        return _call_decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"not a call of this protocol: {error}") from error


def encode_result(value: object) -> bytes:
    """Encode a call's result."""
    return _encoder.encode(Result(msgspec.Raw(_encoder.encode(value))))


def encode_failure(error: BaseException) -> bytes:
    """Encode a call's failure; an error that is not declared becomes an InternalError."""
    kind = type(error).__name__
    # A message may quote what was wrong: a file name that is no Unicode, or a caller's argument of any length.
    text = str(error)[:_MAX_WORDS].encode(errors="backslashreplace").decode()
    if kind in _ERRORS and type(error) is _ERRORS[kind]:
        return _encoder.encode(Failure(kind, text))
    return _encoder.encode(Failure("InternalError", f"{kind}: {text}; please report it, with the service's log"))


def decode_reply(call: Call, body: bytes) -> Any:
    """Return the result that the reply *body* to *call* carries.

    Raises:
        ProtocolError: It is not a reply to this call.
        LxcPoolError, TypeError, ValueError: The failure that it carries.
    """
    try:
        reply = _reply_decoder.decode(body)
        if isinstance(reply, Failure):
            raise _ERRORS.get(reply.kind, errors.InternalError)(reply.message)
        decoder = _result_decoders.get(type(call))
        if decoder is None:
            decoder = _result_decoders.setdefault(type(call), msgspec.msgpack.Decoder(call.RESULT))
        return decoder.decode(reply.value)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"not a reply of this protocol: {error}") from error
