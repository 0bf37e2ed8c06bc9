"""Feeding a command and reading its outputs at once, as `subprocess.Popen.communicate`."""

from __future__ import annotations

import contextlib
import io
import os
import select
import time
from typing import IO, Any

_CHUNK = 64 * 1024  # bytes read or written at once


class Communication:
    """One conversation with a command; it can be interrupted by its deadline and resumed."""

    def __init__(self, stdin: IO[Any] | None, stdout: IO[Any] | None, stderr: IO[Any] | None, data: Any) -> None:
        """Talk over the files; *data* is str if stdin is text, else bytes-like.

        Raises:
            TypeError: *data* is neither.
        """
        self._stdin = stdin
        self._outputs = [file for file in (stdout, stderr) if file is not None]
        self._files = (stdout, stderr)
        self._chunks: dict[int, list[bytes]] = {file.fileno(): [] for file in self._outputs}
        self._fds = tuple(None if file is None else file.fileno() for file in self._files)
        self._open = set(self._chunks)
        self._whole: Any = None  # what one file's own read() returned, text or bytes
        self._input = memoryview(_as_bytes(stdin, data)) if stdin is not None else memoryview(b"")
        if stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # what the caller wrote before, to a command that is gone
                stdin.flush()
            if self._input:
                os.set_blocking(stdin.fileno(), False)  # our end alone; the command's is another description

    def run(self, deadline: float | None) -> bool:
        """Go on until all is written and both outputs have ended; return False if *deadline* (monotonic) came first."""
        if deadline is None and self._stdin is None and len(self._outputs) == 1 and not any(self._chunks.values()):
            self._whole = self._outputs[0].read()  # with what the file has buffered, as subprocess
            return True
        poller = select.poll()
        for fd in self._open:
            poller.register(fd, select.POLLIN)
        if self._stdin is not None and not self._stdin.closed:
            if self._input:
                poller.register(self._stdin, select.POLLOUT)
            else:
                self._close_stdin()
        while self._open or self._input:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left < 0:
                return False
            for fd, _ in poller.poll(None if left is None else left * 1000):
                if fd in self._chunks:
                    self._read(fd, poller)
                else:
                    self._write(fd, poller)
        return True

    def drain(self) -> None:
        """Read what is there, without waiting."""
        self._input = memoryview(b"")
        self._close_stdin()
        self.run(time.monotonic())

    def so_far(self) -> tuple[bytes | None, bytes | None]:
        """Return the bytes of stdout and stderr up to now, None for nothing, as TimeoutExpired holds them."""
        output, errors = (b"".join(self._chunks[fd]) or None if fd is not None else None for fd in self._fds)
        return output, errors

    def results(self) -> tuple[Any, Any]:
        """Return both outputs, as text where the files are; None where there is no pipe."""
        output, errors = (self._result(file, fd) for file, fd in zip(self._files, self._fds, strict=True))
        return output, errors

    def _result(self, file: IO[Any] | None, fd: int | None) -> Any:
        if file is None or fd is None:
            return None
        file.close()
        if self._whole is not None:
            return self._whole
        data = b"".join(self._chunks[fd])
        if isinstance(file, io.TextIOWrapper):
            text = data.decode(file.encoding, file.errors or "strict")
            return text.replace("\r\n", "\n").replace("\r", "\n")
        return data

    def _read(self, fd: int, poller: select.poll) -> None:
        data = os.read(fd, _CHUNK)
        if data:
            self._chunks[fd].append(data)
        else:
            poller.unregister(fd)
            self._open.discard(fd)

    def _write(self, fd: int, poller: select.poll) -> None:
        try:
            self._input = self._input[os.write(fd, self._input[:_CHUNK]) :]
        except BlockingIOError:
            return
        except BrokenPipeError:
            self._input = memoryview(b"")  # the command does not want it, which is no error
        if not self._input:
            poller.unregister(fd)
            self._close_stdin()

    def _close_stdin(self) -> None:
        if self._stdin is not None and not self._stdin.closed:
            with contextlib.suppress(BrokenPipeError):
                self._stdin.close()


def _as_bytes(stdin: IO[Any], data: Any) -> bytes:
    if data is None:
        return b""
    if isinstance(stdin, io.TextIOWrapper):
        if not isinstance(data, str):
            raise TypeError(f"input must be str for a text stream, not {type(data).__name__}")
        return data.encode(stdin.encoding, stdin.errors or "strict")
    return memoryview(data).cast("b").tobytes() if not isinstance(data, bytes) else data
