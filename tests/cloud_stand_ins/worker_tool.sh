#!/usr/bin/env bash
# Stands in for the programs of a worker, by the name it is called by. $AT is NODE/WORKER.
set -eu
tool=${0##*/}
note() { printf '%s\n' "$AT $tool $*" >>"$CLOUD/worker.log"; }
case $tool in
  curl) echo "${AT#*/}" ;; # the VM's metadata
  python3)
    case "$1 $2 ${3-}" in
      "-c import"*) ;;
      "-m r1jax on-slice") # the check, where the scripts are called; tests say what it answers
        printf '%s\n' "$*" >>"$CLOUD/checks.log"
        cat "$CLOUD/refused" >&2 2>/dev/null && exit 2
        cat "$CLOUD/settings_for" 2>/dev/null || true
        ;;
      "-m pip wheel") # where install.sh is called, not on a worker
        cat "$CLOUD/checkout" >"$7/r1jax-0.1.0-py3-none-any.whl"
        ;;
      "-m uv venv")
        note "$@"
        mkdir -p venv/bin
        ln -sf "$(command -v true)" venv/bin/python
        ln -sf "$(dirname "$0")/r1jax" venv/bin/r1jax
        ;;
      *) note "$@" ;;
    esac
    ;;
  r1jax)
    # The run: what it is to do is the next line of $CLOUD/NODE-WORKER.runs or of $CLOUD/runs.
    {
      printf '%s\0' "$AT" "R1JAX_MULTI_HOST=${R1JAX_MULTI_HOST-}" "$@"
      printf '\n'
    } >>"$CLOUD/runs.log"
    count=$CLOUD/${AT/\//-}.turn
    turn=$(cat "$count" 2>/dev/null || echo 1)
    echo $((turn + 1)) >"$count"
    plan=$CLOUD/${AT/\//-}.runs
    [[ -f $plan ]] || plan=$CLOUD/runs
    act=$(sed -n "${turn}p" "$plan")
    echo "the log of $AT, turn $turn: $act"
    if [[ $act == suspend ]]; then touch "$CLOUD/suspended"; fi
    case ${act:-wait} in
      wait | suspend)
        trap 'exit 143' TERM
        while :; do sleep 0.05; done
        ;;
      vanish) kill -KILL "$PPID" ;; # with its supervisor, as when the VM goes
      *) exit "$act" ;;
    esac
    ;;
esac
