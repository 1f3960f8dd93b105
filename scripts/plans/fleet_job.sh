#!/bin/bash
# What a job of `make trt-fleet` runs, on a machine with the GPU: fleet_job.sh FILE RECORD make trt MODEL=vit ...
# RECORD, with Make's words gpu=sm80 tensorrt=10.1.0.27 for its @, goes to FILE: which GPU that kind is.
set -euo pipefail
file=$1 record=$2
shift 2
# Docker would give a container every GPU of the machine; this job has the one that Slurm numbers so
if [[ -z ${DOCKER_GPUS-} && ${SLURM_JOB_GPUS-} ]]; then export DOCKER_GPUS="--gpus device=${SLURM_JOB_GPUS%%,*}"; fi
export MAKE_RUN=slurm-$SLURM_JOB_ID # by this name the steps' records tell what the job built
answer=$(.venv/bin/python -sESB -m scripts.plans.gpu)
echo "${record/@/$answer}" > "$file.$SLURM_JOB_ID~"
mv "$file.$SLURM_JOB_ID~" "$file"
read -ra words <<< "$answer"
# scancel and the time limit send SIGTERM to every process of the job, and SIGKILL once this script is gone: so wait, as
# cat does, for whoever still holds the pipe, which removes its container before it goes
trap : TERM
"$@" "${words[@]}" 2>&1 | (trap '' TERM && exec cat)
