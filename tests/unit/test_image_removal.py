"""Removing images from the store: replaced versions that nobody uses, and those that somebody names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lxc_pool.errors import ImageError
from lxc_pool.images import tree
from lxc_pool.images.store import Image, ImageStore


def build(rootfs: Path, _report: Callable[[str], None]) -> None:
    (rootfs / "x").touch()


def filled(path: Path, **versions: int) -> tuple[ImageStore, list[Image]]:
    store = ImageStore(path / "images", dict.fromkeys(versions, build))
    images = [
        store.build(name, lambda _line: None) for name, count in sorted(versions.items()) for _number in range(count)
    ]
    return store, images


def test_replaced_versions_go_but_for_those_in_use_and_the_newest(tmp_path: Path) -> None:
    store, (a1, a2, a3, b1) = filled(tmp_path, a=3, b=1)
    assert store.collect({a2.ref}) == (a1,)
    assert store.list() == (a2, a3, b1)
    assert store.collect(()) == (a2,)
    assert store.collect(()) == ()
    assert store.list() == (a3, b1)


def test_a_collection_removes_what_a_killed_build_or_removal_left(tmp_path: Path) -> None:
    store, (image,) = filled(tmp_path, a=1)
    (store.directory / "a/.partial-x").mkdir()
    assert store.collect(()) == ()
    assert [path.name for path in (store.directory / "a").iterdir()] == [image.version]


def test_a_removal_that_is_cut_short_leaves_no_half_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, (old, new) = filled(tmp_path, a=2)
    remove = tree.remove

    def killed(path: Path) -> None:
        (path / "manifest.json").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(tree, "remove", killed)
    with pytest.raises(KeyboardInterrupt):
        store.remove(old.ref, list)
    monkeypatch.setattr(tree, "remove", remove)
    assert store.list() == (new,)
    assert len(store.sweep()) == 1


def test_an_image_that_is_being_built_is_passed_over(tmp_path: Path) -> None:
    store, (_old, _new) = filled(tmp_path, a=2)

    def collect_meanwhile(rootfs: Path, _report: Callable[[str], None]) -> None:
        assert store.collect(()) == ()
        assert rootfs.exists()

    store.build("a", lambda _line: None, collect_meanwhile)
    assert len(store.list()) == 3


def test_one_that_can_not_be_removed_does_not_keep_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _images = filled(tmp_path, a=2, b=2)
    remove = tree.remove

    def fail_first(path: Path) -> None:
        if path.parent.name == "a":
            raise ImageError("mounts in it")
        remove(path)

    monkeypatch.setattr(tree, "remove", fail_first)
    with pytest.raises(ImageError, match="mounts in it"):
        store.collect(())
    assert [image.name for image in store.list()] == ["a", "b"]


def test_nothing_is_made_by_a_collection(tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "images", {})
    assert store.collect(()) == ()
    assert not store.directory.exists()
