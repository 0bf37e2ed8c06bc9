"""Many users at once, and more than one machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from machine import Machine

from lxc_pool import PoolServiceProxy

USERS, POSTS = 4, 10


@pytest.fixture
def neighbour(lxc_pool: PoolServiceProxy) -> Iterator[Machine]:
    """A second machine."""
    with lxc_pool.lease("neighbour", timeout=30) as container:
        yield Machine(container)


def test_no_message_is_lost_or_torn(board: Machine) -> None:
    """Several commands run in one container at once, each a user who posts."""
    script = (
        "for number in $(seq {posts}); do"
        ' wget -q -O - --post-data "{user}-$number" http://127.0.0.1:8080/cgi-bin/messages || exit; done'
    )
    users = [board.start(script.format(posts=POSTS, user=user)) for user in range(USERS)]
    for user in users:
        with user:
            output, _ = user.communicate(timeout=60)
            assert user.returncode == 0, output
    texts = [line.split()[-1] for line in board.messages()]
    assert sorted(texts) == sorted(f"{user}-{number}" for user in range(USERS) for number in range(1, POSTS + 1))


def test_machines_know_nothing_of_each_other(board: Machine, neighbour: Machine) -> None:
    """Both use the same port and the same files, each its own."""
    board.post("here")
    neighbour.install("1.0")
    assert neighbour.messages() == []
    neighbour.post("there")
    assert [line.split()[-1] for line in board.messages()] == ["here"]
