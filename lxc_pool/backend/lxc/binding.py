"""The only place that loads the `lxc` binding: when it is called, which workers alone do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lxc_pool.errors import BackendError

if TYPE_CHECKING:
    import lxc


def container(name: str, lxcpath: Path) -> lxc.Container:
    """Return liblxc's object for a container; a fresh one for each operation: they keep state and open log files.

    Raises:
        BackendError: liblxc can't look at the container, and does not say why.
    """
    import lxc  # noqa: PLC0415  # it loads liblxc, which the service must not call: it holds the GIL

    try:
        return lxc.Container(name, str(lxcpath))
    except RuntimeError as error:
        raise BackendError(f"liblxc can't look at {name}: {error} Is it short of descriptors or memory?") from error
