"""Names for requests, by which the service knows one that is made again: like no other of any process.

A random part for each process, and a number: the kernel's random numbers take a `get` 7 µs after a rest (measured).
"""

from __future__ import annotations

import itertools
import os


class _Names:
    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """Be another process's from now on."""
        self._process = os.urandom(16).hex()
        self._numbers = itertools.count()

    def new(self) -> str:
        return f"{self._process}-{next(self._numbers)}"


_names = _Names()
os.register_at_fork(after_in_child=_names.renew)

new_name = _names.new
"""Return the next name. Callable from any thread."""
