"""Commands about base images: image ls, build, import, verify, rm.

What needs the `server` extra is imported where it is used: the program is the clients' too.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

from lxc_pool.cli.options import add_state_dir
from lxc_pool.cli.output import Progress, print_json, print_table
from lxc_pool.errors import ConfigError, ImageError, LxcPoolError
from lxc_pool.progress import Milestone, Milestones

if TYPE_CHECKING:
    from lxc_pool import PoolServiceProxy
    from lxc_pool.images.store import Image, ImageStore


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser], common: argparse.ArgumentParser) -> None:
    """Add the commands to the parser."""
    images = commands.add_parser("image", help="list, build, import, verify and remove base images").add_subparsers(
        dest="image_command", metavar="COMMAND", required=True
    )

    def add(name: str, function: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        parser = images.add_parser(name, parents=[common], help=text)
        add_state_dir(parser)
        parser.set_defaults(function=function)
        return parser

    add("ls", _ls, "list every version of every image")
    parser = add("build", _build, "build a new version of an image")
    parser.add_argument("kind", metavar="KIND", help="busybox, or debian (which takes a mirror and a minute)")
    parser.add_argument("--name", metavar="NAME", help="what to call it (default: KIND)")
    debian = parser.add_argument_group("debian only")
    debian.add_argument("--suite", metavar="S", help="the release (default: the host's if that is Debian, else stable)")
    debian.add_argument(
        "--include", metavar="PKG", nargs="+", action="extend", default=[], help="packages to install as well"
    )
    debian.add_argument("--mirror", metavar="URL", help="where from (default: what the host's apt uses)")
    parser = add("import", _import, "make a new version of an image from a directory, an archive or an OCI image")
    parser.add_argument("name", metavar="NAME", help="what to call it")
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a directory; a tar archive, also .gz, .zst, .xz; an OCI layout; an archive of `docker save`; "
        "after the last two may come :TAG",
    )
    parser = add("verify", _verify, "check that images are what was built")
    parser.add_argument("images", metavar="NAME[:VERSION]", nargs="*", help="which (default: all)")
    parser = add("rm", _rm, "remove an image that nobody uses: one version, or all")
    parser.add_argument("image", metavar="NAME[:VERSION]", help="which")


def _ls(arguments: argparse.Namespace) -> int:
    images = _store(arguments).list()
    if arguments.json:
        print_json([_as_dict(image) for image in images])
        return 0
    print_table(
        ("name", "version", "MiB", "created", "verified", "made of"),
        [
            (
                image.name,
                image.version,
                f"{image.size / 2**20:.1f}",
                _date(image.created),
                _verified(image),
                image.origin or None,
            )
            for image in images
        ],
    )
    return 0


def _date(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))


def _verified(image: Image) -> str | None:
    """Return when an image was last found to be what was made, or that it is not."""
    from lxc_pool.images.manifest import last_verification

    last = last_verification(image)
    return None if last is None else "HAS CHANGED" if last.problem else _date(last.time)


def _build(arguments: argparse.Namespace) -> int:
    from lxc_pool.images.debian import Recipe

    packages = tuple(package for words in arguments.include for package in words.replace(",", " ").split())
    recipe = Recipe(arguments.suite, packages, arguments.mirror)
    name = arguments.name or arguments.kind
    if arguments.kind == "debian":
        recipe.check()
        words = ["Debian", arguments.suite or "", f"with {' '.join(packages)}" if packages else ""]
        return _make(arguments, name, recipe.build, " ".join(filter(None, words)))
    if recipe != Recipe():
        raise ConfigError("--suite, --include and --mirror are for `image build debian` only")
    if name != arguments.kind:
        raise ConfigError(f"only a Debian image may have another name; this one is {arguments.kind}")
    return _make(arguments, name, None, "")


def _import(arguments: argparse.Namespace) -> int:
    from lxc_pool.images import imports

    return _make(arguments, arguments.name, imports.builder(arguments.source), f"import of {arguments.source}")


def _make(arguments: argparse.Namespace, name: str, builder: Any, origin: str) -> int:
    with _progress(arguments) as progress, _ended_in_order():
        image = _store(arguments).build(name, progress.show, builder, origin)
    _tell_service(arguments)
    if arguments.json:
        print_json(_as_dict(image))
    else:
        print(image.ref)
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from lxc_pool.images.store import verify

    store = _store(arguments)
    images = [image for reference in arguments.images for image in store.find(reference)]
    results: list[tuple[Image, str | None]] = []
    with _progress(arguments) as progress:
        images = images if arguments.images else list(store.list())
        everything = sum(image.size for image in images) or 1
        for number, image in enumerate(images):
            before = sum(other.size for other in images[:number])
            milestones = Milestones()

            def show(read: int, image: Image = image, before: int = before, due: Milestones = milestones) -> None:
                if not read or due.is_due(read / everything):
                    progress.show(Milestone(f"verifying {image.ref}", (before + read) / everything))

            show(0)
            try:
                verify(image, show)
                results.append((image, None))
            except ImageError as error:
                if image.rootfs.parent.exists():
                    results.append((image, str(error)))
                else:  # replaced by a newer version, most likely: the service removes those
                    progress.show(f"{image.ref} was removed meanwhile")
    if arguments.json:
        print_json([{"name": i.name, "version": i.version, "ok": not wrong, "problem": wrong} for i, wrong in results])
    else:
        for image, wrong in results:
            print(wrong or f"{image.ref}: unchanged since it was made")
    return 1 if any(wrong for _, wrong in results) else 0


def _rm(arguments: argparse.Namespace) -> int:
    removed = _store(arguments).remove(arguments.image, lambda: _in_use(arguments))
    if arguments.json:
        print_json([_as_dict(image) for image in removed])
    else:
        for image in removed:
            print(image.ref)
    return 0


def _in_use(arguments: argparse.Namespace) -> set[str]:
    """Return what the state dir's containers are cloned from, and what its service makes new ones of.

    Raises:
        ImageError: A service runs that can't be asked.
    """
    from lxc_pool.service import ledger
    from lxc_pool.service.directories import running_service

    state_dir = arguments.state_dir.absolute()
    used = {entry.image for entry in ledger.read(state_dir / "ledger.db")}
    if (pid := running_service(state_dir)) is not None:
        with _service(arguments, pid) as pool:
            used |= {profile.image for profile in pool.status().profiles.values() if profile.image}
    return used


def _tell_service(arguments: argparse.Namespace) -> None:
    """Let the service that makes containers of the store's images, if one runs, know that there is a new version."""
    from lxc_pool.service.directories import running_service

    if (pid := running_service(arguments.state_dir.absolute())) is None:
        return
    try:
        with _service(arguments, pid) as pool:
            pool.look_for_images()
    except LxcPoolError as error:
        print(f"{error}; it takes the new version once it gets SIGHUP (`kill -HUP {pid}`)", file=sys.stderr)


@contextlib.contextmanager
def _service(arguments: argparse.Namespace, pid: int) -> Iterator[PoolServiceProxy]:
    """Connect to the service *pid*, which has the state dir; 0: its pid is not known.

    Raises:
        ImageError: It does not answer in the host dir.
    """
    from lxc_pool import PoolManager

    with contextlib.ExitStack() as stack:
        try:
            pool = stack.enter_context(PoolManager.connect(arguments.host_dir, timeout=2.0))
            answering = pool.status().pid
        except LxcPoolError as error:
            raise ImageError(f"the service with pid {pid} can't be asked: {error}") from error
        if pid not in (0, answering):
            raise ImageError(f"{arguments.state_dir} is used by the service with pid {pid}: give its --host-dir, too")
        yield pool


def _store(arguments: argparse.Namespace) -> ImageStore:
    from lxc_pool.images.store import ImageStore

    return ImageStore(arguments.state_dir.absolute() / "images")


@contextlib.contextmanager
def _ended_in_order() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end us as Ctrl-C does: what has been made so far is removed."""

    def end(number: int, _frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _progress(arguments: argparse.Namespace) -> Iterator[Progress]:
    progress = Progress(quiet=arguments.json)
    try:
        yield progress
    finally:
        progress.end()


def _as_dict(image: Image) -> dict[str, object]:
    from lxc_pool.images.manifest import last_verification

    last = last_verification(image)
    return {
        "name": image.name,
        "version": image.version,
        "size": image.size,
        "created": image.created,
        "checksum": image.checksum,
        "rootfs": str(image.rootfs),
        "origin": image.origin,
        "probe": list(image.probe),
        "verified": last and last.time,
        "problem": last and last.problem,
    }
