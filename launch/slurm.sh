#!/usr/bin/env bash
# Submits a training on NVIDIA GPUs to SLURM: one process for each GPU.
#
#   launch/slurm.sh --nodes=4 --gpus_per_node=8 --time=48:00:00 --workdir=/scratch/runs/moat_0 \
#     -- --config=configs/moat.py:moat_0
#
# --nodes=, --gpus_per_node=   what to ask for (1 and 8)
# --cpus_per_gpu=              cores for each GPU's data loading (12)
# --partition=, --account=, --time=   as sbatch's (the site's defaults where not given)
# --name=                      the job's name (hybrid_vit)
# --workdir=                   the run's directory: one file system that all nodes see
# --requeues=                  how often the job may go back to the queue at its time limit (100)
# --dry_run                    prints what would be run, and runs nothing
# After "--" come the arguments of hybrid_vit.main. Submit from the environment that has hybrid_vit
# installed with the extra [cuda]; the job takes the environment along.
#
# A training longer than --time is cut in parts: three minutes before the limit it saves, and the job
# goes back to the queue and on from its work directory. So it does when it is preempted or a node
# fails, by SLURM itself. One that fails, or that is cancelled, does not come back.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/launch/common.sh"

nodes=1 gpus_per_node=8 cpus_per_gpu=12 partition="" account="" limit="" name=hybrid_vit
workdir="" requeues=100 dry_run=false
while (($#)); do
  case "$1" in
    --nodes=*) nodes="${1#*=}" ;;
    --gpus_per_node=*) gpus_per_node="${1#*=}" ;;
    --cpus_per_gpu=*) cpus_per_gpu="${1#*=}" ;;
    --partition=*) partition="${1#*=}" ;;
    --account=*) account="${1#*=}" ;;
    --time=*) limit="${1#*=}" ;;
    --name=*) name="${1#*=}" ;;
    --workdir=*) workdir="${1#*=}" ;;
    --requeues=*) requeues="${1#*=}" ;;
    --dry_run) dry_run=true ;;
    -h | --help) usage ;;
    --) shift; break ;;
    *) fail "unknown option $1 (the arguments of hybrid_vit.main come after --)" ;;
  esac
  shift
done
need workdir "$workdir"
for number in nodes gpus_per_node cpus_per_gpu requeues; do
  whole "$number" "${!number}"
done

# JAX gives each SLURM task the one GPU of its local rank, hence a task for each GPU.
run sbatch --job-name="$name" --nodes="$nodes" --gpus-per-node="$gpus_per_node" \
  --ntasks-per-node="$gpus_per_node" --cpus-per-task="$cpus_per_gpu" --chdir="$root" \
  ${partition:+--partition="$partition"} ${account:+--account="$account"} ${limit:+--time="$limit"} \
  "$root/launch/slurm.sbatch" "$requeues" "${main_command[@]}" --workdir="$workdir" "$@"
