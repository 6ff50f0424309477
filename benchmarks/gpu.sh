#!/usr/bin/env bash
# All benchmarks and tests for a GPU: bash benchmarks/gpu.sh [DIRECTORY for the results]
# To run one part, which takes less than ten minutes:
#   bash benchmarks/gpu.sh DIRECTORY memory | correctness | profile | runs | throughput
# `runs` needs everything that training needs, the others only torch and transformers. TRL is measured if installed.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-gpu_results}
parts=${2:-memory correctness profile runs throughput}
mkdir -p "$out"

for part in $parts; do
    echo "== $part"
    case $part in
    memory)
        # the original's six models and four current ones: memory of a forward and backward pass, measured and predicted
        python3 benchmarks/gpu_memory.py | tee "$out/memory.md"
        ;;
    correctness)
        python3 benchmarks/gpu.py correctness | tee "$out/correctness.txt"
        python3 benchmarks/gpu.py synchronization | tee "$out/synchronization.txt"
        ;;
    throughput)
        # for the README: Pythia-2.8B's shape, HH's lengths; float32 weights computed in bfloat16, a bfloat16 reference
        python3 benchmarks/throughput.py --preset pythia-2.8b --steps 4 --repeats 2 --max-tokens 6500 \
            --ways original shared packed cached packed-cached trl trl-cached | tee "$out/throughput.md"
        ;;
    profile)
        python3 benchmarks/gpu.py profile | tee "$out/profile.txt"
        python3 benchmarks/throughput.py --preset pythia-2.8b --hidden 2048 --layers 16 --heads 16 --max-length 2048 \
            --max-prompt-length 1024 --steps 2 --repeats 1 --ways shared packed --arch llama | tee "$out/llama_2k.md"
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
    *)
        echo "no such part: $part" >&2
        exit 2
        ;;
    esac
done
