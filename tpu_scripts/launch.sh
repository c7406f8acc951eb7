#!/usr/bin/env bash
# launch.sh [--settings FILE] [--dry-run] CONFIG [KEY.PATH=VALUE]... [--from STAGE] ...
#
# Checks the run for the slice, starts `r1jax run CONFIG ...` on every worker and returns; tail.sh and
# watch.sh follow it. CONFIG is a YAML file here, or a name that `r1jax configs` lists. Outputs go to
# gs://BUCKET/runs. If the same command runs already, it is left alone; another one has to be stopped
# first.

. "$(dirname "${BASH_SOURCE[0]}")/slice.sh"
read_options "$@"
load_settings PROJECT ZONE SLICE ACCELERATOR_TYPE BUCKET
prepare_run "$ACCELERATOR_TYPE"

if [[ $DRY_RUN == no ]]; then
  states=$(on_every_worker state | reports) || give_up 1 "not every worker answers; see above"
  running=$(awk '$2 == "running"' <<<"$states")
  if [[ -n $running && $running != "$states" ]]; then
    give_up 1 "a run is going on some of the workers only; stop.sh first:"$'\n'"$states"
  fi
fi
on_every_worker start "${RUN[@]}" ||
  give_up 1 "not started on every worker; see above for which"
