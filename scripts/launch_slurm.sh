#!/usr/bin/env bash
# Trains on a SLURM cluster: makes a copy of the commit checked out here on the shared file system, installs it there,
# and submits a job of one process per node, which SLURM queues again after a preemption. The job runs in the copy:
# relative paths are the commit's, but for runs/, --workdir, and files that are here and not in the commit.
#
#   scripts/launch_slurm.sh --nodes 4 --gpus 8 --time 24:00:00 --partition gpu --restarts 5 -- \
#     gpt-jax train --config=gpt2_124m --workdir=runs/g124
#
#   --nodes N --gpus N       whole nodes, GPUs of each (0: CPUs)     --time T --partition P --account A   SLURM's own
#   --restarts N             after preemptions and lost nodes (3); a mistake of yours is never retried
#   --logs DIR               a log per process (runs/logs)           --extras E   what pip installs (cuda)
#   --dry-run                prints the batch script and submits nothing
set -euo pipefail
cd "$(dirname "$0")/.."

nodes=1 gpus=8 time="24:00:00" partition="" account="" restarts=3 logs="" extras="cuda" dry=""
usage() {
  sed -n '2,/^set -euo/p' "$0" | sed '$d; s/^# \{0,1\}//' >&2
  echo "launch_slurm: $1" >&2
  exit 1
}
while [ $# -gt 0 ]; do
  case "$1" in
    --nodes | --gpus | --time | --partition | --account | --restarts | --logs | --extras)
      [ $# -ge 2 ] || usage "$1 needs a value."
      printf -v "${1#--}" '%s' "$2"
      shift 2
      ;;
    --dry-run) dry=1 && shift ;;
    --) shift && break ;;
    *) usage "unknown option $1." ;;
  esac
done
[ $# -gt 0 ] || usage "no command: -- gpt-jax train ...."
for number in nodes gpus restarts; do
  [[ "${!number}" =~ ^[0-9]+$ ]] || usage "--$number is '${!number}'; it is a whole number."
done
[ "$nodes" -gt 0 ] || usage "--nodes is 0; it is at least 1."
here="$PWD"
logs="${logs:-runs/logs}"
[[ "$logs" == /* ]] || logs="$here/$logs"
commit="$(git rev-parse HEAD)"
changed="$(git diff --name-only HEAD && git ls-files --others --exclude-standard -- configs gpt_jax)"
if [ -n "$changed" ]; then
  echo "launch_slurm: there are uncommitted changes, which would not run; commit them first: ${changed//$'\n'/ }." >&2
  [ -n "$dry" ] || exit 1
fi
code="$here/runs/code/$commit"

# Whether a path or glob names something here that is not in the commit.
is_beside() {
  local found file
  if [ -e "$1" ]; then found="$1"; else found="$(compgen -G "$1")" || return 1; fi
  while IFS= read -r file; do
    git cat-file -e "$commit:$file" 2>/dev/null || return 0
  done <<<"$found"
  return 1
}

# Paths and globs separated by commas, those beside the commit's files told from the root.
from_root() {
  local rest="$1," part path made=""
  while [ -n "$rest" ]; do
    part="${rest%%,*}" rest="${rest#*,}"
    path="${part#"${part%%[![:space:]]*}"}"
    case "$path" in
      "" | /* | -* | *://*) ;;
      *) if is_beside "$path"; then part="${part%"$path"}$here/$path"; fi ;;
    esac
    made+="$part,"
  done
  printf '%s' "${made%,}"
}

# The words of the command; what they name beside the commit's files is told from the root.
shopt -s globstar
command="" before=""
for word in "$@"; do
  flag="$before" value="$word"
  if [[ "$word" == --*=* ]]; then flag="${word%%=*}" value="${word#*=}"; fi
  case "$flag:$value" in
    --workdir: | --workdir:/* | --workdir:-* | --workdir:*://*) ;;
    --workdir:*) word="${word%"$value"}$here/$value" ;;
    --*) word="${word%"$value"}$(from_root "$value")" ;;
  esac
  before="$word"
  printf -v command '%s%q ' "$command" "$word"
done

script() {
  cat <<SBATCH
#!/usr/bin/env bash
#SBATCH --job-name=gpt_jax
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=$time
#SBATCH --output=$logs/%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@180
SBATCH
  [ "$gpus" -eq 0 ] || echo "#SBATCH --gpus-per-node=$gpus"
  [ -z "$partition" ] || echo "#SBATCH --partition=$partition"
  [ -z "$account" ] || echo "#SBATCH --account=$account"
  cat <<SBATCH
set -uo pipefail
cd "$code" || exit 1
export PATH="$code/.venv/bin:\$PATH"
# One process per node drives all of its GPUs. Each saves on SIGTERM and ends with 75.
ends="$logs/\${SLURM_JOB_ID}_\${SLURM_RESTART_COUNT:-0}"
mkdir -p "\$ends"
srun --kill-on-bad-exit=1 --output="$logs/%j_%t.log" --open-mode=append \\
  bash "$code/scripts/_slurm_task.sh" "\$ends" $command
code=\$?
# srun tells the highest code, which is that of those it killed; what a process said of itself counts.
own="\$(cat "\$ends"/* 2>/dev/null | awk '\$1 > 0 && \$1 != 75 && \$1 < 128' | head -n 1)"
code="\${own:-\$code}"
# 75 and signals (128 and more): preempted or lost, queued again. All else is a failure of its own, never retried.
if [ "\$code" -eq 75 ] || [ "\$code" -ge 128 ]; then
  if [ "\${SLURM_RESTART_COUNT:-0}" -lt $restarts ]; then
    echo "launch_slurm: ended with \$code, queued again (restart \$((\${SLURM_RESTART_COUNT:-0} + 1)) of $restarts)"
    scontrol requeue "\$SLURM_JOB_ID" || exit "\$code"
    exit 0
  fi
  echo "launch_slurm: ended with \$code after $restarts restarts"
fi
exit "\$code"
SBATCH
}

if [ -n "$dry" ]; then
  echo "+ bash scripts/_host.sh $here $commit $code $extras"
  echo "+ ln -sfn $here/runs $code/runs"
  echo "+ sbatch <<the script that follows"
  script
  exit 0
fi
mkdir -p "$logs"
bash scripts/_host.sh "$here" "$commit" "$code" "$extras"
ln -sfn "$here/runs" "$code/runs"
script | sbatch
