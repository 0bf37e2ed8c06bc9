"""Many clients at once on one pool of real containers: each gets its own, in its turn; none is made needlessly."""

from __future__ import annotations

import contextlib
import functools
import json
import threading
from concurrent.futures import ThreadPoolExecutor

from lxc_pool import Container, PoolServiceProxy, State
from tests.support.real_service import Service
from tests.support.starter import Starter
from tests.support.waiting import eventually

TEN_IN_A_ROW = """
    import json
    names = []
    sys.stdin.readline()
    for number in range(10):
        with pool.lease(number, timeout=60) as container:
            said = container.run(["hostname"], capture_output=True, text=True, check=True).stdout.strip()
            assert said == container.name
            names.append(said)
    print(json.dumps(names))
"""

ONE_IN_TURN = """
    sys.stdin.readline()
    container = pool.get("x", 60)
    print(container.name, flush=True)
    sys.stdin.readline()
    container.release()
"""


def number_of(name: str) -> int:
    """Return which container of its service it is, by the order in which they were made."""
    return int(name.rpartition("-")[2])


def waits(pool: PoolServiceProxy, number: int) -> bool:
    return pool.status().waiting == number


def test_a_spike_of_one_more_than_are_warm_gives_each_its_own_and_makes_just_one_for_it(service: Service) -> None:
    size = 3
    pool = service.start(size=size)
    pool.wait_ready()
    barrier = threading.Barrier(size + 1)

    def lease(number: int) -> Container | None:
        barrier.wait()
        return pool.get(number, 30)

    with ThreadPoolExecutor(size + 1) as threads:
        containers = [container for container in threads.map(lease, range(size + 1)) if container is not None]
    assert len({container.name for container in containers}) == size + 1
    assert {container.id for container in containers} == set(range(size + 1))
    pool.wait_ready()
    warm = [info.name for info in pool.containers() if info.state is State.WARM]
    made = {number_of(name) for name in [*warm, *(container.name for container in containers)]}
    assert made == set(range(1, 2 * size + 2))
    for container in containers:
        container.release()


def test_eight_processes_lease_ten_each(pool: PoolServiceProxy, shared_service: Service) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(shared_service.client(TEN_IN_A_ROW)) for _ in range(8)]
        for client in clients:
            assert client.stdin is not None
            client.stdin.write("go\n")
            client.stdin.flush()
        outputs = [client.communicate()[0] for client in clients]
    assert [client.returncode for client in clients] == [0] * 8
    names = [name for output in outputs for name in json.loads(output)]
    assert len(set(names)) == 80
    pool.wait_ready()
    eventually(lambda: [info.state for info in pool.containers()] == [State.WARM] * 3, "only what is warm is left")
    warm = {info.name for info in pool.containers()}
    assert {path.name for path in shared_service.containers.iterdir()} == warm
    assert not warm & set(names)
    assert not [path for path in shared_service.cgroups() if not any(name in path for name in warm)]


def test_processes_of_one_user_are_served_in_the_order_in_which_they_came(service: Service, starter: Starter) -> None:
    with contextlib.ExitStack() as stack:
        with starter.holding():
            pool = service.start(size=1, path=[starter.directory])
            eventually(starter.held, "the first container is being started")
            clients = [stack.enter_context(service.client(ONE_IN_TURN)) for _ in range(4)]
            for place, client in enumerate(clients, 1):
                assert client.stdin is not None
                client.stdin.write("go\n")
                client.stdin.flush()
                eventually(functools.partial(waits, pool, place), "it waits", timeout=30)
        names = [client.stdout.readline().strip() for client in clients if client.stdout is not None]
        # With a size of 1 each one is made when the one before it has been leased.
        assert [number_of(name) for name in names] == [1, 2, 3, 4]
        for client in clients:
            client.communicate("done\n")
