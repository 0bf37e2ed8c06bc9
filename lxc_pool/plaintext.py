"""Make what a container says fit to be shown: text, and nothing that a terminal obeys."""

from __future__ import annotations

import re

_LINE_ENDS = re.compile(r"\r*\n|\r+")
"""A console ends lines with CR LF; a lone CR begins a line again, over what stood there."""

_ESCAPES = re.compile(
    r"(?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f])[^\x07\x1b\x9c\n]*(?:\x07|\x1b\\|\x9c)?"  # OSC, DCS, SOS, PM, APC
    r"|(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?"  # CSI: parameters, and what is to be done with them
    r"|\x1b[ -/]*[0-~]?"  # all others
)
"""Source: ECMA-48, 5.3 to 5.6; BEL as the end of a string is xterm's. A string ends with its line at the latest, so
that one without an end does not hide what comes after it."""

_UNSEEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters, C0 and C1, but for tab and newline
    r"\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff"  # directions, separators and what has no width
    r"\ud800-\udfff]"  # halves of pairs, which no terminal could be sent
)
"""Source: Unicode 15, general categories Cc, Cf, Cs, Zl, Zp; UAX 9 for directions."""


def plain(text: str) -> str:
    """Return *text* without escape sequences, control characters and changes of direction, with plain line ends."""
    return _UNSEEN.sub("", _ESCAPES.sub("", _LINE_ENDS.sub("\n", text)))


def last_lines(text: str, count: int) -> str:
    """Return the last *count* lines of *text*."""
    return "".join(text.splitlines(keepends=True)[-count:]) if count else ""
