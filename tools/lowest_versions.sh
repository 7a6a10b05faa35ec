#!/usr/bin/env bash
# Test attention, models and compiled training steps with the lowest versions that requirements.txt allows:
#
#     tools/lowest_versions.sh [VENV] [PYTEST_OPTION ...]
#
# Called by `make lowest`. The environment (several gigabytes) is created once, and again if a version changes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${1:-.venv-lowest}
shift || true
versions=$venv/lowest.txt

lowest() { # print name==version for every name>=version; no test here needs FFCV, which is built from source
    sed -n 's/ *#.*//; /^ffcv/d; s/^\([A-Za-z0-9_.-]*\(\[[a-z]*\]\)\?\)>=\(.*\)$/\1==\3/p' requirements.txt
    printf '%s\n' 'pytest==8.0' 'pytest-xdist==3.6.1' 'hypothesis==6.100'
}

if [ "$(lowest)" != "$(cat "$versions" 2>/dev/null)" ]; then
    "${PYTHON:-python3}" -m venv --clear "$venv"
    printf 'lowest: installing %s\n' "$(lowest | xargs)" >&2
    # shellcheck disable=SC2046  # one argument per package
    "$venv/bin/python" -m pip --disable-pip-version-check install --quiet $(lowest)
    lowest >"$versions"
fi
exec env VIL_SLOW_TESTS=1 OMP_NUM_THREADS=1 "$venv/bin/python" -m pytest tests/attention tests/models "$@"
