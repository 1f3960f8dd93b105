#!/bin/bash
# A job of `make trt-fleet` runs this on a machine with the GPU: fleet_job.sh FILE RECORD make trt MODEL=vit ...
# It writes RECORD to FILE, with words for make, such as gpu=sm80 tensorrt=10.1.0.27, in place of @.
set -euo pipefail
file=$1 record=$2
shift 2
# Without this, Docker gives a container all GPUs of the machine; Slurm gave this job the one of this number
if [[ -z ${DOCKER_GPUS-} && ${SLURM_JOB_GPUS-} ]]; then export DOCKER_GPUS="--gpus device=${SLURM_JOB_GPUS%%,*}"; fi
export MAKE_RUN=slurm-$SLURM_JOB_ID # the steps' records name this run, so that fleet.py sees what the job built
answer=$(.venv/bin/python -sESB -m scripts.plans.gpu)
echo "${record/@/$answer}" > "$file.$SLURM_JOB_ID~"
mv "$file.$SLURM_JOB_ID~" "$file"
read -ra words <<< "$answer"
# scancel and the time limit send SIGTERM to every process of the job, and SIGKILL once this script has ended.  So this
# script ignores SIGTERM and waits: cat ends only when the last process has removed its container and closed the pipe
trap : TERM
"$@" "${words[@]}" 2>&1 | (trap '' TERM && exec cat)
