#!/usr/bin/env bash
# Trains on a Cloud TPU pod slice: makes it if need be, ships the commit checked out here to every host, installs it,
# runs one process per host, starts again after a preemption, and brings every host's log back.
#
#   scripts/launch_tpu_pod.sh --name run1 --zone us-east5-a --type v5p-256 --spot --restarts 5 -- \
#     gpt-jax train --config=gpt3_1b3 --workdir=/mnt/shared/runs/run1
#
#   --name NAME --zone ZONE --type TYPE   of the slice (accelerator type, e.g. v5litepod-256)
#   --version VERSION                     software of the hosts; default: that of the type
#   --project PROJECT                     default: gcloud's own        --spot        may be taken away, costs less
#   --restarts N                          after preemptions and lost hosts (3); a mistake of yours is never retried
#   --logs DIR                            where the logs come to (runs/logs/NAME)
#   --dry-run                             says every command and runs none
# Exit codes: 0 finished; 1 a mistake, see the logs, or hosts or a slice that could not be made ready; 75 preempted or
# lost more often than --restarts.
set -euo pipefail
cd "$(dirname "$0")/.."

name="" zone="" type="" version="" project="" spot="" restarts=3 logs="" dry=""
usage() {
  sed -n '2,/^set -euo/p' "$0" | sed '$d; s/^# \{0,1\}//' >&2
  echo "launch_tpu_pod: $1" >&2
  exit 1
}
while [ $# -gt 0 ]; do
  case "$1" in
    --name | --zone | --type | --version | --project | --restarts | --logs)
      [ $# -ge 2 ] || usage "$1 needs a value."
      printf -v "${1#--}" '%s' "$2"
      shift 2
      ;;
    --spot) spot=1 && shift ;;
    --dry-run) dry=1 && shift ;;
    --) shift && break ;;
    *) usage "unknown option $1." ;;
  esac
done
[ -n "$name" ] && [ -n "$zone" ] && [ -n "$type" ] || usage "--name, --zone and --type are needed."
[ $# -gt 0 ] || usage "no command: -- gpt-jax train ...."
[[ "$restarts" =~ ^[0-9]+$ ]] || usage "--restarts is '$restarts'; it is a whole number."
logs="${logs:-runs/logs/$name}"
if [ -z "$version" ]; then
  case "$type" in
    v5p-*) version="v2-alpha-tpuv5" ;;
    v5lite*) version="v2-alpha-tpuv5-lite" ;;
    v6e-*) version="v2-alpha-tpuv6e" ;;
    *) version="tpu-ubuntu2204-base" ;;
  esac
fi

commit="$(git rev-parse HEAD)"
changed="$(git diff --name-only HEAD && git ls-files --others --exclude-standard -- configs gpt_jax)"
if [ -n "$changed" ]; then
  echo "launch_tpu_pod: there are uncommitted changes, which would not be shipped; commit them first: ${changed//$'\n'/ }." >&2
  [ -n "$dry" ] || exit 1
fi

run() {
  if [ -n "$dry" ]; then
    printf '+'
    printf ' %q' "$@"
    printf '\n'
  else
    "$@"
  fi
}
where=(--zone "$zone" --quiet)
[ -z "$project" ] || where+=(--project "$project")
tpu() { run gcloud compute tpus "$@" "${where[@]}"; }
on_all() { tpu tpu-vm ssh "$name" --worker=all --command "$1"; }

# The state of the queued resource, NONE if there is none; fails if it cannot be asked five times in a row.
state() {
  [ -z "$dry" ] || { echo ACTIVE && return; }
  local now
  for _ in 1 2 3 4 5; do
    if now="$(gcloud compute tpus queued-resources describe "$name" --format='value(state.state)' "${where[@]}" 2>"$errors")"; then
      echo "$now" && return
    elif grep -q 'NOT_FOUND\|was not found' "$errors"; then
      echo NONE && return
    fi
    sleep 30
  done
  echo "launch_tpu_pod: the state of $name cannot be asked: $(tail -n 1 "$errors")" >&2
  return 1
}

removed=0 # slices that were suspended or failed; each attempt may find one
remove_slice() {
  if [ "$removed" -gt "$restarts" ]; then
    echo "launch_tpu_pod: $name is $1 again, more often than --restarts" >&2
    if [ "$1" = FAILED ]; then exit 1; else exit 75; fi
  fi
  removed=$((removed + 1))
  tpu queued-resources delete "$name" --force
}

ensure_slice() {
  local now asked
  asked=(queued-resources create "$name" --node-id "$name" --accelerator-type "$type" --runtime-version "$version")
  [ -z "$spot" ] || asked+=(--spot)
  [ -z "$dry" ] || tpu "${asked[@]}"
  while :; do
    now="$(state)" || exit 1
    case "$now" in
      ACTIVE) return ;;
      NONE) tpu "${asked[@]}" ;;
      SUSPENDED | SUSPENDING | FAILED) remove_slice "$now" ;;
      *) echo "launch_tpu_pod: $name is $now, waiting" >&2 ;;
    esac
    sleep 30
  done
}

gather_logs() {
  local hosts=1 k
  [ -n "$dry" ] || hosts="$(gcloud compute tpus tpu-vm describe "$name" --format='value(networkEndpoints.len())' "${where[@]}" || echo 0)"
  for ((k = 0; k < hosts; k++)); do
    run mkdir -p "$logs/host_$k"
    tpu tpu-vm scp --recurse --worker="$k" "$name:gpt_jax_logs" "$logs/host_$k" || true
  done
}

bundle="$(mktemp --suffix .bundle)"
output="$(mktemp)"
errors="$(mktemp)"
trap 'rm -f "$bundle" "$output" "$errors"' EXIT
run git bundle create --quiet "$bundle" HEAD
printf -v command '%q ' "$@"
# Each host says how it ended: ssh itself gives one code for all. What a lost connection left running is ended first.
remote="cd gpt_jax && source .venv/bin/activate && python -m gpt_jax.launch --alone ../gpt_jax_held --logs ../gpt_jax_logs -- $command; echo \"exit code \$? of \$(hostname)\""

code=75
for ((left = restarts; left >= 0; left--)); do
  ensure_slice
  if tpu tpu-vm scp "$bundle" scripts/_host.sh "$name:" --worker=all &&
    on_all "bash _host.sh $(basename "$bundle") $commit gpt_jax tpu,gcs"; then
    on_all "$remote" 2>&1 | tee "$output" || true
  elif [ "$(state)" = ACTIVE ]; then # the hosts are there, so it was no preemption
    echo "launch_tpu_pod: the hosts could not be made ready: see above" >&2
    code=1 && break
  fi
  gather_logs
  [ -z "$dry" ] || exit 0
  codes="$(sed -n 's/.*exit code \([0-9]*\) of .*/\1/p' "$output" | sort -un)"
  if [ "$codes" = 0 ]; then
    code=0 && break
  fi
  # 1 and the like are a process's own failure; from 128 on a signal: killed, or aborted because another was lost.
  if [ -n "$(awk '$1 > 0 && $1 != 75 && $1 < 128' <<<"$codes")" ]; then
    echo "launch_tpu_pod: a process failed by itself, see $logs" >&2
    code=1 && break
  fi
  echo "launch_tpu_pod: preempted or lost a host; $left restarts left" >&2
  : >"$output"
done
exit "$code"
