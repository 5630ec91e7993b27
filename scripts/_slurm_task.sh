#!/usr/bin/env bash
# Runs as each task of a SLURM job: the launcher, and its exit code as a file of its own.
#   _slurm_task.sh ENDS COMMAND...
# SLURM tells this shell alone of a SIGTERM, which passes it on and waits: the command saves and ends with 75.
ends="$1" && shift
told=""
python -m gpt_jax.launch -- "$@" &
child=$!
trap 'told=1; kill -TERM "$child" 2>/dev/null' TERM
while :; do
  wait "$child"
  code=$?
  [ -n "$told" ] || break # a signal ends `wait`, not the launcher
  told=""
done
echo "$code" >"$ends/$SLURM_PROCID"
exit "$code"
