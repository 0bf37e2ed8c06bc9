"""Ranges of ids: one holder each, on the whole machine."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from lxc_pool.errors import CloneFailed
from lxc_pool.host import idranges
from lxc_pool.host.idranges import LIMIT, SIZE, give_back, held, take


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    return tmp_path / "ids"


def test_a_range_has_one_holder_until_it_is_given_back(registry: Path) -> None:
    first, second = (take(name, registry=registry, subids=()) for name in ("a", "b"))
    assert abs(first - second) >= SIZE
    assert {who for _path, who in held(registry=registry)} == {"a", "b"}
    give_back("a", first, registry=registry)
    assert take("c", registry=registry, subids=()) == first
    give_back("b", registry=registry)
    give_back("nobody", registry=registry)
    assert [who for _path, who in held(registry=registry)] == ["c"]


def test_a_range_that_another_takes_just_then_is_passed_over(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idranges, "taken", lambda **_where: frozenset())  # looked before the others took theirs
    assert len({take(name, registry=registry, subids=()) for name in "abc"}) == 3
    assert [who for _path, who in held(registry=registry)] == ["a", "b", "c"]


@pytest.mark.parametrize("base", [1, SIZE - 1, SIZE, SIZE + 1, idranges.DEFAULT_BASE + 12345])
def test_services_with_different_bases_never_overlap(registry: Path, base: int) -> None:
    usual = idranges.DEFAULT_BASE
    taken = sorted(take("x", first, registry=registry, subids=()) for first in (usual, base, usual, base, usual, base))
    assert all(later - earlier >= SIZE for earlier, later in itertools.pairwise(taken))
    assert min(taken) >= min(base, usual)


@pytest.mark.parametrize(
    ("start", "count"), [(SIZE, SIZE), (SIZE - 1, 2), (2 * SIZE - 1, 1), (SIZE + 7, 3), (1, 3 * SIZE)]
)
def test_what_the_host_has_given_to_its_users_is_left_alone(registry: Path, start: int, count: int) -> None:
    file = registry.with_name("subuid")
    file.write_text(f"# nothing\nalice:{start}:{count}\nbob:not:numbers\n")
    first = take("x", SIZE, registry=registry, subids=(file, registry.with_name("missing")))
    assert first >= start + count or first + SIZE <= start


def test_when_all_are_taken_it_says_so(registry: Path) -> None:
    base = LIMIT - SIZE + 1 - SIZE
    take("x", base, registry=registry, subids=())
    with pytest.raises(CloneFailed, match="no range of 65536 ids is free"):
        take("y", base, registry=registry, subids=())


def test_the_registry_is_closed_to_others(registry: Path) -> None:
    first = take("x", registry=registry, subids=())
    assert registry.stat().st_mode & 0o777 == 0o700
    assert (registry / str(first)).stat().st_mode & 0o777 == 0o600


def test_a_range_that_is_of_no_use_is_passed_over(registry: Path) -> None:
    usual = idranges.DEFAULT_BASE
    first = take("a", registry=registry, subids=(), unless=lambda first: first < usual + 2 * SIZE)
    assert first == usual + 2 * SIZE
    assert idranges.taken(registry=registry) == {first}
    assert idranges.holder(first, registry=registry) == "a"
    assert idranges.holder(first + SIZE, registry=registry) is None
    assert idranges.taken(registry=registry / "missing") == frozenset()
