#!/usr/bin/env bash
# Run a var-jax command on a TPU slice of a GKE cluster.
#
#   launch/gke_jobset.sh [--dry-run] TOPOLOGY COMMAND [ARGUMENT ...]
#   launch/gke_jobset.sh v5e:4x4 train --config configs/var.py:d16 \
#     --workdir /mnt/gcs/runs/d16
#
# Fills in gke_jobset.yaml and applies it; --dry-run prints what it applies.
# Variables: NAME of the JobSet, IMAGE with var-jax (see Dockerfile), BUCKET
# that is mounted at /mnt/gcs.

set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "$0")/common.sh"

topology=${1-}
[[ $topology =~ ^(v5e|v5p|v6e):[1-9][0-9]*(x[1-9][0-9]*)+$ ]] ||
  fail "topology '$topology' is not known; use one like v5e:4x4 or v5p:4x4x4."
[[ $# -gt 1 ]] || fail "no var-jax command is given; add one, like doctor."
setting NAME var-d16
setting IMAGE us-docker.pkg.dev/my-project/images/var-jax
setting BUCKET my-bucket
shift

case $topology in
  v5e:*) accelerator=tpu-v5-lite-podslice ;;
  v5p:*) accelerator=tpu-v5p-slice ;;
  v6e:*) accelerator=tpu-v6e-slice ;;
esac
shape=${topology#*:}
chips=$((${shape//x/*}))
# Slices of several hosts have four chips in each.
((chips % 4 == 0)) ||
  fail "$topology has $chips chips, not a multiple of 4; use whole hosts."

arguments=
for word; do
  arguments+=${arguments:+, }"'${word//\'/"''"}'" # as YAML quotes
done

manifest=$(<"$root/launch/gke_jobset.yaml")
fill() { manifest=${manifest//"\${$1}"/"$2"}; }
fill NAME "$NAME"
fill IMAGE "$IMAGE"
fill BUCKET "$BUCKET"
fill ACCELERATOR "$accelerator"
fill TOPOLOGY "$shape"
fill HOSTS $((chips / 4))
fill ARGUMENTS "[$arguments]" # the last: whatever it holds stays as it is

if dry; then
  printf "kubectl apply -f - <<'END'\n%s\nEND\n" "$manifest"
else
  kubectl apply -f - <<<"$manifest"
fi
