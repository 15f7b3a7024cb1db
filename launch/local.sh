#!/usr/bin/env bash
# Run a var-jax command in N processes of this machine, joined over loopback.
#
#   launch/local.sh [--dry-run] N COMMAND [ARGUMENT ...]
#   DEVICES=4 launch/local.sh 2 train --config configs/var.py:tiny --workdir DIR
#
# Lines are printed behind the number of their process. Ends with 0, or as the
# first process that failed; signals are passed on. No process outlives it,
# unless it is killed with SIGKILL itself.
#
# Variables:
#   DEVICES  CPU devices of each process, if it is to have more than one
#   GRACE    seconds (30) that processes get to end by themselves after one
#            failed, then to answer SIGTERM; SIGKILL comes last
#   VAR_JAX  the program, if var-jax is not on the PATH

set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "$0")/common.sh"

count=${1-}
grace=${GRACE:-30}
program=${VAR_JAX:-var-jax}
[[ $count =~ ^[1-9][0-9]*$ ]] ||
  fail "'$count' is no number of processes; use ${0##*/} 2 train ..."
[[ $# -gt 1 ]] || fail "no var-jax command is given; add one, like doctor."
[[ $grace =~ ^[0-9]+$ ]] ||
  fail "GRACE '$grace' is no number of seconds; use one like GRACE=30."
[[ ${DEVICES:-1} =~ ^[1-9][0-9]*$ ]] ||
  fail "DEVICES '$DEVICES' is no number of devices; use one like DEVICES=4."
dry || command -v "$program" >/dev/null ||
  fail "$program is no command here; give its path, for example" \
    "VAR_JAX=.venv/bin/var-jax."
shift

# Below the ports that the system gives out by itself.
free_port() {
  local port
  while true; do
    port=$((20000 + RANDOM % 10000))
    (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
  done
  echo "$port"
}

# Goes on to the last line, whatever the terminal sends.
number() {
  trap '' INT TERM HUP
  local text
  while IFS= read -r text || [[ -n $text ]]; do
    printf '[%d] %s\n' "$1" "$text"
  done
}

environment=(
  "JAX_COORDINATOR_ADDRESS=127.0.0.1:$(free_port)"
  "JAX_NUM_PROCESSES=$count"
  "JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo"
)
if [[ -n ${DEVICES-} ]]; then
  flag=--xla_force_host_platform_device_count=$DEVICES
  environment+=("XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }$flag")
fi

asked= # a signal that is to be passed on
trap 'asked=TERM' TERM HUP
trap 'asked=INT' INT
processes=() printers=()
# Of their groups too: data workers end with their process.
trap 'for id in "${processes[@]}"; do
  kill -KILL -- "-$id" 2>/dev/null || true
done' EXIT

for ((i = 0; i < count; i++)); do
  command=(env "${environment[@]}" "JAX_PROCESS_ID=$i" "$program" "$@")
  if dry; then
    run "${command[@]}"
    continue
  fi
  exec {out}> >(number "$i")
  printers+=($!)
  set -m # a group of its own, which the terminal's Ctrl-C does not reach
  "${command[@]}" >&"$out" 2>&1 </dev/null &
  set +m
  processes+=($!)
  exec {out}>&-
done

# end SIGNAL: give the processes that are left the time to answer.
end() {
  local id
  for id in "${processes[@]}"; do kill -s "$1" "$id" 2>/dev/null || true; done
  next=KILL limit=$((SECONDS + grace))
}

first=0 next=TERM limit=
while ((${#processes[@]})); do
  for i in "${!processes[@]}"; do
    id=${processes[i]}
    kill -0 "$id" 2>/dev/null && continue
    status=0
    wait "$id" 2>/dev/null || status=$?
    kill -KILL -- "-$id" 2>/dev/null || true
    unset "processes[i]"
    if ((status && !first)); then
      first=$status
      echo "${0##*/}: process $i ended with $status" >&2
      limit=${limit:-$((SECONDS + grace))}
    fi
  done
  if [[ -n $asked ]]; then
    end "$asked"
    asked=
  elif [[ -n $limit ]] && ((SECONDS > limit)); then
    end "$next"
  fi
  sleep 0.1 || true # Ctrl-C ends it too
done
# They end when nobody is left who could write to them.
for id in "${printers[@]}"; do wait "$id" 2>/dev/null || true; done
exit "$first"
