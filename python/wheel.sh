#!/usr/bin/env bash
# Makes the wheel: the module, the Python files, and the programs kvkeepd and kvkeepctl. `make wheel` runs it.
#
#   PROGRAMS=target/release python/wheel.sh     where the programs are (built beforehand)
#   OUT=target/wheels                           where the wheel goes
set -euo pipefail
cd "$(dirname "$0")/.."

readonly PROGRAMS=${PROGRAMS:-target/release} OUT=${OUT:-target/wheels} VENV=target/wheel-venv BIN=python/kvkeep/bin

say() { printf 'kvkeep: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }

if [[ ! -x $VENV/bin/maturin ]]; then
  python3 -m venv --clear "$VENV" || fail 'a wheel needs python3 with its venv module'
  "$VENV/bin/pip" install --quiet --disable-pip-version-check 'maturin>=1.9,<2' || fail 'pip cannot install maturin'
fi

# Without what only debuggers read, a wheel is a third of the size.
mkdir -p "$BIN"
trap 'rm -rf "$BIN"' EXIT
for program in kvkeepd kvkeepctl; do
  [[ -x $PROGRAMS/$program ]] || fail "$PROGRAMS/$program is missing: make build"
  objcopy --strip-debug "$PROGRAMS/$program" "$BIN/$program"
done

# maturin audits the module; the programs decide, too, which systems the wheel is for.
newest() { # newest <version set>: the newest version of it that the programs ask for
  objdump -T "$BIN"/* | grep -o "\b$1_[0-9.]*[0-9]" | sort -uV | tail -n 1 | sed 's/.*_//'
}
glibc=$(newest GLIBC) glibcxx=$(newest GLIBCXX)
# The C++ library that comes with the oldest systems of a glibc, by the rules of manylinux.
case $glibcxx in
  '' | 3.4.[0-9] | 3.4.1? | 3.4.2[0-9]) with=2.34 ;;
  3.4.30) with=2.35 ;;
  3.4.3[123]) with=2.39 ;;
  *) fail "kvkeepd asks for GLIBCXX_$glibcxx: say here with which glibc that comes" ;;
esac
glibc=$(printf '%s\n%s\n' "$glibc" "$with" | sort -V | tail -n 1)
tag=manylinux_${glibc/./_}
say "a wheel for $tag (the programs ask for glibc $glibc, GLIBCXX $glibcxx)"

"$VENV/bin/maturin" build --release --strip --manifest-path python/Cargo.toml --out "$OUT" --compatibility "$tag"
