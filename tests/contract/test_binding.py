"""What liblxc's binding says when it fails, on the real one."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

_SHORT_OF_DESCRIPTORS = """
import os, resource, sys
from pathlib import Path
import lxc
from lxc_pool.backend.lxc import binding
from lxc_pool.errors import BackendError

resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) - 1,) * 2)
try:
    binding.container("c1", Path(sys.argv[1]))
except BackendError as error:
    print(error)
"""


@pytest.mark.skipif(importlib.util.find_spec("lxc") is None, reason="needs liblxc's binding")
def test_a_container_that_liblxc_can_not_look_at_is_the_backends_error(tmp_path: object) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _SHORT_OF_DESCRIPTORS, str(tmp_path)],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.startswith("liblxc can't look at c1: "), done
    assert "short of descriptors" in done.stdout
    assert done.returncode == 0, done
