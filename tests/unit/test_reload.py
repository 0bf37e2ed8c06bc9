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
from lxc_pool.service.reload import reload
from lxc_pool.wire import messages
from tests.support.memory_service import MemoryService, memory_service, say

ME = os.getuid()


@pytest.fixture
def service() -> Iterator[MemoryService]:
    with memory_service(2) as service:
        yield service


def change(service: MemoryService, **fields: object) -> None:
    wanted = dataclasses.replace(service.config, **fields)  # type: ignore[arg-type]
    reload(lambda: wanted, service.config, service.pool, service.service)


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
        reload(fail, service.config, service.pool, service.service)
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


@pytest.mark.parametrize("reach", [(), ("host",)])
def test_a_network_that_was_not_made_at_the_start_is_not_had_by_a_reload(
    service: MemoryService, reach: tuple[str, ...]
) -> None:
    change(service, profiles=(*service.config.profiles, ProfileConfig("net", 1, network="bridge", reach=reach)))
    assert "restart it for that" in str(service.service.status().configuration)
    assert "net" not in service.pool.census().profiles
