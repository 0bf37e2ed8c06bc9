"""The examples run with one command against a service, as their README says."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.support.real_service import ROOT, Service

pytestmark = pytest.mark.host

TIMEOUT = 110.0
"""Seconds for the whole suite; a guess, it takes ten."""


@pytest.mark.parametrize("options", [[], ["-p", "xdist.plugin", "-n", "2"]], ids=["one process", "xdist"])
@pytest.mark.usefixtures("pool")
def test_the_examples_pass_and_leave_nothing(shared_service: Service, options: list[str]) -> None:
    plugins = ["-p", "lxc_pool.pytest_plugin", "-p", "no:cacheprovider"]
    suite = subprocess.run(
        [sys.executable, "-m", "pytest", *plugins, "--lxc-pool-require", *options, "examples"],
        cwd=ROOT,
        env=os.environ
        | {
            "LXC_POOL_HOST_DIR": str(shared_service.host_dir),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # those of whoever runs this
            "PYTHONDONTWRITEBYTECODE": "1",
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT,
    )
    assert suite.returncode == 0, suite.stdout + suite.stderr
    (passed,) = re.findall(r"^(?:=+ )?(\d+) passed in", suite.stdout, re.MULTILINE)
    assert int(passed) > 30
