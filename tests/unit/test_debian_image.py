"""Debian images by a stand-in for mmdebstrap: what it is told, what is made of its tree, and that nothing survives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lxc_pool.errors import ImageError
from lxc_pool.images import debian, init, program
from lxc_pool.images.debian import Recipe
from lxc_pool.images.store import ImageStore
from lxc_pool.progress import Milestone
from tests.support.waiting import eventually

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it makes mounts of its own")

ROOT = Path(__file__).parents[2]

SOURCES = """\
Created-By: Packages
Component: main
Release: bookworm
Repo-URI: http://mirror/debian/
Sourcesentry: {file}:1

Created-By: Packages
Component: contrib
Release: bookworm
Repo-URI: http://mirror/debian/
Sourcesentry: {file}:1

Created-By: Translations
Component: main
Release: bookworm
Repo-URI: http://mirror/debian/

Created-By: Packages
Component: main
Release: bookworm-security
Repo-URI: http://security/debian-security/
Sourcesentry: {file}:2

Created-By: Packages
Component: main
Release: nodistro
Repo-URI: http://third/party/

Created-By: Packages
Release: ./
Repo-URI: http://flat/
"""

DEB822 = """\
# a comment
Types: deb
URIs: http://mirror/debian
Suites: bookworm
Signed-By: /usr/share/keyrings/debian.gpg

Types: deb
URIs: http://security/debian-security
Suites: bookworm-security
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 mQ==
 -----END PGP PUBLIC KEY BLOCK-----
"""

FAKE = """\
#!/bin/bash
# the root is the argument after the suite
{before}
while [ "$1" != -- ]; do
    case $1 in --setup-hook=*) hook=${{1#*=}} ;; --include=*) include=$1 ;; esac
    shift
done
root=$3
mkdir -p "$root"/etc/apt/apt.conf.d "$root"/etc/systemd/system "$root"/usr/lib/systemd "$root"/usr/sbin "$root"/dev
sh -c "$hook" hook "$root"
printf '%s\\n' "$include" "$2" "$4" >"$root/etc/arguments"
[ -z "$4" ] || [ ! -f "$4" ] || cat "$4" >"$root/etc/sources"
cp "$root/etc/apt/apt.conf.d/00lxc-pool" "$root/etc/seen"
mknod "$root/dev/null" c 1 3
echo host >"$root/etc/hostname"
ln -s /lxc-pool-evil "$root/etc/resolv.conf"
echo 1234 >"$root/etc/machine-id"
printf '#!/bin/sh\\n' >"$root/usr/lib/systemd/systemd"
chmod 755 "$root/usr/lib/systemd/systemd"
ln -s usr/sbin "$root/sbin"
ln -s ../lib/systemd/systemd "$root/usr/sbin/init"
touch "$TMPDIR/left"
echo "I: downloading packages with apt..." >&2
echo "I: running --setup-hook in shell: x" >&2
mount -t tmpfs fake "$root/dev"
{after}
umount "$root/dev"
"""


def apt(answers: dict[str, str]) -> object:
    def run(*argv: str) -> str:
        return next(answer for words, answer in answers.items() if words in " ".join(argv))

    return run


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory on PATH for a stand-in, and a host whose apt says what the tests want."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    stand_in(directory)
    sources = tmp_path / "debian.sources"
    sources.write_text(DEB822)
    answers = {
        "apt-config dump": 'APT::Architecture "amd64";\nAcquire::http::Proxy "http://proxy:3128";\n',
        "apt-config shell": "netrc='/etc/apt/secret.conf'\n",
        "indextargets": SOURCES.format(file=sources),
    }
    monkeypatch.setattr(debian, "_apt", apt(answers))
    monkeypatch.setattr(debian, "host_suite", lambda: "bookworm")
    yield directory
    assert not Path("/lxc-pool-evil").exists()


def stand_in(directory: Path, before: str = "", after: str = "") -> None:
    (directory / "mmdebstrap").write_text(FAKE.format(before=before, after=after))
    (directory / "mmdebstrap").chmod(0o755)


def test_mmdebstrap_is_told_what_to_install_and_from_where(fake: Path, tmp_path: Path) -> None:
    del fake
    lines: list[str] = []
    recipe = Recipe(include=("nginx", "dbus"))
    image = ImageStore(tmp_path / "images").build("debian", lines.append, recipe.build)
    include, suite, mirror = (image.rootfs / "etc/arguments").read_text().splitlines()
    assert include == f"--include={','.join(debian.PACKAGES)},nginx"
    assert suite == "bookworm"
    assert mirror.endswith("/host.sources")
    assert lines[1:3] == ["downloading packages with apt", "preparing it for containers"]


def test_the_hosts_apt_decides_how_mirrors_are_reached(fake: Path, tmp_path: Path) -> None:
    del fake
    image = ImageStore(tmp_path / "images").build("debian", lambda _line: None, Recipe().build)
    assert (image.rootfs / "etc/seen").read_text().splitlines() == [
        'Acquire::http::Proxy "http://proxy:3128";',
        'Dir::Etc::netrc "/etc/apt/secret.conf";',
        'Dir::Etc::netrcparts "/etc/apt/auth.conf.d";',
    ]
    assert (image.rootfs / "etc/sources").read_text() == (
        "Types: deb\nURIs: http://mirror/debian/\nSuites: bookworm\nComponents: main contrib\n"
        "Signed-By: /usr/share/keyrings/debian.gpg\n\n"
        "Types: deb\nURIs: http://security/debian-security/\nSuites: bookworm-security\nComponents: main\n"
        "Signed-By: \n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n mQ==\n -----END PGP PUBLIC KEY BLOCK-----\n"
    )


@pytest.mark.parametrize(
    ("suite", "expected"),
    [("trixie", ["Suites: trixie", "Suites: trixie-security"]), ("sid", ["Suites: sid"])],
)
def test_another_suite_comes_from_the_same_mirror(fake: Path, tmp_path: Path, suite: str, expected: list[str]) -> None:
    del fake
    text = debian.host_sources(suite, tmp_path)
    assert [line for line in text.splitlines() if line.startswith("Suites")] == expected
    assert "third" not in text


def test_a_host_without_such_sources_leaves_it_to_mmdebstrap(
    fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del fake
    monkeypatch.setattr(debian, "host_suite", lambda: None)
    image = ImageStore(tmp_path / "images").build("debian", lambda _line: None, Recipe().build)
    assert (image.rootfs / "etc/arguments").read_text().splitlines()[1:] == ["stable", ""]
    assert debian.host_sources("stable", tmp_path) == ""


def test_a_mirror_that_is_given_is_the_only_one(fake: Path, tmp_path: Path) -> None:
    del fake
    recipe = Recipe(suite="trixie", mirror="http://other/debian")
    image = ImageStore(tmp_path / "images").build("debian", lambda _line: None, recipe.build)
    assert (image.rootfs / "etc/arguments").read_text().splitlines()[1:] == ["trixie", "http://other/debian"]
    assert not (image.rootfs / "etc/sources").exists()


def test_options_of_a_source_in_one_line_are_read_too(tmp_path: Path) -> None:
    file = tmp_path / "x.list"
    file.write_text("# a comment\ndeb [arch=amd64 Signed-By=/key.gpg trusted=yes] http://mirror/debian sid main\n")
    assert debian._trust(f"{file}:2") == {"signed-by": "/key.gpg", "trusted": "yes"}
    for nothing in (f"{file}:1", f"{file}:9", f"{file}:x", "/nonexistent:1", ""):
        assert debian._trust(nothing) == {}


def test_the_hosts_release_is_known_if_it_is_debians(tmp_path: Path) -> None:
    file = tmp_path / "os-release"
    for text, expected in (
        ('ID=debian\nVERSION_CODENAME="trixie"\n', "trixie"),
        ("ID=ubuntu\nVERSION_CODENAME=noble\n", None),
        ("ID=debian\n", None),
        ("ID=debian\nVERSION_CODENAME=-x\n", None),
    ):
        file.write_text(text)
        assert debian.host_suite(file) == expected
    assert debian.host_suite(tmp_path / "nothing") is None


def test_the_tree_is_made_fit_for_containers(fake: Path, tmp_path: Path) -> None:
    del fake
    image = ImageStore(tmp_path / "images").build("debian", lambda _line: None, Recipe().build)
    assert os.listdir(image.rootfs / "dev") == []
    assert not (image.rootfs / "etc/hostname").exists()
    assert not (image.rootfs / "etc/resolv.conf").is_symlink()
    assert (image.rootfs / "etc/resolv.conf").read_text() == ""
    assert (image.rootfs / "etc/machine-id").read_text() == ""
    assert os.readlink(image.rootfs / "etc/systemd/system/apt-daily.timer") == "/dev/null"
    assert image.probe == init.SYSTEMD_PROBE
    assert sorted(os.listdir(image.rootfs.parent)) == ["manifest.json", "rootfs"]


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(suite="--x"),
        Recipe(suite="../x"),
        Recipe(suite=""),
        Recipe(include=("--x",)),
        Recipe(include=("a b",)),
        Recipe(include=("./x.deb",)),
        Recipe(include=("?x",)),
        Recipe(mirror="/etc/passwd"),
        Recipe(mirror="-"),
        Recipe(mirror="http://a/b c"),
    ],
)
def test_words_that_other_programs_would_misunderstand_are_refused(recipe: Recipe) -> None:
    with pytest.raises(ValueError, match="not "):
        recipe.check()


def test_usual_words_are_fine() -> None:
    Recipe("bookworm", ("nginx", "g++", "libc6:i386", "x=1.2-3~4", "x/sid"), "https://host:80/debian").check()


def test_without_mmdebstrap_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "_path", lambda: str(tmp_path))
    with pytest.raises(ImageError, match="apt-get install mmdebstrap"):
        ImageStore(tmp_path / "images").build("debian", lambda _line: None, Recipe().build)


def test_each_step_is_told_with_how_far_it_is_and_packages_are_counted(tmp_path: Path) -> None:
    archives, log = tmp_path / "var/cache/apt/archives", tmp_path / "var/log/dpkg.log"
    said: list[str] = []
    steps = debian._Steps(tmp_path, said.append)
    steps.look()
    steps.heard("I: downloading packages with apt...")
    steps.look()
    for directory in (archives, log.parent):
        directory.mkdir(parents=True)
    log.write_text("2026-11-24 20:00:00 install of-the-step-before:all <none> 1\n")
    steps.heard("I: installing remaining packages inside the chroot...")
    for fetched in (4, 11, 20):
        for number in range(fetched):
            (archives / f"{number}.deb").touch()
        (archives / "lock").touch()
        steps.look()
    with log.open("a") as file:
        for action in (*["install"] * 20, *["configure"] * 10):
            file.write(f"2026-11-24 20:00:01 {action} a:amd64 1 1\n2026-11-24 20:00:01 status {action}ed a:amd64 1\n")
    (archives / "0.deb").unlink()  # as apt does with what it has installed
    steps.heard("a line of apt's")
    steps.look()
    steps.look()
    steps.heard("I: something that nobody knows")
    assert [(str(line), line.done) for line in said if isinstance(line, Milestone)] == [
        ("downloading packages with apt", 0.06),
        ("installing remaining packages inside the chroot", 0.64),
        ("installing remaining packages inside the chroot: 11 packages fetched", 0.64),
        (
            "installing remaining packages inside the chroot: 20 of 20 packages unpacked, 10 configured",
            pytest.approx(0.88),
        ),
        ("something that nobody knows", pytest.approx(0.88)),
    ]


def test_a_failure_is_told_in_mmdebstraps_words_and_leaves_nothing(fake: Path, tmp_path: Path) -> None:
    stand_in(fake, after='echo "E: no network" >&2; exit 25')
    store = ImageStore(tmp_path / "images")
    with pytest.raises(ImageError, match=r"mmdebstrap failed with exit status 25: .*E: no network"):
        store.build("debian", lambda _line: None, Recipe().build)
    assert list(store.directory.glob("debian/*")) == []
    assert "tmpfs fake" not in Path("/proc/self/mountinfo").read_text()


def test_a_full_disk_ends_the_program_and_leaves_nothing(
    fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(fake, after="sleep 60")
    looks = iter([1, 1])

    def check_room(_directory: Path) -> int:
        if next(looks, 0):
            return 1
        raise ImageError("the disk is full")

    monkeypatch.setattr(program, "check_room", check_room)
    monkeypatch.setattr(program, "_LOOK_PAUSE", 0.05)
    monkeypatch.setattr(debian, "finish", pytest.fail)
    store = ImageStore(tmp_path / "images")
    with pytest.raises(ImageError, match="the disk is full"):
        store.build("debian", lambda _line: None, Recipe().build)
    assert list(store.directory.glob("debian/*")) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_build_leaves_no_process_and_no_mount(
    fake: Path, tmp_path: Path, number: signal.Signals
) -> None:
    stand_in(fake, before='echo "$LXC_POOL_MARK" >/dev/null', after='touch "$LXC_POOL_MARK"; sleep 61.25 & sleep 61.25')
    mark = tmp_path / "mark"
    state = tmp_path / "state"
    # A killed process leaves coverage a broken data file.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    command = [sys.executable, "-m", "lxc_pool", "image", "build", "debian", "--mirror", "http://none/debian"]
    with subprocess.Popen(
        [*command, "--state-dir", state],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
        env=environment | {"LXC_POOL_MARK": str(mark)},
    ) as build:
        eventually(mark.exists, "mmdebstrap has begun")
        build.send_signal(number)
        build.wait(20)
    assert build.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
    eventually(lambda: not running(state), "all of it has ended")
    assert str(state) not in Path("/proc/self/mountinfo").read_text()
    left = list((state / "images").glob("debian/*"))
    assert len(left) == (1 if number is signal.SIGKILL else 0)
    store = ImageStore(state / "images")
    assert store.list() == ()
    assert list(store.sweep()) == left
    assert list((state / "images").glob("debian/*")) == []


def running(state: Path) -> list[str]:
    """Return the processes that know of *state*."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                seen = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
            except OSError:
                continue
            if os.fsencode(state.parent) in seen and b"pytest" not in seen.split(b"\0")[0]:
                found.append(seen[:200].decode(errors="replace"))
    return found


def test_a_program_whose_parent_has_ended_already_does_nothing(tmp_path: Path) -> None:
    leash = [*program._LEASHED, "999999999", "touch", str(tmp_path / "x")]
    assert subprocess.run(leash, check=False).returncode == 1
    assert not (tmp_path / "x").exists()


def test_what_a_program_says_is_cut_into_printable_lines(tmp_path: Path) -> None:
    heard: list[str] = []
    began = time.monotonic()
    program.run(["printf", r"one\rtwo\n\033[31mthree\nfour"], room=tmp_path, heard=heard.append)
    assert heard == ["one", "two", "[31mthree", "four"]
    assert time.monotonic() - began < 10
