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
# --max_restarts=          how often the job is started again after its pods were taken away (20)
# --grace=                 seconds for saving between SIGTERM and the end of a pod (120)
# --priority=              of the job: very-low, low, medium, high or very-high (XPK's default)
# --spot                   where the cluster provisions nodes by itself: spot capacity
# --dry_run                prints what would be run, and runs nothing
# After "--" come the arguments of hybrid_vit.main.
#
# XPK starts a job again where a container ended with 42 or 127 to 255: by a signal, or by the 143
# that a run ends with after it has saved. Any other code of the run's own ends the job.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/launch/common.sh"

cluster="" workload="" tpu_type="" num_slices=1 image="" project="" zone="" workdir="" dry_run=false
max_restarts=20 grace=120 priority="" spot=false
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
    --max_restarts=*) max_restarts="${1#*=}" ;;
    --grace=*) grace="${1#*=}" ;;
    --priority=*) priority="${1#*=}" ;;
    --spot) spot=true ;;
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
whole num_slices "$num_slices"
whole max_restarts "$max_restarts"
whole grace "$grace"
spot_flag=()
[[ "$spot" == false ]] || spot_flag=(--spot)

run xpk workload create --cluster="$cluster" --workload="$workload" --tpu-type="$tpu_type" \
  --num-slices="$num_slices" --docker-image="$image" \
  --max-restarts="$max_restarts" --termination-grace-period-seconds="$grace" \
  ${priority:+--priority="$priority"} "${spot_flag[@]}" \
  ${project:+--project="$project"} ${zone:+--zone="$zone"} \
  --command="$(quote "${main_command[@]}" --workdir="$workdir" "$@")"
