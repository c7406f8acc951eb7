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
    command -v gcsfuse >/dev/null || install_gcsfuse
    if [[ ! -x venv/bin/python ]]; then
      # The VMs' own Python may be older than r1jax allows.
      python3 -m pip install --quiet --user uv
      python3 -m uv venv --quiet --clear --python 3.12 venv
    fi
    python3 -m uv pip install --quiet --python venv/bin/python --reinstall-package r1jax \
      "r1jax[$2] @ file://$PWD/$1"
    printf '%s\n' "$wanted" >installed
  fi
  report installed
}

install_gcsfuse() {
  local key=/usr/share/keyrings/cloud.google.asc repository=https://packages.cloud.google.com/apt
  # A new VM may be updating itself and hold the lock.
  local apt=(sudo env DEBIAN_FRONTEND=noninteractive apt-get --quiet --yes -o DPkg::Lock::Timeout=600)
  curl --silent --show-error --fail "$repository/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
  echo "deb [signed-by=$key] $repository gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  "${apt[@]}" update >&2
  "${apt[@]}" install gcsfuse >&2
}

mount_bucket() { # BUCKET MOUNT
  if mountpoint -q "$2"; then return; fi
  sudo mkdir -p "$2"
  sudo chown "$(id -un)" "$2"
  # Nothing is cached, as workers read what others wrote; and fsync has to upload, which a streaming
  # write leaves to close(): the metric files stay open, and a checkpoint counts on their bytes.
  gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 \
    --enable-streaming-writes=false "$1" "$2" >&2 9>&- # it lives on, and must not keep the lock
}

# Held by a run as long as it lives, whatever ends it. Shared, so that two who ask do not find each
# other.
is_running() { ! flock --shared --nonblock lock true; }

start_step() { # BUCKET MOUNT ARGUMENT...
  local bucket=$1 mount=$2 wanted
  shift 2
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
  mount_bucket "$bucket" "$mount"
  mkdir -p "$mount/runs"
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
  # Again and again: while JAX starts, it takes SIGTERM for itself.
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
