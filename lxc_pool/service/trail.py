"""The trail: one line for every lease, end of a lease, mount and refusal: who, what, why, for how long.

Never the key, and nothing of a command but who ran it where. What comes from outside is quoted, so that it can't make a
line of its own.
"""

from __future__ import annotations

import json
import logging

_log = logging.getLogger(__name__)

_MOST = 200
"""Characters of one field. A guess: names and ids have at most 128; a refused message may quote megabytes."""


def record(event: str, **fields: object) -> None:
    """Write one line; fields that are None are left out.

    Args:
        event: `lease`, `end` (of a lease, by which its container is reaped), `reap` (of one without), `mount` (that it
            was asked for), `refusal`.
        **fields: What is to be known of it.
    """
    known = {key: _bounded(value) for key, value in fields.items() if value is not None}
    words = (f"{key}={_plain(value)}" for key, value in known.items())
    level = logging.WARNING if event == "refusal" else logging.INFO
    _log.log(level, "%s %s", event, " ".join(words), extra={"event": event, "fields": known})


class JsonFormatter(logging.Formatter):
    """Write every log record as one JSON object on one line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        document: dict[str, object] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            document["exception"] = self.formatException(record.exc_info)
        document.update(getattr(record, "fields", {}))
        if event := getattr(record, "event", None):
            document["event"] = event
        return json.dumps(document, default=str)


def _bounded(value: object) -> object:
    if isinstance(value, (int, float)):
        return value
    text = str(value)
    return text if len(text) <= _MOST else f"{text[:_MOST]}…"


def _plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    text = str(value)
    return text if (text.isascii() and text.isidentifier()) or text.isdecimal() else json.dumps(text)
