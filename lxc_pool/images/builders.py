"""Which base images can be built by themselves. A new kind of image is one module, and one line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from lxc_pool.images import busybox

Report = Callable[[str], None]
"""Takes one line for the user: what a build is doing. A `progress.Milestone` says how far it is, too."""

Builder = Callable[[Path, Report], None]
"""Fills an empty root directory; raises ImageError or OSError.

It may be killed at any moment: the store discards what is left. So a program that it starts must die with it, and what
it mounts belongs in a mount namespace of its own.
"""

BUILDERS: Mapping[str, Builder] = MappingProxyType({"busybox": busybox.build})
"""The builder of each image that a service makes by itself: quickly, of what is on the host, from its name alone."""
