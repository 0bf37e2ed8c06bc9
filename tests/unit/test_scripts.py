"""The set-up scripts, as far as they can be tried without setting anything up."""

from __future__ import annotations

import configparser
import os
import re
import select
import shutil
import signal
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.demo_site import Site

ROOT = Path(__file__).resolve().parents[2]
ENTRIES = [ROOT / "scripts" / "demo", ROOT / "scripts" / "test", ROOT / ".ci" / "run"]
SETUP = ROOT / "scripts" / "lib" / "setup.sh"


def os_release(directory: Path, **fields: str) -> Path:
    path = directory / "os-release"
    path.write_text("".join(f'{key}="{value}"\n' for key, value in fields.items()), encoding="utf-8")
    return path


def prelude(root: Path) -> str:
    return f"set -euo pipefail\nroot={root}\n. {SETUP}\n"


def bash(script: str, root: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", prelude(root) + script],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
        env={**os.environ, **env},
    )


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return path


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project whose virtual environment's Python only writes down how it is called."""
    root = tmp_path / "project"
    executable(root / ".venv" / "bin" / "python", f'#!/bin/sh\necho "$*" >>{root}/calls\n')
    (root / "pyproject.toml").write_text("one", encoding="utf-8")
    return root


def installs(root: Path) -> int:
    return (root / "calls").read_text(encoding="utf-8").count("-m pip install")


@pytest.mark.parametrize("script", [*ENTRIES, SETUP], ids=lambda path: path.name)
def test_script_parses(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True, timeout=30)


@pytest.mark.parametrize("script", ENTRIES, ids=lambda path: path.name)
def test_script_can_be_executed(script: Path) -> None:
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize("script", ENTRIES, ids=lambda path: path.name)
@pytest.mark.parametrize("known", [True, False], ids=["fedora", "no-os-release"])
def test_another_distribution_is_told_what_is_needed(script: Path, known: bool, tmp_path: Path) -> None:
    release = os_release(tmp_path, ID="fedora", PRETTY_NAME="Fedora Linux 43") if known else tmp_path / "missing"
    done = subprocess.run(
        [script],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
        env={**os.environ, "LXC_POOL_OS_RELEASE": str(release)},
    )
    assert done.returncode == 2
    assert ("Fedora Linux 43" in done.stderr) is known
    for package in ("lxc", "lxc-dev", "busybox-static", "gcc", "pkg-config", "python3-venv", "iproute2"):
        assert package in done.stderr


@pytest.mark.parametrize(
    "fields", [{"ID": "debian"}, {"ID": "ubuntu", "ID_LIKE": "debian"}, {"ID": "x", "ID_LIKE": "ubuntu debian"}]
)
def test_debian_and_its_kin_are_set_up(fields: dict[str, str], tmp_path: Path) -> None:
    executable(tmp_path / "bin" / "apt-get", "#!/bin/sh\n")
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    done = bash("check_distribution", tmp_path, PATH=path, LXC_POOL_OS_RELEASE=str(os_release(tmp_path, **fields)))
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("answer", [True, False])
def test_apparmor_is_installed_where_the_kernel_has_it(tmp_path: Path, answer: bool) -> None:
    fakes = f"apparmor_is_on() {{ {str(answer).lower()}; }}; installed() {{ true; }}; find_python() {{ echo python3; }}"
    done = bash(f'{fakes}; install_packages; echo "${{packages[@]}}"', tmp_path)
    assert done.returncode == 0
    assert ("apparmor" in done.stdout.split()) is answer


def test_who_is_not_root_goes_on_with_sudo_or_is_told(tmp_path: Path) -> None:
    executable(tmp_path / "bin" / "id", "#!/bin/sh\necho 1000\n")
    for name in ("dirname", "env", "cat"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name) or name)
    environment = {"PATH": str(tmp_path / "bin"), "PIP_INDEX_URL": "https://mirror.example/"}
    script = executable(tmp_path / "script", f'#!{shutil.which("bash")}\n{prelude(tmp_path)}as_root "$@"\n')

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run([script, "--size", "3"], env=environment, capture_output=True, text=True, check=False)

    refused = run()
    assert (refused.returncode, "there is no sudo here: run it as root" in refused.stderr) == (2, True)
    executable(tmp_path / "bin" / "sudo", '#!/bin/sh\nprintf "%s\\n" "$@"\n')
    words = run().stdout.splitlines()
    assert "PIP_INDEX_URL=https://mirror.example/" in words
    assert words[-3:] == [str(script), "--size", "3"]


def test_what_the_machine_lacks_is_installed_and_nothing_else(tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    executable(tmp_path / "bin" / "apt-get", f'#!/bin/sh\necho "$*" >>{calls}\n')
    lacks = "installed() { case $1 in lxc|gcc) false;; esac; }; apparmor_is_on() { false; }"
    python = "find_python() { echo python3; }"
    done = bash(f"{lacks}; {python}; install_packages", tmp_path, PATH=f"{tmp_path}/bin:{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    update, install = calls.read_text(encoding="utf-8").splitlines()
    assert update.split()[-1] == "update"
    assert install.split()[-2:] == ["lxc", "gcc"]
    calls.unlink()
    again = bash(f"installed() {{ true; }}; {python}; install_packages", tmp_path)
    assert "skipped: every package is there already" in again.stdout
    assert not calls.exists()


def test_packages_that_can_not_be_installed_end_it(tmp_path: Path) -> None:
    executable(tmp_path / "bin" / "apt-get", '#!/bin/sh\ncase "$*" in *install*) exit 100;; esac\n')
    fakes = "installed() { false; }; find_python() { echo python3; }; sleep() { :; }"
    done = bash(f"{fakes}; install_packages", tmp_path, PATH=f"{tmp_path}/bin:{os.environ['PATH']}")
    assert done.returncode == 5
    assert "could not install lxc" in done.stderr


def test_interpreter_that_fails_is_passed_over_for_one_that_works(tmp_path: Path) -> None:
    version = bash("python3 -c 'import sys; print(\"%d.%d\" % sys.version_info[:2])'", tmp_path).stdout.strip()
    executable(tmp_path / f"python{version}", "#!/bin/sh\necho 'command not found' >&2\nexit 127\n")
    done = bash(f"find_interpreter {version}", tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 0
    assert done.stdout.startswith("/")
    assert str(tmp_path) not in done.stdout


def test_missing_interpreter_is_not_found(tmp_path: Path) -> None:
    assert bash("find_interpreter 3.99", tmp_path).returncode == 1


def test_interpreters_of_pyenv_come_last_on_path(tmp_path: Path) -> None:
    executable(tmp_path / "versions" / "3.12.9" / "bin" / "python3", "#!/bin/sh\n")
    executable(tmp_path / "bin" / "pyenv", f"#!/bin/sh\necho {tmp_path}\n")
    done = bash('add_pyenv_interpreters; echo "$PATH"', tmp_path, PATH=f"{tmp_path}/bin:/usr/bin:/bin")
    assert done.stdout.strip() == f"{tmp_path}/bin:/usr/bin:/bin:{tmp_path}/versions/3.12.9/bin"


def test_second_install_is_skipped_and_says_so(project: Path) -> None:
    first = bash("venv_install things -e .", project)
    second = bash("venv_install things -e .", project)
    assert (first.returncode, second.returncode) == (0, 0)
    assert "skipped: things" not in first.stdout
    assert "skipped: things" in second.stdout
    assert installs(project) == 1


def test_install_is_done_again_once_the_project_file_changes(project: Path) -> None:
    bash("venv_install things -e .", project)
    (project / "pyproject.toml").write_text("two", encoding="utf-8")
    assert bash("venv_install things -e .", project).returncode == 0
    assert installs(project) == 2


def test_install_that_failed_is_taken_again(project: Path) -> None:
    python = project / ".venv" / "bin" / "python"
    working = python.read_text(encoding="utf-8")
    python.write_text('#!/bin/sh\n[ "$1" = -VV ]\n', encoding="utf-8")
    failed = bash("sleep() { :; }; venv_install things -e .", project)
    python.write_text(working, encoding="utf-8")
    assert failed.returncode == 5
    assert failed.stdout.count("failed (attempt") == 2
    assert bash("venv_install things -e .", project).returncode == 0
    assert installs(project) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: files get other owners")
@pytest.mark.parametrize("theirs", [True, False])
def test_what_root_made_in_the_callers_tree_is_given_back(project: Path, tmp_path: Path, theirs: bool) -> None:
    (project / "pyproject.toml").unlink()
    (project / "pyproject.toml").symlink_to("/etc/hostname")
    (tmp_path / "beside").touch()
    files = (*project.rglob("*"), project)
    if theirs:
        os.chown(project, 4711, 4712)
    environment = {"SUDO_UID": "4711", "SUDO_GID": "4712"}
    assert bash("give_back; give_back", project, **environment).returncode == 0
    assert {(path.lstat().st_uid, path.lstat().st_gid) for path in files} == {(4711, 4712) if theirs else (0, 0)}
    assert {path.stat().st_uid for path in (tmp_path, tmp_path / "beside", Path("/etc/hostname"))} == {0}


@pytest.fixture
def machine(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A copy of the scripts on a machine with everything but Python 3.12 and 3.13, and a tox that fails py311."""
    root, programs = tmp_path / "project", tmp_path / "bin"
    for name in ("scripts/test", "scripts/lib/setup.sh", ".ci/run", "pyproject.toml"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, root / name)
    executable(root / ".venv" / "bin" / "python", "#!/bin/sh\n")
    tox = (
        f'echo "$*" >{tmp_path}/tox',
        'echo "lint: commands[0]> ruff check"',
        'echo "py311: commands[0]> pytest"',
        'echo "===== 1 failed, 7 passed in 1.00s ====="',
        'echo "TOTAL    100   10   91%"',
        'echo "py312: skipped because could not find python interpreter"',
        'printf "  lint: OK (1.0 seconds)\\n  py311: FAIL code 1 (2.0 seconds)\\n  py312: SKIP (0.0 seconds)\\n"',
        "exit 1",
    )
    executable(root / ".venv" / "bin" / "tox", "\n".join(("#!/bin/sh", *tox, "")))
    executable(programs / "id", "#!/bin/sh\necho 0\n")
    executable(programs / "dpkg-query", "#!/bin/sh\nprintf installed\n")
    executable(programs / "apt-get", "#!/bin/sh\nexit 100\n")
    # Who finds interpreters asks each for its version; who looks for one to make environments with asks nothing.
    executable(programs / "python3.11", '#!/bin/sh\n[ "${2:-3.11}" = 3.11 ] && echo "$0"\n')
    for name in ("python3", "python3.12", "python3.13"):
        executable(programs / name, "#!/bin/sh\nexit 127\n")
    environment = {
        **os.environ,
        "PATH": f"{programs}:/usr/bin:/bin",
        "PYENV_ROOT": str(tmp_path),
        "LXC_POOL_OS_RELEASE": str(os_release(tmp_path, ID="debian")),
    }
    return root, environment


@pytest.mark.parametrize("entry", ["scripts/test", ".ci/run"])
def test_the_tests_run_through_tox_and_what_is_left_out_is_said(
    machine: tuple[Path, dict[str, str]], tmp_path: Path, entry: str
) -> None:
    root, environment = machine
    done = subprocess.run(
        [root / entry, "-e", "py311"],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert done.returncode == 1, done.stderr
    words = (tmp_path / "tox").read_text(encoding="utf-8").split()
    assert words == ["run", "--root", str(root), "--conf", str(root / "tox.ini"), "-e", "py311"]
    for version in ("3.12", "3.13"):
        assert f"test: no Python {version} on this machine: py{version.replace('.', '')} is skipped" in done.stdout
    assert "no Python 3.11" not in done.stdout
    summary = done.stdout.partition("---- summary ----\n")[2].splitlines()
    assert summary == [
        "  lint: OK (1.0 seconds)",
        "  py311: FAIL code 1 (2.0 seconds), coverage 91%",
        "    ===== 1 failed, 7 passed in 1.00s =====",
        "  py312: SKIP (0.0 seconds), no such Python on this machine",
        "test: failed (tox: exit status 1)",
    ]


def test_tox_has_an_environment_for_each_check_and_python_and_judges_the_coverage_of_lines_and_branches() -> None:
    tox = configparser.ConfigParser(interpolation=None)
    tox.read(ROOT / "tox.ini", encoding="utf-8")
    assert tox["tox"]["env_list"].split(", ") == ["lint", "types", "imports", "py311", "py312", "py313"]
    assert tox["tox"]["skip_missing_interpreters"] == "true"
    *_, report = tox["testenv"]["commands"].splitlines()
    # With the Python that runs everything; the others run a part.
    assert re.fullmatch(r"py311: coverage report --fail-under=\{env:\w+:(9\d)\}", report)
    coverage = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["coverage"]["run"]
    assert coverage["branch"]
    assert coverage["source"] == ["lxc_pool"]
    assert "subprocess" in coverage["patch"]  # the service and its workers


@pytest.fixture
def waiting_script(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A script in the middle of a step, which has said so."""
    # Not a bash's `wait`: a signal that comes just before it is lost.
    script = prelude(tmp_path) + """on_signal\nstep sh -c 'sh -c "echo \\$\\$; exec sleep 60"; :'\n"""
    # Whoever runs the tests may have it ignored (nohup), and a shell can't trap what was ignored as it began.
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        process = subprocess.Popen(["bash", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGHUP, before)
    with process:
        yield process
        process.kill()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_ends_a_step_with_its_children(waiting_script: subprocess.Popen[str], signum: signal.Signals) -> None:
    assert waiting_script.stdout is not None
    grandchild = os.pidfd_open(int(waiting_script.stdout.readline()))
    try:
        waiting_script.send_signal(signum)
        _, errors = waiting_script.communicate(timeout=30)
        assert waiting_script.returncode == 128 + signum
        assert f"ended by {signum.name}" in errors
        poller = select.poll()
        poller.register(grandchild, select.POLLIN)  # readable once it has ended
        assert poller.poll(30_000)
    finally:
        os.close(grandchild)


def test_sites_of_different_runs_share_no_name() -> None:
    ours, other = Site.of_this_process(), Site("1-2")
    for mine, theirs in (
        (ours.state_dir, other.state_dir),
        (ours.host_dir, other.host_dir),
        (ours.lock_dir, other.lock_dir),
        (ours.cold_name(0), other.cold_name(0)),
    ):
        assert mine != theirs


def test_site_that_was_never_used_has_no_residue() -> None:
    site = Site.of_this_process()
    assert site.residue() == []
    site.undo()
    assert site.residue() == []


def test_site_is_abandoned_only_once_its_process_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scripts.demo_site._STATE_PARENT", tmp_path)
    monkeypatch.setattr("scripts.demo_site._HOST_PARENT", tmp_path)
    live = Site.of_this_process()
    gone = Site(f"{os.getpid()}-1")  # our pid, but another start time
    for site in (live, gone):
        site.state_dir.mkdir()
    assert list(Site.abandoned()) == [gone]
