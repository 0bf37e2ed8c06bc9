"""The configuration: every key, and for every mistake the file, the line, the key and what would be right."""

from __future__ import annotations

import os
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from lxc_pool import config
from lxc_pool.config import Config, MountConfig, NetworkConfig, ProfileConfig, check_size, load, parse
from lxc_pool.errors import ConfigError


def read(text: str, size: int | None = None) -> Config:
    return parse(text, origin="pool.toml", size=size)


def test_without_a_file_there_is_one_profile_of_five_and_a_lane_for_each_cpu_but_at_most_five() -> None:
    found = read("")
    assert found.profiles == (ProfileConfig("default", 5, "busybox", "empty", ()),)
    assert found.workers == min(os.cpu_count() or 1, 5)
    assert (found.create_timeout, found.image_timeout, found.confirm_timeout) == (30.0, 600.0, 5.0)
    assert found.group == "lxc-pool"


@pytest.mark.parametrize(("cpus", "lanes"), [(1, 1), (4, 4), (64, 5), (None, 1)])
def test_there_are_five_lanes_at_most_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, cpus: int | None, lanes: int
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cpus)
    assert read("").workers == lanes
    assert read("[pool]\nworkers = 7\n").workers == 7


def test_every_key_is_read() -> None:
    found = read(
        """
        [pool]
        size = 7
        workers = 3
        create_timeout = 10
        image_timeout = 60.5
        confirm_timeout = 1
        max = 9
        shrink_after = 30
        [access]
        group = "testers"
        [profile.default]
        [profile.big-one]
        image = "debian"
        network = "empty"
        size = 2
        min = 0
        max = 4
        probe = ["test", "-e", "/ready"]
        probe_timeout = 20
        env = { LANG = "de_DE.UTF-8", EMPTY = "" }
        """
    )
    assert found == Config(
        profiles=(
            ProfileConfig("default", 7),
            ProfileConfig(
                "big-one",
                2,
                "debian",
                "empty",
                ("test", "-e", "/ready"),
                min=0,
                max=4,
                probe_timeout=20.0,
                env=(("LANG", "de_DE.UTF-8"), ("EMPTY", "")),
            ),
        ),
        workers=3,
        create_timeout=10.0,
        image_timeout=60.5,
        confirm_timeout=1.0,
        max=9,
        shrink_after=30.0,
        group="testers",
    )


def test_the_pools_size_is_that_of_the_default_profile_and_of_no_other() -> None:
    assert [p.size for p in read("pool.size = 9\n[profile.a]\n[profile.default]").profiles] == [1, 9]
    assert [p.size for p in read("pool.size = 9\n[profile.a]\n[profile.b]").profiles] == [9, 1]
    assert [p.size for p in read("[profile.default]\nsize = 2").profiles] == [2]


def test_a_profile_has_its_size_unless_it_has_bounds() -> None:
    def bounds(text: str, size: int | None = None) -> tuple[int, int, int]:
        profile = read(text, size).main
        return profile.size, *profile.bounds

    assert bounds("[profile.a]\nsize = 3") == (3, 3, 3)
    assert bounds("[profile.a]\nsize = 3\nmin = 1") == (3, 1, 3)
    assert bounds("[profile.a]\nsize = 3\nmax = 9") == (3, 3, 9)
    assert bounds("[profile.a]\nsize = 0") == (0, 0, 1)
    # A size that nobody has given is as near to the usual one as the bounds allow.
    assert bounds("[profile.a]\nmax = 3") == (3, 3, 3)
    assert bounds("[profile.a]\nmin = 7") == (7, 7, 7)
    assert bounds("[profile.a]\nmin = 1\nmax = 9") == (5, 1, 9)
    # One on the command line moves them.
    assert bounds("[profile.a]\nmin = 2\nmax = 3", 1) == (1, 1, 3)
    assert bounds("[profile.a]\nmin = 2\nmax = 3", 8) == (8, 2, 8)


def test_the_main_profile_is_the_default_one_or_else_the_first() -> None:
    assert read("[profile.a]\n[profile.default]").main.name == "default"
    assert read("[profile.b]\n[profile.a]").main.name == "b"


def test_what_a_container_is_made_by_is_not_how_many_there_are_or_whom_they_are_for() -> None:
    plain = ProfileConfig("a", 1)
    same = ProfileConfig("b", 2, min=1, max=3, allow=("x",), probe_timeout=1.0, env=(("A", "b"),))
    assert plain.recipe == same.recipe
    assert plain.recipe != ProfileConfig("a", 1, probe=("true",)).recipe


def test_a_size_on_the_command_line_is_stronger_than_the_files() -> None:
    assert [p.size for p in read("pool.size = 9\n[profile.a]\nsize = 3\n[profile.default]\nsize = 4", 2).profiles] == [
        3,
        2,
    ]
    assert read("", 2).profiles[0].size == 2


@pytest.mark.parametrize("size", [0, -1, 1001, True, 1.0, "5", None])
def test_refuses_a_size_that_is_not_1_to_1000(size: object) -> None:
    with pytest.raises(ConfigError, match="size must be an integer from 1 to 1000, not"):
        check_size(size)


@pytest.mark.parametrize("size", [1, 1000])
def test_takes_the_least_and_the_largest_size(size: int) -> None:
    assert check_size(size) == size


def test_a_size_of_0_on_the_command_line_is_refused() -> None:
    with pytest.raises(ConfigError, match="not 0"):
        read("", 0)


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("[pool]\nsize = 5\nsizes = 6\n", "line 3: pool.sizes", "unknown key; known here: size, workers"),
        ("\n[pol]\nsize = 5\n", "line 2: pol", "unknown key; known here: pool, access, network, profile"),
        ("[access]\n# groups\ngroups = 'x'\n", "line 3: access.groups", "unknown key; known here: group"),
        ("[profile.a]\nimage='x'\n[profile.b]\nimages='x'\n", "line 4: profile.b.images", "unknown key"),
        ("[pool]\nsize = 5\n[profile.a]\nworkers = 6\n", "line 4: profile.a.workers", "unknown key"),
        ('[ profile . a ]\n "nope" = 1\n', "line 2: profile.a.nope", "unknown key"),
        ("pool = { sizes = 5 }\n", "pool.toml: pool.sizes", "unknown key"),
        ("[pool]\nsize = 0\n", "line 2: pool.size", "must be an integer from 1 to 1000, not 0"),
        ("[pool]\nsize = '5'\n", "line 2: pool.size", "must be an integer from 1 to 1000, not '5'"),
        ("[pool]\nsize = true\n", "line 2: pool.size", "not True"),
        ("[pool]\nworkers = 65\n", "line 2: pool.workers", "must be an integer from 1 to 64, not 65"),
        ("[pool]\ncreate_timeout = 0\n", "line 2: pool.create_timeout", "must be a number of seconds above 0"),
        ("[pool]\ncreate_timeout = nan\n", "line 2: pool.create_timeout", "must be a number of seconds"),
        ("[pool]\nimage_timeout = 86401\n", "line 2: pool.image_timeout", "up to 86400, not 86401"),
        ("[pool]\nconfirm_timeout = false\n", "line 2: pool.confirm_timeout", "not False"),
        ("[pool]\nconfirm_timeout = '1'\n", "line 2: pool.confirm_timeout", "not '1'"),
        ("[access]\ngroup = ''\n", "line 2: access.group", "must be a string of printable characters, not ''"),
        ("[access]\ngroup = 5\n", "line 2: access.group", "must be a string of printable characters, not 5"),
        ('[access]\ngroup = "a\\nb"\n', "line 2: access.group", "must be a string of printable characters"),
        ("[profile.a]\nnetwork = 'host'\n", "line 2: profile.a.network", "must be one of empty, bridge, not 'host'"),
        ("[profile.a]\nprobe = 'true'\n", "line 2: profile.a.probe", "must be a list of strings, not 'true'"),
        ("[profile.a]\nprobe = ['x', 1]\n", "line 2: profile.a.probe", "must be a list of strings"),
        ("[profile.a]\nprobe = ['']\n", "line 2: profile.a.probe", "must be a list of strings"),
        ("[profile.Big]\n", "line 1: profile.Big", "a profile's name is 1 to 32 of a-z, 0-9, - and _"),
        ("pool = 5\n", "line 1: pool", "must be a table, not 5"),
        ("[profile.a]\nsize = -1\n", "line 2: profile.a.size", "must be an integer from 0 to 1000, not -1"),
        ("[profile.a]\nmin = 3\nmax = 2\n", "line 2: profile.a.min", "must be at most max, which is 2, not 3"),
        ("[profile.a]\nsize = 2\nmin = 3\n", "line 3: profile.a.min", "must be at most size, which is 2, not 3"),
        ("[profile.a]\nsize = 2\nmax = 1\n", "line 3: profile.a.max", "must be at least size, which is 2, not 1"),
        ("[pool]\nsize = 4\n[profile.default]\nmax = 3\n", "line 4: profile.default.max", "size, which is 4"),
        ("[profile.a]\nmax = 0\n", "line 2: profile.a.max", "must be an integer from 1 to 1000, not 0"),
        ("[pool]\nmax = 2\n[profile.a]\nsize = 3\n", "line 2: pool.max", "must be at least 3, which the profiles'"),
        (
            "[pool]\nmax = 2\n[profile.a]\nsize = 2\n[profile.b]\nsize = 0\n",
            "line 2: pool.max",
            "must be above 2, which the profiles' min add up to: some have min = 0",
        ),
        ("[pool]\nshrink_after = 0\n", "line 2: pool.shrink_after", "must be a number of seconds above 0"),
        ("[profile.a]\nprobe_timeout = 0\n", "line 2: profile.a.probe_timeout", "must be a number of seconds above 0"),
        ("[profile.a]\nenv = 5\n", "line 2: profile.a.env", "must be a table, not 5"),
        ("[profile.a.env]\nA = 5\n", "line 2: profile.a.env.A", "must be a string without NUL, not 5"),
        ("[profile.a]\nenv = { 'A=B' = 'x' }\n", "profile.a.env.A=B", "a variable's name is of A-Z"),
        ("[profile]\na = 5\n", "line 2: profile.a", "must be a table, not 5"),
    ],
)
def test_a_mistake_is_named_with_its_line_and_what_would_be_right(text: str, where: str, what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(text)
    message = str(caught.value)
    assert message.startswith("pool.toml")
    assert where in message
    assert what in message


def test_what_is_not_toml_is_refused_with_the_parsers_words() -> None:
    with pytest.raises(ConfigError, match=r"pool\.toml: not valid TOML: .*line 2"):
        read("[pool]\nsize 5\n")


def test_a_profile_is_found_by_name_and_an_unknown_one_is_answered_with_those_there_are() -> None:
    found = read("[profile.a]\n[profile.b]")
    assert found.profile("b").name == "b"
    with pytest.raises(ValueError, match="unknown profile 'c'; the service has: a, b"):
        found.profile("c")


def test_a_named_file_has_to_be_there_and_be_text(tmp_path: Path) -> None:
    path = tmp_path / "pool.toml"
    with pytest.raises(ConfigError, match=r"can't read the configuration .*pool\.toml"):
        load(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="can't read the configuration"):
        load(path)
    path.write_text("[pool]\nsize = 3\n", encoding="utf-8")
    assert load(path).profiles[0].size == 3
    assert load(path, size=4).profiles[0].size == 4


def test_the_usual_file_is_read_if_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lxc-pool.toml"
    monkeypatch.setattr(config, "DEFAULT_CONFIG", path)
    assert load(size=6).profiles[0].size == 6
    path.write_text("[pool]\nsize = 3\nbad = 1", encoding="utf-8")
    with pytest.raises(ConfigError, match=f"{path}, line 3: pool.bad"):
        load()


def test_a_network_is_read_and_is_left_to_the_host_where_nothing_is_said() -> None:
    assert read("").network == NetworkConfig()
    assert not read("").wants_bridge
    found = read(
        """
        [network]
        bridge = "br0"
        subnet = "10.1.2.0/24"
        nat = false
        dns = ["192.0.2.53"]
        [profile.default]
        network = "bridge"
        reach = ["metadata", "containers", "containers"]
        """
    )
    assert found.network == NetworkConfig("br0", IPv4Network("10.1.2.0/24"), False, ("192.0.2.53",))
    assert found.wants_bridge
    assert found.profiles[0].reach == ("containers", "metadata")
    assert read("network.dns = []").network.dns == ()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("subnet = '10.1.2.3/24'", "network.subnet: must be like \"10.1.2.0/24\", not '10.1.2.3/24': .* host bits set"),
        ("subnet = 'fd00::/64'", "network.subnet: must be like"),
        ("subnet = '10.0.0.0/8'", "network.subnet: must be a /22 to a /29, not a /8"),
        ("subnet = '10.0.0.0/30'", "network.subnet: must be a /22 to a /29, not a /30"),
        ("subnet = '169.254.1.0/24'", "network.subnet: must be of a private range"),
        ("bridge = 'br0; flush'", "network.bridge: must be the name of a bridge"),
        ("bridge = 'abcdefghijklmnop'", "network.bridge: must be the name of a bridge"),
        ("dns = ['one.one.one.one']", "network.dns: must be a list of IPv4 addresses, not 'one.one.one.one'"),
        ("dns = ['127.0.0.53']", "network.dns: 127.0.0.53 would be the container itself"),
        (
            "dns = ['192.0.2.1', '192.0.2.2', '192.0.2.3', '192.0.2.4']",
            "network.dns: must be at most 3 addresses, not 4",
        ),
        ("ipv6 = true", "network.ipv6: unknown key; known here: bridge, subnet, nat, dns"),
        (
            "[profile.a]\nnetwork = 'bridge'\nreach = ['lan']",
            "reach: must be some of containers, host, metadata, not 'lan'",
        ),
        ("[profile.a]\nreach = ['host']", 'reach: is for a profile with network = "bridge"'),
    ],
)
def test_a_mistake_about_the_network_is_named(line: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read(f"[network]\n{line}")


def test_a_profile_may_have_mounts() -> None:
    found = read(
        """
        [profile.default]
        mounts = [
            { host_path = "/srv/data", dst = "/data" },
            { host_path = "/srv/cache/", dst = "/var//cache/x/", readonly = false },
        ]
        """
    )
    assert found.profiles[0].mounts == (
        MountConfig("/srv/data", "/data", readonly=True),
        MountConfig("/srv/cache", "/var/cache/x", readonly=False),
    )
    assert read("[profile.default]\nmounts = []").profiles[0] == ProfileConfig("default", 5)
    assert found.profiles[0].recipe != ProfileConfig("default", 5).recipe


@pytest.mark.parametrize(
    ("mounts", "words"),
    [
        ('"/srv/data"', "must be a list of tables"),
        ('["/srv/data"]', "must be a list of tables"),
        ("[{}]", "must be a list like"),
        ('[{ host_path = "/a" }]', "must be a list like"),
        ('[{ host_path = "a", dst = "/a" }]', "mounts.host_path: must be an absolute path, not 'a'"),
        ('[{ host_path = "/a", dst = "a" }]', "mounts.dst: must be an absolute path"),
        ('[{ host_path = "/a", dst = "/" }]', "must be below the root directory"),
        ('[{ host_path = "/a", dst = "/a/../../b" }]', "without .."),
        ('[{ host_path = "/a", dst = "/dev/shm" }]', "can't be in /proc, /sys, /dev"),
        ('[{ host_path = "/a", dst = "/proc" }]', "can't be in /proc, /sys, /dev"),
        ('[{ host_path = "/a", dst = "/a", readonly = 1 }]', "readonly: must be true or false"),
        ('[{ host_path = "/a", dst = "/a", read_only = true }]', "read_only: unknown key"),
        ('[{ host_path = "/a", dst = "/a" }, { host_path = "/b", dst = "/a" }]', "can't be in each other"),
        ('[{ host_path = "/a", dst = "/a/b" }, { host_path = "/b", dst = "/a" }]', "can't be in each other"),
        ('[{ host_path = "/a", dst = "/a" }, { host_path = "/b", dst = "/a/b" }]', "can't be in each other"),
        ('[{ host_path = "", dst = "/a" }]', "must be a string"),
    ],
)
def test_a_wrong_mount_is_refused(mounts: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(f"[profile.default]\nmounts = {mounts}\n")
    assert words in str(caught.value)
