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
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/launch/common.sh"

name="" zone="" project="" workdir="" dir=hybrid_vit setup=false detach=false dry_run=false
while (($#)); do
  case "$1" in
    --name=*) name="${1#*=}" ;;
    --zone=*) zone="${1#*=}" ;;
    --project=*) project="${1#*=}" ;;
    --workdir=*) workdir="${1#*=}" ;;
    --dir=*) dir="${1#*=}" ;;
    --setup) setup=true ;;
    --detach) detach=true ;;
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

where=(--zone="$zone" --worker=all ${project:+--project="$project"})
if [[ "$setup" == true ]]; then
  archive="$(mktemp -d)/hybrid_vit.tar.gz"
  run git -C "$root" archive --format=tar.gz --output="$archive" HEAD
  run gcloud compute tpus tpu-vm scp "$archive" "$name:hybrid_vit.tar.gz" "${where[@]}"
  run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --command="mkdir -p $(quote "$dir") \
&& tar -xzf hybrid_vit.tar.gz -C $(quote "$dir") && cd $(quote "$dir") \
&& python3 -m venv .venv && .venv/bin/pip install -e '.[tpu]'"
  rm -rf "$(dirname "$archive")"
fi

train="$(quote "${main_command[@]}" --workdir="$workdir" "$@")"
if [[ "$detach" == true ]]; then
  # Braces: only the training is left behind, not the shell that ssh would wait for.
  train="{ nohup $train >train.log 2>&1 </dev/null & }"
fi
run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" \
  --command="cd $(quote "$dir") && source .venv/bin/activate && $train"
