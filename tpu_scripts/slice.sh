# Sourced by the scripts in this folder: their options, their settings, and how to reach a slice.
# shellcheck shell=bash
set -euo pipefail

SCRIPTS=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# Exit statuses: a setting or argument that cannot be used; the time in the queue is over; stopped by
# stop.sh; preempted, as of `r1jax run`: the state is saved, the same command goes on.
# shellcheck disable=SC2034 # read by the scripts
readonly UNUSABLE=2 NO_CAPACITY=3 STOPPED=10 PREEMPTED=143

readonly SETTINGS=(
  PROJECT ZONE SLICE SLICES ACCELERATOR_TYPE RUNTIME_VERSION CAPACITY QUEUE_FOR BUCKET EXTRAS
  RESTARTS POLL_SECONDS KUBE_CONTEXT NAMESPACE SERVICE_ACCOUNT IMAGE GKE_ACCELERATOR GKE_TOPOLOGY
  CHIPS_PER_HOST GKE_SPOT
)

say() { printf '%s\n' "$*" >&2; }

give_up() { # STATUS MESSAGE
  say "${0##*/}: $2"
  exit "$1"
}

# Takes --dry-run, --settings FILE and --help off the front; leaves the others in ARGUMENTS.
read_options() {
  DRY_RUN=no
  SLICE_FILE=$SCRIPTS/slice.env
  while (($# > 0)); do
    case $1 in
      --dry-run) DRY_RUN=yes ;;
      --settings | --slice) # the latter is its name of before
        (($# > 1)) || give_up "$UNUSABLE" "$1 needs a file"
        SLICE_FILE=$2
        [[ $1 == --settings || -f $2 || ! $2 =~ ^([0-9]+x)?(v[0-9]|tpu) ]] ||
          give_up "$UNUSABLE" "$1 $2: which slice it is stands in slice.env; --settings FILE names another"
        shift
        ;;
      -h | --help)
        # The comment at the top of the script is its help.
        sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
        exit 0
        ;;
      --)
        shift
        break
        ;;
      -*) give_up "$UNUSABLE" "there is no option $1; --help lists them" ;;
      *) break ;;
    esac
    shift
  done
  # shellcheck disable=SC2034 # read by the scripts
  ARGUMENTS=("$@")
}

# The options again, for another script of this folder.
same_options() {
  OPTIONS=(--settings "$SLICE_FILE")
  if [[ $DRY_RUN == yes ]]; then OPTIONS+=(--dry-run); fi
}

# Reads SLICE_FILE and checks it; the settings named may not be empty.
load_settings() { # NAME...
  [[ -f $SLICE_FILE ]] ||
    give_up "$UNUSABLE" "$SLICE_FILE is not there: copy $SCRIPTS/slice.env.example to it and fill it in"
  # Only the file counts: a PROJECT that happens to be exported is another one.
  unset "${SETTINGS[@]}"
  # shellcheck source=slice.env.example
  . "$SLICE_FILE"
  local name missing=()
  for name in "$@"; do
    [[ -n ${!name:-} ]] || missing+=("$name")
  done
  ((${#missing[@]} == 0)) || give_up "$UNUSABLE" "$SLICE_FILE does not set ${missing[*]}"
  : "${SLICES:=1}" "${CAPACITY:=on-demand}" "${QUEUE_FOR:=}" "${EXTRAS:=tpu}"
  : "${RESTARTS:=100}" "${POLL_SECONDS:=30}" "${NAMESPACE:=default}" "${GKE_SPOT:=no}"
  check SLICE '[a-z]([-a-z0-9]*[a-z0-9])?' "a name of small letters, digits and hyphens"
  check SLICES '[1-9][0-9]*' "the number of slices"
  check CAPACITY 'spot|reserved|on-demand' "spot, reserved or on-demand"
  check BUCKET '[a-z0-9][-_.a-z0-9]*' "a bucket's name, without gs://"
  check EXTRAS '[-_a-z0-9]+(,[-_a-z0-9]+)*' "names with commas between them"
  check RESTARTS '[0-9]+' "a number"
  check POLL_SECONDS '[0-9]+(\.[0-9]+)?' "a number"
  check CHIPS_PER_HOST '[1-9][0-9]*' "a number"
  check GKE_TOPOLOGY '[1-9][0-9]*(x[1-9][0-9]*)+' "sizes such as 4x4"
  check GKE_SPOT 'yes|no' "yes or no"
}

check() { # NAME PATTERN MEANING; an empty setting is another question
  local value=${!1:-}
  [[ -z $value || $value =~ ^($2)$ ]] ||
    give_up "$UNUSABLE" "$1=$value in $SLICE_FILE cannot be used: it has to be $3"
}

# A command as one line that a shell reads back as the same words.
quoted() {
  local line
  printf -v line '%q ' "$@"
  printf '%s' "${line% }"
}

# Runs what changes something; a dry run only says what that is.
change() {
  if [[ $DRY_RUN == yes ]]; then
    printf '%s\n' "$(quoted "$@")"
  else
    "$@"
  fi
}

# The TPU VMs, one a line.
nodes() {
  if ((SLICES == 1)); then
    printf '%s\n' "$SLICE"
  else
    local index
    for ((index = 0; index < SLICES; index++)); do printf '%s-%s\n' "$SLICE" "$index"; done
  fi
}

# How the slices are, as one line; fails if that cannot be found out.
#   none | waiting STATE | ready | failed | leaving STATE | gone WHAT
slice_health() {
  local state
  # A list, because it tells "there is none" from "you may not ask".
  state=$(gcloud compute tpus queued-resources list --project="$PROJECT" --zone="$ZONE" \
    --filter="name~\"/$SLICE\$\"" --format='value(state.state)' --quiet) || return
  case $state in
    '') echo none ;;
    CREATING | ACCEPTED | WAITING_FOR_RESOURCES | PROVISIONING) echo "waiting $state" ;;
    ACTIVE) nodes_health ;;
    FAILED) echo failed ;;
    SUSPENDING | DELETING) echo "leaving $state" ;;
    SUSPENDED) echo "gone $SLICE is SUSPENDED" ;;
    *) give_up 1 "the queued resource $SLICE is in a state that this script does not know: $state" ;;
  esac
}

# As slice_health, of an active queued resource: one preempted VM is the end of a run on all.
nodes_health() {
  local listed node state health=ready
  # In quotes, as parentheses are gcloud's own outside them.
  listed=$(gcloud compute tpus tpu-vm list --project="$PROJECT" --zone="$ZONE" \
    --filter="name~\"/$SLICE(-[0-9]+)?\$\"" --format='value(name.basename(),state)' --quiet) || return
  for node in $(nodes); do
    state=$(awk -v node="$node" '$1 == node { print $2 }' <<<"$listed")
    case ${state:-DELETED} in
      READY) ;;
      CREATING | STARTING | RESTARTING | REIMAGING | REPAIRING) health="waiting $node is $state" ;;
      *)
        echo "gone $node is ${state:-DELETED}"
        return
        ;;
    esac
  done
  echo "$health"
}

# Runs a step of worker.sh on all workers of all slices at the same time, and shows what they print.
# Fails if it did on one of them; gcloud has said which.
on_every_worker() { # STEP ARGUMENT...
  local node pid started=() failed=0
  for node in $(nodes); do
    local command=(
      gcloud compute tpus tpu-vm ssh "$node" --project="$PROJECT" --zone="$ZONE" --worker=all
      --quiet --command="$(quoted bash r1jax/worker.sh "$node" "$@")"
    )
    if [[ $DRY_RUN == yes ]]; then
      change "${command[@]}"
    else
      "${command[@]}" </dev/null &
      started+=($!)
    fi
  done
  for pid in ${started[@]+"${started[@]}"}; do
    wait "$pid" || failed=1
  done
  return "$failed"
}

# A Python that has r1jax's packages, to check runs here: PYTHON, or that of .venv, which is made.
checking_python() {
  local root=$1 python=${PYTHON:-python3}
  if ! "$python" -c 'import jax, pydantic, typer' 2>/dev/null; then
    python=$root/.venv/bin/python
    if [[ ! -x $python ]]; then
      say "making .venv with r1jax, to check the run; this happens once"
      make --directory="$root" --quiet .venv/installed >&2
    fi
  fi
  printf '%s' "$python"
}

# Checks the words of `r1jax run` in ARGUMENTS for a slice, by the planner: config, mesh, batches,
# memory. Leaves `--slice NAME` in FOR_SLICE where the config has settings for the slice.
check_run() { # SLICE, as `r1jax plan --slice` takes it
  ((${#ARGUMENTS[@]} > 0)) || give_up "$UNUSABLE" "which config? --help says more"
  local slice=$1 root python said
  FOR_SLICE=()
  if [[ -n ${CHECKED_FOR:-} ]]; then # by run.sh, which calls launch.sh
    if [[ $CHECKED_FOR != any ]]; then FOR_SLICE=(--slice "$CHECKED_FOR"); fi
    return
  fi
  root=$(dirname "$SCRIPTS")
  if ((SLICES > 1)); then slice=${SLICES}x$slice; fi
  python=$(checking_python "$root")
  said=$(PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} "$python" -m r1jax on-slice "$slice" -- \
    "${ARGUMENTS[@]}") || give_up "$UNUSABLE" "nothing was created or started; see above for why"
  if [[ -n $said ]]; then FOR_SLICE=(--slice "${said##*$'\n'}"); fi
}

# Checks the words of `r1jax run` in ARGUMENTS for a slice, puts a config that is a file here on the
# bucket, and leaves what a worker is to run in RUN.
prepare_run() { # SLICE
  check_run "$1"
  local config=${ARGUMENTS[0]} rest=("${ARGUMENTS[@]:1}") argument
  for argument in ${rest[@]+"${rest[@]}"}; do
    case $argument in
      output=gs://*) ;;
      output=*)
        give_up "$UNUSABLE" "$argument would not outlive the machines: outputs go to \
gs://$BUCKET/runs; for another folder there give output=gs://$BUCKET/..."
        ;;
    esac
  done
  if [[ -f $config ]]; then
    local folder=configs/$SLICE
    change gcloud storage cp "$config" "gs://$BUCKET/$folder/" --project="$PROJECT" --quiet
    config=gs://$BUCKET/$folder/$(basename "$config")
  fi
  # shellcheck disable=SC2034 # read by the scripts
  RUN=("$config" "output=gs://$BUCKET/runs" ${FOR_SLICE[@]+"${FOR_SLICE[@]}"}
    ${rest[@]+"${rest[@]}"})
}

# Of the lines on standard input those that worker.sh printed, as NODE/WORKER STATE...
reports() { sed -n 's/^@worker //p'; }
