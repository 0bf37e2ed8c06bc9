"""What a configuration file changes, and how a wrong one is refused, by the real service."""

from __future__ import annotations

import subprocess

import pytest

from lxc_pool import PoolTimeout
from tests.support.real_service import ROOT, Service
from tests.support.waiting import eventually


def refused(service: Service, config: str, *arguments: str) -> str:
    """Return why a service with that configuration does not start."""
    file = service.directory / "wrong.toml"
    file.write_text(config)
    command = service.command("serve", "--state-dir", service.state_dir, "--config", file, *arguments)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    assert not service.host_dir.exists()
    return done.stderr


def test_a_container_is_warm_once_its_profiles_probe_has_succeeded(service: Service) -> None:
    probe = 'probe = ["sh", "-c", "test -e /tried && touch /probed || { touch /tried; exit 1; }"]'
    pool = service.start(config=f"[pool]\nsize = 1\nworkers = 1\n[profile.default]\n{probe}\n")
    with pool.lease("x") as container:
        container.run(["test", "-e", "/probed"], check=True)
    assert pool.status().error_count == 0


def test_a_configured_key_is_every_services(service: Service) -> None:
    file = service.directory / "key"
    file.write_bytes(b"k" * 32)
    config = f'[pool]\nsize = 1\n[access]\nkey_file = "{file}"\n'
    assert "chmod 0600" in refused(service, config)
    file.chmod(0o600)
    for _ in range(2):
        with service.start(config=config) as pool:
            assert pool.echo("x") == "x"
            assert (service.host_dir / "authkey").read_bytes() == b"k" * 32
        service.stop()


def test_a_probe_that_never_succeeds_is_told_with_what_it_said(service: Service) -> None:
    probe = 'probe = ["sh", "-c", "echo no database >&2; exit 7"]'
    config = f"[pool]\nsize = 1\nworkers = 1\ncreate_timeout = 2\n[profile.default]\n{probe}\n"
    pool = service.start(config=config)
    eventually(lambda: pool.status().error_count, "it has failed")
    error = pool.status().last_error or ""
    assert "still ends with 7: no database" in error
    with pytest.raises(PoolTimeout, match="no database"):
        pool.wait_ready(timeout=0)


def test_profiles_have_sizes_of_their_own(service: Service) -> None:
    config = (
        '[pool]\nworkers = 2\n[profile.default]\nsize = 2\n[profile.other]\nsize = 1\nprobe = ["touch", "/other"]\n'
    )
    pool = service.start(config=config)
    pool.wait_ready()
    assert {name: profile.size for name, profile in pool.status().profiles.items()} == {"default": 2, "other": 1}
    with pool.lease("x", profile="other") as container:
        assert container.profile == "other"
        container.run(["test", "-e", "/other"], check=True)
    with pool.lease("x") as container:
        assert container.run(["test", "-e", "/other"]).returncode == 1
    with pytest.raises(ValueError, match="unknown profile 'third'; the service has: default, other"):
        pool.get("x", 10, profile="third")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("[pool]\nsize = 3\nsizes = 2\n", "wrong.toml, line 3: pool.sizes: unknown key"),
        ("[pool]\n\nsize = 0\n", "wrong.toml, line 3: pool.size: must be an integer from 1 to"),
        ('[profile.default]\nnetwork = "host"\n', "wrong.toml, line 2: profile.default.network: must be one of"),
        ("[pool\n", "wrong.toml: not valid TOML"),
    ],
)
def test_a_wrong_configuration_is_refused_with_file_and_line(service: Service, config: str, words: str) -> None:
    assert words in refused(service, config)


def test_a_pool_of_nothing_is_refused(service: Service) -> None:
    assert "size must be an integer from 1 to" in refused(service, "", "--size", "0")


def test_a_configuration_that_is_not_there_is_refused(service: Service) -> None:
    missing = service.directory / "missing.toml"
    assert str(missing) in refused(service, "", "--config", str(missing))
