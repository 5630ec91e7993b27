# shellcheck shell=bash
# Sourced by the scripts: makes .venv if there is none, installs the project with the extras in $1 (may be none), activates it.
# A second call sees that setup.cfg has not changed and installs nothing.

ensure_venv() {
  local extras="${1:-}" root stamp python said
  root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
  cd "$root" || return
  if [ ! -x .venv/bin/python ]; then
    python=""
    for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11; do
      if [ -n "$candidate" ] && command -v "$candidate" >/dev/null &&
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        python="$candidate"
        break
      fi
    done
    if [ -z "$python" ]; then
      echo "gpt_jax needs Python 3.11 or newer; set PYTHON=/path/to/python3." >&2
      exit 1
    fi
    echo "making .venv with $("$python" --version)"
    # Where the module is there but not its pip (Debian without python3-venv), another pip may install one.
    if ! said="$("$python" -m venv .venv 2>&1)" && ! { "$python" -m venv --clear --without-pip .venv &&
      "$python" -m pip --python .venv/bin/python install --quiet --disable-pip-version-check pip; } >/dev/null 2>&1; then
      rm -rf .venv
      echo "$python cannot make .venv (${said%%$'\n'*}); on Debian and Ubuntu: apt install python3-venv" >&2
      exit 1
    fi
  fi
  stamp=".venv/.installed-$(echo "$extras" | tr ',' '-')-$(cat setup.cfg pyproject.toml | cksum | cut -d' ' -f1)"
  if [ ! -e "$stamp" ]; then
    echo "installing gpt_jax${extras:+[$extras]}"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".${extras:+[$extras]}"
    touch "$stamp"
  fi
  export PATH="$root/.venv/bin:$PATH"
  # Faster training on CPU (docs/RESULTS.md): huge pages, and freed memory is kept for the next step. glibc reads this
  # when a process starts.
  local malloc="glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184"
  export GLIBC_TUNABLES="${GLIBC_TUNABLES:-$malloc}"
}
