#!/usr/bin/env bash
# run.sh [--settings FILE] [--dry-run] CONFIG [KEY.PATH=VALUE]... [--from STAGE] ...
#
# A run from nothing to its end: the planner checks it for the slice; then create.sh, install.sh,
# launch.sh, watch.sh, and again from the top after each preemption, up to RESTARTS times. It can be
# interrupted and called again at any time: it takes up whatever is there. Gives up on any other
# failure. The slices stay; delete.sh ends the bill.

. "$(dirname "${BASH_SOURCE[0]}")/slice.sh"
read_options "$@"
load_settings PROJECT ZONE SLICE ACCELERATOR_TYPE RUNTIME_VERSION BUCKET EXTRAS
check_run "$ACCELERATOR_TYPE"
export CHECKED_FOR=${FOR_SLICE[1]-any}
same_options

# A slice that is preempted between two steps fails the later one.
preempted_meanwhile() {
  local health
  health=$(slice_health) && [[ $health == gone* || $health == leaving* || $health == none ]]
}

for ((restart = 0; restart <= RESTARTS; restart++)); do
  "$SCRIPTS/create.sh" "${OPTIONS[@]}"
  status=0
  {
    "$SCRIPTS/install.sh" "${OPTIONS[@]}" &&
      "$SCRIPTS/launch.sh" "${OPTIONS[@]}" -- "${ARGUMENTS[@]}" &&
      "$SCRIPTS/watch.sh" "${OPTIONS[@]}"
  } || status=$?
  case $status in
    0) exit 0 ;;
    "$PREEMPTED") ;;
    "$STOPPED") exit "$PREEMPTED" ;;
    *)
      if ! preempted_meanwhile; then
        "$SCRIPTS/stop.sh" "${OPTIONS[@]}" || true # the other workers wait for the one that failed
        exit "$status"
      fi
      ;;
  esac
  # The workers that are left must be out of the checkpoints before others open them.
  health=$(slice_health)
  if [[ $health == ready ]]; then
    "$SCRIPTS/stop.sh" "${OPTIONS[@]}" || true
  fi
  say "$SLICE: again ($((restart + 1)) of $RESTARTS)"
done
give_up 1 "preempted more than RESTARTS=$RESTARTS times"
