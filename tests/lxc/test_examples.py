"""The examples run with one command, against a service that is there or with one of their own, as their README says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.support import debian
from tests.support.real_service import ROOT, Service

pytestmark = pytest.mark.host

TIMEOUT = 110.0
"""Seconds for the whole suite; a guess, it takes ten."""


PLUGINS = ("-p", "lxc_pool.pytest_plugin", "-p", "no:cacheprovider")


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ
        | {
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # those of whoever runs this
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT,
    )


@pytest.mark.usefixtures("pool")
def test_those_in_busybox_containers_pass_and_leave_nothing(shared_service: Service) -> None:
    suite = run(
        *(sys.executable, "-m", "pytest", *PLUGINS, "--lxc-pool-require", "examples"),
        LXC_POOL_HOST_DIR=str(shared_service.host_dir),
    )
    assert suite.returncode == 0, suite.stdout + suite.stderr
    (passed, skipped) = re.findall(r"^(?:=+ )?(\d+) passed, (\d+) skipped in", suite.stdout, re.MULTILINE)[0]
    assert int(passed) > 30
    assert int(skipped) == 9  # no profile `debian` here


@pytest.mark.timeout(600)  # seconds: the first one builds the image, which takes 20 on an idle machine
def test_all_pass_with_one_command_that_starts_a_service_and_ends_it(service: Service) -> None:
    shutil.rmtree(service.state_dir)
    service.state_dir.mkdir(mode=0o755)
    debian.lend_images(service.state_dir / "images")
    suite = run(
        *("examples/run", *PLUGINS, "-p", "xdist.plugin", "-n", "2"),
        LXC_POOL_EXAMPLES_DIR=str(service.directory),
        PYTHON=sys.executable,
    )
    assert suite.returncode == 0, suite.stdout + suite.stderr + service.log
    (passed,) = re.findall(r"^(?:=+ )?(\d+) passed in", suite.stdout, re.MULTILINE)
    assert int(passed) > 40
    service.assert_clean()
