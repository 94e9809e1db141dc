# Sourced by the launchers beside it: options, and running or only showing a command.

# The command that every launcher runs; what a launcher adds is how it gets to the machines.
main_command=(python -m hybrid_vit.main --distributed)

# What the run exits with once it has saved after SIGTERM: the same command goes on from there.
saved=143

fail() {
  say "$1"
  exit 2
}

usage() {
  # The comment at the head of the launcher is its help.
  sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$0"
  exit 0
}

# need NAME VALUE: an option that must be given.
need() {
  [[ -n "$2" ]] || fail "--$1=... is needed (see $0 --help)"
}

# whole NAME VALUE: an option that must be a whole number.
whole() {
  [[ "$2" =~ ^[0-9]+$ ]] || fail "--$1=$2: a whole number is needed"
}

# What the launcher itself has to say, beside the output of what it runs.
say() {
  printf '%s: %s\n' "$(basename "$0")" "$1" >&2
}

# Words quoted so that a shell reads them back as they are.
quote() {
  local word text="" escaped="'\\''"
  for word in "$@"; do
    if [[ ! "$word" =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then
      word="'${word//\'/$escaped}'"
    fi
    text+="$word "
  done
  printf '%s' "${text% }"
}

# Runs a command, or with --dry_run prints it exactly as it would be run.
run() {
  if [[ "$dry_run" == true ]]; then
    quote "$@"
    printf '\n'
  else
    "$@"
  fi
}
