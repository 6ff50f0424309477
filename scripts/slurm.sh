#!/usr/bin/env bash
# Train on several machines of a Slurm cluster, with one task per GPU. Submit this from the repository's directory:
#   sbatch scripts/slurm.sh model=pythia28 datasets=[hh] loss=dpo local_run_dir=/shared/run ...
# local_run_dir must be on a file system that all machines see: a job that is preempted or out of time resumes there.
#
# Every task must see all GPUs of its machine, because it picks one by its local rank; so don't use --gpus-per-task. Slurm
# must send USR1 to every task (so not B:USR1), early enough to write a checkpoint before the time is up.
#SBATCH --job-name=dpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export MASTER_ADDR MASTER_PORT

# When a task has ended, the others get one more minute. We don't use --kill-on-bad-exit=1, which would kill them at
# once: after a signal, tasks end one after the other, and a killed task would hide the exit code 75.
train() {
    srun --kill-on-bad-exit=0 --wait=60 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" bash -c '
        export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
        exec python -u train.py trainer=FSDPTrainer resume=auto "$@"' task "$@"
}

# A failed run is restarted and resumes, up to MAX_RESTARTS times. A failure within RESTART_AFTER seconds is most likely a
# mistake in the command: it would fail again. (Slurm itself requeues the job after a machine has failed.)
for attempt in $(seq 0 "${MAX_RESTARTS:-3}"); do
    started=$SECONDS
    train "$@"
    status=$?
    if [ $status -eq 0 ] || [ $status -eq 75 ] || [ $((SECONDS - started)) -lt "${RESTART_AFTER:-60}" ]; then
        break
    fi
    echo "attempt $attempt ended with exit code $status"
done

if [ $status -eq 75 ]; then # stopped by a signal, with a checkpoint
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
