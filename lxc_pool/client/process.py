"""Commands in containers: `Process`, as `subprocess.Popen`, and `run`, as `subprocess.run`."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping
from typing import Any

from lxc_pool.client.caller import check_wait
from lxc_pool.client.popen import Args, Launch, Path, Process
from lxc_pool.client.stdio import Target

__all__ = ["Args", "Launch", "Process", "run"]


def run(
    launch: Launch,
    args: Args,
    *,
    input: Any = None,  # noqa: A002 - subprocess.run's name
    capture_output: bool = False,
    stdin: Target = None,
    stdout: Target = None,
    stderr: Target = None,
    text: bool | None = None,
    encoding: str | None = None,
    errors: str | None = None,
    universal_newlines: bool | None = None,
    env: Mapping[str, str] | Mapping[bytes, bytes] | None = None,
    cwd: Path | None = None,
    check: bool = False,
    timeout: float | None = None,
    user: str | int | None = None,
) -> subprocess.CompletedProcess[Any]:
    """Run a command to its end, with the keywords, results and errors of `subprocess.run`.

    Args:
        launch: Sends the request.
        args: The program and its arguments.
        input: What the command reads; then *stdin* may not be given.
        capture_output: Both outputs are PIPEs.
        stdin: See `Process.start`, also for the keywords that are not listed here.
        stdout: See there.
        stderr: See there.
        text: See there.
        encoding: See there.
        errors: See there.
        universal_newlines: See there.
        env: See there.
        cwd: See there.
        check: Whether a returncode other than 0 raises.
        timeout: Seconds, starting included; None for ever.
        user: See there.

    Raises:
        subprocess.CalledProcessError: *check*, and the command failed.
        subprocess.TimeoutExpired: *timeout* is over; no process of the command is left, and `output` and `stderr` hold
            what it wrote (bytes).
        ValueError: *input* with *stdin*, *capture_output* with *stdout* or *stderr*; and as `Process.start`.
        TypeError: *timeout* is no number; and as `Process.start`.
        OSError: As `Process.start`.
        ExecFailed: As `Process.start` and `Process.kill_tree`.
    """
    if input is not None:
        if stdin is not None:
            raise ValueError("stdin and input arguments may not both be used.")
        stdin = subprocess.PIPE
    if capture_output:
        if stdout is not None or stderr is not None:
            raise ValueError("stdout and stderr arguments may not be used with capture_output.")
        stdout = stderr = subprocess.PIPE
    patience = check_wait(timeout)
    deadline = None if patience is None else time.monotonic() + patience
    try:
        process = Process.start(
            launch,
            args,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            text=text,
            encoding=encoding,
            errors=errors,
            universal_newlines=universal_newlines,
            env=env,
            cwd=cwd,
            user=user,
            start_timeout=patience,
        )
    except subprocess.TimeoutExpired as late:
        raise subprocess.TimeoutExpired(late.cmd, timeout or 0.0) from None
    try:
        output, error_output = process.communicate(input, _left(deadline))
    except subprocess.TimeoutExpired:
        process.kill_tree()
        raise process.timeout_expired(timeout, drain=True) from None
    except BaseException:
        process.abort(wait=True)
        raise
    finally:
        process.close()
    code = process.returncode
    assert code is not None
    if check and code:
        raise subprocess.CalledProcessError(code, process.args, output, error_output)
    return subprocess.CompletedProcess(process.args, code, output, error_output)


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else deadline - time.monotonic()
