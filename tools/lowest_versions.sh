#!/usr/bin/env bash
# Tests attention, models and compiled training steps with the lowest versions that requirements.txt allows:
#
#     tools/lowest_versions.sh [VENV] [OPTIONS OF PYTEST]
#
# `make lowest` calls it. The environment is made once (several gigabytes) and again when a bound changes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${1:-.venv-lowest}
shift || true
wanted=$venv/lowest.txt

lowest() { # name==version for every name>=version; FFCV is built from source, and no test here needs it
    sed -n 's/ *#.*//; /^ffcv/d; s/^\([A-Za-z0-9_.-]*\(\[[a-z]*\]\)\?\)>=\(.*\)$/\1==\3/p' requirements.txt
    printf '%s\n' 'pytest==8.0' 'pytest-xdist==3.6.1' 'hypothesis==6.100'
}

if [ "$(lowest)" != "$(cat "$wanted" 2>/dev/null)" ]; then
    "${PYTHON:-python3}" -m venv --clear "$venv"
    printf 'lowest: installing %s\n' "$(lowest | xargs)" >&2
    # shellcheck disable=SC2046  # one word per package
    "$venv/bin/python" -m pip --disable-pip-version-check install --quiet $(lowest)
    lowest >"$wanted"
fi
exec env VIL_SLOW_TESTS=1 OMP_NUM_THREADS=1 "$venv/bin/python" -m pytest tests/attention tests/models "$@"
