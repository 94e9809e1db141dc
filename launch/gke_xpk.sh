#!/usr/bin/env bash
# Trains on a GKE cluster of TPUs by XPK (https://github.com/AI-Hypercomputer/xpk).
#
#   launch/gke_xpk.sh --cluster=my-cluster --workload=moat-0 --tpu_type=v5litepod-256 \
#     --image=gcr.io/my-project/hybrid_vit --workdir=/mnt/runs/moat_0 \
#     -- --config=configs/moat.py:moat_0
#
# --cluster=, --workload=  names of the cluster and of the job
# --tpu_type=              the slice
# --num_slices=            number of slices (1)
# --image=                 a container image with this checkout as its working directory, installed
#                          with the extra [tpu]
# --project=, --zone=      where the cluster is (gcloud's own defaults where not given)
# --workdir=               the run's directory: one file system that all pods mount
# --dry_run                prints what would be run, and runs nothing
# After "--" come the arguments of hybrid_vit.main.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/launch/common.sh"

cluster="" workload="" tpu_type="" num_slices=1 image="" project="" zone="" workdir="" dry_run=false
while (($#)); do
  case "$1" in
    --cluster=*) cluster="${1#*=}" ;;
    --workload=*) workload="${1#*=}" ;;
    --tpu_type=*) tpu_type="${1#*=}" ;;
    --num_slices=*) num_slices="${1#*=}" ;;
    --image=*) image="${1#*=}" ;;
    --project=*) project="${1#*=}" ;;
    --zone=*) zone="${1#*=}" ;;
    --workdir=*) workdir="${1#*=}" ;;
    --dry_run) dry_run=true ;;
    -h | --help) usage ;;
    --) shift; break ;;
    *) fail "unknown option $1 (the arguments of hybrid_vit.main come after --)" ;;
  esac
  shift
done
need cluster "$cluster"
need workload "$workload"
need tpu_type "$tpu_type"
need image "$image"
need workdir "$workdir"

run xpk workload create --cluster="$cluster" --workload="$workload" --tpu-type="$tpu_type" \
  --num-slices="$num_slices" --docker-image="$image" \
  ${project:+--project="$project"} ${zone:+--zone="$zone"} \
  --command="$(quote "${main_command[@]}" --workdir="$workdir" "$@")"
