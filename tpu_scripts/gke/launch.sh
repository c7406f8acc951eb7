#!/usr/bin/env bash
# launch.sh [--settings FILE] [--dry-run] CONFIG [KEY.PATH=VALUE]... [--from STAGE] ...
#
# Checks the run for the slice, starts `r1jax run CONFIG ...` on GKE, as the JobSet that jobset.yaml
# describes, and returns; JobSet itself starts it again after a preemption. The same command again
# changes nothing while it runs, and goes on with a run that has ended. --dry-run prints the manifest,
# and the command that takes it.

. "$(dirname "${BASH_SOURCE[0]}")/../slice.sh"
read_options "$@"
load_settings PROJECT SLICE BUCKET KUBE_CONTEXT SERVICE_ACCOUNT IMAGE GKE_ACCELERATOR GKE_TOPOLOGY \
  CHIPS_PER_HOST
case $GKE_ACCELERATOR in
  tpu-v4-*) kind=v4 ;;
  tpu-v5-lite-*) kind=v5e ;;
  tpu-v5p-*) kind=v5p ;;
  tpu-v6e-*) kind=v6e ;;
  tpu7x*) kind=tpu7x ;;
  *) kind=$GKE_ACCELERATOR ;; # which the planner does not know
esac
prepare_run "$kind:$GKE_TOPOLOGY"

kubectl=(kubectl --context="$KUBE_CONTEXT" --namespace="$NAMESPACE")

# A list of strings that YAML, and then Kubernetes, read as these words.
words() { # WORD...
  local word comma=''
  for word in "$@"; do
    word=${word//\\/\\\\}
    word=${word//\"/\\\"}
    word=${word//$'\n'/\\n}
    word=${word//$'\t'/\\t}
    word=${word//\$/\$\$} # $(NAME) would be a variable of the pod
    printf '%s"%s"' "$comma" "$word"
    comma=', '
  done
}

chips=$((${GKE_TOPOLOGY//x/*}))
((chips % CHIPS_PER_HOST == 0)) ||
  give_up "$UNUSABLE" "GKE_TOPOLOGY=$GKE_TOPOLOGY is $chips chips, which CHIPS_PER_HOST=$CHIPS_PER_HOST \
does not divide"
# shellcheck disable=SC2034 # by name, below
HOSTS=$((chips / CHIPS_PER_HOST)) SPOT=
# shellcheck disable=SC2034 # what r1jax/run/tpu_compiler.py has for the chip
LIBTPU_INIT_ARGS=
# shellcheck disable=SC2034
if [[ $kind == tpu7x ]]; then
  LIBTPU_INIT_ARGS=--xla_tpu_control_large_2nd_minor_layout_for_x16=false
fi
# shellcheck disable=SC2034
if [[ $GKE_SPOT == yes ]]; then SPOT='cloud.google.com/gke-spot: "true"'; fi

manifest=$(<"$SCRIPTS/gke/jobset.yaml")
for name in SLICE SLICES HOSTS RESTARTS SERVICE_ACCOUNT GKE_ACCELERATOR GKE_TOPOLOGY SPOT IMAGE \
  CHIPS_PER_HOST LIBTPU_INIT_ARGS; do
  manifest=${manifest//"{{$name}}"/"${!name}"}
done
# Last, as a user's words may have braces.
manifest=${manifest//"{{ARGUMENTS}}"/"[$(words "${RUN[@]}")]"}

if [[ $DRY_RUN == no ]]; then
  ended=$("${kubectl[@]}" get jobset "$SLICE" --ignore-not-found \
    --output='jsonpath={.status.terminalState}')
  if [[ -n $ended ]]; then
    say "$SLICE: the JobSet of before is $ended, and makes room"
    "${kubectl[@]}" delete jobset "$SLICE" --ignore-not-found
  fi
  "${kubectl[@]}" apply --filename=- <<<"$manifest" ||
    give_up 1 "if another run is going on, gke/stop.sh first"
else
  change "${kubectl[@]}" apply --filename=-
  printf '%s\n' "$manifest"
fi
