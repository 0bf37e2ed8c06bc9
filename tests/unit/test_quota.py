"""Project quotas, where there are none; where there are, see `tests/security/test_quota`."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from lxc_pool.backend.lxc import layers
from lxc_pool.host import quota
from lxc_pool.host.quota import Quota


def test_a_file_system_without_projects_enforces_nothing() -> None:
    descriptor = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
    try:
        assert not quota.enforced(descriptor)
        with pytest.raises(OSError, match="quotactl") as caught:
            quota.limit(descriptor, 1, 1, 1)
        assert caught.value.errno in (errno.ENOSYS, errno.EPERM)
    finally:
        os.close(descriptor)


def test_a_layer_is_on_a_tmpfs_where_nothing_is_enforced() -> None:
    assert layers.bound(Path("/proc")) == ("tmpfs", "no project quotas are enforced there")
    assert layers.bound(Path("/nonexistent"))[0] == "tmpfs"
    assert not layers.in_use(Path("/proc"), 1)


def test_ids_that_the_administrator_has_given_away_are_known(tmp_path: Path) -> None:
    names, paths = tmp_path / "projid", tmp_path / "projects"
    assert list(quota.named(names, paths)) == []
    names.write_text("# name:id\nweb:42\nbroken\nmail:x\n\nshop:1879048192 # theirs\n")
    paths.write_text("42:/srv/web\n7:/srv/mail:with a colon\n#8:/srv/none\n")
    assert set(quota.named(names, paths)) == {42, 1879048192, 7}


@pytest.mark.parametrize(
    ("record", "blank"),
    [(Quota(0, 0, 0, 0), True), (Quota(1, 0, 0, 0), False), (Quota(0, 1, 0, 0), False), (Quota(0, 0, 0, 1), False)],
)
def test_a_project_with_limits_or_files_is_somebodys(record: Quota, blank: bool) -> None:
    assert record.blank == blank
