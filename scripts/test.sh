#!/usr/bin/env bash
# Installs the project with its test extra into .venv and runs the tests: scripts/test.sh [--all] [pytest arguments].
# --all adds the slow tests.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/_venv.sh
all=0
if [ "${1:-}" = "--all" ]; then
  all=1
  shift
fi
ensure_venv test
export JAX_PLATFORMS=cpu
ruff check gpt_jax configs scripts tests
if [ "$all" = 1 ]; then
  exec python -m pytest "$@"
fi
exec python -m pytest -m "not slow" "$@"
