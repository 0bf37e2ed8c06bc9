"""How a test gets, uses and removes a system by a peer's command line: plain data, handed to the tests as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path


@dataclasses.dataclass(frozen=True, slots=True)
class Commands:
    """A peer's commands; `{name}`, `{src}` and `{dst}` in them stand for the system and the file's two paths.

    Attributes:
        prefix: What names of systems begin with.
        environment: All that the commands have.
        start: Make a system and start it.
        run: Run a command, which is appended, and pass on its output.
        push: Copy a file of the host's into the system.
        remove: End the system, and all that is left of it.
        push_reads: Whether `push` reads the file from its stdin.
    """

    prefix: str
    environment: Mapping[str, str]
    start: Sequence[str]
    run: Sequence[str]
    push: Sequence[str]
    remove: Sequence[str]
    push_reads: bool = False

    def write(self, path: Path) -> None:
        """Write them to the file *path*."""
        path.write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Commands:
        """Read what `write` has written."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def filled(command: Sequence[str], **values: str) -> list[str]:
    """Put the values in their places."""
    return [argument.format_map(values) for argument in command]
