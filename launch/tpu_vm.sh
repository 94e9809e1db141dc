#!/usr/bin/env bash
# Trains on a Cloud TPU VM or pod slice: the same command on every host.
#
#   launch/tpu_vm.sh --name=my-tpu --zone=us-central2-b --workdir=/mnt/runs/moat_0 \
#     -- --config=configs/moat.py:moat_0
#
# --name=, --zone=   the TPU
# --project=         the Google Cloud project (gcloud's own default where not given)
# --workdir=         the run's directory: one file system that all hosts see
# --dir=             the checkout on the hosts, relative to the home directory (hybrid_vit)
# --setup            first copies this checkout to every host and installs it there
# --detach           leaves the run going when this terminal closes; output: train.log in --dir
# --dry_run          prints what would be run, and runs nothing
# After "--" come the arguments of hybrid_vit.main.
#
# Where the TPU is not there yet, or may be preempted:
#
#   launch/tpu_vm.sh --name=my-tpu --zone=us-west4-a --accelerator_type=v5litepod-256 \
#     --runtime_version=v2-alpha-tpuv5-lite --spot --workdir=gs://bucket/runs/moat_0 \
#     -- --config=configs/moat.py:moat_0
#
# asks for it as a queued resource of the same name, waits until it is active, installs, and runs. A
# TPU that is taken away is asked for again, and the run goes on from its work directory. A command
# that fails on a TPU that is still there ends this with its exit code. At the end the TPU is deleted.
# A launcher that was stopped is started again by the same command. It has to stay connected: run it
# under tmux, on a machine that does not sleep.
#
# --accelerator_type=, --runtime_version=   as gcloud names them
# --spot             capacity that may be preempted
# --tries=           how often the run is started in all, on new TPUs or on one that is there (20)
# --poll=            seconds between two looks at the TPU (30)
# --keep             leaves the TPU there at the end
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/launch/common.sh"
source "$root/launch/tpu_queue.sh"

name="" zone="" project="" workdir="" dir=hybrid_vit setup=false detach=false dry_run=false
accelerator_type="" runtime_version="" spot=false tries=20 poll=30 keep=false
while (($#)); do
  case "$1" in
    --name=*) name="${1#*=}" ;;
    --zone=*) zone="${1#*=}" ;;
    --project=*) project="${1#*=}" ;;
    --workdir=*) workdir="${1#*=}" ;;
    --dir=*) dir="${1#*=}" ;;
    --setup) setup=true ;;
    --detach) detach=true ;;
    --accelerator_type=*) accelerator_type="${1#*=}" ;;
    --runtime_version=*) runtime_version="${1#*=}" ;;
    --spot) spot=true ;;
    --tries=*) tries="${1#*=}" ;;
    --poll=*) poll="${1#*=}" ;;
    --keep) keep=true ;;
    --dry_run) dry_run=true ;;
    -h | --help) usage ;;
    --) shift; break ;;
    *) fail "unknown option $1 (the arguments of hybrid_vit.main come after --)" ;;
  esac
  shift
done
need name "$name"
need zone "$zone"
need workdir "$workdir"
whole tries "$tries"
whole poll "$poll"
if [[ -n "$accelerator_type" ]]; then
  need runtime_version "$runtime_version"
  [[ "$detach" == false ]] || fail "--detach does not go with --accelerator_type: the launcher has \
to see whether the TPU is still there (run it under tmux or nohup)"
else
  [[ "$spot" == false && -z "$runtime_version" && "$keep" == false ]] \
    || fail "--spot, --runtime_version and --keep need --accelerator_type=..."
fi

place=(--zone="$zone" ${project:+--project="$project"})
main_arguments=(--workdir="$workdir" "$@")

on_all_hosts() {
  run gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker=all --command="$1"
}

# This checkout, installed on every host; twice does no harm.
set_up() {
  local code=0 archive
  archive="$(mktemp -d)/hybrid_vit.tar.gz"
  { run git -C "$root" archive --format=tar.gz --output="$archive" HEAD \
    && run gcloud compute tpus tpu-vm scp "$archive" "$name:hybrid_vit.tar.gz" "${place[@]}" \
      --worker=all \
    && on_all_hosts "mkdir -p $(quote "$dir") && tar -xzf hybrid_vit.tar.gz -C $(quote "$dir") \
&& cd $(quote "$dir") && python3 -m venv .venv && .venv/bin/pip install -e '.[tpu]'"; } || code=$?
  rm -rf "$(dirname "$archive")"
  return "$code"
}

train() {
  local command
  command="$(quote "${main_command[@]}" "${main_arguments[@]}")"
  if [[ "$detach" == true ]]; then
    # Braces: only the training is left behind, not the shell that ssh would wait for.
    command="{ nohup $command >train.log 2>&1 </dev/null & }"
  fi
  on_all_hosts "cd $(quote "$dir") && source .venv/bin/activate && $command"
}

if [[ -n "$accelerator_type" ]]; then
  train_in_queue
fi
if [[ "$setup" == true ]]; then
  set_up
fi
train
