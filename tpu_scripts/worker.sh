#!/usr/bin/env bash
# worker.sh NODE STEP [ARGUMENT]...
#
# On a worker, in ~/r1jax, where install.sh puts it: one step of the scripts that are called elsewhere.
# Each step prints one line, `@worker NODE/WORKER STATE ...`, which they read.
#
#   venv/ installed          what `install` made, and of what
#   words lock log           the run: its command, held while it lives, what it said
#   pid ended stopped        its process, its exit status and when, whether `stop` asked for it

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

report() {
  # JAX, too, takes a worker's number from here.
  local number
  number=$(curl --silent --fail --header 'Metadata-Flavor: Google' \
    http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number) ||
    number=0 # a VM of one worker need not have one
  printf '@worker %s/%s %s\n' "$NODE" "$number" "$*"
}

install_step() { # WHEEL EXTRAS
  local wanted
  wanted="$2 $(sha256sum <"$1")"
  if [[ ! -f installed || $(<installed) != "$wanted" ]]; then
    rm -f installed
    if [[ ! -x venv/bin/python ]]; then
      # The VMs' own Python may be older than r1jax allows.
      python3 -m pip install --quiet --user uv
      python3 -m uv venv --quiet --clear --python 3.12 venv
    fi
    # gcs: outputs are on the bucket.
    python3 -m uv pip install --quiet --python venv/bin/python --reinstall-package r1jax \
      "r1jax[gcs,$2] @ file://$PWD/$1"
    printf '%s\n' "$wanted" >installed
  fi
  report installed
}

# Held by a run as long as it lives, whatever ends it. Shared, so that two who ask do not find each
# other.
is_running() { ! flock --shared --nonblock lock true; }

start_step() { # ARGUMENT...
  local wanted
  printf -v wanted '%q ' r1jax run "$@"
  exec 9>>lock
  if ! flock --wait 2 9; then # is_running holds it for a moment, too
    if [[ -f words && $(<words) == "$wanted" ]]; then
      report running already
      return
    fi
    report busy "with another run: $(cat words)"
    return 1
  fi
  [[ -f installed ]] || {
    report broken "r1jax is not installed: install.sh"
    return 1
  }
  rm -f ended stopped pid
  printf '%s\n' "$wanted" >words
  # A session of its own outlives the connection. TPU VMs have nothing in the environment that tells
  # of the other hosts, so r1jax is told to look for them.
  R1JAX_MULTI_HOST=1 setsid bash "${BASH_SOURCE[0]##*/}" "$NODE" supervise "$@" >log 2>&1 </dev/null &
  report started
}

supervise_step() { # ARGUMENT...
  local status=0 interrupted=yes
  # When the VM goes down this shell gets SIGTERM as well, and waits for the run to save.
  trap 'interrupted=yes' TERM
  # Programs of the run may live on; the lock is this shell's alone.
  venv/bin/r1jax run "$@" 9>&- &
  printf '%s\n' "$!" >pid
  while [[ $interrupted == yes ]]; do
    interrupted=no status=0
    wait "$!" || status=$?
  done
  printf '%s %s\n' "$status" "$(date +%s.%N)" >ended.partial
  mv ended.partial ended
}

state_step() {
  if is_running; then
    report running
  elif [[ -f ended ]]; then
    report ended "$(<ended)$(if [[ -f stopped ]]; then echo ' stopped'; fi)"
  elif [[ -f words ]]; then
    report lost
  else
    report idle
  fi
}

stop_step() {
  # Again and again: while Python starts, nobody waits for SIGTERM.
  local tries
  for ((tries = 0; tries < 120; tries++)); do
    if ! is_running; then
      state_step
      return
    fi
    touch stopped
    if [[ -f pid ]]; then kill -TERM "$(<pid)" 2>/dev/null || true; fi
    sleep "${STOP_SECONDS:-5}"
  done
  report running "and does not stop"
  return 1
}

NODE=$1
step=$2
shift 2
"${step}_step" "$@"
