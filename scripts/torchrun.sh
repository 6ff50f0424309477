#!/usr/bin/env bash
# Train on several machines without a cluster manager. Start the same command on each machine, with its own NODE_RANK;
# all connect to machine 0. For two machines with the repository and the data in the same place:
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=machine0 bash scripts/torchrun.sh model=pythia28 datasets=[hh] loss=dpo ...
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=machine0 bash scripts/torchrun.sh model=pythia28 datasets=[hh] loss=dpo ...
# Add local_run_dir=DIR resume=auto, with DIR on a file system that all machines see, to be able to restart after a
# failure. A failure ends all workers: start the command again on every machine.
set -euo pipefail

# One worker per GPU, or NPROC_PER_NODE workers, e.g. to try this on CPUs. Signals that stop the run are passed on to the
# workers, which get ten minutes to write a checkpoint. (By default torchrun doesn't handle USR1, and gives 30 seconds.)
exec torchrun \
    --nnodes="$NNODES" --node-rank="$NODE_RANK" --nproc-per-node="${NPROC_PER_NODE:-gpu}" \
    --master-addr="$MASTER_ADDR" --master-port="${MASTER_PORT:-29500}" \
    --signals-to-handle=SIGTERM,SIGINT,SIGUSR1 --shutdown-timeout=600 \
    "$(dirname "$0")/../train.py" trainer=FSDPTrainer "$@"
