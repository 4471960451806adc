#!/usr/bin/env bash
# Usage: infra/setup.sh
# Puts the environment of requirements.lock in place: built in .env/<first 12 digits of the lock's sha256>, complete
# when the file `complete` in it is written, and then named by the link .venv, which is switched in one step.
# Returns at once where that is done. A killed build is removed and built again; of two builds one waits.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly NEED_BYTES=11000000000 # 8 GB installed, and the archives pip keeps until the end
root=$(pwd -P)
digest=$(sha256sum requirements.lock)
home=.env/${digest:0:12}
read -r project _ < <(sha256sum pyproject.toml)
pip=("$home/bin/python" -m pip --disable-pip-version-check install -q --no-deps --no-build-isolation)
readonly root home project pip

fail() {
    echo "setup: $*" >&2
    exit 1
}

# Scripts of an environment hold absolute paths, hence the folder; the project's entry points come from pyproject.toml.
is_complete() { [[ -f $home/complete && $(<"$home/complete") == "$root $project" ]]; }
is_linked() { [[ -L .venv && $(readlink .venv) == "$home" ]]; }

find_python() {
    local candidate probe
    probe='import platform, sys, venv, ensurepip
libc, version = platform.libc_ver()
fits = (sys.version_info[:2] == (3, 11) and platform.python_implementation() == "CPython" and sys.platform == "linux"
        and platform.machine() == "x86_64" and libc == "glibc" and tuple(map(int, version.split("."))) >= (2, 28))
sys.exit(not fits)'
    for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3 python; do
        "$candidate" -c "$probe" >/dev/null 2>&1 && { echo "$candidate"; return; }
    done
    fail "requirements.lock holds packages for CPython 3.11 with venv on Linux x86_64 (glibc 2.28 or later), and" \
        "no such python was found here ($(uname -sm)); install it or name it: PYTHON=/path/to/python3.11 make setup"
}

require_space() {
    local have
    have=$(($(df --output=avail -B1 .env | tail -n 1)))
    ((have >= NEED_BYTES)) || fail "the environment needs $((NEED_BYTES / 1000000)) MB of free disk below $root/.env," \
        "which has $((have / 1000000)) MB; free some (an environment no longer used lies in .env/) and run it again"
}

run_logged() { # run_logged WHAT COMMAND...: quiet unless it fails
    local what=$1
    shift
    "$@" >>"$home.log" 2>&1 || {
        tail -n 20 "$home.log" >&2
        fail "$what failed; the lines above are the end of $home.log, and running it again starts afresh"
    }
}

install_project() {
    run_logged "installing the project" "${pip[@]}" -e .
    echo "$root $project" >"$home/complete.new"
    mv -T "$home/complete.new" "$home/complete"
}

build() {
    local python list
    python=$(find_python)
    rm -rf "$home"
    require_space
    echo "setup: installing requirements.lock into $home: 3 to 4 minutes on two cores, 8 GB of disk" \
        "(log: $home.log)"
    : >"$home.log"
    run_logged "creating the environment" "$python" -m venv "$home"
    mkdir "$home/tmp" # a killed pip leaves its archives here, where the next build removes them
    # setuptools first: it builds what comes as a source archive, so nothing runs whose hash is not in the lock
    awk '/^setuptools==/ {take = 1} take {print} take && !/\\$/ {exit}' requirements.lock >"$home/tmp/setuptools.txt"
    for list in "$home/tmp/setuptools.txt" requirements.lock; do
        TMPDIR=$root/$home/tmp run_logged "installing requirements.lock" "${pip[@]}" --require-hashes -r "$list"
    done
    rm -rf "$home/tmp"
    install_project
    echo "setup: environment complete after $SECONDS s"
}

is_complete && is_linked && exit 0

mkdir -p .env
exec {lock}>.env/lock
flock -n "$lock" || { echo "setup: another setup is at work; waiting for it"; flock "$lock"; }
if [[ -f $home/complete && $(<"$home/complete") == "$root "* ]]; then
    is_complete || install_project
else
    build
fi
[[ ! -e .venv || -L .venv ]] || fail "$root/.venv is a folder of another making; remove it: rm -r .venv"
ln -sfn "$home" ".venv.$$"
mv -T ".venv.$$" .venv
for other in .env/*/; do
    [[ $other == "$home/" ]] || echo "setup: ${other%/} is no longer used by .venv; remove it when no run needs it"
done
