"""A run's output on terminals of 80 and 120 columns, and in a log file."""

import json
import os
import re
import textwrap
import time

import pytest
from conftest import mark_exhaustive_except, read_jsonl
from launcher import train_after
from terminals import run_on_terminal
from test_cli import TOY

from reporting import terminal
from reporting.run_log import interval_means
from reporting.terminal import Progress, RunTable, duration, number, sample_lines, still_working

RUN = [*TOY, "loss=dpo", "n_examples=64", "eval_every=32", "lr=1e-3", "curves=false", "wandb.enabled=false",
       "minimum_log_interval_secs=1e-9"]  # fmt: skip
ESCAPE = re.compile(rb"\033\[[0-9;]*m")


@pytest.mark.slow
@pytest.mark.parametrize("columns", mark_exhaustive_except([80, 120], 120))
def test_terminal_lines_are_aligned_and_never_mixed(columns, launcher, tmp_path):
    screen = run_on_terminal(launcher, *RUN, f"local_run_dir={tmp_path}/run", columns=columns)
    assert screen.code == 0, "\n".join(screen.lines)
    (header,) = [line for line in screen.lines if line.split()[:1] == ["examples"]]
    names = header.split()
    assert names[0] == "examples" and {"loss", "acc.", "margin", "chosen", "rejected", "grad", "left"} <= set(names)
    assert ("epoch" in names) == ("lr" in names) == (columns == 120)
    ends = {match.end() for match in re.finditer(r"\S+", header)}
    rows = [line for line in screen.lines if re.match(r" *(\d+/64|eval \d+|change) ", line)]
    assert [row.split()[0] for row in rows].count("eval") == 3
    for row in rows:  # every cell is aligned to the right edge of its column's name
        cells = {match.end() for match in re.finditer(r"(eval )?\S+", row)}
        assert cells <= ends, (header, row)
        assert len(row) < columns
    lines = {line["counters/examples"]: line for line in read_jsonl(tmp_path / "run/metrics.jsonl")}
    for row in screen.rows(*(f"{n}/64 " for n in range(4, 65, 4))):
        shown, line = dict(zip(names, row, strict=True)), lines.get(int(row[0].split("/")[0]))
        if line["split"] == "train" and shown["acc."] != "ties":
            assert float(shown["loss"]) == pytest.approx(line["loss/train"], abs=1e-3)
            assert shown["acc."] == f"{line['rewards_train/accuracies']:.1%}"
    # each bar overwrites the one before, so only training's last one remains
    bars = [line for line in screen.lines if "|" in line and "steps, " in line]
    assert len(bars) == 1 and re.match(r"Training 100% \|█+\| 16/16 steps, .*, loss [\d.]+, acc\. [\d.]+%$", bars[0])
    text = "\n".join(screen.lines)
    for word in ("Writing model shards", "Loading weights", "it/s", "UserWarning", "FutureWarning"):
        assert word not in text


@pytest.mark.slow
@pytest.mark.parametrize(
    "env", mark_exhaustive_except([{}, {"NO_COLOR": "1"}, {"TERM": "dumb"}], {}, {"NO_COLOR": "1"})
)
def test_evaluations_are_bold_unless_colours_are_off(env, launcher, tmp_path):
    overrides = [*RUN, "n_examples=8", "eval_every=8", "sample_during_eval=false", f"local_run_dir={tmp_path}/run"]
    screen = run_on_terminal(launcher, *overrides, columns=120, env=env)
    assert screen.code == 0
    assert bool(ESCAPE.search(screen.sent)) == (env == {})
    if env == {}:
        (line,) = [line for line in screen.sent.splitlines() if b"eval 8" in line]
        assert b"\033[1m" in line  # bold is readable on light and on dark backgrounds
    assert {line.split()[0] for line in screen.lines if "eval" in line.split()[:1]} == {"eval"}


@pytest.mark.slow
def test_log_file_has_the_same_lines_without_escape_codes(launcher, tmp_path):
    launcher.start(*RUN, f"local_run_dir={tmp_path}/run", in_order=True)
    assert launcher.wait() == 0, launcher.output
    output = launcher.output
    assert "\033" not in output and "\r" not in output and "█" not in output
    rows = re.findall(r"^ *(\d+)/64 .* (\S+)$", output, re.MULTILINE)
    assert [int(n) for n, _ in rows] == list(range(4, 65, 4))
    assert all(re.fullmatch(r"\d+s|\d+m\d\ds", left) for _, left in rows)
    assert rows[-1][1] == "0s"
    assert max(map(len, output.split("Each line gives")[1].splitlines()[:60])) <= 120
    assert re.search(r"^First step: [\d,]+ tokens; peak memory: [\d.]+ GB of host memory$", output, re.MULTILINE)
    assert re.search(r"^1\.12 M parameters, all of them trained$", output, re.MULTILINE)
    assert re.search(r"^Trained on 64 examples in \d+s of steps: .* tokens per step", output, re.MULTILINE)


@pytest.mark.slow
def test_only_non_default_config_is_printed(launcher, tmp_path):
    run = ["n_examples=4", "sample_during_eval=false", "loss.beta=0.3", "do_first_eval=false"]
    assert launcher.run(*TOY, "loss=dpo", *run, "lora={r:4}", f"local_run_dir={tmp_path}/run") == 0, launcher.output
    printed = launcher.output.split("Loading tokenizer")[0]
    for line in ("loss.beta: 0.3", "lora.r: 4", "n_examples: 4", "do_first_eval: false", "exp_name: dpo_tiny"):
        assert f"  {line}\n" in printed
    for key in ("max_grad_norm", "optimizer", "save_every", "label_smoothing", "warmup_steps"):
        assert key not in printed
        assert key in (tmp_path / "run/config.yaml").read_text()
    assert re.search(r"parameters, [\d.]+ k of them trained \([\d.]+%\)", launcher.output)


def test_log_line_shows_means_over_its_steps():
    """Steps have equal size, so the rate over several steps is the harmonic mean."""
    steps = [
        {"counters/examples": 4, "loss/train": 1.0, "lr": 0.1, "examples_per_second": 10.0},
        {"counters/examples": 8, "loss/train": 2.0, "lr": 0.2, "examples_per_second": 30.0},
    ]
    means = interval_means(steps)
    expected = {"counters/examples": 8, "loss/train": 1.5, "lr": 0.2, "examples_per_second": 15.0}
    assert means == pytest.approx(expected)


def metrics(examples: int, loss: float, accuracy: float, ties: float = 0.0) -> dict[str, float]:
    rewards = {"accuracies": accuracy, "margins": 0.5, "ties": ties}
    return {
        "counters/examples": examples, "loss/eval": loss, **{f"rewards_eval/{k}": v for k, v in rewards.items()},
        "logps_eval/chosen": -10.0, "logps_eval/rejected": -20.0,
    }  # fmt: skip


def test_evaluation_line_shows_changes_and_ties():
    table = RunTable(160_000, 160_000)
    first = table.evaluation(metrics(0, 0.6931, 0.0, ties=1.0))
    assert first[-1].split()[:5] == ["eval", "0", "0.00", "0.6931", "ties"]
    second, change = table.evaluation(metrics(20_000, 0.5, 0.75))
    assert second.split()[:5] == ["eval", "20000", "0.12", "0.5000", "75.0%"]
    assert change.split()[:3] == ["change", "-0.1931", "+0.0000"]  # nothing for the accuracy: no earlier value
    assert table.evaluation(metrics(40_000, 0.6, 0.70))[1].split()[:3] == ["change", "+0.1000", "-5.0"]
    resumed = RunTable(160_000, 160_000, 40_000, metrics(40_000, 0.6, 0.70))
    assert resumed.evaluation(metrics(60_000, 0.4, 0.70))[-1].split()[:3] == ["change", "-0.2000", "+0.0"]


def test_evaluation_line_after_resuming_with_another_loss_shows_the_common_changes():
    """A run of pairs, all of them ties at its last evaluation, is resumed with loss=sft resume_anyway=true."""
    resumed = RunTable(1000, 1000, 200, metrics(200, 0.69, 0.0, ties=1.0))
    change = resumed.evaluation({"counters/examples": 300, "loss/eval": 20.0, "nll_eval/chosen": 2.0})[-1]
    assert change.split() == ["change", "+19.310"]


def test_table_header_is_repeated_every_few_lines():
    table = RunTable(1000, 1000)
    printed = [line for i in range(60) for line in table.evaluation(metrics(i, 0.5, 0.75))]
    assert 2 <= sum(line.split()[0] == "examples" for line in printed) <= 4


@pytest.mark.parametrize("columns", [80, 100, 120])
@pytest.mark.parametrize("n_examples", [8, 160_800, 10**9])
def test_log_line_fits_the_terminal_whatever_the_numbers(columns, n_examples, monkeypatch):
    monkeypatch.setattr(terminal, "width", lambda: columns - 1)
    for value in (-1e9, -12345.6, -0.00001, 0.0, 1e-12, 0.5, 99999.0, 1e9):
        table = RunTable(n_examples, n_examples)
        step = {"counters/examples": n_examples, "grad_norm": abs(value), "lr": 5e-7, "examples_per_second": 12345.6}
        names = ("loss/train", "rewards_train/margins", "logps_train/chosen", "logps_train/rejected")
        step |= dict.fromkeys(names, value) | {"rewards_train/accuracies": 1.0}
        lines = table.train(step)
        assert max(map(len, lines[-2:])) < columns, lines[-1]


def test_numbers_are_formatted_in_few_characters():
    for value in (0, 1, 0.6931, 12.3456, 999.99, 1234.5, 99999.4, 123456.7, 5.3e7, 1e6, 1e300, 4e-4, 1e-300):
        assert len(number(value)) <= 7, value
        assert float(number(value)) == pytest.approx(value, rel=0.3, abs=1e-4)
    assert [duration(s) for s in (0, 59.4, 61, 3599, 3600, 86399, 90000)] == [
        "0s", "59s", "1m01s", "59m59s", "1h00m", "23h59m", "1d01h",
    ]  # fmt: skip


def samples(prompt: str, **responses: str) -> list[dict]:
    """Return samples of one prompt; `responses`: by the model's name."""
    return [
        {"model": model, "prompt": prompt, "response": text, "sample": prompt + text}
        for model, text in responses.items()
    ]


def test_samples_are_shortened_below_their_prompt(monkeypatch):
    monkeypatch.setattr(terminal, "width", lambda: 79)
    prompt = "\n\nHuman: " + "word " * 100 + "last?\n\nAssistant:"
    drawn = samples(prompt, policy=" Yes, " + "of course " * 50, reference=" No.\033[2J\n\nHuman: x")
    text = "\n".join(sample_lines(drawn + samples("Hello", policy="", reference="Hi")))
    assert max(map(len, text.splitlines())) <= 79 and "\033" not in text
    head = "Samples: 2 of 2, drawn separately from each model, shortened; all are in samples.jsonl"
    assert text.startswith("\n".join(textwrap.wrap(head, 79)) + "\n… ")
    assert len(re.findall(r" last\?\s+Assistant:\npolicy: Yes, of course ", text)) == 1  # the end of a long prompt
    assert re.search(r" of\s+… *\nreference: No\.\\x1b\[2J Human: x\n", text)  # the beginning of a long response
    assert text.endswith("\nHello\npolicy: (empty)\nreference: Hi")
    assert sample_lines([]) == []


def test_samples_of_a_single_model_show_prompts_without_the_lines_they_share(monkeypatch):
    monkeypatch.setattr(terminal, "width", lambda: 79)
    prompts = [f"<system>\nBe kind. {'Be brief. ' * 40}\n<user>\nHow do {you}?\n<assistant>\n" for you in ("I", "we")]
    drawn = [sample for prompt in prompts for sample in samples(prompt, policy="So.")]
    assert sample_lines(drawn) == [
        "Samples: 2 of 2, shortened; all are in samples.jsonl",
        "… How do I? <assistant>", "policy: So.", "… How do we? <assistant>", "policy: So.",
    ]  # fmt: skip
    assert sample_lines(samples("\nOne prompt\nalone", policy="So."))[1] == "One prompt alone"


@pytest.mark.slow
def test_log_file_shows_samples_and_their_kl_once_per_evaluation(launcher, tmp_path):
    assert launcher.run(*RUN, "n_examples=4", "eval_every=4", f"local_run_dir={tmp_path}/run") == 0, launcher.output
    output = launcher.output
    assert output.count("Samples: 2 of 2, drawn separately from each model") == 2
    lines = [line for line in read_jsonl(tmp_path / "run/metrics.jsonl") if line["split"] == "eval"]
    shown = re.findall(r"on the samples: (\S+) ± (\S+) nats per response, (\S+) per token", output)
    assert len(shown) == len(lines) == 2
    assert float(shown[-1][0]) == pytest.approx(lines[-1]["kl_eval/per_response"], abs=1e-3)
    prompt = " ".join(json.loads((tmp_path / "run/samples.jsonl").read_text().splitlines()[0])["prompt"].split())
    assert output.count(prompt) == 2 and os.path.exists(tmp_path / "run/LATEST")


@pytest.mark.slow
def test_rounded_default_of_eval_every_gives_no_warning(launcher, tmp_path):
    """Few batch sizes divide the default of `eval_every`; 64, the quickstart's, doesn't."""
    run = ["batch_size=64", "n_examples=64", "sample_during_eval=false", "do_first_eval=false",
           "warmup_steps=0"]  # fmt: skip
    assert launcher.run(*TOY, *run, f"local_run_dir={tmp_path}/run") == 0, launcher.output
    assert "WARNING" not in launcher.output and "Setting eval_every to 19968" in launcher.output
    assert launcher.run(*TOY, *run, "eval_every=100", f"local_run_dir={tmp_path}/run2") == 0, launcher.output
    assert "WARNING: eval_every must be divisible by batch_size" in launcher.output


def test_progress_in_a_log_shows_the_total_and_the_time_left(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    with Progress("Evaluating", 100, "batches") as progress:
        assert progress.line() == "Evaluating: 0 of 100 batches, 0s so far"
        progress.update(6)
        now[0] = 60
        assert progress.line() == "Evaluating: 6 of 100 batches, 1m00s so far, about 15m40s left"
    assert capsys.readouterr().out == ""  # it was done before a minute had passed
    monkeypatch.setattr(terminal, "_PROGRESS_EVERY", 0.01)
    with Progress("Reading a\x1b file", None, "rows") as progress:
        progress.update(1000, note="3 failed")
        time.sleep(0.2)
    assert "Reading a\\x1b file: 1,000 rows, 0s so far, 3 failed\n" in capsys.readouterr().out


IMPATIENT = """
from reporting import terminal
terminal._PROGRESS_EVERY = 0.01  # seconds
import acceleration.model_check
acceleration.model_check._SLOW_PARAMETERS = 0
"""


def test_log_file_gets_progress_lines_during_every_long_stage(train_ok, tmp_path):
    """Each stage is a single batch or a single call, so only the timer's thread can have printed its lines."""
    output = train_ok(
        *TOY, "n_examples=8", "batch_size=8", "eval_every=16", "loss=dpo", "lora.r=2", "lr=1e-3",
        "precompute_ref_log_probs=true", "n_eval_examples=16", "eval_batch_size=16", "sample_during_eval=true",
        "n_eval_model_samples=2", script=train_after(IMPATIENT, tmp_path),
    )  # fmt: skip
    before_training = output.partition(" eval 0 ")[0]
    for line in (
        "Loading the policy: 0s so far",
        "Comparing faster ways to compute GPTNeoXForCausalLM with the plain forward: ",
        "Precomputing the reference, training data: ",
        "Evaluating: 0 of 1 batches, 0s so far",
        "Sampling: 0 of 1 batches, ",
    ):
        assert line in before_training, line


def test_time_left_follows_the_speed_so_far_without_the_first_evaluation(monkeypatch):
    """A resumed run of 1000 examples, which begins at 200, spends half its time on evaluations and saves."""
    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    table = RunTable(1000, 1000, n_done=200)
    now[0] = 500
    table.evaluation(metrics(200, 0.5, 0.75))
    now[0] += 40
    assert table.time_left(240) == "12m40s"  # 40 seconds for 40 examples, 760 left
    table.evaluation(metrics(240, 0.5, 0.75))
    now[0] += 40
    assert table.time_left(240) == "25m20s"
    assert table.time_left(1000) == "0s"


def test_long_loading_is_reported_every_minute(monkeypatch, capsys):
    monkeypatch.setattr(terminal, "_PROGRESS_EVERY", 0.01)
    with still_working("Loading the policy"):
        time.sleep(0.2)
    lines = capsys.readouterr().out.splitlines()
    assert lines and set(lines) == {"Loading the policy: 0s so far"}
    time.sleep(0.05)
    assert capsys.readouterr().out == ""
