"""The commands about images, without containers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lxc_pool import errors
from lxc_pool.cli.main import main
from lxc_pool.cli.output import Progress
from lxc_pool.images import debian, tree
from lxc_pool.images.store import ImageStore
from lxc_pool.model import State
from lxc_pool.service import directories
from lxc_pool.service.ledger import Entry, Ledger

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: images keep their owners")


class Commands:
    """Runs `lxc-pool image …` on a state dir of its own."""

    def __init__(self, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.state_dir = path / "state"
        self.store = ImageStore(self.state_dir / "images")
        self.out = self.err = ""
        self._capsys = capsys

    def run(self, *arguments: object) -> int:
        status = main(["image", *map(str, arguments), "--state-dir", str(self.state_dir)])
        self.out, self.err = self._capsys.readouterr()
        return status

    def json(self, *arguments: object) -> Any:
        assert self.run(*arguments, "--json") == 0, self.err
        assert self.err == ""
        return json.loads(self.out)


@pytest.fixture
def image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Commands:
    return Commands(tmp_path, capsys)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root/sbin").mkdir(parents=True)
    (tmp_path / "root/sbin/init").write_text("#!/bin/sh\n")
    (tmp_path / "root/sbin/init").chmod(0o755)
    return tmp_path / "root"


def test_an_import_is_listed_verified_and_removed(image: Commands, root: Path) -> None:
    made = image.json("import", "mine", root)
    assert made["origin"] == f"import of {root}"
    assert image.json("ls") == [made]
    assert image.run("ls") == 0
    assert image.out.splitlines()[1].split()[:2] == ["mine", made["version"]]
    assert image.run("verify") == 0
    assert "unchanged" in image.out
    assert image.run("rm", f"mine:{made['version']}") == 0
    assert image.out.strip() == f"mine:{made['version']}"
    assert image.json("ls") == []
    assert list((image.state_dir / "images/mine").iterdir()) == []


def test_a_changed_image_is_found_out(image: Commands, root: Path) -> None:
    made = image.json("import", "mine", root)
    image.json("import", "other", root)
    (Path(made["rootfs"]) / "sbin/init").write_text("#!/bin/evil\n")
    assert image.run("verify") == 1
    assert "has changed" in image.out
    assert image.run("verify", "other") == 0
    assert image.run("verify", "mine", "--json") == 1
    assert [each["ok"] for each in json.loads(image.out)] == [False]


def test_a_verification_tells_how_far_it_is_within_an_image_too(
    image: Commands, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(40):
        (root / f"file{number}").write_bytes(bytes(1000))
    refs = [f"{made['name']}:{made['version']}" for made in (image.json("import", name, root) for name in ("a", "b"))]
    shown: list[tuple[str, float]] = []
    monkeypatch.setattr(Progress, "show", lambda _self, line: shown.append((line, line.done)))
    assert image.run("verify") == 0
    assert shown == sorted(shown)
    for ref, begin in zip(refs, (0.0, 0.5), strict=True):
        told = [done for line, done in shown if line == f"verifying {ref}"]
        assert len(told) >= 8
        assert told[0] == pytest.approx(begin, abs=0.01)
        assert told[-1] == pytest.approx(begin + 0.5, abs=0.07)


def test_what_is_removed_during_a_verification_is_no_changed_image(
    image: Commands, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = image.json("import", "mine", root), image.json("import", "mine", root)
    measure = tree.measure

    def remove_the_old_and_measure(*arguments: Any) -> tree.Measure:
        image.store.collect(keep=())
        return measure(*arguments)

    monkeypatch.setattr(tree, "measure", remove_the_old_and_measure)
    assert image.run("verify") == 0
    assert f"mine:{old['version']} was removed meanwhile" in image.err
    assert image.out.splitlines() == [f"mine:{new['version']}: unchanged since it was made"]


def test_what_is_not_there_can_not_be_removed_or_verified(image: Commands, root: Path) -> None:
    version = image.json("import", "mine", root)["version"]
    for reference in ("yours", "mine:1", f"yours:{version}", "../mine", "mine:", ""):
        assert image.run("rm", reference) == 5, reference
        assert image.run("verify", reference) == 5, reference
    assert len(image.json("ls")) == 1


def test_a_name_stands_for_all_versions_and_all_go_or_none(image: Commands, root: Path) -> None:
    refs = [f"mine:{image.json('import', 'mine', root)['version']}" for _ in range(3)]
    ledger = Ledger(image.state_dir / "ledger.db")
    ledger.open()
    ledger.write(Entry("c1", "default", State.LEASED, 0.0, refs[1], "", None, None, None))
    try:
        assert image.run("rm", "mine") == 5
        assert f"{refs[1]}: in use" in image.err
        assert len(image.json("ls")) == 3
        assert image.run("rm", refs[1]) == 5
        assert image.run("rm", refs[2]) == 0
        ledger.erase("c1")
    finally:
        ledger.close()
    assert image.run("rm", "mine") == 0
    assert image.out.split() == refs[:2]


def test_beside_a_service_that_can_not_be_asked_nothing_is_removed(
    image: Commands, root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    image.json("import", "mine", root)
    monkeypatch.setattr(directories, "running_service", lambda _directory: 4711)

    def refuse(_host_dir: Path, timeout: float) -> None:  # noqa: ARG001  # as the real one has it
        raise errors.ServiceUnavailable("no service answers")

    monkeypatch.setattr("lxc_pool.PoolManager.connect", refuse)
    assert image.run("rm", "mine", "--host-dir", tmp_path / "none") == 5
    assert "the service with pid 4711 can't be asked" in image.err
    assert len(image.json("ls")) == 1


def test_a_debian_image_is_built_with_what_was_asked_for(image: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[debian.Recipe] = []

    def build(recipe: debian.Recipe, rootfs: Path, _report: Callable[[str], None]) -> None:
        seen.append(recipe)
        (rootfs / "x").touch()

    monkeypatch.setattr(debian.Recipe, "build", build)
    made = image.json("build", "debian", "--suite", "sid", "--include", "a,b", "c", "--include", "d", "--name", "web")
    assert made["name"] == "web"
    assert made["origin"] == "Debian sid with a b c d"
    assert image.json("build", "debian", "--mirror", "http://m/debian")["name"] == "debian"
    assert seen == [debian.Recipe("sid", ("a", "b", "c", "d")), debian.Recipe(mirror="http://m/debian")]


@pytest.mark.parametrize(
    "arguments",
    [
        ("build", "busybox", "--suite", "sid"),
        ("build", "busybox", "--include", "nginx"),
        ("build", "busybox", "--name", "other"),
        ("build", "debian", "--suite", "../x"),
        ("build", "debian", "--include", "./x.deb"),
        ("build", "debian", "--mirror", "none"),
    ],
)
def test_wrong_use_is_refused_before_anything_is_made(image: Commands, arguments: tuple[str, ...]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageStore, "build", pytest.fail)
        assert image.run(*arguments) == 2
    assert not image.state_dir.exists()


@pytest.mark.parametrize("source", ["/nonexistent", "/etc/hostname", "/dev/null"])
def test_what_is_no_image_is_an_error_of_its_own(image: Commands, source: str) -> None:
    assert image.run("import", "mine", source) == 5
    assert source in image.err
