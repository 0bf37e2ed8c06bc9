"""Note every sleep in a process tree of Python programs: who started one, and in which lines of the package's.

```
 Sleeps(directory).environment ──► a service ──► fork server, workers, sweeper, agent, whatever else runs Python
                                      each writes DIRECTORY/PID: `begun`, then a line for each sleep
```

Python runs `sitecustomize` when it begins: here it replaces `time.sleep`, which the standard library's waits with a
timeout use as well (`subprocess.Popen.wait`), and `select.select` where that waits for nothing but time.
"""

from __future__ import annotations

import os
from pathlib import Path

_HOOK = """\
import os, select, sys, time

def _note(text):
    fd = os.open(os.path.join({directory!r}, str(os.getpid())), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(fd, (text + "\\n").encode())
    finally:
        os.close(fd)

def _note_sleep(seconds):
    callers, frame = [], sys._getframe(2)
    while frame is not None:
        callers.append(frame.f_globals.get("__name__", "?") + "." + frame.f_code.co_name)
        frame = frame.f_back
    _note(f"slept {{seconds}} " + " < ".join(callers))

def _sleep(seconds, _real=time.sleep):
    _note_sleep(seconds)
    _real(seconds)

def _select(reading, writing, failing, timeout=None, _real=select.select):
    if timeout and not (list(reading) or list(writing) or list(failing)):
        _note_sleep(timeout)
    return _real(reading, writing, failing, timeout)

time.sleep, select.select = _sleep, _select
_note("begun " + repr(sys.orig_argv))
"""


class Sleeps:
    """What is noted in one directory."""

    def __init__(self, directory: Path) -> None:
        self._notes = directory / "notes"
        self._notes.mkdir()
        self.path = directory / "hook"
        self.path.mkdir()
        (self.path / "sitecustomize.py").write_text(_HOOK.format(directory=str(self._notes)))

    @property
    def environment(self) -> dict[str, str]:
        """What whoever is to be looked at has to find in its environment."""
        return {"PYTHONPATH": os.pathsep.join([str(self.path), *filter(None, [os.environ.get("PYTHONPATH")])])}

    def programs(self) -> dict[int, str]:
        """Return the command line of each program that was looked at; forks of one are not among them."""
        return {
            int(path.name): line.removeprefix("begun ")
            for path in self._notes.iterdir()
            for line in path.read_text().splitlines()
            if line.startswith("begun ")
        }

    def slept(self) -> list[tuple[str, float]]:
        """Return of each sleep the functions that led to it, the innermost first, and its seconds."""
        lines = [line for path in sorted(self._notes.iterdir()) for line in path.read_text().splitlines()]
        sleeps = [line.split(maxsplit=2)[1:] for line in lines if line.startswith("slept ")]
        return [(callers, float(seconds)) for seconds, callers in sleeps]
