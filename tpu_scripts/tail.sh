#!/usr/bin/env bash
# tail.sh [--settings FILE] [--dry-run] [NODE [WORKER]]
#
# Follows the log of one worker: by default of worker 0 of the first slice, which speaks for all.

. "$(dirname "${BASH_SOURCE[0]}")/slice.sh"
read_options "$@"
load_settings PROJECT ZONE SLICE

first=$(nodes | head -n 1)
node=${ARGUMENTS[0]:-$first}
worker=${ARGUMENTS[1]:-0}
nodes | grep -qxF -- "$node" ||
  give_up "$UNUSABLE" "there is no TPU VM $node; there are: $(nodes | paste -sd' ' -)"
[[ $worker =~ ^[0-9]+$ ]] || give_up "$UNUSABLE" "$worker is no worker: they are numbered from 0"
change gcloud compute tpus tpu-vm ssh "$node" --project="$PROJECT" --zone="$ZONE" \
  --worker="$worker" --quiet --command="$(quoted tail -n 100 -F r1jax/log)"
