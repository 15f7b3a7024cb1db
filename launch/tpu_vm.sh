#!/usr/bin/env bash
# Run var-jax on all workers of a Cloud TPU slice that is there.
#
#   launch/tpu_vm.sh [--dry-run] install|mount|stop
#   launch/tpu_vm.sh [--dry-run] run|start|resume COMMAND [ARGUMENT ...]
#   launch/tpu_vm.sh [--dry-run] logs [WORKER]
#
#   install  copy what is committed here to the workers and install it
#   mount    the bucket BUCKET at /mnt/gcs of the workers
#   run      a var-jax command, and wait: run doctor
#   start    one that goes on without us:
#            start train --config configs/var.py:d16 --workdir /mnt/gcs/runs/d16
#   logs     follow what a worker (0) prints
#   stop     SIGTERM: the step that is reached gets saved
#   resume   after a preemption: give back the rest of the slice, get another
#            one, install, mount and start
#
# Variables: NAME and ZONE of the slice; for resume, what queued_resources.sh
# wants to create it; TFDS_DATA_DIR on the workers, if it is not
# /mnt/gcs/tensorflow_datasets.

set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "$0")/common.sh"

tpu=(gcloud compute tpus tpu-vm)
queue=$root/launch/queued_resources.sh
data=${TFDS_DATA_DIR:-/mnt/gcs/tensorflow_datasets}
program="env TFDS_DATA_DIR=$(line "$data") ~/venv/bin/var-jax"

# on WORKERS LINE: for the shell of those workers.
on() {
  run "${tpu[@]}" ssh "$NAME" --zone="$ZONE" --worker="$1" --command="$2"
}

install() {
  local archive=${TMPDIR:-/tmp}/$NAME.tar.gz
  run git -C "$root" archive --format=tar.gz --output="$archive" HEAD
  run "${tpu[@]}" scp "$archive" "$NAME:var_jax.tar.gz" --zone="$ZONE" \
    --worker=all
  on all "rm -rf var_jax && mkdir var_jax && tar -xzf var_jax.tar.gz \
-C var_jax && var_jax/launch/worker.sh install"
}

mount() {
  setting BUCKET my-bucket
  on all "var_jax/launch/worker.sh mount $(line "$BUCKET")"
}

start() {
  # Two of them would fight for the chips.
  on all "cd var_jax || exit; \
if kill -0 \$(cat ~/var-jax.pid 2>/dev/null) 2>/dev/null; then \
echo var-jax runs already, stop it first. >&2; exit 1; fi; \
nohup $program $(line "$@") >>~/var-jax.log 2>&1 </dev/null & \
echo \$! >~/var-jax.pid"
}

stop() {
  on all "kill -TERM \$(cat ~/var-jax.pid) && \
while kill -0 \$(cat ~/var-jax.pid) 2>/dev/null; do sleep 1; done; \
tail -n 1 ~/var-jax.log"
}

resume() {
  local state
  setting ACCELERATOR v5litepod-16
  setting BUCKET my-bucket
  state=$("$queue" state)
  echo "$state"
  [[ $state != ACTIVE ]] ||
    fail "$NAME is ACTIVE, there is nothing to replace; use start."
  "$queue" delete
  "$queue" create
  "$queue" wait
  install
  mount
  start "$@"
}

command=${1-}
case $command in
  install | mount | stop | logs) ;;
  run | start | resume)
    [[ $# -gt 1 ]] ||
      fail "$command needs a var-jax command, for example $command doctor."
    ;;
  *) fail "'$command' is no subcommand; see ${0##*/} --help." ;;
esac
setting NAME var-d16
setting ZONE us-west4-a
shift

case $command in
  run) on all "cd var_jax && $program $(line "$@")" ;;
  logs) on "${1:-0}" "tail -n 100 -F ~/var-jax.log" ;;
  *) "$command" "$@" ;;
esac
