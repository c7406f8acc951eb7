#!/usr/bin/env bash
# install.sh [--settings FILE] [--dry-run]
#
# Installs r1jax, as this checkout has it, on every worker. Workers that have the same files already
# do nothing.

. "$(dirname "${BASH_SOURCE[0]}")/slice.sh"
read_options "$@"
load_settings PROJECT ZONE SLICE EXTRAS

root=$(dirname "$SCRIPTS")
if [[ $DRY_RUN == yes ]]; then
  folder=FOLDER # a new one each time
  wheel='r1jax-VERSION-py3-none-any.whl'
else
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
  mkdir "$folder/r1jax"
fi
change "${PYTHON:-python3}" -m pip wheel --quiet --no-deps --wheel-dir "$folder/r1jax" "$root"
change cp "$SCRIPTS/worker.sh" "$folder/r1jax/"
if [[ $DRY_RUN == no ]]; then
  wheel=$(basename "$folder"/r1jax/*.whl)
fi
for node in $(nodes); do
  change gcloud compute tpus tpu-vm scp "$folder/r1jax" "$node:" --recurse \
    --project="$PROJECT" --zone="$ZONE" --worker=all --quiet
done
on_every_worker install "$wheel" "$EXTRAS"
