#!/usr/bin/env bash
# Installs the project with its test extra into .venv and runs the tests: scripts/test.sh [--all] [pytest arguments].
# --all adds the slow tests and, in CI, the comparison with PyTorch and Hugging Face.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/_venv.sh
all=0
if [ "${1:-}" = "--all" ]; then
  all=1
  shift
fi
extras=test
if [ "$all" = 1 ] && [ -n "${CI:-}" ]; then extras=test,peer; fi
ensure_venv "$extras"
export JAX_PLATFORMS=cpu
ruff check gpt_jax configs scripts tests
if [ "$all" = 1 ]; then
  exec python -m pytest "$@"
fi
exec python -m pytest -m "not slow" "$@"
