#!/usr/bin/env bash
# watch.sh [--settings FILE]
#
# Waits for the end of the run. Exit status 0: it finished; 143: it was preempted, and the same
# launch.sh goes on; 10: stop.sh stopped it; 1: it failed, and the worker that did so first is named.

. "$(dirname "${BASH_SOURCE[0]}")/slice.sh"
read_options "$@"
load_settings PROJECT ZONE SLICE
[[ $DRY_RUN == no ]] || exit 0 # it changes nothing

# So many looks in a row that fail are too many: the network here, or an SSH daemon there.
readonly PATIENCE=5
# What a preemption breaks is seen before the preemption itself, so a failure is looked at this often.
readonly DOUBTS=3

# The ends of a run that say nothing of its cause: 143 saved at SIGTERM; 134 is how a process ends
# that has lost another one, or that its watchdog aborts, and `lost` one that a reboot or the kernel ended.
failures() { # STATES; the earliest first
  awk '$2 == "ended" && $3 !~ /^(0|134|143)$/' <<<"$1" | LC_ALL=C sort -s -n -k4,4
}

preempted() { # WHY
  say "$SLICE: preempted: $1"
  exit "$PREEMPTED"
}

failed_looks=0
doubts=0
while :; do
  if ! health=$(slice_health) || [[ $health == waiting* ]]; then
    health=unknown
  fi
  case $health in
    gone* | leaving* | none | failed) preempted "$health" ;;
  esac

  if states=$(on_every_worker state) && states=$(reports <<<"$states") && [[ -n $states ]]; then
    failed_looks=0
  else
    ((++failed_looks < PATIENCE)) ||
      give_up 1 "no answer from every worker, $PATIENCE times in a row; see above for which"
    sleep "$POLL_SECONDS"
    continue
  fi

  failed=$(failures "$states")
  if [[ -n $failed ]]; then
    if ((++doubts <= DOUBTS)); then
      sleep "$POLL_SECONDS"
      continue
    fi
    read -r worker state status _ <<<"$failed"
    say "$SLICE: the run failed: $worker was the first, ${state/ended/exit status} $status"
    say "$states"
    say "the end of its log (tail.sh ${worker%/*} ${worker#*/} shows more):"
    gcloud compute tpus tpu-vm ssh "${worker%/*}" --project="$PROJECT" --zone="$ZONE" \
      --worker="${worker#*/}" --quiet --command="$(quoted tail -n 30 r1jax/log)" >&2 || true
    exit 1
  fi
  doubts=0
  grep -qv ' idle$' <<<"$states" || give_up "$UNUSABLE" "there is no run: launch.sh starts one"
  if ! grep -q ' running$' <<<"$states"; then
    if ! grep -qv ' ended 0 ' <<<"$states"; then
      say "$SLICE: the run finished"
      exit 0
    fi
    if grep -q ' stopped$' <<<"$states"; then
      say "$SLICE: the run was stopped; the same command goes on"
      exit "$STOPPED"
    fi
    preempted "$(sort <<<"$states" | paste -sd, -)"
  fi
  sleep "$POLL_SECONDS"
done
