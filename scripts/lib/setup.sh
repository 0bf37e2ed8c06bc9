# shellcheck shell=bash
# What scripts/demo and scripts/test share: the machine's packages, a Python, the project's virtual environment.
#
# Sourced, after `set -euo pipefail`, with `root` set to the project's root. Whatever is there already is left alone.
# For tests, LXC_POOL_OS_RELEASE names another os-release(5).

venv="${root:?}/.venv"

# Debian's names. The interpreter's own packages come from python_packages.
packages=(lxc lxc-dev busybox-static iproute2 nftables procps gcc libc6-dev pkg-config)

say() { printf '%s: %s\n' "${0##*/}" "$*" || true; }
die() {
    local status=$1
    shift
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit "$status"
}

# Run a command, three times at most: mirrors have bad moments.
retry() {
    local attempt
    for attempt in 1 2 3; do
        step "$@" && return 0
        [ "$attempt" = 3 ] || { say "failed (attempt $attempt of 3): $*" && step sleep $((attempt * 5)); }
    done
    return 1
}

# Run a command so that a signal to this script ends it too, at once and with all of its children: it is a job, hence a
# process group, of its own, which `interrupted` finds. Its standard input is empty.
step_ends=yes
# Who starts us in the background has us ignore interrupts, and our children with us; they shall heed ours.
heedful=(env --default-signal=INT)
step() {
    local status=0 as=("${heedful[@]}")
    if [ "$(type -t "$1")" = function ]; then as=(); fi
    set -m
    "${as[@]}" "$@" </dev/null &
    set +m
    wait "$!" || status=$?
    return "$status"
}

# The same for a command that must not be cut short; the script ends when the command has.
patiently() {
    local status=0
    step_ends=no
    "$@" || status=$?
    step_ends=yes
    return "$status"
}

# Have SIGINT, SIGTERM and SIGHUP end the running step, wait for it, and end this script with 128 + the signal.
on_signal() {
    local pair
    for pair in INT:2 TERM:15 HUP:1; do
        # shellcheck disable=SC2064 # signal and number are filled in now
        trap "interrupted ${pair%:*} ${pair#*:}" "${pair%:*}"
    done
}

interrupted() {
    trap '' INT TERM HUP
    local group
    # Not a variable of `step`: a signal may come before it is set.
    for group in $(jobs -p); do
        if [ "$step_ends" = yes ]; then
            # An interrupt is what tox and pip end in an orderly way from.
            kill -INT -- "-$group" 2>/dev/null || true
        else
            say "SIG$1: waiting for a step that must not be cut short" >&2
        fi
        wait "$group" 2>/dev/null || true
        # What does not heed an interrupt, or has been left behind.
        [ "$step_ends" = no ] || kill -TERM -- "-$group" 2>/dev/null || true
    done
    printf '%s: ended by SIG%s\n' "${0##*/}" "$1" >&2 || true
    exit $((128 + $2))
}

# Become root, where the machine lets us; everything after this line runs as root.
as_root() {
    [ "$(id -u)" != 0 ] || return 0
    command -v sudo >/dev/null ||
        die 2 "containers need root, and there is no sudo here: run it as root (su -c '$0')"
    local pass=() name
    if [ -d "${HOME:-}/.pyenv" ]; then export PYENV_ROOT=${PYENV_ROOT:-$HOME/.pyenv}; fi
    # What decides where packages come from, and how the tests run.
    for name in CI PATH PYENV_ROOT LXC_POOL_OS_RELEASE http_proxy https_proxy no_proxy HTTP_PROXY HTTPS_PROXY NO_PROXY \
        "${!PIP_@}" "${!TOX_@}" "${!LXC_POOL_TEST_@}"; do
        [ -z "${!name+set}" ] || pass+=("$name=${!name}")
    done
    say "containers need root: going on with sudo"
    exec sudo -- env "${pass[@]}" "$BASH" "$0" "$@"
}

# Give what root made in the caller's tree (environments, caches) back to the caller, if sudo was used.
give_back() {
    [ -n "${SUDO_UID:-}" ] && [ "$(stat -c %u "$root")" = "$SUDO_UID" ] || return 0
    find "$root" -xdev -user 0 -exec chown -h "$SUDO_UID:${SUDO_GID:-$SUDO_UID}" {} + || true
}

# Exit 2 with a list of what is needed, unless this is a distribution whose packages we know.
check_distribution() {
    local release=${LXC_POOL_OS_RELEASE:-/etc/os-release} family='' name='an unknown system'
    if [ -r "$release" ]; then
        # shellcheck source=/dev/null
        family=$(. "$release" && printf '%s %s' "${ID:-}" "${ID_LIKE:-}")
        # shellcheck source=/dev/null
        name=$(. "$release" && printf '%s' "${PRETTY_NAME:-${ID:-an unknown system}}")
    fi
    case " $family " in
        *" debian "* | *" ubuntu "*) command -v apt-get >/dev/null && return 0 ;;
    esac
    cat >&2 <<TEXT
${0##*/}: this is $name; only Debian, Ubuntu and their kin are set up by this script.
What is needed, with Debian's names for it:
  lxc 5 or newer (lxc-start, lxc-copy, lxc-attach)            lxc
  its headers, pkg-config, a C compiler                       lxc-dev pkg-config gcc libc6-dev
  a statically linked busybox                                 busybox-static
  ip, nft, ps                                                 iproute2 nftables procps
  Python 3.11 or newer with venv and headers                  python3 python3-venv python3-dev
Once they are installed:
  python3 -m venv .venv && .venv/bin/pip install -e '.[server]' tox
  .venv/bin/lxc-pool check        names what the host still lacks
  .venv/bin/tox                   the tests, as root
TEXT
    exit 2
}

# Put interpreters that pyenv holds on PATH, last: its shims answer to every name, but run only the chosen versions.
add_pyenv_interpreters() {
    local versions=${PYENV_ROOT:-${HOME:-}/.pyenv}/versions bin
    if command -v pyenv >/dev/null; then versions=$(pyenv root)/versions; fi
    for bin in "$versions"/3.1[1-9]*/bin; do
        if [ -x "$bin/python3" ]; then PATH=$PATH:$bin; fi
    done
    export PATH
}

# Print the path of a working Python of the version given (3.12, say), or fail.
find_interpreter() {
    local candidate
    while read -r candidate; do
        "$candidate" - "$1" 2>/dev/null <<'PYTHON' && return 0
import sys
if "%d.%d" % sys.version_info[:2] != sys.argv[1]:
    raise SystemExit(1)
print(sys.executable)
PYTHON
    done < <(type -aP "python$1" python3 || true)
    return 1
}

# Print the first Python on PATH that is new enough for the project, and can make a virtual environment with headers
# to build against.
find_python() {
    local version candidate
    for version in 3.11 3.12 3.13 3.14; do
        candidate=$(find_interpreter "$version") || continue
        "$candidate" - >/dev/null 2>&1 <<'PYTHON' || continue
import ensurepip, os, sysconfig, venv
raise SystemExit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))
PYTHON
        printf '%s\n' "$candidate"
        return 0
    done
    return 1
}

installed() { [ "$(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

# Whether the kernel has AppArmor: then liblxc starts nothing until its profile is loaded.
apparmor_is_on() { grep -qsx Y /sys/module/apparmor/parameters/enabled; }

# Install what the machine lacks of `packages`, and a Python if it has none that serves. Sets `python`.
install_packages() {
    local missing=() package
    if apparmor_is_on; then packages+=(apparmor); fi
    for package in "${packages[@]}"; do
        installed "$package" || missing+=("$package")
    done
    add_pyenv_interpreters
    python=$(find_python) || missing+=(python3 python3-venv python3-dev)
    if [ ${#missing[@]} = 0 ]; then
        say "skipped: every package is there already"
        return 0
    fi
    say "installing ${missing[*]}"
    local apt=(env DEBIAN_FRONTEND=noninteractive NEEDRESTART_MODE=l apt-get -q -y -o DPkg::Lock::Timeout=300)
    retry "${apt[@]}" update || die 5 "apt-get update failed"
    patiently retry "${apt[@]}" install --no-install-recommends "${missing[@]}" || die 5 "could not install ${missing[*]}"
    python=$(find_python) || die 2 "Python 3.11 or newer is needed, and this release's python3 is older"
}

# Make .venv unless it is there and works.
make_venv() {
    # A virtual environment whose Python is gone (an upgrade, a moved tree) is made anew.
    if [ -x "$venv/bin/python" ] && "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        return 0
    fi
    say "making the virtual environment $venv with $python"
    step "$python" -m venv --clear "$venv" || die 5 "could not make $venv"
}

# Install into .venv what the arguments after the first say, unless it was done before for the same pyproject.toml.
# The first argument names the step; its stamp is written last, so that an interrupted step is taken again.
venv_install() {
    local name=$1 stamp="$venv/.stamp-$1" want
    shift
    want=$({ printf '%s\n' "$root" "$*" && "$venv/bin/python" -VV && cat "$root/pyproject.toml"; } | sha256sum)
    if [ -r "$stamp" ] && [ "$(cat "$stamp")" = "$want" ]; then
        say "skipped: $name is in the virtual environment already"
        return 0
    fi
    say "installing $name into $venv"
    rm -f "$stamp"
    retry "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@" ||
        die 5 "could not install $name"
    printf '%s\n' "$want" >"$stamp"
}

# One set-up at a time in one tree. The lock is let go with `unlock`, before anything long begins.
lock() {
    exec 9<"$root/pyproject.toml"
    flock -n 9 || {
        say "waiting for another set-up in this tree to end"
        flock 9
    }
}
unlock() { exec 9<&-; }
