# Sourced by tpu_vm.sh: a TPU that is asked for, waited for, and asked for again when it is gone.
# It reads name, place, accelerator_type, runtime_version, spot, tries, poll, keep and dry_run, and
# calls set_up and train.

# So many times in a row gcloud may fail (a network that comes back) before this ends.
patience=5

train_in_queue() {
  local state shown="" code unanswered=0 undeleted=0 left="$tries"
  if [[ "$dry_run" == true ]]; then
    ask && set_up && train && release
    exit
  fi
  trap 'say "stopped; the request $name stays (the same command goes on with it)"; exit 130' INT
  while true; do
    state="$(state_of queued-resources 'value(state.state)')"
    [[ "$state" == "$shown" ]] || say "the queued resource $name is $state"
    shown="$state"
    [[ "$state" == NO_ANSWER ]] || unanswered=0
    case "$state" in
      ABSENT)
        ((left-- > 0)) || leave 1 "no try is left of $tries; the same command goes on"
        # Refused at once (a permission, a quota, a type that is none): asking again changes nothing.
        ask || leave $? "the TPU was refused"
        ;;
      ACTIVE)
        code=0
        { set_up && train; } || code=$?
        ((code)) || finish 0 "the run is done"
        if ! still_there; then
          say "the TPU is gone (the command ended with $code)"
          forget
        elif ((code == saved && left > 0)); then
          say "the run was told to stop and has saved: started again"
          left=$((left - 1))
        else
          finish "$code" "the command failed with exit code $code, and the TPU is there"
        fi
        ;;
      FAILED | SUSPENDED)
        # What it says of the reason.
        gcloud compute tpus queued-resources describe "$name" "${place[@]}" >&2 || true
        forget
        ;;
      NO_ANSWER)
        ((++unanswered < patience)) || leave 1 "gcloud gave no answer $patience times in a row"
        sleep "$poll"
        ;;
      *) sleep "$poll" ;;
    esac
  done
}

# state_of GROUP FORMAT: what Google Cloud says, ABSENT where there is nothing of this name, and
# NO_ANSWER where gcloud fails for another reason.
state_of() {
  local answer errors code=0
  errors="$(mktemp)"
  answer="$(gcloud compute tpus "$1" describe "$name" "${place[@]}" --format="$2" 2>"$errors")" \
    || code=$?
  if ((code == 0)); then
    printf '%s' "$answer"
  elif grep -q NOT_FOUND "$errors"; then
    printf ABSENT
  else
    cat "$errors" >&2
    printf NO_ANSWER
  fi
  rm -f "$errors"
}

ask() {
  local -a spot_flag=()
  [[ "$spot" == false ]] || spot_flag=(--spot)
  run gcloud compute tpus queued-resources create "$name" "${place[@]}" --node-id="$name" \
    --accelerator-type="$accelerator_type" --runtime-version="$runtime_version" "${spot_flag[@]}"
}

release() {
  run gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
}

# Deletes the request of a TPU that is gone, so that its name is free; seen in the next look.
forget() {
  if release; then
    undeleted=0
    return
  fi
  ((++undeleted < patience)) || leave 1 "the request $name cannot be deleted"
  sleep "$poll"
}

# Whether the hosts are there after a command failed; the state lags behind a preemption.
still_there() {
  local look
  for look in 1 2 3; do
    ((look == 1)) || sleep "$poll"
    case "$(state_of tpu-vm 'value(state)')" in
      READY | NO_ANSWER) ;;
      *) return 1 ;;
    esac
    case "$(state_of queued-resources 'value(state.state)')" in
      ACTIVE | NO_ANSWER) ;;
      *) return 1 ;;
    esac
  done
}

leave() {
  say "$2"
  exit "$1"
}

# The end of the run, and of the TPU unless it is to stay.
finish() {
  say "$2"
  if [[ "$keep" == true ]]; then
    say "the TPU $name stays"
  else
    release || say "the TPU $name could not be deleted: it goes on costing"
  fi
  exit "$1"
}
