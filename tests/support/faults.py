"""Faults for a real service: it dies, hangs or fails at just the step that a test names.

```
 test ── Faults.plan ──► DIRECTORY/faults/STEP.KIND ──(rename: taken once)──► whichever process comes to STEP next
 _COMMAND, serve … ── the real command, with a Ledger and an LxcBackend that look there
```

The product has no hooks for this: what is wrapped here are its own functions, in the service and in its workers.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import time
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from lxc_pool.backend.lxc import container_config, engine, removal
from lxc_pool.backend.lxc.engine import LxcBackend
from lxc_pool.backend.protocol import Blueprint
from lxc_pool.cli.main import main
from lxc_pool.errors import DestroyFailed
from lxc_pool.host import idranges
from lxc_pool.host.processes import ProcessIdentity
from lxc_pool.images.store import Image
from lxc_pool.model import State
from lxc_pool.service import daemon
from lxc_pool.service.ledger import Entry, Ledger
from tests.support.netlab import Namespace
from tests.support.real_service import Service

# Not `-m`: the workers would run this module once more, under another name.
_COMMAND = "import sys; from tests.support.faults import serve; sys.exit(serve())"

Kind = Literal["kill", "hang", "fail"]

LEDGER_STEPS = tuple(
    f"{step}-{when}"
    for step in ("building", "warm", "leased", "settling", "rewriting", "reaping", "erasing")
    for when in ("before", "after")
)
"""Each write of the service's to its ledger, by the state that it announces; `settling`: a lease's row."""

CREATION_STEPS = ("preparing", "cloning", "starting", "started", "probing")
REMOVAL_STEPS = ("stopping", "stopped", "destroying", "destroyed")
"""A lane's. `started`: the container runs and nobody knows; `destroyed`: all but its lock file and its ids is gone."""


class Faults:
    """The faults that are planned for one service."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory / "faults"
        self._directory.mkdir(exist_ok=True)

    def plan(self, step: str, kind: Kind) -> None:
        """Let the next process that comes to *step* suffer."""
        (self._directory / f"{step}.{kind}").touch()

    def has_happened(self, step: str, kind: Kind) -> bool:
        return any(self._directory.glob(f"happened.{step}.{kind}.*"))

    def hanging(self, step: str) -> list[int]:
        """Return the pids of those that hang at *step*."""
        said = [path.read_text() for path in self._directory.glob(f"happened.{step}.hang.*")]
        return [int(pid) for pid in said if pid]

    def forget(self) -> None:
        """Drop what was planned, and what has happened."""
        for path in self._directory.iterdir():
            path.unlink(missing_ok=True)

    def set_read_only(self, value: bool) -> None:
        """Let the ledger refuse every write from now on, or take them again."""
        if value:
            (self._directory / "read-only").touch()
        else:
            (self._directory / "read-only").unlink()

    @property
    def read_only(self) -> bool:
        return (self._directory / "read-only").exists()

    def suffer(self, step: str) -> None:
        """Be at *step*, in the service or a worker."""
        kinds: tuple[Kind, ...] = ("kill", "hang", "fail")
        for kind in kinds:
            happened = self._directory / f"happened.{step}.{kind}.{time.monotonic_ns()}"
            try:
                (self._directory / f"{step}.{kind}").rename(happened)
            except FileNotFoundError:
                continue
            if kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if kind == "hang":
                happened.write_text(str(os.getpid()))
                while True:
                    time.sleep(1000)
            raise DestroyFailed(f"a test lets {step} fail")


class FaultyBackend(LxcBackend):
    """The real backend, which in a worker comes to the steps above."""

    def __init__(self, state_dir: Path, id_base: int = idranges.DEFAULT_BASE) -> None:
        super().__init__(state_dir, id_base)
        self._faults = Faults(state_dir.parent)

    def open(self) -> None:
        super().open()
        suffer = self._faults.suffer
        _precede(container_config, "render", lambda: suffer("cloning"))
        _precede(removal, "_remove_cgroups", lambda: suffer("stopped"))
        used = types.SimpleNamespace(rmtree=shutil.rmtree)  # of shutil, by this one module
        _precede(used, "rmtree", lambda: suffer("destroying"))
        removal.__dict__["shutil"] = used
        _precede(idranges, "give_back", lambda: suffer("destroyed"))

    def prepare(self, image_name: str) -> Image:
        self._faults.suffer("preparing")
        return super().prepare(image_name)

    def destroy(self, name: str, *, force: bool) -> None:
        self._faults.suffer("stopping")
        super().destroy(name, force=force)

    def _start(self, blueprint: Blueprint, directory: Path) -> None:
        self._faults.suffer("starting")
        super()._start(blueprint, directory)
        self._faults.suffer("started")

    def _await_init(self, blueprint: Blueprint, directory: Path, directories: Sequence[Path]) -> ProcessIdentity:
        init = super()._await_init(blueprint, directory, directories)
        self._faults.suffer("probing")
        return init


class UnlimitedBackend(LxcBackend):
    """The real backend, on a host whose liblxc ignores one of the limits, as it does what it does not know.

    Args:
        state_dir: As it has it.
        ignored: Words of the settings that are ignored.
    """

    def __init__(self, state_dir: Path, ignored: str) -> None:
        super().__init__(state_dir)
        self._ignored = ignored

    def open(self) -> None:
        super().open()
        limits = container_config._limits

        def known(blueprint: Blueprint) -> list[tuple[str, str]]:
            return [(key, value) for key, value in limits(blueprint) if self._ignored not in key]

        container_config.__dict__["_limits"] = known


class FaultyService(Service):
    """A real service that faults can be planned for."""

    def __init__(self, images: Path | None = None, namespace: Namespace | None = None) -> None:
        super().__init__(images, namespace)
        self.faults = Faults(self.directory)

    def command(self, *arguments: str | Path) -> list[str]:
        words = super().command(*arguments)
        if arguments and arguments[0] == "serve":
            place = words.index("-m")
            words[place : place + 2] = ["-c", _COMMAND]
        return words

    def died(self) -> bool:
        return self.process is not None and self.process.poll() is not None


def _precede(module: object, name: str, act: Callable[[], None]) -> None:
    """Let *act* be called before each call of a function."""
    function = getattr(module, name)

    @functools.wraps(function)
    def both(*args: Any, **kwargs: Any) -> Any:
        act()
        return function(*args, **kwargs)

    setattr(module, name, both)


class FaultyLedger(Ledger):
    """The real ledger of a service that dies beside a write, or whose writes are refused."""

    __slots__ = ()

    def write(self, entry: Entry) -> None:
        step = "settling" if entry is self._intended else "rewriting" if entry.name in _leased else "leased"
        with self._at(step if entry.state is State.LEASED else str(entry.state)):
            super().write(entry)

    def intend(self, entry: Entry) -> None:
        with self._at("leased"):
            super().intend(entry)
        _leased.add(entry.name)

    def erase(self, name: str) -> None:
        with self._at("erasing"):
            super().erase(name)

    @contextlib.contextmanager
    def _at(self, step: str) -> Iterator[None]:
        faults = Faults(self.path.parent.parent)
        if self._database is not None:
            self._database.execute(f"PRAGMA query_only = {'ON' if faults.read_only else 'OFF'}")
        faults.suffer(f"{step}-before")
        yield
        faults.suffer(f"{step}-after")


_leased: set[str] = set()
"""Of this service: a lease that is written again has been renewed."""


def serve() -> int:
    """Be `lxc-pool`."""
    # The command and the daemon take them from there.
    engine.__dict__["LxcBackend"] = FaultyBackend
    daemon.__dict__["Ledger"] = FaultyLedger
    return main()
