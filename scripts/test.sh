#!/usr/bin/env bash
# Installs the project with its test extra into .venv and runs the tests: scripts/test.sh [--all] [pytest arguments].
# --all adds the slow tests and what compares with torch (extra `peer`: where pip finds no CPU build of it, name the
# index that has one in PIP_EXTRA_INDEX_URL, or pip takes the far larger one for GPUs).
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/_venv.sh
# A file's tests stay together, which share compiled programs. `-n 0` runs them in one process, for a debugger.
tests=(python -m pytest -n 2 --dist worksteal)
if [ "${1:-}" = "--all" ]; then
  shift
  ensure_venv test,peer
else
  ensure_venv test
  tests+=(-m "not slow")
fi
export JAX_PLATFORMS=cpu
ruff check gpt_jax configs scripts tests
exec "${tests[@]}" "$@"
