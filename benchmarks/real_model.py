"""Train a real chat model by DPO with this program and with TRL, on the same pairs, each in a process of its own.

`pip install trl==1.16.0`, then `python benchmarks/real_model.py --model HuggingFaceTB/SmolLM2-135M-Instruct
--data CHAT.jsonl`. The data are pairs of messages (`prompt`, `chosen`, `rejected`); the first pairs that fit into
`--max-length` are used. Both programs run from the command line, in turn, and take the same steps: the same tokens in
the same order, AdamW, a constant learning rate, the same clipping, no dropout. TRL keeps float32 weights and
uses no activation checkpointing, which is its fastest setting on a CPU. The columns, medians over the rounds:
  pairs/s       of the steps after the first
  memory        the process's peak, weights included (GB)
  start         seconds from the command to the end of the first step, with precomputing the reference if that is on
  loss differs  the largest difference between a step's loss and this program's in the first round
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

MODES = {  # this program's keys, TRL's options, True for LoRA
    "full": ([], {}, False),
    "full, precomputed reference": (
        ["precompute_ref_log_probs=true"], {"precompute_ref_log_probs": True}, False
    ),
    "LoRA, adapter off": (["lora={r: 16, lora_alpha: 32}"], {}, True),
    "LoRA, precomputed reference": (
        ["lora={r: 16, lora_alpha: 32}", "precompute_ref_log_probs=true"], {"precompute_ref_log_probs": True}, True
    ),
    "full, bfloat16 autocast": (["model.policy_mp=bfloat16"], {"bf16": True}, False),
}  # fmt: skip
LEARNING_RATES = {False: 1e-6, True: 1e-4}  # of all weights, of an adapter
MAX_GRAD_NORM = 10.0


# ---- the data -------------------------------------------------------------------------------------------------------


def our_keys(args: argparse.Namespace, data: str, directory: str) -> list[str]:
    """Return the run's config keys, from which `write_data` also computes the order of the run's examples."""
    return [
        f"model.name_or_path={args.model}", f"datasets=[{data}]", "loss=dpo", f"max_length={args.max_length}",
        f"max_prompt_length={args.max_length - 1}", f"batch_size={args.batch_size}", "n_epochs=1",
        "n_eval_examples=1", "eval_batch_size=1", f"local_dirs=[{directory}]",
    ]  # fmt: skip


def write_data(args: argparse.Namespace, directory: str) -> tuple[str, str]:
    """Write the first pairs that fit: in their order for this program, and in the order of its shuffling for TRL.

    Returns: this program's folder, which has one more pair as its test split, and TRL's file.
    """
    from transformers import AutoTokenizer

    from commands.command_line import compose_config
    from config_checks.datasets import chosen_datasets
    from preference_datasets import open_batches

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = [json.loads(line) for line in Path(args.data).read_text(encoding="utf-8").splitlines()]
    fitting = []
    for row in rows:
        row = {key: row[key] for key in ("prompt", "chosen", "rejected")}
        longest = max(
            len(tokenizer.apply_chat_template(row["prompt"] + row[side], return_dict=False))
            for side in ("chosen", "rejected")
        )
        if longest <= args.max_length and row not in fitting:
            fitting.append(row)
    n_pairs = args.steps * args.batch_size
    if len(fitting) <= n_pairs:
        raise SystemExit(
            f"{args.data}: {len(fitting)} pairs fit into {args.max_length} tokens, {n_pairs + 1} are needed"
        )
    folder = Path(directory) / "data"
    folder.mkdir()
    for split, part in (("train", fitting[:n_pairs]), ("test", fitting[n_pairs : n_pairs + 1])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    config = compose_config(*our_keys(args, str(folder), directory))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    train, _ = open_batches(config, chosen_datasets(config), tokenizer, config.seed)
    order = [prompt.rows[index] for prompt, index in train.examples()]
    path = Path(directory) / "trl.jsonl"
    path.write_text("".join(json.dumps(fitting[row]) + "\n" for row in order))
    return str(folder), str(path)


# ---- the two programs -----------------------------------------------------------------------------------------------


def command_of_ours(args: argparse.Namespace, mode: str, folder: str, directory: str) -> list[str]:
    keys, _, is_lora = MODES[mode]
    return [
        sys.executable, str(REPOSITORY / "train.py"), *our_keys(args, folder, directory), *keys,
        f"lr={LEARNING_RATES[is_lora]}", "warmup_steps=0", "optimizer=AdamW", "decay_biases_and_norms=false",
        f"max_grad_norm={MAX_GRAD_NORM}", f"gradient_accumulation_steps={args.batch_size // args.microbatch}",
        "do_first_eval=false", "sample_during_eval=false", "wandb.enabled=false", "debug=true",
        f"local_run_dir={directory}/run",
    ]  # fmt: skip


def command_of_trl(args: argparse.Namespace, mode: str, trl_data: str, directory: str) -> list[str]:
    os.mkdir(f"{directory}/run")
    return [
        sys.executable, __file__, "--model", args.model, "--data", args.data, "--mode", mode, "--trl-data", trl_data,
        "--output", f"{directory}/run/metrics.jsonl", "--max-length", str(args.max_length), "--batch-size",
        str(args.batch_size), "--microbatch", str(args.microbatch),
    ]  # fmt: skip


def run_trl(args: argparse.Namespace):
    """Train with TRL, and write each step's loss to `--output`, one line of JSON per step."""
    import peft
    import torch
    import transformers
    from datasets import load_dataset
    from trl import DPOConfig, DPOTrainer

    _, options, is_lora = MODES[args.mode]
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    if is_lora:
        torch.manual_seed(0)  # as this program does before it draws an adapter's weights
        settings = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=16, lora_alpha=32)
        model = peft.get_peft_model(model, settings)

    class Record(transformers.TrainerCallback):
        def on_log(self, _args, _state, _control, logs, **_):
            if "loss" in logs:
                with open(args.output, "a") as file:
                    print(json.dumps({"loss/train": logs["loss"]}), file=file)

    with tempfile.TemporaryDirectory() as directory:
        config = DPOConfig(
            directory, per_device_train_batch_size=args.microbatch, num_train_epochs=1,
            gradient_accumulation_steps=args.batch_size // args.microbatch, learning_rate=LEARNING_RATES[is_lora],
            lr_scheduler_type="constant", warmup_steps=0, max_grad_norm=MAX_GRAD_NORM, beta=0.1, weight_decay=0.01,
            max_length=args.max_length, train_sampling_strategy="sequential", use_cpu=True, report_to="none",
            save_strategy="no", logging_steps=1, disable_tqdm=True, gradient_checkpointing=False,
            **{"bf16": False, **options},
        )  # fmt: skip
        data = load_dataset("json", data_files=args.trl_data, split="train", cache_dir=directory)
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
        trainer = DPOTrainer(model, None, config, train_dataset=data, processing_class=tokenizer, callbacks=[Record()])
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()


# ---- measuring ------------------------------------------------------------------------------------------------------


def measure(command: list[str], steps_file: Path, args: argparse.Namespace) -> dict:
    """Run a command that appends a line of JSON to a file after each step; return its figures for the table."""
    start, times = time.time(), []
    log = steps_file.parent.parent / "log.txt"
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            n_steps = len(read_steps(steps_file))
            times += [time.time()] * (n_steps - len(times))
            if pid:
                break
            time.sleep(0.02)
    if status != 0:
        raise SystemExit(f"{' '.join(command)}\nfailed:\n{log.read_text()[-3000:]}")
    return {
        "pairs_per_second": (len(times) - 1) * args.batch_size / (times[-1] - times[0]),
        "memory": usage.ru_maxrss * 1024 / 1e9,
        "start": times[0] - start,
        "losses": [step["loss/train"] for step in read_steps(steps_file)],
    }


def read_steps(path: Path) -> list[dict]:
    """Return the complete lines of steps in a file; without the file, none."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]
    return [step for step in map(json.loads, lines) if "loss/train" in step]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a hub id or a folder")
    parser.add_argument("--data", required=True, help="JSON Lines of prompt, chosen, rejected as messages")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--max-length", type=int, default=384)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--microbatch", type=int, default=4, help="pairs that TRL computes at once")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mode", help=argparse.SUPPRESS)
    parser.add_argument("--trl-data", help=argparse.SUPPRESS)
    parser.add_argument("--output", help="write all figures to this JSON file")
    args = parser.parse_args()
    if args.mode is not None:
        run_trl(args)
        return
    with tempfile.TemporaryDirectory() as directory:
        folder, trl_data = write_data(args, directory)
        results: dict[str, dict[str, list[dict]]] = {mode: {"this program": [], "TRL": []} for mode in args.modes}
        for number in range(args.rounds):
            for mode, programs in results.items():
                for program, make_command, data in (
                    ("this program", command_of_ours, folder),
                    ("TRL", command_of_trl, trl_data),
                ):
                    run = Path(tempfile.mkdtemp(dir=directory))  # each run has its own cache for the reference
                    result = measure(make_command(args, mode, data, str(run)), run / "run/metrics.jsonl", args)
                    programs[program].append(result)
                    print(f"round {number + 1}, {mode}, {program}: {result}", file=sys.stderr, flush=True)
    if args.output:
        Path(args.output).write_text(json.dumps(results, indent=1))
    print("| mode | program | pairs/s | memory (GB) | start (s) | loss differs by |\n|---|---|---|---|---|---|")
    for mode, programs in results.items():
        first = next(iter(programs.values()))[0]["losses"]
        for program, rounds in programs.items():
            speed, memory, start = (
                statistics.median(result[key] for result in rounds) for key in ("pairs_per_second", "memory", "start")
            )
            difference = max(
                abs(ours - theirs) for result in rounds for ours, theirs in zip(result["losses"], first, strict=True)
            )
            print(f"| {mode} | {program} | {speed:.2f} | {memory:.1f} | {start:.0f} | {difference:.1e} |")


if __name__ == "__main__":
    main()
