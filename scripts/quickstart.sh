#!/usr/bin/env bash
# Train the tiny model on the toy data with SFT, then with DPO: two minutes on two CPU cores, no network.
set -euo pipefail
cd "$(dirname "$0")/.."

dir=.cache/quickstart_$(date +%Y-%m-%d_%H-%M-%S)
common=(model=tiny "datasets=[toy]" max_length=64 max_prompt_length=32 eval_batch_size=64
        minimum_log_interval_secs=5 wandb.enabled=false)

echo "== Step 1: SFT, on 20,000 reviews"
python train.py "${common[@]}" loss=sft local_run_dir="$dir/sft" \
    batch_size=64 lr=1e-3 warmup_steps=20 sample_during_eval=false

# RMSprop divides each gradient by its running size. With the tiny default eps, weights whose gradient is almost 0 would also
# take steps of full size, which changes texts that no preference pair contains. A larger eps keeps those steps small.
echo "== Step 2: DPO from the SFT checkpoint, on 5,000 preference pairs"
python train.py "${common[@]}" loss=dpo loss.beta=0.5 local_run_dir="$dir/dpo" model.archive="$dir/sft/LATEST/policy.pt" \
    batch_size=32 n_examples=5000 lr=1e-3 "optimizer_args={eps:1e-3}" warmup_steps=20 \
    do_first_eval=false n_eval_model_samples=256

echo "== What DPO changed"
python -m data.toy "$dir/dpo"
echo "Metrics, samples and checkpoints of both runs: $dir"
echo "The same with a real chat model: docs/real_model.md"
