"""Random histories of an address book: no two holders of one address, least recently used first, restarts included."""

from __future__ import annotations

import itertools
from ipaddress import IPv4Address, IPv4Interface, IPv4Network

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lxc_pool.backend.protocol import Endpoint
from lxc_pool.config import ProfileConfig
from lxc_pool.errors import BackendError
from lxc_pool.host.bridge import Network
from lxc_pool.model import State
from lxc_pool.service.addresses import AddressBook
from lxc_pool.service.ledger import Entry

NETWORK = Network(
    instance="00face",
    bridge="lxp00face",
    own=True,
    gateway=IPv4Interface("10.9.8.1/28"),
    subnet=IPv4Network("10.9.8.0/28"),
    nat=True,
    resolvers=("10.0.0.53",),
)
BRIDGED, EMPTY = ProfileConfig("a", 1, network="bridge"), ProfileConfig("b", 1)


def ip(endpoint: Endpoint) -> IPv4Address:
    return IPv4Interface(endpoint.address).ip


class AddressMachine(RuleBasedStateMachine):
    """Containers that come and go, and a service that is killed and reads what they have from the ledger."""

    def __init__(self) -> None:
        super().__init__()
        self.book = AddressBook(NETWORK)
        self.held: dict[str, tuple[Endpoint, float]] = {}
        self.idle = list(NETWORK.addresses)
        self.names = (f"c{number}" for number in itertools.count())
        self.clock = itertools.count(1.0)

    @rule()
    def take(self) -> None:
        name = next(self.names)
        if not self.idle:
            with pytest.raises(BackendError, match="all 13 addresses"):
                self.book.take(name, BRIDGED)
            return
        endpoint = self.book.take(name, BRIDGED)
        assert endpoint is not None
        assert ip(endpoint) == self.idle.pop(0)
        self.held[name] = (endpoint, next(self.clock))

    @rule()
    def take_none(self) -> None:
        assert self.book.take(next(self.names), EMPTY) is None

    @rule(data=st.data())
    @precondition(lambda self: self.held)
    def give_back(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.held)))
        self.book.give_back(name)
        self.idle.append(ip(self.held.pop(name)[0]))
        self.book.give_back(name)  # twice is as good as once

    @rule()
    def restart(self) -> None:
        entries = [
            Entry(name, "a", State.LEASED, since, "", "", None, None, None, endpoint)
            for name, (endpoint, since) in self.held.items()
        ]
        other = Entry("other", "b", State.WARM, 0.5, "", "", None, None, None)
        self.book = AddressBook(NETWORK, [*entries, other])
        # What is known of who had what: the addresses after the newest one's come next.
        newest = max(self.held.values(), key=lambda pair: pair[1], default=None)
        self.idle.sort()
        if newest is not None:
            self.idle.sort(key=lambda address: address < ip(newest[0]))

    @invariant()
    def nobody_shares(self) -> None:
        endpoints = [endpoint for endpoint, _since in self.held.values()]
        for what in ("address", "mac", "port"):
            assert len({getattr(endpoint, what) for endpoint in endpoints}) == len(endpoints)
        assert not {ip(endpoint) for endpoint in endpoints} & {
            NETWORK.gateway.ip,
            *map(IPv4Address, ("10.9.8.0", "10.9.8.15")),
        }


test_address_book = AddressMachine.TestCase


def test_an_earlier_services_container_is_as_one_of_now_only_if_it_has_the_same_place() -> None:
    book = AddressBook(NETWORK)
    endpoint = book.take("c1", BRIDGED)
    assert book.fits(endpoint, BRIDGED)
    assert book.fits(None, EMPTY)
    assert not book.fits(endpoint, EMPTY)
    assert not book.fits(None, BRIDGED)
    assert not book.fits(endpoint, ProfileConfig("a", 1, network="bridge", reach=("host",)))
    assert not AddressBook(None).fits(endpoint, BRIDGED)


def test_what_is_left_of_a_network_that_was_configured_before_is_in_nobodys_way() -> None:
    old = Endpoint("lxp00face", "lxp00facea002", "02:6c:0a:00:00:02", "10.0.0.2/24", "10.0.0.1", (), True)
    book = AddressBook(NETWORK, [Entry("c1", "a", State.LEASED, 1.0, "", "", None, None, None, old)])
    book.give_back("c1")
    assert [book.take(f"n{number}", BRIDGED) is not None for number in range(13)] == [True] * 13
