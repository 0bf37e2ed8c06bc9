"""What child processes of tests do; in a module of its own, so that a spawned one can import it."""

from __future__ import annotations

import os
from multiprocessing.connection import Connection

from lxc_pool import Container


def use(container: Container, answers: Connection) -> None:
    """Run a command in a container that came pickled, and send what it said."""
    said = container.run(["hostname"], capture_output=True, text=True).stdout.strip()
    answers.send((os.getpid(), said, container.state))
