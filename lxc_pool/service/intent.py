"""The intent file: the last hand-off, written down in microseconds, until the ledger has it in its place.

One record, overwritten by the next: length and CRC-32 of the body, then the body. A record that is torn was being
written when the service was killed, before anybody was told of what it says: it is as if it had never been.
"""

from __future__ import annotations

import contextlib
import os
import struct
import zlib
from pathlib import Path

_HEADER = struct.Struct("!II")

_LIMIT = 64 * 1024
"""Bytes of a record at most: a hundred times what one has."""


class IntentFile:
    """The file, open for writing."""

    def __init__(self, path: Path) -> None:
        """Open it, or make it.

        Raises:
            OSError: That is not possible.
        """
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        os.fchmod(self._file, 0o600)  # it says who has what: root's alone

    def put(self, body: bytes) -> None:
        """Write *body* in the place of what is there.

        Raises:
            OSError: It could not be written; what is there may be torn.
        """
        record = _HEADER.pack(len(body), zlib.crc32(body)) + body
        if os.pwrite(self._file, record, 0) != len(record):
            raise OSError("only a part of it was written")

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def read(path: Path) -> bytes | None:
    """Return what was put last; None: nothing, or it is torn.

    Raises:
        OSError: The file can't be read.
    """
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        record = file.read(_LIMIT)
        if len(record) >= _HEADER.size:
            length, checksum = _HEADER.unpack_from(record)
            body = record[_HEADER.size : _HEADER.size + length]
            if len(body) == length and zlib.crc32(body) == checksum:
                return body
    return None
