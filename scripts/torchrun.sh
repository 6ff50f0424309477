#!/usr/bin/env bash
# Train on several machines without a cluster manager. Start the same command on each machine, with its own NODE_RANK;
# all connect to machine 0. For two machines with the repository and the data in the same place:
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=machine0 bash scripts/torchrun.sh model=pythia28 datasets=[hh] local_run_dir=/shared/run ...
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=machine0 bash scripts/torchrun.sh model=pythia28 datasets=[hh] local_run_dir=/shared/run ...
# local_run_dir must be on a file system that all machines see. If a worker fails, all are restarted and resume there, up
# to MAX_RESTARTS times. After a machine has failed, give its command again: the others wait ten minutes for it.
set -euo pipefail

[ "$NODE_RANK" -eq 0 ] && is_host=true || is_host=false

# One worker per GPU, or NPROC_PER_NODE workers, e.g. to try this on CPUs. Signals that stop the run are passed on to the
# workers, which get ten minutes to write a checkpoint. (By default torchrun doesn't handle USR1, and gives 30 seconds.)
# With c10d rendezvous, unlike the static one, every machine notices that another restarts its workers. By default, all
# attempts share a store whose address torchrun tells only to the machines of the first attempt, so a restarted machine
# couldn't join. The variable makes torchrun create a new store for each attempt.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun \
    --nnodes="$NNODES" --nproc-per-node="${NPROC_PER_NODE:-gpu}" --max-restarts="${MAX_RESTARTS:-3}" \
    --rdzv-backend=c10d --rdzv-endpoint="$MASTER_ADDR:${MASTER_PORT:-29500}" --rdzv-conf="is_host=$is_host" \
    --signals-to-handle=SIGTERM,SIGINT,SIGUSR1 --shutdown-timeout="${SHUTDOWN_TIMEOUT:-600}" \
    "$(dirname "$0")/../train.py" trainer=FSDPTrainer resume=auto "$@"
