#!/usr/bin/env bash
# stop.sh [--settings FILE] [--dry-run]
#
# Ends the run: its pods save and leave. What is on the bucket stays; the same launch.sh goes on.

. "$(dirname "${BASH_SOURCE[0]}")/../slice.sh"
read_options "$@"
load_settings SLICE KUBE_CONTEXT
change kubectl --context="$KUBE_CONTEXT" --namespace="$NAMESPACE" delete jobset "$SLICE" \
  --ignore-not-found
