"""The service's key: new each time, or the one in a file that nobody else has a hand in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lxc_pool.errors import ConfigError
from lxc_pool.service import authkey
from tests.support.processes import NOBODY


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_bytes(bytes(range(32)))
    path.chmod(0o600)
    return path


def test_a_new_key_has_32_bytes_that_no_other_has() -> None:
    assert len({authkey.new() for _ in range(100)}) == 100
    assert len(authkey.new()) == authkey.LENGTH == 32


def test_a_configured_one_is_what_the_file_holds(file: Path) -> None:
    assert authkey.read(file) == bytes(range(32))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_file_that_others_may_read_or_write_is_refused_with_the_remedy(file: Path, mode: int) -> None:
    file.chmod(mode)
    with pytest.raises(ConfigError, match=f"mode {mode:04o}.*chmod 0600"):
        authkey.read(file)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give it to another")
def test_another_users_file_is_refused(file: Path) -> None:
    os.chown(file, NOBODY, NOBODY)
    with pytest.raises(ConfigError, match=f"uid {NOBODY}"):
        authkey.read(file)


@pytest.mark.parametrize("length", [0, 31, 4097])
def test_a_key_of_a_wrong_length_is_refused_with_the_remedy(file: Path, length: int) -> None:
    file.write_bytes(bytes(length))
    with pytest.raises(ConfigError, match="head -c 32 /dev/urandom"):
        authkey.read(file)


def test_what_is_no_file_is_refused(tmp_path: Path, file: Path) -> None:
    (tmp_path / "link").symlink_to(file)
    os.mkfifo(tmp_path / "fifo", 0o600)
    for name, words in (("none", "can't be opened"), ("link", "can't be opened"), ("fifo", "not a regular file")):
        with pytest.raises(ConfigError, match=words):
            authkey.read(tmp_path / name)
