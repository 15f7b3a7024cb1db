#!/usr/bin/env bash
# Make a TPU VM ready; runs on the VM, in a copy of this repository.
#
#   launch/worker.sh [--dry-run] install|mount BUCKET
#
#   install  var-jax with its packages, in ~/venv
#   mount    the bucket at /mnt/gcs, with gcsfuse

set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "$0")/common.sh"

folder=/mnt/gcs
packages=https://packages.cloud.google.com/apt

# The VMs' own Python may be older than ours: uv brings one.
install() {
  run bash -o pipefail -c "curl -LsSf https://astral.sh/uv/install.sh | sh"
  run ~/.local/bin/uv venv --allow-existing --python 3.12 ~/venv
  run ~/.local/bin/uv pip install --python ~/venv/bin/python -e "${root}[tpu]"
}

install_gcsfuse() {
  local key=/usr/share/keyrings/cloud.google.asc release list
  release=$(. /etc/os-release && echo "$VERSION_CODENAME")
  list="deb [signed-by=$key] $packages gcsfuse-$release main"
  run sudo curl -fsSL -o "$key" "$packages/doc/apt-key.gpg"
  run sudo bash -c "echo '$list' >/etc/apt/sources.list.d/gcsfuse.list"
  run sudo apt-get update
  run sudo apt-get install -y gcsfuse
}

# gcsfuse keeps what it knows of files, on large machines for ever: a host would
# not see what another one wrote. Hence the zeros.
mount() {
  if mountpoint -q "$folder"; then
    echo "$folder is mounted already"
    return
  fi
  command -v gcsfuse >/dev/null || install_gcsfuse
  run sudo mkdir -p "$folder"
  run sudo chown "$(id -u)" "$folder"
  run gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 \
    --metadata-cache-negative-ttl-secs=0 "$1" "$folder"
}

case ${1-} in
  install) install ;;
  mount)
    [[ $# == 2 ]] || fail "mount needs the name of a bucket; give one."
    mount "$2"
    ;;
  *) fail "'${1-}' is no subcommand; use install or mount BUCKET." ;;
esac
