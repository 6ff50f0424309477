#!/usr/bin/env bash
# Train with DPO at several β. The first run computes the reference's log-probabilities; the others find them cached.
#   bash scripts/sweep_beta.sh model=pythia28 datasets=[hh] model.archive=/path/to/sft/LATEST/policy.pt ...
set -euo pipefail
for beta in 0.05 0.1 0.2 0.5; do
    python -u "$(dirname "$0")/../train.py" loss=dpo loss.beta=$beta exp_name="dpo_beta_$beta" precompute_ref_log_probs=true "$@"
done
