"""The service's configuration: the keys of API.md, their defaults, and the reading of the TOML file."""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import re
import tomllib
from pathlib import Path

from lxc_pool.errors import ConfigError
from lxc_pool.table import Source, Table

DEFAULT_CONFIG = Path("/etc/lxc-pool.toml")
DEFAULT_HOST_DIR = Path("/run/lxc-pool")
DEFAULT_STATE_DIR = Path("/var/lib/lxc-pool")

MAX_LANES = 5
"""Lanes unless configured otherwise, however many CPUs there are. Origin: the ancestor's limit."""

MAX_SIZE = 1000
"""Warm containers of one pool at most. Origin: liblxc needs about 25 cgroup directories for each."""

REACHABLE = ("containers", "host", "metadata")
"""What containers on a bridge reach only if their profile says so: others whose profile says so too, the host's own
services, and the addresses where clouds tell a machine its credentials."""

_LONGEST_PREFIX, _SHORTEST_PREFIX = 29, 22
"""Of a subnet: at least five containers, and not more than a bridge has ports, 1024. Source: Linux
net/bridge/br_private.h, BR_PORT_BITS."""

_MOST_RESOLVERS = 3
"""Source: resolv.conf(5), MAXNS."""

_BRIDGE_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,14}")

_KERNELS_OWN = ("/proc", "/sys", "/dev")
"""What is mounted in each container anyhow, over whatever was there."""

_PROFILE_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")


@dataclasses.dataclass(frozen=True, slots=True)
class MountConfig:
    """A file or directory of the host's that each container of a profile has.

    Attributes:
        host_path: Where it is on the host: an absolute path.
        dst: Where it is in the container: as before; below none of another, and no link of the image's is in it.
        readonly: Whether it can be read only.
    """

    host_path: str
    dst: str
    readonly: bool


@dataclasses.dataclass(frozen=True, slots=True)
class ProfileConfig:
    """What one kind of container is made of.

    Attributes:
        size: Warm containers to keep at first.
        min: How few of them are left when they are not needed; None: as *size*.
        max: How many of them there may be after gets that found none; None: as *size*, but at least 1.
        privileged: Whether the container's root is the host's root, and not one of a user namespace of its own.
        no_new_privs: Whether no program in it may gain privileges by being executed: set-uid ones are then as others.
        memory: Bytes that it may use.
        pids: Processes that it may have.
        cpu: Its share of the CPUs when they are busy, as cpu.weight: 1 to 10000, 100 is usual.
        network: "empty": loopback alone; "bridge": an address of its own on the pool's bridge, see `NetworkConfig`.
        reach: What of `REACHABLE` it reaches over the bridge.
        disk: Bytes that it may write to its root file system; on a tmpfs, they are memory and count there too.
        mounts: What of the host each container has.
        allow: Users and, with `@` before them, groups that may have such containers; None: everybody who may use the
            service, but administrators alone if it is privileged.
        probe: A command that has to succeed inside before the container counts as warm; empty: that its init has
            been executed and is alive.
        probe_timeout: Seconds that it may take from the start of init on, beside `create_timeout`; None: what that
            leaves.
        env: Variables that commands, the probe included, find in their environment.
    """

    name: str
    size: int
    image: str = "busybox"
    network: str = "empty"
    probe: tuple[str, ...] = ()
    privileged: bool = False
    no_new_privs: bool = False
    memory: int = 1 << 30
    pids: int = 1000
    cpu: int = 100
    disk: int = 512 << 20
    allow: tuple[str, ...] | None = None
    reach: tuple[str, ...] = ()
    mounts: tuple[MountConfig, ...] = ()
    min: int | None = None
    max: int | None = None
    probe_timeout: float | None = None
    env: tuple[tuple[str, str], ...] = ()

    @property
    def bounds(self) -> tuple[int, int]:
        """The fewest and the most warm containers that there may be."""
        return (
            self.size if self.min is None else self.min,
            max(self.size, 1) if self.max is None else self.max,
        )

    @property
    def recipe(self) -> str:
        """What a container of this profile is made by, beside the image's version: equal recipes, equal containers."""
        made_by = dataclasses.replace(self, name="", size=0, min=None, max=None, allow=None, probe_timeout=None, env=())
        return repr(made_by)


@dataclasses.dataclass(frozen=True, slots=True)
class NetworkConfig:
    """The bridge that containers of profiles with `network = "bridge"` are on.

    Attributes:
        bridge: One that the host has; None: the service makes one of its own, and removes it.
        subnet: Where containers' addresses are from; None: one that is free on this host.
        nat: Whether what containers send to the outside comes from the host's address; None: on a bridge of the
            service's own.
        dns: The resolvers that containers are told; None: the host's.
    """

    bridge: str | None = None
    subnet: ipaddress.IPv4Network | None = None
    nat: bool | None = None
    dns: tuple[str, ...] | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Config:
    """A whole configuration, checked.

    Attributes:
        workers: Lanes, that is, creations and removals under way at once.
        max: Warm containers of all profiles together at most; None: as many as the profiles' own bounds allow.
        shrink_after: Seconds after which a place that was not needed all the while is given up.
        create_timeout: Seconds that a clone, start and probe may take together.
        image_timeout: Seconds that the building of an image may take.
        confirm_timeout: Seconds that a client may take to confirm a hand-off.
        min_free: Bytes that have to be free in the state dir for containers to be created.
        id_base: The first id that containers of this service may have on the host.
        max_keep: Seconds that a lease without an owner may last at most.
        group: The group that may use the service, if the host has it.
        users: Those of it that may; None: all.
        admins: Users who may administrate.
        key_file: A file with the key that clients are to have; None: a new one at each start.
        max_leases: Containers that one user may have or wait for at once; administrators: any number.
        max_waiters: Calls of one user that may wait at once; as before.
        max_connections: Connections that one user may have at once; as before.
        max_calls: Calls a second that are taken of one user; more have to wait. As before.
        source: Where it was read, for the errors of what turns out later.
    """

    profiles: tuple[ProfileConfig, ...]
    workers: int
    create_timeout: float = 30.0
    image_timeout: float = 600.0
    confirm_timeout: float = 5.0
    min_free: int = 256 << 20
    id_base: int = 0x70000000
    max_keep: float = 86400.0
    group: str = "lxc-pool"
    users: tuple[str, ...] | None = None
    admins: tuple[str, ...] = ("root",)
    key_file: Path | None = None
    max_leases: int = 100
    max_waiters: int = 100
    max_connections: int = 200
    max_calls: int = 2000
    network: NetworkConfig = NetworkConfig()
    max: int | None = None
    shrink_after: float = 300.0
    source: Source = dataclasses.field(default=Source(), compare=False, repr=False)

    @property
    def wants_bridge(self) -> bool:
        """Whether any profile's containers are on the bridge."""
        return any(profile.network == "bridge" for profile in self.profiles)

    @property
    def main(self) -> ProfileConfig:
        """The profile that `size` of the pool is about: the one called "default", or else the first."""
        return next((profile for profile in self.profiles if profile.name == "default"), self.profiles[0])

    def profile(self, name: str) -> ProfileConfig:
        """Return the profile called *name*.

        Raises:
            ValueError: There is none of that name.
        """
        for profile in self.profiles:
            if profile.name == name:
                return profile
        names = ", ".join(profile.name for profile in self.profiles)
        raise ValueError(f"unknown profile {name!r}; the service has: {names}")


def load(path: Path | None = None, *, size: int | None = None) -> Config:
    """Read the configuration.

    Args:
        path: The TOML file, which must exist; None for `/etc/lxc-pool.toml` if it exists, else the defaults.
        size: Overrides the size of the main profile, see `Config.main`, and its bounds where they are in the way.

    Raises:
        ConfigError: The file can't be read or parsed, has an unknown key, or a value that is not allowed.
    """
    if path is None:
        if not DEFAULT_CONFIG.exists():
            return parse("", origin="defaults", size=size)
        path = DEFAULT_CONFIG
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"can't read the configuration {path}: {error}") from error
    return parse(text, origin=str(path), size=size)


def parse(text: str, *, origin: str, size: int | None = None) -> Config:
    """Make a Config of TOML *text*; *origin* names it in errors. See `load`."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{origin}: not valid TOML: {error}") from error
    source = Source(origin, text)
    top = Table(document, source)
    top.only("pool", "access", "network", "profile")
    pool, access = top.table("pool"), top.table("access")
    pool.only(
        *("size", "workers", "max", "create_timeout", "image_timeout", "confirm_timeout", "shrink_after"),
        *("min_free", "id_base", "max_keep"),
    )
    access.only("group", "users", "admins", "key_file", "max_leases", "max_waiters", "max_connections", "max_calls")
    profiles = _profiles(top.table("profile"), pool, None if size is None else check_size(size))
    return Config(
        profiles=profiles,
        workers=pool.integer("workers", min(os.cpu_count() or 1, MAX_LANES), 1, 64),
        max=_total(pool, profiles),
        shrink_after=pool.seconds("shrink_after", 300.0),
        create_timeout=pool.seconds("create_timeout", 30.0),
        image_timeout=pool.seconds("image_timeout", 600.0),
        confirm_timeout=pool.seconds("confirm_timeout", 5.0),
        min_free=pool.size("min_free", 256 << 20, least=0),
        id_base=pool.integer("id_base", 0x70000000, 65536, 0x7FFF0000),
        max_keep=pool.seconds("max_keep", 86400.0),
        group=access.string("group", "lxc-pool"),
        users=access.strings("users") if "users" in access.values else None,
        admins=access.strings("admins") if "admins" in access.values else ("root",),
        key_file=access.path("key_file"),
        max_leases=access.integer("max_leases", 100, 1, 1_000_000),
        max_waiters=access.integer("max_waiters", 100, 1, 1_000_000),
        max_connections=access.integer("max_connections", 200, 1, 1_000_000),
        max_calls=access.integer("max_calls", 2000, 1, 1_000_000),
        network=_network(top.table("network")),
        source=source,
    )


def check_size(size: object) -> int:
    """Return *size* if a pool can have it.

    Raises:
        ConfigError: It is not an integer from 1 to 1000.
    """
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= MAX_SIZE:
        raise ConfigError(f"size must be an integer from 1 to {MAX_SIZE}, not {size!r}")
    return size


def _network(keys: Table) -> NetworkConfig:
    keys.only("bridge", "subnet", "nat", "dns")
    bridge = keys.string("bridge", "") if "bridge" in keys.values else None
    if bridge is not None and not _BRIDGE_NAME.fullmatch(bridge):
        raise keys.error("bridge", f"must be the name of a bridge, at most 15 of A-Z a-z 0-9 _ . -, not {bridge!r}")
    return NetworkConfig(
        bridge=bridge,
        subnet=_subnet(keys) if "subnet" in keys.values else None,
        nat=keys.boolean("nat") if "nat" in keys.values else None,
        dns=_resolvers(keys) if "dns" in keys.values else None,
    )


def _subnet(keys: Table) -> ipaddress.IPv4Network:
    text = keys.string("subnet", "")
    try:
        subnet = ipaddress.IPv4Network(text)
    except ValueError as error:
        raise keys.error("subnet", f'must be like "10.1.2.0/24", not {text!r}: {error}') from error
    if not _SHORTEST_PREFIX <= subnet.prefixlen <= _LONGEST_PREFIX:
        raise keys.error("subnet", f"must be a /{_SHORTEST_PREFIX} to a /{_LONGEST_PREFIX}, not a /{subnet.prefixlen}")
    if subnet.is_loopback or subnet.is_link_local or subnet.is_multicast or subnet.is_reserved:
        raise keys.error("subnet", f"must be of a private range (10/8, 172.16/12, 192.168/16), not {text!r}")
    return subnet


def _resolvers(keys: Table) -> tuple[str, ...]:
    resolvers = keys.strings("dns")
    if len(resolvers) > _MOST_RESOLVERS:
        raise keys.error("dns", f"must be at most {_MOST_RESOLVERS} addresses, not {len(resolvers)}")
    for text in resolvers:
        try:
            loopback = ipaddress.IPv4Address(text).is_loopback
        except ValueError as error:
            raise keys.error("dns", f"must be a list of IPv4 addresses, not {text!r}") from error
        if loopback:
            raise keys.error("dns", f"{text} would be the container itself: name a resolver that it can reach")
    return resolvers


def _profiles(table: Table, pool: Table, override: int | None) -> tuple[ProfileConfig, ...]:
    names = list(table.values) or ["default"]
    main = "default" if "default" in names else names[0]
    default_size = pool.integer("size", 5, 1, MAX_SIZE)
    profiles = []
    for name in names:
        if not _PROFILE_NAME.fullmatch(name):
            raise table.error(name, "a profile's name is 1 to 32 of a-z, 0-9, - and _")
        keys = table.table(name)
        keys.only(
            *("image", "size", "min", "max", "network", "probe", "probe_timeout", "env", "privileged", "no_new_privs"),
            *("memory", "pids", "cpu", "disk", "mounts", "allow", "reach"),
        )
        size, least, most = _sizes(
            keys, default_size if name == main else 1, given=name == main and "size" in pool.values
        )
        if override is not None and name == main:
            size = override
            least = None if least is None else min(least, override)
            most = None if most is None else max(most, override)
        profiles.append(
            ProfileConfig(
                name=name,
                size=size,
                min=least,
                max=most,
                image=keys.string("image", "busybox"),
                network=keys.choice("network", "empty", ("empty", "bridge")),
                probe=keys.strings("probe"),
                probe_timeout=keys.seconds("probe_timeout", 0.0) if "probe_timeout" in keys.values else None,
                env=keys.environment("env"),
                privileged=keys.boolean("privileged"),
                no_new_privs=keys.boolean("no_new_privs"),
                memory=keys.size("memory", 1 << 30),
                pids=keys.integer("pids", 1000, 1, 4_194_304),
                cpu=keys.integer("cpu", 100, 1, 10_000),
                disk=keys.size("disk", 512 << 20),
                allow=keys.strings("allow") if "allow" in keys.values else None,
                reach=_reach(keys),
                mounts=_mounts(keys),
            )
        )
    return tuple(profiles)


def _reach(keys: Table) -> tuple[str, ...]:
    reach = keys.strings("reach")
    for what in reach:
        if what not in REACHABLE:
            raise keys.error("reach", f"must be some of {', '.join(REACHABLE)}, not {what!r}")
    if reach and keys.values.get("network") != "bridge":
        raise keys.error("reach", 'is for a profile with network = "bridge"')
    return tuple(what for what in REACHABLE if what in reach)


def _mounts(keys: Table) -> tuple[MountConfig, ...]:
    mounts: list[MountConfig] = []
    for table in keys.tables("mounts"):
        table.only("host_path", "dst", "readonly")
        host_path, dst = table.path("host_path"), table.path("dst")
        if host_path is None or dst is None:
            raise keys.error("mounts", 'must be a list like [{ host_path = "/srv/data", dst = "/data" }]')
        if ".." in dst.parts or dst == Path("/"):
            raise table.error("dst", f"must be below the root directory, and without .., not {str(dst)!r}")
        if any(dst.is_relative_to(place) for place in _KERNELS_OWN):
            raise table.error("dst", f"can't be in {', '.join(_KERNELS_OWN)}, where the kernel's own are mounted")
        for other in mounts:
            if dst.is_relative_to(other.dst) or Path(other.dst).is_relative_to(dst):
                raise table.error("dst", f"{str(dst)!r} and {other.dst!r} can't be in each other")
        readonly = table.boolean("readonly", default=True)
        mounts.append(MountConfig(str(host_path), str(dst), readonly))
    return tuple(mounts)


def _sizes(keys: Table, default: int, *, given: bool) -> tuple[int, int | None, int | None]:
    """Return a profile's size, min and max; a size that nobody has *given* is as the other two allow."""
    least = keys.integer("min", 0, 0, MAX_SIZE) if "min" in keys.values else None
    most = keys.integer("max", 1, 1, MAX_SIZE) if "max" in keys.values else None
    if least is not None and most is not None and least > most:
        raise keys.error("min", f"must be at most max, which is {most}, not {least}")
    size = keys.integer("size", default, 0, MAX_SIZE)
    if not given and "size" not in keys.values:
        size = max(size, least or 0)
        size = size if most is None else min(size, most)
    if least is not None and least > size:
        raise keys.error("min", f"must be at most size, which is {size}, not {least}")
    if most is not None and most < size:
        raise keys.error("max", f"must be at least size, which is {size}, not {most}")
    return size, least, most


def _total(pool: Table, profiles: tuple[ProfileConfig, ...]) -> int | None:
    """Return the most warm containers of all profiles together; None: no bound but theirs."""
    if "max" not in pool.values:
        return None
    total = pool.integer("max", 1, 1, MAX_SIZE)
    sizes = sum(profile.size for profile in profiles)
    if total < sizes:
        raise pool.error("max", f"must be at least {sizes}, which the profiles' sizes add up to, not {total}")
    leasts = [profile.bounds[0] for profile in profiles]
    if total == sum(leasts) and 0 in leasts:
        raise pool.error("max", f"must be above {total}, which the profiles' min add up to: some have min = 0")
    return total
