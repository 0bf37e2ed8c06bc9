"""What every test of this suite may ask for."""

from __future__ import annotations

import pytest
from machine import Machine

from lxc_pool import Container


@pytest.fixture
def machine(lxc_container: Container) -> Machine:
    """A machine without board."""
    return Machine(lxc_container)


@pytest.fixture(params=["1.0", "2.0"])
def board(machine: Machine, request: pytest.FixtureRequest) -> Machine:
    """A machine with board installed and running, each release in turn."""
    machine.install(request.param)
    return machine
