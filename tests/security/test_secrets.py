"""What the service writes down holds no secret, and nothing that a terminal obeys."""

from __future__ import annotations

import base64
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lxc_pool import hostdir
from tests.support.real_service import Service
from tests.support.waiting import eventually

ARGUMENT, VARIABLE, INPUT, OUTPUT = "hunter-argument", "hunter-variable", "hunter-input", "hunter-output"


@pytest.fixture
def service(images: Path) -> Service:
    return Service(images)


def files_of(service: Service) -> Iterator[Path]:
    """Yield the log and the files of the state dir but images'; `os.walk` minds no directory that goes meanwhile."""
    yield service.log_path
    for place, directories, files in os.walk(service.state_dir):
        if Path(place) == service.state_dir:
            directories.remove("images")
        yield from (path for name in files if (path := Path(place, name)).is_file())


def read(path: Path) -> bytes:
    """Return a file's content; nothing, where it has gone meanwhile, as files and processes of a refill do."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def test_neither_key_nor_what_commands_are_given_or_say_is_written_down(service: Service) -> None:
    try:
        service.launch(size=1, arguments=["--log-json", "--verbose"])
        service.await_ready()
        pool = service.connect()
        key = hostdir.read_key(service.host_dir)
        with pool.lease("job", timeout=30) as container:
            container.run(
                ["sh", "-c", f"cat; echo hunter'-'output # {ARGUMENT}"],
                env={"SECRET": VARIABLE},
                input=INPUT.encode(),
                capture_output=True,
                check=True,
            )
            with pytest.raises(ValueError, match=VARIABLE):  # the caller is told
                container.run(["sh", ARGUMENT], user=VARIABLE)
            with pytest.raises(FileNotFoundError):
                container.run([f"/{ARGUMENT}"])
            process = container.popen(["sh", "-c", f"sleep 100 # {ARGUMENT}"])
            process.kill()
            process.wait()
            process.close()
            written = b"".join(read(file) for file in files_of(service))
        written += service.log_path.read_bytes()
        for secret in (ARGUMENT, VARIABLE, INPUT, OUTPUT):
            assert secret.encode() not in written
        texts = (repr(key)[2:-1], str(list(key)), key.decode("latin1"), base64.b64encode(key).decode())
        for form in (
            key,
            key.hex().encode(),
            *(form.encode() for text in texts for form in (text, json.dumps(text)[1:-1])),
        ):
            assert form not in written
        # Neither is the key in what ps(1) shows of the service.
        for pid in service.marked():
            for file in ("cmdline", "environ"):
                assert key not in read(Path(f"/proc/{pid}/{file}"))
        events = [json.loads(line) for line in service.log.splitlines()]
        leases = [event for event in events if event.get("event") == "lease"]
        assert [event["id"] for event in leases] == ["job"]
        assert leases[0]["message"].startswith("lease name=")
        assert (leases[0]["uid"], leases[0]["profile"]) == (0, "default")
    finally:
        service.close()


def test_what_a_probe_says_is_shown_without_what_a_terminal_obeys(service: Service) -> None:
    configuration = (
        '[pool]\nsize = 1\n[profile.default]\nprobe_timeout = 0.2\nprobe = ["sh", "-c", '
        "\"printf '\\\\033[31mred\\\\033]0;title\\\\007\\\\r\\\\nsecond'; exit 1\"]\n"
    )
    try:
        pool = service.start(config=configuration)
        eventually(lambda: pool.status().last_error, "the probe's time is over")
        error = pool.status().last_error
        assert error is not None
        assert "red" in error
        assert "second" in error
        assert error.isprintable()
        shown = service.cli("status").stdout
        assert "red" in shown
        assert "\x1b" not in shown
        assert "\x07" not in shown
        assert not any("\x1b" in line for line in service.log.splitlines())
    finally:
        service.close()


def test_ids_that_a_terminal_would_obey_are_refused(service: Service) -> None:
    try:
        pool = service.start(size=1)
        for bad in ("a\x1b[31m", "a\nb", "a\u202eb", "x" * 129, ""):
            with pytest.raises(ValueError, match="id"):
                pool.get(bad, 0)
        listed = subprocess.run(
            service.command("ls"), cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
        )
        assert listed.stdout.replace("\n", "").isprintable()
    finally:
        service.close()
