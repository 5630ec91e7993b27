#!/usr/bin/env bash
# Runs on each host of a pod or cluster: checks out a commit, finds or installs a Python that is new enough, installs.
#   _host.sh BUNDLE COMMIT FOLDER EXTRAS
# BUNDLE is a `git bundle` or the URL of a repository. What is there already is kept, so a restart takes seconds.
set -euo pipefail
bundle="$1" commit="$2" folder="$3" extras="$4"
if [ -e "$bundle" ]; then bundle="$(realpath "$bundle")"; fi # git -C looks for it from the folder
if ! git -C "$folder" rev-parse --verify --quiet "$commit^{commit}" >/dev/null 2>&1; then
  if [ -d "$folder/.git" ]; then
    git -C "$folder" fetch --quiet "$bundle" "$commit" || git -C "$folder" fetch --quiet "$bundle" HEAD
  else
    git clone --quiet --no-checkout "$bundle" "$folder"
  fi
fi
cd "$folder"
git checkout --quiet --force --detach "$commit"
if [ ! -x .venv/bin/python ]; then
  new_enough='import sys; sys.exit(sys.version_info < (3, 11))'
  for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11; do
    if [ -n "$candidate" ] && command -v "$candidate" >/dev/null && "$candidate" -c "$new_enough"; then
      export PYTHON="$candidate"
      break
    fi
    PYTHON=""
  done
  if [ -z "${PYTHON:-}" ]; then # the image's is too old: fetch one of our own
    echo "$(hostname): $(python3 --version 2>&1) is too old, installing 3.12"
    python3 -m pip install --user --quiet uv
    python3 -m uv python install --quiet 3.12
    PYTHON="$(python3 -m uv python find 3.12)"
    export PYTHON
  fi
fi
# shellcheck source=scripts/_venv.sh
source scripts/_venv.sh
ensure_venv "$extras"
echo "$(hostname): $(git rev-parse --short HEAD) on $(.venv/bin/python --version)"
