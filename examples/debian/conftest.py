"""What the tests in Debian containers may ask for."""

from __future__ import annotations

import pytest
from server import Server

from lxc_pool import Container, PoolServiceProxy


@pytest.fixture(scope="session", autouse=True)
def _debian_containers(lxc_pool: PoolServiceProxy) -> None:
    """Skip all this where the service has no such containers."""
    if "debian" not in lxc_pool.status().profiles:
        pytest.skip("the service has no profile `debian`: see examples/README.md")


@pytest.fixture
def server(lxc_container: Container) -> Server:
    """A server without tally."""
    return Server(lxc_container)


@pytest.fixture
def tally(server: Server) -> Server:
    """A server with tally installed and running."""
    server.dpkg(f"--install {server.package('1.0')}")
    return server
