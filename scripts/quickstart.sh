#!/usr/bin/env bash
# From a fresh clone to a trained model: installs, builds tokenizer and data from the embedded corpus, pre-trains,
# evaluates, samples, writes the report. The last line is JSON. Arguments go to `gpt-jax train`.
set -euo pipefail
cd "$(dirname "$0")/.."
started=$(date +%s)
source scripts/_venv.sh
ensure_venv tasks
workdir="${WORKDIR:-runs/quickstart}"
summary="$(gpt-jax train --config=quickstart --workdir="$workdir" "$@" | tee >(cat >&2) | tail -n 1)"
gpt-jax sample --workdir="$workdir" --prompt "The " --max-tokens 100 --seed 1 >&2
SUMMARY="$summary" python - "$started" <<'PY'
import json, os, sys, time

summary = json.loads(os.environ["SUMMARY"])
print(json.dumps({
    "bits_per_byte": summary.get("valid/bits_per_byte"),
    "xz_bits_per_byte": summary.get("xz_bits_per_byte"),
    "unigram_bits_per_byte": summary.get("unigram_bits_per_byte"),
    "report": summary.get("report"),
    "seconds": round(time.time() - int(sys.argv[1])),
}))
PY
