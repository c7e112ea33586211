#!/usr/bin/env bash
# Stock gRPC from Python against a node. Makes a virtual environment under target/, starts the built kvkeepd, runs
# client.py. With `bench`: grpc_bench.py instead, against kvkeepd and the bare service of kvkeep-bench.
#
#   tests/python/run.sh                   the test (dev binaries)
#   PROFILE=release tests/python/run.sh bench [flags of grpc_bench.py]
set -euo pipefail
cd "$(dirname "$0")/../.."

readonly BIN=target/${PROFILE:-debug} VENV=target/python-venv

skip() { printf '\nSKIPPED tests/python: %s\n' "$*" >&2; exit 0; }

[[ -x $BIN/kvkeepd ]] || { printf '%s/kvkeepd is missing: cargo build -p kvkeep-node\n' "$BIN" >&2; exit 1; }
command -v python3 >/dev/null || skip 'no python3'
if ! cmp -s tests/python/requirements.txt "$VENV/requirements.txt"; then
  python3 -m venv --clear "$VENV" >/dev/null 2>&1 || skip 'python3 has no venv module'
  printf 'kvkeep: installing stock gRPC for Python in %s ...\n' "$VENV" >&2
  "$VENV/bin/pip" install --quiet --disable-pip-version-check --requirement tests/python/requirements.txt ||
    skip 'pip cannot install grpcio'
  cp tests/python/requirements.txt "$VENV/requirements.txt"
fi

work=$(mktemp -d target/python-test.XXXXXX)
arena=$(mktemp -d /dev/shm/kvkeep-python.XXXXXX 2>/dev/null) || arena=$work
pids=()
finish() {
  local status=$?
  kill "${pids[@]}" 2>/dev/null || true
  wait "${pids[@]}" 2>/dev/null || true
  if [[ $status -ne 0 ]]; then tail -n 40 "$work"/*.log >&2 || true; fi
  rm -rf "$work" "$arena"
}
trap finish EXIT

# Starts a server and leaves its address in `address`; it says `... ready listen=HOST:PORT`.
serve() { # serve <name> <command...>
  local name=$1 out="$work/$1.out"
  shift
  "$@" >"$out" 2>"$work/$name.log" &
  pids+=($!)
  for ((i = 0; i < 600; i++)); do
    address=$(sed -n 's/.* ready listen=//p' "$out")
    if [[ -n $address ]]; then return 0; fi
    kill -0 "${pids[-1]}" 2>/dev/null || { printf '%s did not start\n' "$name" >&2; exit 1; }
    sleep 0.05
  done
  printf '%s did not become ready\n' "$name" >&2
  exit 1
}

node=("$BIN/kvkeepd" --data-dir "$work/data" --listen 127.0.0.1:0 --arena-dir "$arena" --keep-free-bytes 0)
if [[ ${1:-} == bench ]]; then
  shift
  serve kvkeepd "${node[@]}" --arena-bytes 2GiB --no-nvme
  kvkeepd=$address
  serve bare "$BIN/kvkeep-bench" bare-server --block-bytes 1048576
  "$VENV/bin/python" tests/python/grpc_bench.py "$kvkeepd" "$address" "$@"
else
  serve kvkeepd "${node[@]}" --arena-bytes 128MiB --nvme-bytes 256MiB
  "$VENV/bin/python" tests/python/client.py "$address"
fi
