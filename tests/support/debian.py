"""A Debian image for tests, built once a day on a machine, however many interpreters' tests need it."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lxc_pool.images import debian
from lxc_pool.images.store import ImageStore
from tests.support.real_service import ROOT

PACKAGES = ("cron", "nginx-light", "openssh-server")
"""Services for tests to start."""

CACHE = Path(os.environ.get("LXC_POOL_TEST_IMAGES", "/var/tmp/lxc-pool-test-images"))
"""Root's alone, as every image directory is. Those of other days and recipes go when a new one is built."""

UNREACHABLE = re.compile(r"Failed to fetch|Temporary failure|Could not (connect|resolve)|Unable to connect|not signed")
"""What apt says when a mirror is not there, or something else answers in its place."""


def lend_images(images: Path) -> None:
    """Put the Debian image into a new image directory; skip the test if it can't be made.

    The files are shared by hard links where that is possible: nobody may change them.
    """
    if shutil.which("mmdebstrap") is None:
        pytest.skip("needs mmdebstrap: apt-get install mmdebstrap")
    CACHE.mkdir(mode=0o700, exist_ok=True)
    if CACHE.is_symlink() or CACHE.stat().st_uid != os.geteuid():
        pytest.skip(f"{CACHE} is another user's")
    # How it is made is part of what it is.
    made_by = hashlib.sha256(Path(debian.__file__).read_bytes()).hexdigest()[:8]
    state = CACHE / "-".join([debian.host_suite() or "stable", *PACKAGES, time.strftime("%Y%m%d"), made_by])
    directory = state / "images"
    with open(CACHE / ".lock", "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the first builds it; the others wait, and find it
        if ImageStore(directory).newest("debian") is None:
            _build(state)
        if subprocess.run(["cp", "-al", directory, images], capture_output=True, check=False).returncode:
            shutil.rmtree(images, ignore_errors=True)
            subprocess.run(["cp", "-a", directory, images], check=True)


def _build(state: Path) -> None:
    """Build it as it is typed."""
    for old in CACHE.iterdir():
        if old.is_dir():
            shutil.rmtree(old)
    suite = ["--suite", name] if (name := debian.host_suite()) else []
    command = [sys.executable, "-m", "lxc_pool", "image", "build", "debian", "--state-dir", str(state), *suite]
    build = subprocess.run(
        [*command, "--include", *PACKAGES],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if build.returncode:
        if UNREACHABLE.search(build.stderr):
            pytest.skip(f"no mirror could be reached to build the Debian image from: {build.stderr}")
        pytest.fail(f"the Debian image could not be built: {build.stderr}")
