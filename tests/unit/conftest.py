"""What several unit tests need."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def open_path() -> Iterator[Path]:
    """A short directory that every user may enter: pytest's own are closed to others and too long for a socket."""
    path = Path(tempfile.mkdtemp(prefix="lxp-test-"))
    path.chmod(0o755)
    try:
        yield path
    finally:
        path.chmod(0o700)
        shutil.rmtree(path)
