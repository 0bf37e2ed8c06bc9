"""What a configuration that is read again means for those who are connected, and when it is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterator

import pytest

from lxc_pool.config import Config, ProfileConfig
from lxc_pool.errors import AccessDenied, ConfigError, QuotaExceeded
from lxc_pool.service.access import Peer, Policy
from lxc_pool.service.reload import Network, reload
from lxc_pool.wire import messages
from tests.support.memory_service import MemoryService, memory_service, say

ME = os.getuid()


@pytest.fixture
def service() -> Iterator[MemoryService]:
    with memory_service(2) as service:
        yield service


class NoNetwork:
    """What containers of the memory backend are on; with profiles that want one, nothing is changed either."""

    def prepare(self, _config: Config) -> None:
        pass

    def settle(self, _config: Config) -> None:
        pass


class Refusing(NoNetwork):
    """A host that has no room for a network."""

    def prepare(self, _config: Config) -> None:
        raise ConfigError("/etc/lxc-pool.toml, line 3: network.subnet: it is taken")


def change(service: MemoryService, *, network: Network | None = None, **fields: object) -> None:
    wanted = dataclasses.replace(service.config, **fields)  # type: ignore[arg-type]
    reload(lambda: wanted, service.pool, service.service, network or NoNetwork())


class Stranger:
    """Lets this process count as a user without rights from the next reload on; see `admin`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.admin = True

        def look_again(_policy: Policy, peer: Peer) -> Peer:
            return dataclasses.replace(peer, is_admin=self.admin)

        monkeypatch.setattr(Policy, "look_again", look_again)


def test_limits_are_those_of_the_new_configuration_at_once(service: MemoryService) -> None:
    change(service, max_leases=7, confirm_timeout=0.5, max_calls=5, create_timeout=3.0)
    assert service.service.config.max_leases == 7
    assert service.pool._upkeep.config.create_timeout == 3.0


def test_whoever_may_no_more_is_refused_from_the_next_call_on_and_an_offer_goes_back(
    service: MemoryService, monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger = Stranger(monkeypatch)
    with contextlib.closing(service.channel()) as channel:
        offer = say(channel, messages.Get("r", "x", 5.0, "default", None, None))
        assert isinstance(offer, messages.Offer)
        stranger.admin = False  # it is root's no more, and in no group of the service's
        change(service, users=())
        for call in (messages.Confirm("r"), messages.Echo("x")):
            with pytest.raises(AccessDenied, match=f"uid {ME} is not"):
                say(channel, call)
        service.reaches(reserved=0, size=2)
        stranger.admin = True
        change(service, users=None)
        assert say(channel, messages.Echo("x")) == "x"


def test_whoever_waits_for_a_profile_that_it_may_have_no_more_does_not_get_it(
    service: MemoryService, monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger = Stranger(monkeypatch)
    monkeypatch.setattr(Policy, "require_user", lambda *_: None)
    stranger.admin = False
    change(service, max_leases=10)
    with contextlib.closing(service.channel()) as channel:
        assert say(channel, messages.Echo("x"))
        assert isinstance(say(channel, messages.Get("r", "x", 5.0, "default", None, None)), messages.Offer)
        change(service, profiles=(ProfileConfig("default", 2, privileged=True),))
        with pytest.raises(AccessDenied, match="privileged"):
            say(channel, messages.Confirm("r"))
        service.reaches(reserved=0, leased=0, size=2)


def test_a_quota_holds_for_those_who_are_connected_already(
    service: MemoryService, monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger = Stranger(monkeypatch)
    with contextlib.closing(service.channel()) as channel:
        assert say(channel, messages.Get("r1", "x", 5.0, "default", None, None))
        assert say(channel, messages.Confirm("r1"))
        monkeypatch.setattr(Policy, "require_user", lambda *_: None)
        stranger.admin = False
        change(service, max_leases=1)
        with pytest.raises(QuotaExceeded, match="has 1 containers"):
            say(channel, messages.Get("r2", "x", 5.0, "default", None, None))
        change(service, max_leases=2)
        assert say(channel, messages.Get("r3", "x", 5.0, "default", None, None))


def test_what_is_refused_changes_nothing_and_is_told(service: MemoryService, caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> Config:
        raise ConfigError("/etc/lxc-pool.toml, line 3: pool.sizes: unknown key")

    with caplog.at_level(logging.ERROR):
        reload(fail, service.pool, service.service, NoNetwork())
    change(service, max_leases=3, profiles=(ProfileConfig("default", 1, allow=("no-such-user",)),))
    assert "no user 'no-such-user'" in str(service.service.status().configuration)
    assert service.service.config.max_leases == 100
    assert service.pool.census().profiles["default"].capacity == 2
    assert "line 3: pool.sizes: unknown key" in caplog.text
    change(service)
    assert service.service.status().configuration is None


def test_what_needs_a_restart_is_named_and_the_rest_is_in_force(service: MemoryService) -> None:
    change(service, workers=4, group="other", max_leases=3)
    assert service.service.status().configuration == (
        "a new value waits for the next start of the service: pool.workers, access.group"
    )
    assert service.service.config.max_leases == 3
    assert service.service.status().worker_count == service.config.workers


def test_a_network_that_can_not_be_made_refuses_the_whole_configuration(service: MemoryService) -> None:
    net = ProfileConfig("net", 1, network="bridge")
    change(service, network=Refusing(), max_leases=3, profiles=(*service.config.profiles, net))
    assert "line 3: network.subnet: it is taken" in str(service.service.status().configuration)
    assert service.service.config.max_leases == 100
    assert "net" not in service.pool.census().profiles


def test_the_network_is_made_before_there_are_profiles_on_it_and_removed_when_they_are_gone(
    service: MemoryService,
) -> None:
    log: list[str] = []

    class Watching:
        def prepare(self, config: Config) -> None:
            log.append(f"prepare {config.wants_bridge}, in force: {sorted(service.pool.census().profiles)}")

        def settle(self, config: Config) -> None:
            log.append(f"settle {config.wants_bridge}, in force: {sorted(service.pool.census().profiles)}")

    net = ProfileConfig("net", 0, network="bridge")
    change(service, network=Watching(), profiles=(*service.config.profiles, net))
    change(service, network=Watching())
    assert log == [
        "prepare True, in force: ['default']",
        "settle True, in force: ['default', 'net']",
        "prepare False, in force: ['default', 'net']",
        "settle False, in force: ['default']",
    ]
