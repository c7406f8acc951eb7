#!/usr/bin/env bash
# tail.sh [--settings FILE] [--dry-run]
#
# Follows the log of the first host of the first slice, which speaks for all.

. "$(dirname "${BASH_SOURCE[0]}")/../slice.sh"
read_options "$@"
load_settings SLICE KUBE_CONTEXT
job=jobset.sigs.k8s.io
change kubectl --context="$KUBE_CONTEXT" --namespace="$NAMESPACE" logs --follow --tail=100 \
  --container=r1jax \
  --selector="$job/jobset-name=$SLICE,$job/job-index=0,batch.kubernetes.io/job-completion-index=0"
