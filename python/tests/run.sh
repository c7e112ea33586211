#!/usr/bin/env bash
# The tests of the Python package against a real kvkeepd. Makes a virtual environment and an importable package under target/;
# the module and the server are the ones that cargo built.
#
#   python/tests/run.sh [arguments of pytest]
#   PROFILE=release KVKEEP_KVKEEPD=/path/of/kvkeepd python/tests/run.sh -k forks
#   PROFILE=release python/tests/run.sh bench [flags of bench.py]      needs the example engine_speed of kvkeep-client
set -euo pipefail
cd "$(dirname "$0")/../.."

readonly BIN=target/${PROFILE:-debug} VENV=target/kvkeep-venv PACKAGE=target/kvkeep-package

skip() { printf '\nSKIPPED python/tests: %s\n' "$*" >&2; exit 0; }

export KVKEEP_KVKEEPD=${KVKEEP_KVKEEPD:-$PWD/$BIN/kvkeepd}
[[ -x $KVKEEP_KVKEEPD ]] || { printf '%s is missing: cargo build -p kvkeep-node\n' "$KVKEEP_KVKEEPD" >&2; exit 1; }
[[ -f $BIN/lib_native.so ]] || { printf '%s/lib_native.so is missing: cargo build -p kvkeep-python\n' "$BIN" >&2; exit 1; }
command -v python3 >/dev/null || skip 'no python3'
python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || skip 'the package needs Python 3.11 or newer'
if ! cmp -s python/tests/requirements.txt "$VENV/requirements.txt"; then
  python3 -m venv --clear "$VENV" >/dev/null 2>&1 || skip 'python3 has no venv module'
  printf 'kvkeep: installing what the tests of the Python package need in %s ...\n' "$VENV" >&2
  "$VENV/bin/pip" install --quiet --disable-pip-version-check --requirement python/tests/requirements.txt ||
    skip 'pip cannot install pytest'
  cp python/tests/requirements.txt "$VENV/requirements.txt"
fi

# The package as a wheel has it: its Python files, and the module beside them.
mkdir -p "$PACKAGE/kvkeep"
for file in python/kvkeep/*; do
  ln -sfn "$PWD/$file" "$PACKAGE/kvkeep/"
done
cp "$BIN/lib_native.so" "$PACKAGE/kvkeep/.next" && mv "$PACKAGE/kvkeep/.next" "$PACKAGE/kvkeep/_native.abi3.so"

export PYTHONPATH=$PWD/$PACKAGE PYTHONDONTWRITEBYTECODE=1
if [[ ${1:-} == bench ]]; then
  exec "$VENV/bin/python" python/tests/bench.py "$BIN/examples/engine_speed" "${@:2}"
fi
exec "$VENV/bin/python" -m pytest -q -p no:cacheprovider python/tests "$@"
