#!/usr/bin/env bash
# stop.sh [--settings FILE] [--dry-run]
#
# Asks the run on every worker to save and leave (SIGTERM), and returns when it has. run.sh does not
# start it again; the same launch.sh or run.sh goes on.

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
on_every_worker stop
