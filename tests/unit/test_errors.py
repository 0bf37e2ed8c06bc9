"""The errors survive whatever carries them, and are what the public contract says they are."""

from __future__ import annotations

import copy
import pickle

import pytest

import lxc_pool
from lxc_pool import errors
from lxc_pool.errors import LxcPoolError

ALL = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, LxcPoolError)]

BUILT_IN: dict[type[LxcPoolError], type[Exception]] = {
    errors.ConfigError: ValueError,
    errors.ServiceUnavailable: ConnectionError,
    errors.AuthenticationFailed: PermissionError,
    errors.AccessDenied: PermissionError,
    errors.PoolTimeout: TimeoutError,
}

NARROWER: dict[type[LxcPoolError], type[LxcPoolError]] = {
    errors.UnknownLease: errors.LeaseError,
    errors.LeaseExpired: errors.LeaseError,
    errors.CloneFailed: errors.BackendError,
    errors.StartFailed: errors.BackendError,
    errors.DestroyFailed: errors.BackendError,
    errors.ExecFailed: errors.BackendError,
}


@pytest.mark.parametrize("kind", ALL)
def test_survives_pickling_and_copying_with_its_message(kind: type[LxcPoolError]) -> None:
    error = kind("words, and 1 value")
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):  # noqa: S301  # pickled on this line
        assert type(again) is kind
        assert str(again) == "words, and 1 value"


@pytest.mark.parametrize(("kind", "base"), BUILT_IN.items())
def test_can_be_caught_as_the_built_in_that_says_the_same(kind: type[LxcPoolError], base: type[Exception]) -> None:
    assert issubclass(kind, base)
    assert issubclass(kind, LxcPoolError)


@pytest.mark.parametrize(("kind", "base"), NARROWER.items())
def test_can_be_caught_as_its_kind(kind: type[LxcPoolError], base: type[LxcPoolError]) -> None:
    assert issubclass(kind, base)


@pytest.mark.parametrize("kind", ALL)
def test_is_exported_by_the_package(kind: type[LxcPoolError]) -> None:
    assert getattr(lxc_pool, kind.__name__) is kind
    assert kind.__name__ in lxc_pool.__all__
