#!/usr/bin/env bash
# One run on several machines without a cluster manager. Start the same command on each, told apart by NODE_RANK; machine
# 0 is where the others find it. On two machines with the repository and the data at the same place:
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=machine0 bash scripts/torchrun.sh model=pythia28 datasets=[hh] loss=dpo ...
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=machine0 bash scripts/torchrun.sh model=pythia28 datasets=[hh] loss=dpo ...
# Give local_run_dir=DIR resume=auto, on a file system that all machines see, to start it again after a failure; if it
# has fallen over by itself, all workers have ended, and all machines' commands must be started again.
set -euo pipefail

# One worker for each GPU, or NPROC_PER_NODE of them, e.g. to try this on CPUs. A signal that asks the run to stop goes to
# the workers, which have ten minutes to write a checkpoint (otherwise torchrun knows no USR1, and gives them 30 seconds).
exec torchrun \
    --nnodes="$NNODES" --node-rank="$NODE_RANK" --nproc-per-node="${NPROC_PER_NODE:-gpu}" \
    --master-addr="$MASTER_ADDR" --master-port="${MASTER_PORT:-29500}" \
    --signals-to-handle=SIGTERM,SIGINT,SIGUSR1 --shutdown-timeout=600 \
    "$(dirname "$0")/../train.py" trainer=FSDPTrainer "$@"
