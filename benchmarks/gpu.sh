#!/usr/bin/env bash
# All benchmarks and tests for a GPU: bash benchmarks/gpu.sh [DIRECTORY for the results]
# To run one part, which takes less than ten minutes:
#   bash benchmarks/gpu.sh DIRECTORY memory | correctness | throughput | profile | runs | table
# `runs` needs everything that training needs, the others only torch and transformers. TRL is measured if installed.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-gpu_results}
parts=${2:-memory correctness throughput profile runs table}
mkdir -p "$out"

for part in $parts; do
    echo "== $part"
    case $part in
    memory)
        # the original's six models and four current ones: memory of a forward and backward pass, measured and predicted
        python3 benchmarks/gpu_memory.py --json "$out/memory.json"
        ;;
    correctness)
        python3 benchmarks/gpu.py correctness --json "$out/correctness.json"
        python3 benchmarks/gpu.py synchronization --json "$out/synchronization.json"
        ;;
    throughput)
        # Pythia-2.8B's shape and HH's lengths: float32 weights computed in bfloat16, a reference in bfloat16
        python3 benchmarks/throughput.py --preset pythia-2.8b --steps 4 --repeats 2 --max-tokens 6500 \
            --ways original shared packed cached packed-cached trl trl-cached --json "$out/throughput.json"
        ;;
    profile)
        python3 benchmarks/gpu.py profile | tee "$out/profile.txt"
        python3 benchmarks/throughput.py --preset pythia-2.8b --hidden 2048 --layers 16 --heads 16 --max-length 2048 \
            --max-prompt-length 1024 --steps 2 --repeats 1 --ways shared packed --json "$out/llama_2k.json" --arch llama
        ;;
    runs)
        # the command line in one process, in mixed precision, with FSDP over NCCL, compiled, and a resumed run
        run="python3 train.py model=tiny datasets=[toy] loss=dpo n_examples=256 n_eval_examples=64 eval_every=128"
        run="$run batch_size=16 warmup_steps=0 wandb.enabled=false curves=false local_dirs=[$out/cache]"
        runs=$(mktemp -d "$out/runs.XXXX")
        $run local_run_dir="$runs/float32" &&
            $run local_run_dir="$runs/mixed" model.policy_mp=bfloat16 model.reference_dtype=bfloat16 &&
            $run local_run_dir="$runs/fsdp" model.policy_mp=bfloat16 trainer=FSDPTrainer &&
            $run local_run_dir="$runs/compiled" model.policy_dtype=bfloat16 compile=true &&
            $run local_run_dir="$runs/again" n_examples=128 model.policy_mp=bfloat16 &&
            $run local_run_dir="$runs/again" resume="$runs/again" model.policy_mp=bfloat16
        python3 -m pytest -n 0 -m gpu tests/test_gpu.py
        ;;
    table)
        python3 benchmarks/gpu.py table --results "$out" | tee "$out/table.md" # for the README
        ;;
    *)
        echo "no such part: $part" >&2
        exit 2
        ;;
    esac
done
