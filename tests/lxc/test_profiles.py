"""Several profiles in one pool of real containers: sizes that follow the demand, and changes while the service runs."""

from __future__ import annotations

import functools
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lxc_pool import Container, PoolServiceProxy, State
from lxc_pool.images.store import ImageStore
from tests.lxc.test_idle import switches
from tests.support.real_service import Service
from tests.support.waiting import eventually


def reload(service: Service, config: str) -> None:
    """Give a running service another configuration."""
    service.config_path.write_text(config)
    assert service.process is not None
    service.process.send_signal(signal.SIGHUP)


def capacities(pool: PoolServiceProxy) -> dict[str, int]:
    return {name: profile.capacity for name, profile in pool.status().profiles.items()}


def tells(pool: PoolServiceProxy, words: str) -> bool:
    """Return whether that is in what the status says of the configuration."""
    return words in (pool.status().configuration or "")


def lease(pool: PoolServiceProxy, profile: str = "default") -> Container:
    container = pool.get("x", 20, profile=profile)
    assert container is not None
    return container


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.host
def test_a_pool_full_of_one_profile_gives_way_to_a_request_for_another(service: Service) -> None:
    config = """
    [pool]
    workers = 2
    max = 3
    [profile.default]
    size = 3
    min = 2
    [profile.other]
    size = 0
    max = 2
    probe = ["touch", "/other"]
    """
    pool = service.start(config=config)
    pool.wait_ready()
    assert capacities(pool) == {"default": 3, "other": 0}
    with pool.lease("x", timeout=20, profile="other") as container:
        container.run(["test", "-e", "/other"], check=True)
        assert capacities(pool) == {"default": 2, "other": 1}
        # The other place is the first profile's by its min: this one waits for its own profile's only place.
        with pool.lease("y", timeout=20, profile="other"):
            pass
    pool.wait_ready()
    assert capacities(pool) == {"default": 2, "other": 1}


@pytest.mark.host
def test_a_profile_grows_with_gets_that_find_none_and_shrinks_when_it_is_not_needed(service: Service) -> None:
    config = "[pool]\nworkers = 2\nshrink_after = 1\n[profile.default]\nsize = 1\nmin = 0\nmax = 3\n"
    pool = service.start(config=config)
    pool.wait_ready()
    containers = [lease(pool) for _ in range(6)]
    assert capacities(pool) == {"default": 3}
    eventually(lambda: pool.status().size == 3, "as many are kept as were asked for at once")
    for container in containers:
        container.release()
    eventually(lambda: not pool.containers(), "nobody asks any more", timeout=30)
    assert capacities(pool) == {"default": 0}
    # With nothing left to give up, it waits for nothing.
    time.sleep(0.3)
    before = switches(service.pid)
    time.sleep(1.5)  # longer than a period
    assert switches(service.pid) - before < 5
    lease(pool).release()
    assert capacities(pool) == {"default": 1}


# --- the configuration is read again ----------------------------------------------------------------------------------

ROLLING = "[pool]\nworkers = 2\n[profile.default]\nsize = 4\n"


@pytest.mark.host
def test_a_changed_profile_rolls_over_a_few_at_a_time_and_leases_stay(service: Service) -> None:
    pool = service.start(config=ROLLING)
    leased = lease(pool)
    pool.wait_ready()
    old = {info.name for info in pool.containers() if info.state is State.WARM}
    reload(service, ROLLING + 'probe = ["touch", "/new"]\n')
    seen = []
    deadline = time.monotonic() + 30
    while old & {info.name for info in pool.containers()}:
        seen.append(pool.status().size)
        assert time.monotonic() < deadline
    assert min(seen) >= 4, seen
    assert max(seen) <= 5, seen
    pool.wait_ready()
    assert pool.status().profiles["default"].outdated == 0
    for container in [lease(pool) for _ in range(4)]:
        container.run(["test", "-e", "/new"], check=True)
        container.release()
    assert leased.run(["test", "-e", "/new"]).returncode == 1
    assert leased.state is State.LEASED
    leased.release()


def test_no_get_fails_while_a_profile_rolls_over(service: Service) -> None:
    pool = service.start(config=ROLLING)
    pool.wait_ready()
    over = threading.Event()
    got: list[bool] = []
    failures: list[object] = []

    def ask() -> None:
        with service.connect() as mine:
            while not over.is_set():
                container = mine.get("x", 20)
                if container is None:
                    failures.append("none came")
                    return
                got.append(container.run(["test", "-e", "/new"]).returncode == 0)
                container.release()

    clients = [threading.Thread(target=ask) for _ in range(2)]
    for client in clients:
        client.start()
    try:
        eventually(lambda: len(got) > 3, "gets are served")
        reload(service, ROLLING + 'probe = ["touch", "/new"]\n')
        eventually(lambda: failures or (got[-1] and pool.status().profiles["default"].outdated == 0), "all are new", 30)
        count = len(got)
        eventually(lambda: failures or len(got) > count + 6, "and go on to be served", 30)
    finally:
        over.set()
        for client in clients:
            client.join()
    assert not failures
    assert not got[0]
    assert all(got[count:])


def test_a_broken_configuration_is_refused_with_line_and_reason_and_the_old_one_stays(service: Service) -> None:
    config = "[pool]\nworkers = 2\n[profile.default]\nsize = 1\n"
    pool = service.start(config=config)
    pool.wait_ready()
    before = [info.name for info in pool.containers()]
    for broken, why in (
        (config + "[profile.other]\nsiez = 5\n", "line 6: profile.other.siez: unknown key"),
        (config + '[access]\nadmins = ["nobody-at-all"]\n', "no user 'nobody-at-all'"),
        ("[pool", "not valid TOML"),
    ):
        reload(service, broken)
        eventually(functools.partial(tells, pool, why), why)
        assert "the one before stays" in service.cli("status").stdout
        assert why in service.log
        assert [info.name for info in pool.containers()] == before
    reload(service, config)
    eventually(lambda: pool.status().configuration is None, "it is as it was")
    assert [info.name for info in pool.containers()] == before


def test_profiles_come_and_go_and_what_can_not_change_is_named(service: Service) -> None:
    config = "[pool]\nworkers = {}\n[profile.default]\nsize = 1\n[profile.{}]\nsize = 2\n"
    pool = service.start(config=config.format(2, "old"))
    leased = lease(pool, "old")
    pool.wait_ready()
    reload(service, config.format(3, "new"))
    eventually(lambda: pool.status().profiles.keys() == {"default", "new", "old"}, "a profile is new")
    pool.wait_ready()
    assert capacities(pool) == {"default": 1, "new": 2, "old": 0}
    assert pool.status().worker_count == 2
    assert "next start of the service: pool.workers" in (pool.status().configuration or "")
    with pytest.raises(ValueError, match="unknown profile 'old'"):
        pool.get("x", 10, profile="old")
    assert leased.run(["true"]).returncode == 0
    leased.release()
    eventually(lambda: "old" not in pool.status().profiles, "the last of it is gone")


def test_a_signal_that_comes_while_it_ends_does_not_keep_a_service(service: Service) -> None:
    pool = service.start(config=ROLLING)
    pool.wait_ready()
    assert service.process is not None
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGHUP):
        service.process.send_signal(number)
    assert service.wait().status == 0


# --- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.host
def test_a_running_service_takes_up_a_new_version_of_its_image(service: Service) -> None:
    pool = service.start(config=ROLLING)
    leased = lease(pool)
    pool.wait_ready()
    old = {info.name for info in pool.containers() if info.state is State.WARM}
    done = service.cli("image", "build", "busybox", "--state-dir", service.state_dir)
    assert done.returncode == 0, done.stderr
    new = done.stdout.strip()
    seen = []
    deadline = time.monotonic() + 30
    while old & {info.name for info in pool.containers()}:
        seen.append(pool.status().size)
        assert time.monotonic() < deadline
    assert min(seen) >= 4, seen
    profile = pool.status().profiles["default"]
    assert (profile.image, profile.outdated) == (new, 0)
    leased.release()
    store = ImageStore(service.state_dir / "images")
    eventually(lambda: [image.ref for image in store.list()] == [new], "nothing is of the old version any more")


def test_whoever_makes_an_image_is_told_if_the_service_can_not_be(service: Service, tmp_path: Path) -> None:
    service.start(size=1)
    image = ("image", "build", "busybox", "--state-dir", service.state_dir, "--host-dir", tmp_path)
    done = service.cli(*image)
    assert done.returncode == 0
    assert f"kill -HUP {service.pid}" in done.stderr
    new = done.stdout.strip()
    assert service.process is not None
    service.process.send_signal(signal.SIGHUP)
    with service.connect() as pool:
        eventually(lambda: pool.status().profiles["default"].image == new, "the signal makes it look")


# --- readiness and environment ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def probed(images: Path) -> Iterator[PoolServiceProxy]:
    """A pool with profiles whose probes do all kinds of things."""
    config = """
    [pool]
    workers = 2
    create_timeout = 20
    [profile.default]
    size = 1
    probe = ["sh", "-c", "test \\"$GREETING\\" = 'hello, \\\\world' && touch /greeted"]
    env = { GREETING = 'hello, \\world', LANG = "C" }
    [profile.daemon]
    probe = ["sh", "-c", "sleep 1000 & exit 0"]
    [profile.hangs]
    probe = ["sh", "-c", "echo waiting for; echo a database; sleep 1000"]
    probe_timeout = 0.5
    [profile.floods]
    probe = ["sh", "-c", "yes | head -c 5000000; printf '\\\\033[31mno\\\\n'; exit 3"]
    probe_timeout = 2
    """
    service = Service(images)
    try:
        pool = service.start(config=config)
        pool.wait_ready(2)
        yield pool
        assert "a lane hangs" not in service.log
    finally:
        service.close()


@pytest.mark.host
def test_a_profiles_variables_are_those_of_its_probe_and_its_commands(probed: PoolServiceProxy) -> None:
    with probed.lease("x", timeout=20) as container:
        container.run(["test", "-e", "/greeted"], check=True)
        script = ["sh", "-c", 'echo "$GREETING $LANG $HOME"']
        done = container.run(script, capture_output=True, text=True)
        assert done.stdout == "hello, \\world C /root\n"
        done = container.run(script, env={"GREETING": "bye"}, capture_output=True, text=True)
        assert done.stdout == "bye C /root\n"


@pytest.mark.host
def test_a_probe_may_leave_a_process_behind(probed: PoolServiceProxy) -> None:
    with probed.lease("x", timeout=20, profile="daemon") as container:
        container.run(["sh", "-c", "ps | grep -q '[s]leep 1000'"], check=True)


@pytest.mark.parametrize(
    ("profile", "words"),
    [("hangs", "has not ended in time: waiting for; a database"), ("floods", "still ends with 3: ")],
)
def test_a_probe_that_fails_is_with_its_profile_in_the_status_and_in_what_a_waiter_is_told(
    probed: PoolServiceProxy, profile: str, words: str
) -> None:
    eventually(lambda: words in (probed.status().profiles[profile].last_error or ""), words, timeout=30)
    error = probed.status().profiles[profile].last_error or ""
    assert len(error) < 2000
    assert error.isprintable()
    assert probed.status().profiles["default"].last_error is None
    with pytest.raises(TimeoutError, match=words), probed.lease("x", timeout=0.1, profile=profile):
        pass
