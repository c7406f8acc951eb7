#!/usr/bin/env bash
# create.sh [--settings FILE] [--dry-run]
#
# Queues for the slices and returns when all of them are ready. Ready ones are left as they are; what
# was preempted or failed is deleted and asked for again. Interrupted, the request stays in the queue
# and the next call waits on.

. "$(dirname "${BASH_SOURCE[0]}")/slice.sh"
read_options "$@"
load_settings PROJECT ZONE SLICE ACCELERATOR_TYPE RUNTIME_VERSION BUCKET

check_bucket() {
  gcloud storage buckets describe "gs://$BUCKET" --project="$PROJECT" --format='value(name)' \
    --quiet >/dev/null ||
    give_up "$UNUSABLE" "gs://$BUCKET cannot be looked at; $SCRIPTS/slice.env.example says how to make it"
}

ask() {
  local command=(
    gcloud compute tpus queued-resources create "$SLICE" --project="$PROJECT" --zone="$ZONE"
    --accelerator-type="$ACCELERATOR_TYPE" --runtime-version="$RUNTIME_VERSION" --quiet
  )
  if ((SLICES == 1)); then
    command+=(--node-id="$SLICE")
  else
    command+=(--node-count="$SLICES" --node-prefix="$SLICE")
  fi
  case $CAPACITY in
    spot) command+=(--spot) ;;
    reserved) command+=(--reserved) ;;
  esac
  if [[ -n $QUEUE_FOR ]]; then command+=(--valid-until-duration="$QUEUE_FOR"); fi
  # The TPU VMs write to the bucket.
  command+=(--scopes=https://www.googleapis.com/auth/cloud-platform)
  change "${command[@]}"
}

if [[ $DRY_RUN == yes ]]; then
  ask
  exit
fi

check_bucket
asked=no
told=
while :; do
  health=$(slice_health)
  if [[ $health != "$told" ]]; then
    say "$SLICE: $health"
    told=$health
  fi
  case $health in
    ready) exit 0 ;;
    none)
      ask
      asked=yes
      ;;
    failed)
      if [[ $asked == yes ]]; then
        why=$(gcloud compute tpus queued-resources describe "$SLICE" --project="$PROJECT" \
          --zone="$ZONE" --format='value(state.failedData.error.message)' --quiet) || why=
        give_up "$NO_CAPACITY" "no slice: ${why:-the request failed, and nothing is said of why}"
      fi
      "$SCRIPTS/delete.sh" --settings "$SLICE_FILE"
      continue
      ;;
    gone*)
      "$SCRIPTS/delete.sh" --settings "$SLICE_FILE"
      continue
      ;;
  esac
  sleep "$POLL_SECONDS"
done
