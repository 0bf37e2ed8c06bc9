"""One TOML table that is read key by key, with the words for what is wrong, and the line."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lxc_pool.errors import ConfigError

_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}

_LEAST_SIZE = 8 << 20
"""Bytes of memory or disk that a container can start with. A guess: a busybox one takes under 1 MiB of each."""

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """A TOML document, as it was written: where its keys are is lost when it is parsed.

    Attributes:
        origin: What errors call it.
    """

    origin: str = "defaults"
    text: str = dataclasses.field(default="", repr=False)

    def place(self, table: str, key: str) -> str:
        """Return where *key* of *table* is, in words: `/etc/lxc-pool.toml, line 3: pool.size`."""
        line = self._line(table, key)
        return f"{self.origin}{f', line {line}' if line else ''}: {_dotted(table, key)}"

    def _line(self, wanted: str, key: str) -> int | None:
        """Find the line of a key; tomllib keeps no positions."""
        table = ""
        for number, line in enumerate(self.text.splitlines(), 1):
            if header := re.match(r"\s*\[\s*([^\]]+?)\s*\]", line):
                table = header[1].replace('"', "").replace(" ", "")
                if table == _dotted(wanted, key):
                    return number
            elif table == wanted and re.match(rf"\s*\"?{re.escape(key)}\"?\s*[=.]", line):
                return number
        return None


class Table:
    """One table. Each of its methods that takes a key reads that one's value.

    They raise ConfigError if it is not of the kind that they are named for.

    Attributes:
        values: What is in it, unread.
    """

    def __init__(self, values: Mapping[str, Any], source: Source, path: str = "") -> None:
        """Make it; *path*: what it is called, "" for the document itself."""
        self.values = values
        self._source = source
        self._path = path

    def error(self, key: str, problem: str) -> ConfigError:
        """Return the error that says what is wrong with a key, and where that is."""
        return ConfigError(f"{self._source.place(self._path, key)}: {problem}")

    def only(self, *known: str) -> None:
        """Refuse keys that are not *known*."""
        for key in self.values:
            if key not in known:
                raise self.error(key, f"unknown key; known here: {', '.join(known)}")

    def table(self, key: str) -> Table:
        """Return a table in it, empty if there is none."""
        value = self.values.get(key, {})
        if not isinstance(value, dict):
            raise self.error(key, f"must be a table, not {value!r}")
        return Table(value, self._source, _dotted(self._path, key))

    def tables(self, key: str) -> list[Table]:
        """Return the tables in a list."""
        value = self.values.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self.error(key, f"must be a list of tables, not {value!r}")
        path = _dotted(self._path, key)
        return [Table(item, self._source, path) for item in value]

    def integer(self, key: str, default: int, least: int, most: int) -> int:
        """Return an integer from *least* to *most*."""
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.error(key, f"must be an integer from {least} to {most}, not {value!r}")
        return value

    def boolean(self, key: str, *, default: bool = False) -> bool:
        """Return true or false."""
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, f"must be true or false, not {value!r}")
        return value

    def size(self, key: str, default: int, least: int = _LEAST_SIZE) -> int:
        """Return bytes; written as an integer, or like "512M"."""
        value = self.values.get(key, default)
        match = re.fullmatch(r"(\d+)([KMGT]?)", str(value))
        if isinstance(value, bool) or match is None or not (size := int(match[1]) << _UNITS[match[2]]) >= least:
            raise self.error(key, f'must be bytes, or like "512M", and at least {least}, not {value!r}')
        return size

    def seconds(self, key: str, default: float) -> float:
        """Return seconds, above 0 and up to a day."""
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 86400:
            raise self.error(key, f"must be a number of seconds above 0 and up to 86400, not {value!r}")
        return float(value)

    def string(self, key: str, default: str) -> str:
        """Return a string of printable characters, at least one."""
        value = self.values.get(key, default)
        if not isinstance(value, str) or not value or not value.isprintable():
            raise self.error(key, f"must be a string of printable characters, not {value!r}")
        return value

    def path(self, key: str) -> Path | None:
        """Return an absolute path; None if there is none."""
        if key not in self.values:
            return None
        path = Path(self.string(key, ""))
        if not path.is_absolute():
            raise self.error(key, f"must be an absolute path, not {str(path)!r}")
        return path

    def choice(self, key: str, default: str, allowed: tuple[str, ...]) -> str:
        """Return one of the strings that are *allowed*."""
        value = self.string(key, default)
        if value not in allowed:
            raise self.error(key, f"must be one of {', '.join(allowed)}, not {value!r}")
        return value

    def strings(self, key: str) -> tuple[str, ...]:
        """Return a list of strings; empty if there is none."""
        value = self.values.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
            raise self.error(key, f"must be a list of strings, not {value!r}")
        return tuple(value)

    def environment(self, key: str) -> tuple[tuple[str, str], ...]:
        """Return a table of environment variables; empty if there is none."""
        table = self.table(key)
        for name, value in table.values.items():
            if not _VARIABLE.fullmatch(name):
                raise table.error(name, "a variable's name is of A-Z, a-z, 0-9 and _, the first no digit")
            if not isinstance(value, str) or "\0" in value:
                raise table.error(name, f"must be a string without NUL, not {value!r}")
        return tuple(table.values.items())


def _dotted(table: str, key: str) -> str:
    return f"{table}.{key}" if table else key
