"""The short run of the fuzzer, and what earlier runs have found; the long one: `python -m tests.security.fuzz`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lxc_pool.wire import messages
from tests.security import fuzz
from tests.security.fuzz import CASES, CORPUS, Case, Target

short = settings(
    max_examples=300,
    deadline=None,  # a busy machine
    derandomize=True,  # what is new is for the long run to find
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    with fuzz.target() as target:
        yield target


def test_every_declared_call_is_thrown() -> None:
    assert set(fuzz.BY_CALL) == set(get_args(messages.AnyCall))


@given(st.binary(max_size=200) | fuzz._wrong_calls | fuzz._commands)
@short
def test_whatever_is_decoded_is_of_the_protocol_or_refused(body: bytes) -> None:
    fuzz.decode_everything(body)


@given(CASES)
@short
def test_whatever_a_channel_receives_are_messages_and_an_end(case: Case) -> None:
    fuzz.receive_everything(case.data("x"))


@given(CASES)
@example(Case(greeted=True, bodies=[messages.Shutdown(0.0, keep_leases=False)], changes=(), kinds=(), step=0))
@short
def test_whatever_a_client_sends_the_server_goes_on(target: Target, case: Case) -> None:
    target.throw(case)


def test_nothing_is_left_of_all_those_clients(target: Target) -> None:
    target.look()


@pytest.mark.parametrize("name", sorted(path.name for path in CORPUS.glob("*.bin")))
def test_what_an_earlier_run_found_stays_mended(target: Target, name: str) -> None:
    data = (CORPUS / name).read_bytes()
    for step in (0, 1):
        target.send(data, greeted=name.startswith("call"), step=step)
    fuzz.decode_everything(data)
    fuzz.receive_everything(data)
    target.look()
