#!/usr/bin/env bash
# delete.sh [--settings FILE] [--dry-run]
#
# Deletes the slices, or the request for them, and all that is on their disks. What is on the bucket
# stays.

. "$(dirname "${BASH_SOURCE[0]}")/slice.sh"
read_options "$@"
load_settings PROJECT ZONE SLICE

if [[ $DRY_RUN == no ]]; then
  health=$(slice_health)
  if [[ $health == none ]]; then
    say "$SLICE: there is none"
    exit 0
  fi
fi
change gcloud compute tpus queued-resources delete "$SLICE" --project="$PROJECT" --zone="$ZONE" \
  --force --quiet
