#!/usr/bin/env bash
# Install everything into a virtual environment on Debian or Ubuntu:
#
#     tools/setup.sh [VENV]
#
# System packages are installed if the user is root or has sudo without a password. Without them, everything but
# FFCV is installed, and one line names the command that installs them; without Chromium, the test that opens
# report pages in a browser is skipped. Called by the Makefile.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${1:-.venv}
# Exists while pip runs: an interrupted pip can leave an incomplete package that it later considers installed.
unfinished=$venv/.unfinished
log=$venv/ffcv.log

note() { printf 'setup: %s\n' "$*" >&2; }
fail() { note "$*"; exit 1; }

lock() { # wait for another one: this one would take it for interrupted, and remove its environment
    local status=0
    { exec 9>>tools/setup.sh; } 2>/dev/null || return 0 # for writing: else NFS refuses the lock
    flock -n 9 2>/dev/null || status=$?
    if [ "$status" -eq 1 ]; then # 1: it is locked; others: no locks here
        note "waiting for another tools/setup.sh in this folder"
        flock 9
    fi
}

find_python() { # print the first interpreter that is new enough
    local candidate
    for candidate in "${PYTHON:-python3}" python3.14 python3.13 python3.12 python3.11 python3.10; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

has_venv() { "$python" -c 'import ensurepip, venv' 2>/dev/null; }

missing_packages() { # print the Debian packages that the environment or FFCV's build needs and that are missing
    local version
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    has_venv || echo "python$version-venv"
    "$python" -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null ||
        echo "python$version-dev"
    command -v g++ >/dev/null || echo g++
    command -v pkg-config >/dev/null || echo pkg-config
    pkg-config --exists opencv4 2>/dev/null || echo libopencv-dev
    pkg-config --exists libturbojpeg 2>/dev/null || echo libturbojpeg0-dev
}

install_packages() { # install by apt-get, as root or by sudo without a password; fail if neither is possible
    local as_root=()
    command -v apt-get >/dev/null || return 1
    if [ "$(id -u)" -ne 0 ]; then
        sudo -n true 2>/dev/null || return 1
        as_root=(sudo -n)
    fi
    note "installing $*"
    if [ -z "${updated:-}" ]; then
        "${as_root[@]}" apt-get update -qq >&2 || return 1
        updated=yes
    fi
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >&2
}

build_ffcv() { # build a wheel of FFCV; separately, so that everything else is installed if this fails
    if [ -n "$missing" ]; then
        note "installing without FFCV; to install it: $remedy && touch requirements.txt"
        return 1
    fi
    if ! "${pip[@]}" wheel --no-deps --wheel-dir "$venv/wheels" "$ffcv" >"$log" 2>&1; then
        note "installing without FFCV: its build failed, see the end of $log"
        return 1
    fi
}

missing_browser() { # print the browser in which a test opens the pages of tools/report.py, if it is missing
    command -v chromium >/dev/null || command -v google-chrome >/dev/null || echo chromium
}

lock
python=$(find_python) || fail "Python 3.10 or newer is missing: sudo apt-get install -y python3 python3-venv"
missing=$(missing_packages | xargs)
remedy="sudo apt-get install -y $missing"
if [ -n "$missing" ]; then
    # shellcheck disable=SC2086  # one argument per package
    install_packages $missing && missing=$(missing_packages | xargs) || true
fi

browser=$(missing_browser) # separately, so that the others are installed if there is no such package
if [ -n "$browser" ] && ! install_packages "$browser"; then
    note "the test of report pages will be skipped; to run it: sudo apt-get install -y $browser"
fi

if [ -e "$unfinished" ]; then
    note "the last installation was interrupted; creating $venv again"
    rm -rf "$venv"
fi
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    has_venv || fail "Python's module venv is missing: $remedy"
    "$python" -m venv --clear "$venv"
fi
pip=("$venv/bin/python" -m pip --disable-pip-version-check)
[ -t 2 ] || pip+=(--quiet) # progress bars on a terminal only

touch "$unfinished"
ffcv=$(grep '^ffcv' requirements.txt)
if ! "$venv/bin/python" -c 'import ffcv' 2>/dev/null && ! build_ffcv; then
    ffcv=
fi
note "installing requirements.txt and requirements-dev.txt (several gigabytes with PyTorch; minutes, once)"
grep -v '^ffcv' requirements.txt >"$venv/requirements.txt"
"${pip[@]}" install -r "$venv/requirements.txt" -r requirements-dev.txt --find-links "$venv/wheels" ${ffcv:+"$ffcv"}
if [ -n "$ffcv" ] && ! "$venv/bin/python" -c 'import ffcv.loader' >"$log" 2>&1; then
    note "FFCV is installed but cannot be imported: see the end of $log"
fi
rm "$unfinished"
