"""One side of `benchmarks.before`: start containers, and lease them, with the lxc_pool of one source tree.

Run as a file, `before_worker.py TREE HOST_DIR STATE_DIR CONFIG SIZE`: this tree's `benchmarks` would import the wrong
lxc_pool. It says `ready`, then answers each line of its stdin with one of its stdout, in seconds: `start NAME` by the
time that making and starting took and the time of the removal, `get NAME` by that of a get, `rest` by how long it took
until its service had nothing to do.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_PAUSE = 0.01
"""Seconds as `lab._QUIET_PAUSE`."""


def main() -> None:
    """Do what is asked until there is nothing more."""
    tree, host_dir, state_dir, config, size = sys.argv[1:]
    sys.path[0] = tree
    backend = _backend(Path(state_dir))
    image = backend.prepare("busybox")
    with _service(tree, host_dir, state_dir, config, size) as pool:
        _say("ready")
        for line in sys.stdin:
            match line.split():
                case ["start", name]:
                    _say(*_start(backend, image, name))
                case ["get", name]:
                    _say(_get(pool, name))
                case ["rest"]:
                    _say(_rest(pool, int(size)))


def _backend(state_dir: Path) -> Any:
    from lxc_pool.backend.lxc.engine import LxcBackend  # noqa: PLC0415  # of the tree, which is known only now

    backend: Any = LxcBackend(state_dir)
    if hasattr(backend, "open"):  # an older one has nothing to open
        backend.open()
    return backend


def _start(backend: Any, image: Any, name: str) -> tuple[float, float]:
    from lxc_pool.backend.protocol import Blueprint  # noqa: PLC0415  # as above
    from lxc_pool.config import ProfileConfig  # noqa: PLC0415

    begin = time.monotonic()
    backend.create(Blueprint(name, ProfileConfig("default", 1), image, begin + 30))
    up = time.monotonic()
    backend.destroy(name, force=False)
    return up - begin, time.monotonic() - up


@contextlib.contextmanager
def _service(tree: str, host_dir: str, state_dir: str, config: str, size: str) -> Iterator[Any]:
    from lxc_pool import PoolManager  # noqa: PLC0415  # as above

    options = ["--host-dir", host_dir, "--state-dir", state_dir, "--config", config, "--size", size]
    argv = [sys.executable, "-m", "lxc_pool", "serve", *options]
    with subprocess.Popen(argv, cwd=tree, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        try:
            with PoolManager.connect(host_dir, timeout=60) as pool:
                yield pool
        finally:
            process.terminate()


def _rest(pool: Any, size: int) -> float:
    begin = time.monotonic()
    pool.wait_ready(timeout=60)
    while True:
        status = pool.status()
        time.sleep(_PAUSE)  # nothing tells that all is at rest; and so long both processes sleep before what is timed
        if status.size == size and not (status.building or status.reserved or status.leased or status.reaping):
            return time.monotonic() - begin


def _get(pool: Any, name: str) -> float:
    begin = time.perf_counter()
    container = pool.get(name, 30)
    seconds = time.perf_counter() - begin
    container.release()
    return seconds


def _say(*words: object) -> None:
    print(*words, flush=True)


if __name__ == "__main__":
    main()
