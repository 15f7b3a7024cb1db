# shellcheck shell=bash
# What the scripts of this folder share; sourced with their arguments, of which
# it takes the options in front of the first word.

# shellcheck disable=SC2034  # not all of them use it
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# One line that names what is wrong, and the remedy.
fail() {
  echo "${0##*/}: $*" >&2
  exit 2
}

# The arguments as a line that a shell reads back as the same arguments.
line() {
  local word space=
  for word; do
    [[ $word =~ ^[[:alnum:]_@%+=:,./-]+$ ]] || word=${word@Q}
    printf '%s%s' "$space" "$word"
    space=' '
  done
}

# Exported, so that it holds for the scripts that a script calls.
export DRY_RUN=${DRY_RUN-}
dry() { [[ -n $DRY_RUN ]]; }

# The command, or with --dry-run only its line.
run() {
  if dry; then
    line "$@"
    echo
  else
    "$@"
  fi
}

# setting NAME EXAMPLE: the variable has to be there.
setting() {
  [[ -n ${!1-} ]] || fail "$1 is not set; give it, for example $1=$2."
}

while [[ ${1-} == -* ]]; do
  case $1 in
    --dry-run) DRY_RUN=true ;;
    # The help is the comment that a script begins with.
    -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$0" && exit ;;
    *) fail "$1 is no option that goes here; see ${0##*/} --help." ;;
  esac
  shift
done
