"""Build a Debian image with mmdebstrap: minimal, booted by systemd, with what the host's apt is configured to use."""

from __future__ import annotations

import dataclasses
import io
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from lxc_pool.errors import ImageError
from lxc_pool.images import program, tree
from lxc_pool.images.builders import Report
from lxc_pool.images.unpack import Attributes, Unpacker
from lxc_pool.progress import Milestone, Milestones

PACKAGES = ("systemd-sysv", "dbus", "iproute2", "procps", "netbase", "ca-certificates", "libnss-myhostname")
"""Beside Debian's required ones: an init and its bus; ip, ps; names for localhost, protocols and the container."""

_MASKED = (
    # Kernel file systems that are the host's: mounting them fails in a user namespace, and the system is degraded.
    "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount",
    "sys-kernel-config.mount",
    "dev-hugepages.mount",
    "sys-fs-fuse-connections.mount",
    # They would hold apt's lock, or use the network, at a moment of their own choice.
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    # Nobody logs in on the console, which is there to be read.
    "console-getty.service",
    # For disks, of which a container has none.
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    "systemd-pstore.service",
)

_OS_RELEASE = Path("/etc/os-release")
_ALIASES = ("stable", "testing", "unstable", "sid", "oldstable")
"""What sources may call a suite by, beside its code name."""

_ROLLING = ("unstable", "sid", "experimental")
"""Suites without updates and security archives of their own."""

_SUFFIXES = ("", "-updates", "-security", "/updates")
_APT_TIMEOUT = 60.0
"""Seconds for apt to print its configuration, which takes 20 ms (measured)."""

_NOISE = re.compile(r"-hook in shell|received signal|finding correct|is equal to the host's|success in")
"""What mmdebstrap says that is no step of the build."""

_STEPS = {
    "running apt-get update": 0.0,
    "downloading packages": 0.06,
    "extracting archives": 0.1,
    "installing essential packages": 0.24,
    "installing remaining packages": 0.64,
    "cleaning": 0.96,
}
"""How much is done when mmdebstrap 1.3 says that it begins with this; measured."""

_FETCHED_STEP = 10
"""Packages that are fetched between two lines that say so."""

# Source: dpkg(1), --log: `DATE TIME install PACKAGE OLD NEW`, `DATE TIME configure PACKAGE VERSION VERSION`.
_UNPACKING = re.compile(rb"^\S+ \S+ install ", re.MULTILINE)
_CONFIGURING = re.compile(rb"^\S+ \S+ configure ", re.MULTILINE)

_SUITE = re.compile(r"[a-z][a-z0-9._-]*")
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.:~=/-]*")
_MIRROR = re.compile(r"[a-z][a-z0-9+.-]*:/[^\s\[\]]+")


@dataclasses.dataclass(frozen=True, slots=True)
class Recipe:
    """What kind of Debian to build.

    Attributes:
        suite: The release; None: the host's if that is Debian, else the stable one.
        include: Packages beside `PACKAGES`.
        mirror: Where from; None: from where the host's apt takes that suite, or else from mmdebstrap's default.
    """

    suite: str | None = None
    include: tuple[str, ...] = ()
    mirror: str | None = None

    def check(self) -> None:
        """Check the words that go on to other programs.

        Raises:
            ValueError: One is not what it should be.
        """
        if self.suite is not None and not _SUITE.fullmatch(self.suite):
            raise ValueError(f"a suite is a word like `bookworm`, not {self.suite!r}")
        if self.mirror is not None and not _MIRROR.fullmatch(self.mirror):
            raise ValueError(f"a mirror is a URL like `http://HOST/debian`, not {self.mirror!r}")
        for package in self.include:
            if not _PACKAGE.fullmatch(package):
                raise ValueError(f"a package is a name like `nginx`, not {package!r}")

    def build(self, rootfs: Path, report: Report) -> None:
        """Fill *rootfs*: a `Builder`.

        Raises:
            ImageError: mmdebstrap is missing, or failed.
            OSError: The disk fails.
        """
        program.need("mmdebstrap", "mmdebstrap", "building a Debian image")
        suite = self.suite or host_suite() or "stable"
        work = rootfs.with_name("work")
        work.mkdir(mode=0o755)
        try:
            self._bootstrap(suite, rootfs, work, report)
        finally:
            tree.remove(work)
        report(Milestone("preparing it for containers", 0.97))
        finish(rootfs)

    def _bootstrap(self, suite: str, rootfs: Path, work: Path, report: Report) -> None:
        configuration = work / "apt.conf"
        configuration.write_text(host_configuration(), encoding="utf-8")
        mirrors = [self.mirror] if self.mirror else []
        if not mirrors and (sources := host_sources(suite, work)):
            mirrors = [str(work / "host.sources")]
            Path(mirrors[0]).write_text(sources, encoding="utf-8")

        steps = _Steps(rootfs, report)

        program.run(
            [
                "mmdebstrap",
                "--mode=root",
                "--format=directory",
                "--variant=minbase",
                f"--include={','.join(dict.fromkeys((*PACKAGES, *self.include)))}",
                # For the time of the build only: it is this host's, and may hold secrets.
                '--setup-hook=cp "$LXC_POOL_APT_CONF" "$1/etc/apt/apt.conf.d/00lxc-pool"',
                '--customize-hook=rm "$1/etc/apt/apt.conf.d/00lxc-pool"',
                '--customize-hook=chroot "$1" useradd --create-home --shell /bin/bash --uid 1000 user',
                "--",
                suite,
                str(rootfs),
                *mirrors,
            ],
            room=work,
            heard=steps.heard,
            looked=steps.look,
            environment={
                "LXC_POOL_APT_CONF": str(configuration),
                "TMPDIR": str(work),
                "DEBIAN_FRONTEND": "noninteractive",
                "DEBCONF_NONINTERACTIVE_SEEN": "true",
            },
        )


class _Steps:
    """How far mmdebstrap is: which step it says that it begins with, and within that, what has become of the packages.

    They are fetched first, of which nobody knows the number until they are there; then dpkg unpacks them all, and
    configures them, which takes as long. Its log says how far it is.
    """

    def __init__(self, rootfs: Path, report: Report) -> None:
        self._rootfs = rootfs
        self._report = report
        self._words = "starting"
        self._begin, self._end, self._done = 0.0, 0.0, 0.0
        self._before, self._wanted = (0, 0), 0
        self._fetched = 0
        self._milestones = Milestones()

    def heard(self, line: str) -> None:
        """Take a line of mmdebstrap's."""
        if not line.startswith("I: ") or _NOISE.search(line):
            return
        self._words = line[3:].removesuffix("...")
        begin = next((done for step, done in _STEPS.items() if self._words.startswith(step)), None)
        if begin is not None:
            self._begin = self._done = begin
            self._end = min((done for done in _STEPS.values() if done > begin), default=begin)
            self._before, self._wanted = self._logged(), 0
            self._fetched = self._archives()
            self._milestones = Milestones()
        self._report(Milestone(self._words, self._done))

    def look(self) -> None:
        """Look at what is there by now."""
        fetched = self._archives()
        self._wanted = max(self._wanted, fetched)
        unpacked, configured = (now - before for now, before in zip(self._logged(), self._before, strict=True))
        part = (unpacked + configured) / (2 * self._wanted) if self._wanted else 0.0
        if self._end > self._begin and 0 < part <= 1:
            if self._milestones.is_due(part):
                self._done = self._begin + (self._end - self._begin) * part
                self._tell(f"{unpacked} of {self._wanted} packages unpacked, {configured} configured")
        elif fetched >= self._fetched + _FETCHED_STEP:
            self._fetched = fetched
            self._tell(f"{fetched} packages fetched")

    def _tell(self, words: str) -> None:
        self._report(Milestone(f"{self._words}: {words}", self._done))

    def _archives(self) -> int:
        """Return how many packages are there to be installed; 0 if there is no such directory."""
        try:
            names = os.listdir(self._rootfs / "var/cache/apt/archives")
        except OSError:
            return 0
        return sum(name.endswith(".deb") for name in names)

    def _logged(self) -> tuple[int, int]:
        """Return how many packages dpkg has begun to unpack, and to configure; none if there is no log."""
        try:
            log = (self._rootfs / "var/log/dpkg.log").read_bytes()
        except OSError:
            return 0, 0
        return len(_UNPACKING.findall(log)), len(_CONFIGURING.findall(log))


def host_suite(os_release: Path = _OS_RELEASE) -> str | None:
    """Return the code name of the host's release if it is Debian's; else None. Source: os-release(5)."""
    try:
        lines = os_release.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    fields = {key: value.strip("\"'") for key, _, value in (line.partition("=") for line in lines)}
    name = fields.get("VERSION_CODENAME", "")
    return name if fields.get("ID") == "debian" and _SUITE.fullmatch(name) else None


def host_configuration() -> str:
    """Return what the host's apt needs to reach its mirrors: proxies, certificates, passwords, tolerance of old dates.

    Raises:
        ImageError: apt does not say.
    """
    lines = [line for line in _apt("apt-config", "dump").splitlines() if line.startswith("Acquire::")]
    etc = _etc()
    # Below a Dir that is the image's, mmdebstrap's apt would not find them.
    lines += [
        f'Dir::Etc::netrc "{etc.get("netrc", "/etc/apt/auth.conf")}";',
        f'Dir::Etc::netrcparts "{etc.get("netrcparts", "/etc/apt/auth.conf.d")}";',
    ]
    return "\n".join(lines) + "\n"


def host_sources(suite: str, work: Path) -> str:
    """Return deb822 sources for *suite* from those of the host, empty if it has none that serve.

    Sources of the same suite are taken as they are. If there are none, those of the host's own suite are taken with the
    other suite's name: a Debian mirror has all of them.

    Args:
        suite: The suite that is wanted.
        work: A directory for files of the moment.

    Raises:
        ImageError: apt does not say.
    """
    lists = work / "lists"
    (lists / "partial").mkdir(parents=True)
    # Without lists, apt says what the sources say, and nothing that it has learnt from mirrors.
    text = _apt("apt-get", "-o", f"Dir::State::lists={lists}", "indextargets", "--no-release-info")
    targets = [target for target in _stanzas(text) if target.get("Created-By") == "Packages" and "Component" in target]
    own = host_suite()
    for bases in ((suite,), (own, *_ALIASES) if own else ()):
        if found := _of_suite(targets, suite, [base for base in bases if base]):
            return found
    return ""


def _of_suite(targets: list[dict[str, str]], suite: str, bases: list[str]) -> str:
    """Return stanzas for those of *targets* that are of one of the suites *bases*, as if they were of *suite*."""
    suffixes = {base + suffix: suffix for base in bases for suffix in _SUFFIXES}
    components: dict[tuple[str, str, str, str], dict[str, None]] = {}
    for target in targets:
        suffix = suffixes.get(target.get("Release", ""))
        if suffix is None or (suffix and suite in _ROLLING):
            continue
        trust = _trust(target.get("Sourcesentry", ""))
        key = (target.get("Repo-URI", ""), suite + suffix, trust.get("signed-by", ""), trust.get("trusted", ""))
        components.setdefault(key, {})[target["Component"]] = None
    if not any(release == suite and "main" in names for (_, release, _, _), names in components.items()):
        return ""  # a third party's repository, perhaps; no Debian can be built of that
    stanzas = []
    for (uri, release, signed_by, trusted), names in components.items():
        stanza = f"Types: deb\nURIs: {uri}\nSuites: {release}\nComponents: {' '.join(names)}\n"
        stanza += f"Signed-By: {signed_by}\n" if signed_by else ""
        stanza += f"Trusted: {trusted}\n" if trusted else ""
        stanzas.append(stanza)
    return "\n".join(stanzas)


def _trust(entry: str) -> dict[str, str]:
    """Return `signed-by` and `trusted` of a source, which apt-get's `indextargets` leaves out.

    Args:
        entry: `FILE:NUMBER`: the number of a line, or of a stanza in a deb822 file. Source: apt 2.6.1, measured.
    """
    file, _, number = entry.rpartition(":")
    try:
        text = Path(file).read_text(encoding="utf-8")
        if file.endswith(".sources"):
            fields = [stanza for stanza in _stanzas(text) if stanza][int(number) - 1]
            return {key.lower(): value for key, value in fields.items() if key.lower() in ("signed-by", "trusted")}
        options = re.search(r"\[([^]]*)\]", text.splitlines()[int(number) - 1])
        words = (word.partition("=") for word in (options[1].split() if options else ()))
        return {key.lower(): value for key, _, value in words if key.lower() in ("signed-by", "trusted")}
    except (OSError, ValueError, IndexError):
        return {}


def finish(rootfs: Path) -> None:
    """Make a fresh Debian tree fit to be cloned as a container: nothing of the host's, no devices, no machine id.

    Raises:
        ImageError: Something in it is not what Debian has.
        OSError: The disk fails.
    """
    for name in ("etc", "dev"):
        if not tree.is_directory(rootfs / name):
            raise ImageError(f"there is no directory /{name} in what mmdebstrap made")
    tree.remove(rootfs / "dev")  # liblxc mounts its own there
    (rootfs / "etc/hostname").unlink(missing_ok=True)  # the container's name comes from its configuration
    with Unpacker(rootfs) as writer:
        writer.directory(b"dev", Attributes(0o755))
        # The host's name server means nothing inside; what does, is written for each container.
        writer.file(b"etc/resolv.conf", Attributes(0o644), io.BytesIO(), 0)
        writer.file(b"etc/machine-id", Attributes(0o444), io.BytesIO(), 0)  # made at boot, each its own
        for unit in _MASKED:
            writer.symlink(b"etc/systemd/system/" + unit.encode(), b"/dev/null", Attributes(0o777))


def _etc() -> Mapping[str, str]:
    """Return apt's own places of files, by what they are for."""
    text = _apt("apt-config", "shell", "netrc", "Dir::Etc::netrc/f", "netrcparts", "Dir::Etc::netrcparts/d")
    return dict(re.findall(r"^(\w+)='(.*)'$", text, re.MULTILINE))


def _stanzas(text: str) -> Iterator[dict[str, str]]:
    """Take deb822 text apart; continuation lines stay in their values."""
    for paragraph in re.split(r"\n\s*\n", text):
        yield dict(re.findall(r"^([A-Za-z0-9-]+): *((?:.*)(?:\n[ \t].*)*)", paragraph, re.MULTILINE))


def _apt(*argv: str) -> str:
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True, timeout=_APT_TIMEOUT
        )
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", "") or "").strip()
        raise ImageError(f"{' '.join(argv)} failed: {error} {said}".strip()) from error
    return done.stdout
