#!/usr/bin/env bash
# Rent a Cloud TPU slice with a queued resource, and give it back.
#
#   launch/queued_resources.sh [--dry-run] create|wait|state|delete
#
#   create  ask for the slice
#   wait    until it is there; 1 if it can no longer come
#   state   WAITING_FOR_RESOURCES, PROVISIONING, ACTIVE, SUSPENDED, ...
#   delete  give it back, in whatever state it is: nothing else ends the bill
#
# Variables: NAME and ZONE of the slice, and for create
#   ACCELERATOR  v5litepod-16, v5p-128, ...
#   SPOT         true (cheaper, preempted at any time) unless it is false
# The project is that of gcloud's own configuration.

set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "$0")/common.sh"

queued=(gcloud compute tpus queued-resources)

# The image of the VMs belongs to the generation of the chips:
# https://cloud.google.com/tpu/docs/runtimes
image() {
  case $ACCELERATOR in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) fail "ACCELERATOR $ACCELERATOR is not known; use v5litepod-N, v5p-N" \
      "or v6e-N." ;;
  esac
}

create() {
  setting ACCELERATOR v5litepod-16
  local image spot=()
  image=$(image)
  [[ ${SPOT:-true} == false ]] || spot=(--spot)
  run "${queued[@]}" create "$NAME" --node-id="$NAME" --zone="$ZONE" \
    --accelerator-type="$ACCELERATOR" --runtime-version="$image" "${spot[@]}"
}

state() {
  run "${queued[@]}" describe "$NAME" --zone="$ZONE" \
    --format="value(state.state)"
}

wait_for_it() {
  local state
  while true; do
    state=$(state)
    echo "$state"
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPEND* | DELETING)
        echo "${0##*/}: $NAME is $state; delete it and create it again." >&2
        return 1
        ;;
    esac
    ! dry || return 0
    sleep 30
  done
}

command=${1-}
[[ $command =~ ^(create|wait|state|delete)$ ]] ||
  fail "'$command' is no subcommand; use create, wait, state or delete."
setting NAME var-d16
setting ZONE us-west4-a

case $command in
  create) create ;;
  wait) wait_for_it ;;
  state) state ;;
  delete)
    run "${queued[@]}" delete "$NAME" --zone="$ZONE" --force --quiet
    ;;
esac
