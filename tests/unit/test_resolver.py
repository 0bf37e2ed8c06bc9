"""Writing a container's resolv.conf: whatever the image has in that place, no link of it is followed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lxc_pool.backend.lxc.resolver import write

EXPECTED = "nameserver 192.0.2.53\nnameserver 192.0.2.54\n"


def put(rootfs: Path) -> None:
    write(rootfs, os.getuid(), ("192.0.2.53", "192.0.2.54"))


def test_it_is_made_where_there_is_none_not_even_its_directory(tmp_path: Path) -> None:
    put(tmp_path)
    assert (tmp_path / "etc/resolv.conf").read_text() == EXPECTED
    assert (tmp_path / "etc/resolv.conf").stat().st_mode & 0o777 == 0o644
    assert os.listdir(tmp_path / "etc") == ["resolv.conf"]


@pytest.mark.parametrize("target", ["file", "dangling", "link to a file outside"])
def test_what_is_there_is_replaced_and_a_link_is_not_followed(tmp_path: Path, target: str) -> None:
    outside = tmp_path / "outside"
    outside.write_text("the host's")
    etc = tmp_path / "rootfs/etc"
    etc.mkdir(parents=True)
    match target:
        case "file":
            (etc / "resolv.conf").write_text("nameserver 127.0.0.1\n")
        case "dangling":
            (etc / "resolv.conf").symlink_to("../run/systemd/resolve/stub-resolv.conf")
        case _:
            (etc / "resolv.conf").symlink_to(outside)
    put(tmp_path / "rootfs")
    assert not (etc / "resolv.conf").is_symlink()
    assert (etc / "resolv.conf").read_text() == EXPECTED
    assert outside.read_text() == "the host's"


def test_an_image_whose_etc_leads_elsewhere_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "rootfs").mkdir()
    (tmp_path / "hosts-etc").mkdir()
    (tmp_path / "rootfs/etc").symlink_to(tmp_path / "hosts-etc")
    put(tmp_path / "rootfs")
    assert os.listdir(tmp_path / "hosts-etc") == []


def test_without_resolvers_it_is_empty(tmp_path: Path) -> None:
    write(tmp_path, os.getuid(), ())
    assert (tmp_path / "etc/resolv.conf").read_text() == ""
