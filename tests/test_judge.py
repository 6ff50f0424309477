"""`judge.py`: verdicts of judges with a known rule, counted by hand; no verdict is lost or requested twice."""

import json
import math
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ORACLE, REPOSITORY, mark_exhaustive_except, read_jsonl
from judging import FILES, A, B, Judging, write_samples
from launcher import wait_until
from omegaconf import OmegaConf
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from config_checks.schema import own_keys
from evaluation.judge import run
from evaluation.judge_summary import summarize, table
from evaluation.pairs import Pair
from evaluation.statistics import length_controlled, wilson_interval
from utils import UserError, get_local_dir


@pytest.fixture
def judge(launcher, tmp_path) -> Judging:
    return Judging(launcher, tmp_path)


# ---- statistics -----------------------------------------------------------------------------------------------------


def test_wilson_interval_matches_hand_computed_values():
    # 8 of 10: (0.8 + 3.8415/20 ± 1.96 sqrt(0.016 + 3.8415/400)) / 1.38415
    assert wilson_interval(0.8, 10) == pytest.approx([0.4902, 0.9433], abs=1e-4)
    assert wilson_interval(0.0, 4) == pytest.approx([0, 0.4899], abs=1e-4)  # z²/(n + z²)
    assert wilson_interval(1.0, 4) == pytest.approx([0.5101, 1], abs=1e-4)


def test_length_control_recovers_the_length_free_win_rate():
    generator = np.random.default_rng(0)
    difference = generator.integers(-100, 300, 20_000)
    scale = math.sqrt(np.mean(difference.astype(float) ** 2))
    p = 1 / (1 + np.exp(-(-0.5 + 2 * np.tanh(difference / scale))))
    scores = (generator.random(len(p)) < p).astype(float)
    rate, (low, high) = length_controlled(scores, difference)
    assert np.mean(scores) > 0.55
    assert rate == pytest.approx(1 / (1 + math.exp(0.5)), abs=0.02)
    assert high - low < 0.05
    assert low < rate < high


def test_length_biased_judge_has_no_preference_at_equal_length():
    longer = [10 * n for n in range(10, 30)]
    rate, (low, high) = length_controlled([1.0] * 20, longer)  # 100 %
    assert rate == pytest.approx(0.5, abs=0.1)
    assert (low, high) == pytest.approx((0, 1), abs=0.05)  # the data can't tell length from preference
    mixed = longer + [-n for n in longer[::4]]
    rate, _ = length_controlled([float(n > 0) for n in mixed], mixed)  # 80 %
    assert rate == pytest.approx(0.5, abs=0.1)


def test_length_control_changes_nothing_without_length_effects():
    assert length_controlled([1.0, 0.0, 0.5, 1.0, 1.0] * 20, [0] * 100)[0] == pytest.approx(0.7, abs=0.01)
    won, (low, _) = length_controlled([1.0] * 40, [-20, 20] * 20)
    assert won > 0.95
    assert low > 0.5


def test_table_counts_a_single_pair_in_the_singular():
    line = {"prompt_index": 0, "sample": 0, "verdict": "a", "first": "a"}
    summary = summarize([Pair(0, 0, "p", "x", "y")], [line], {"judge": "model"})
    assert "\n  1 pair judged, of 1 prompt: a wins 1, ties 0, b wins 0\n" in table(
        {"a": "a.jsonl", "b": "b.jsonl", "kl": None, **summary}
    )


# ---- a command ------------------------------------------------------------------------------------------------------


LONGER = ["b", "a", "b", "tie", "tie", "b", "b", "a"]  # the longer response: 2 wins, 2 ties, 4 losses
LONGER_SCRIPT = """
import json, sys
for line in sys.stdin:
    row = json.loads(line)
    a, b = len(row["a"]), len(row["b"])
    print("tie" if a == b else "A" if a > b else "B")
"""


@pytest.fixture
def command(tmp_path) -> str:
    (tmp_path / "longer.py").write_text(LONGER_SCRIPT)
    return "judge_command='python3 longer.py'"


def test_verdicts_of_a_command_are_counted(judge, command, tmp_path):
    summary = judge.run("judge=command", command)
    lines = {line["prompt_index"]: line for line in read_jsonl(tmp_path / "v.jsonl")}
    assert {i: line["verdict"] for i, line in lines.items()} == {i: v for i, v in enumerate(LONGER) if i != 4}
    assert {line["first"] for line in lines.values()} == {"a", "b"}  # the order is drawn at random
    expected = {
        "n_pairs": 8, "n_judged": 8, "n_failed": 0, "n_identical": 1, "wins": 2, "ties": 2, "losses": 4,
        "win_rate": 0.375, "mean_length_a": sum(map(len, A)) / 8, "mean_length_b": sum(map(len, B)) / 8,
        "n_decided": 6, "agreement": None,
    }  # fmt: skip
    assert {key: summary[key] for key in expected} == expected
    assert summary["win_rate_ci95"] == pytest.approx(wilson_interval(0.375, 8))
    firsts = [line["first"] == line["verdict"] for line in lines.values() if line["verdict"] != "tie"]
    assert summary["first_wins"] == sum(firsts) / 6


def test_both_orders_reuse_the_verdicts_on_one_order(judge, command, tmp_path, launcher):
    judge.run("judge=command", command)
    summary = judge.run("judge=command", command, "both_orders=true")
    assert "7 verdicts in the file" in launcher.output
    assert (summary["wins"], summary["ties"], summary["losses"]) == (2, 2, 4)
    assert len(read_jsonl(tmp_path / "v.jsonl")) == 14
    assert (summary["agreement"], summary["first_wins"]) == (1, 0.5)
    assert "both orders agree" in launcher.output


COMMANDS = {
    "fails": ("echo A; exit 3", "ended with exit code 3 after 1 of 7 verdicts"),
    "prints too little": ("echo A; echo B", "ended with exit code 0 after 2 of 7 verdicts"),
    "prints too much": ("yes A", "printed more verdicts than there are pairs; none is kept"),
    "prints something else": ("echo A; echo loading", "printed 'loading\\n': expected A, B or tie"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_faulty_judge_command_is_reported_and_can_be_repeated(name, judge, command, tmp_path):
    script, message = COMMANDS[name]
    (tmp_path / "c.sh").write_text(script)
    assert message in judge.refusal("judge=command", "judge_command='sh c.sh'")
    kept = (tmp_path / "v.jsonl").read_text().count("\n") if (tmp_path / "v.jsonl").exists() else 0
    assert kept == {"fails": 1, "prints too little": 2, "prints too much": 0, "prints something else": 1}[name]
    (tmp_path / "c.sh").write_text("exec python3 longer.py")
    assert judge.run("judge=command", "judge_command='sh c.sh'")["n_judged"] == 8


@pytest.mark.parametrize("number", mark_exhaustive_except([signal.SIGTERM, signal.SIGINT], signal.SIGTERM))
def test_signal_ends_the_judge_command_with_all_its_processes(number, judge, launcher, tmp_path):
    (tmp_path / "c.sh").write_text("sleep 1000 & echo $! > child; echo A; wait")
    judge.start("judge=command", "judge_command='sh c.sh'")
    verdicts, child = tmp_path / "v.jsonl", tmp_path / "child"
    wait_until(lambda: child.exists() and child.read_text().strip() and verdicts.exists() and verdicts.stat().st_size)
    launcher.kill(number)
    assert launcher.wait() == {signal.SIGTERM: 75, signal.SIGINT: 130}[number]
    assert "Traceback" not in launcher.output
    assert len(read_jsonl(verdicts)) == 1
    assert not [path.name for path in tmp_path.iterdir() if "partial" in path.name]
    status = Path(f"/proc/{int(child.read_text())}/stat")
    wait_until(lambda: not status.exists() or status.read_text().split()[2] == "Z")


# ---- a reward model -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    """Return a function that saves a model whose score is cos(π · the last token's id / 512) and returns its path."""

    def save(n_labels: int = 1, pad: bool = True, chat_template: str | None = None):
        path = tmp_path_factory.mktemp("reward_model")
        tokenizer = AutoTokenizer.from_pretrained(ORACLE / "model")
        model = AutoModelForSequenceClassification.from_pretrained(ORACLE / "model", num_labels=n_labels)
        first, second = torch.tensor([1.0, -1.0, 1.0, -1.0]).repeat(16), torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(16)
        angles = torch.arange(512)[:, None] * math.pi / 512
        with torch.no_grad():
            for name, parameter in model.named_parameters():  # blocks that add nothing, norms that change nothing
                parameter.fill_(float("norm" in name and name.endswith("weight")))
            model.gpt_neox.embed_in.weight.copy_(angles.cos() * first + angles.sin() * second)
            model.score.weight[-1] = first / 64
        if pad:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.chat_template = chat_template
        model.save_pretrained(path), tokenizer.save_pretrained(path)
        return path

    return save


def expected_score(text: str) -> float:
    ids = AutoTokenizer.from_pretrained(ORACLE / "model")(text)["input_ids"]
    return math.cos(math.pi * ids[-1] / 512)


@pytest.mark.parametrize("kind", ["one score", "two classes", "no padding"])
def test_higher_reward_wins(kind, judge, reward_model, tmp_path, launcher):
    path = reward_model(2 if kind == "two classes" else 1, kind != "no padding")
    summary = judge.run("judge=model", f"judge_model={path}", "judge_batch_size=6")
    lines = read_jsonl(tmp_path / "v.jsonl")
    scores = {i: (expected_score(A[i]), expected_score(B[i])) for i in range(8)}
    assert len(lines) == 7
    for line in lines:
        assert line["scores"] == pytest.approx(scores[line["prompt_index"]], abs=1e-4)
    wins, losses = (sum(sign * (a - b) > 1e-6 for a, b in scores.values()) for sign in (1, -1))
    assert wins > 0 < losses
    assert (summary["wins"], summary["losses"], summary["ties"]) == (wins, losses, 8 - wins - losses)
    assert "first_wins" not in summary
    assert ("has no padding token" in launcher.output) == (kind == "no padding")


def test_messages_are_scored_through_the_chat_template(judge, reward_model, tmp_path):
    for name, responses in (("a.jsonl", A), ("b.jsonl", B)):
        rows = [{"instruction": f"say {i}", "output": text} for i, text in enumerate(responses)]
        (tmp_path / name).write_text(json.dumps(rows))
    template = "{% for m in messages %}{{ m.content + '!' }}{% endfor %}"  # all end in the same token
    assert judge.run("judge=model", f"judge_model={reward_model(chat_template=template)}")["ties"] == 8
    (tmp_path / "v.jsonl").unlink()
    path = reward_model()
    assert "messages need a chat template" in judge.refusal("judge=model", f"judge_model={path}")
    template = f"chat_template={REPOSITORY}/assets/human_assistant.jinja"
    assert judge.run("judge=model", f"judge_model={path}", template)["n_judged"] == 8


def test_texts_longer_than_the_reward_model_are_truncated_with_a_warning(judge, reward_model, tmp_path, launcher):
    write_samples(tmp_path / "a.jsonl", ["long " * 400 + A[0], *A[1:]])
    judge.run("judge=model", f"judge_model={reward_model()}")
    assert "truncated 1 of 14 texts (prompt + response) to their last 256 tokens" in launcher.output
    line = next(line for line in read_jsonl(tmp_path / "v.jsonl") if line["prompt_index"] == 0)
    assert line["scores"][0] == pytest.approx(expected_score("long " + A[0]), abs=1e-4)


@pytest.mark.parametrize("pad", [True, False])
def test_responses_without_opponents_are_scored_alone(pad, judge, reward_model, tmp_path, launcher):
    options = ["judge=model", f"judge_model={reward_model(pad=pad)}", "judge_batch_size=3"]
    summary = judge.run(*options, files=("a=a.jsonl", "output=v.jsonl"))
    scores = {line["prompt_index"]: line["scores"] for line in read_jsonl(tmp_path / "v.jsonl")}
    expected = [expected_score(text) for text in A]
    assert [scores[i] for i in range(8)] == [[pytest.approx(score, abs=1e-4)] for score in expected]
    assert summary["score"] == pytest.approx(np.mean(expected), abs=1e-4)
    assert summary["score_se"] == pytest.approx(np.std(expected, ddof=1) / math.sqrt(8), abs=1e-4)
    assert (summary["n_scored"], summary["n_failed"], summary["b"], summary["drawn"]) == (8, 0, None, [])
    assert "8 responses scored, to 8 prompts" in launcher.output
    judge.run(*options, files=("a=a.jsonl", "output=v.jsonl"))
    assert "8 scored already" in launcher.output


@pytest.mark.parametrize("place", ["folder", "hub"])
def test_verdicts_of_a_retrained_reward_model_are_not_mixed(place, reward_model, tmp_path, monkeypatch):
    write_samples(tmp_path / "a.jsonl", A)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    root = Path(get_local_dir([f"{tmp_path}/cache"])) / "models--someone--judge"

    def score(output: str) -> dict:
        name = "someone/judge" if place == "hub" else str(tmp_path / "model")
        given = {"a": "a.jsonl", "output": output, "judge": "model", "judge_model": name}
        return run(OmegaConf.create(own_keys("judge") | given | {"local_dirs": [f"{tmp_path}/cache"]}))

    def publish(path: Path, commit: str):
        folder = tmp_path / "model" if place == "folder" else root / "snapshots" / commit
        shutil.copytree(path, folder, dirs_exist_ok=True)
        (root / "refs").mkdir(parents=True, exist_ok=True)
        (root / "refs/main").write_text(commit)

    publish(path := reward_model(), "0" * 40)
    score("v.jsonl")
    model = AutoModelForSequenceClassification.from_pretrained(path)
    model.score.weight.data.neg_()
    model.save_pretrained(path)
    publish(path, "1" * 40)
    with pytest.raises(UserError, match="has verdicts that were written under other settings"):
        score("v.jsonl")
    score("w.jsonl")
    before, after = ([line["scores"][0] for line in read_jsonl(tmp_path / f"{name}.jsonl")] for name in "vw")
    assert after == pytest.approx([-value for value in before])


def test_summary_records_sampling_settings_and_kl(judge, command, tmp_path):
    origin = {"run": "dpo", "checkpoint": "LATEST", "examples": 9, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
    lines = [{**line, **origin, "policy_logps": -5.0, "reference_logps": -5.0 - i % 2}
             for i, line in enumerate(read_jsonl(tmp_path / "a.jsonl"))]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = judge.run("judge=command", command)
    assert summary["drawn"] == [origin]
    assert (summary["kl"], summary["n_kl"]) == (0.5, 8)  # of log-ratios 0, 1, 0, 1, ...: variance 8/4/7
    assert summary["kl_se"] == pytest.approx(math.sqrt(2 / 7 / 8))


# ---- bad input ------------------------------------------------------------------------------------------------------


ASKS = ["judge=openai", "judge_model=m"]
OPENAI = [*ASKS, "judge_url=http://127.0.0.1:9/v1"]
COMMAND = ["judge=command", "judge_command=x"]
BAD = {
    "no judge": ([], "judge is required, e.g. python judge.py"),
    "another judge": (["judge=opennai"], "judge=opennai: no such judge. Did you mean openai? There are: model"),
    "nothing to compare with": (["b=null", *OPENAI], "b is required: the file of responses to compare with those of a"),
    "no partners": (["b=null", "judge=model", "judge_model=m", "allow_unmatched=true"], "no effect without b"),
    "no model": (["judge=model"], "judge=model needs judge_model"),
    "no endpoint": (ASKS, "judge=openai needs judge_url"),
    "no URL": ([*ASKS, "judge_url=localhost:8000"], "judge_url=localhost:8000: expected a URL"),
    "an impossible port": ([*ASKS, "judge_url=http://h:abc/v1"], "judge_url=http://h:abc/v1: its host or port"),
    "a label that is too long": (
        [*ASKS, f"judge_url=http://{'a' * 64}.com/v1"], "aaa.com/v1: its host or port isn't valid; expected a URL"
    ),
    "a password": (
        [*ASKS, "judge_url=http://me:secret@h/v1"], "judge_url=http://h/v1: leave out user and password; only the key"
    ),
    "no API key": ([*ASKS, "judge_url=https://api.openai.com/v1"], "set the variable OPENAI_API_KEY"),
    "both orders by a model": (["judge=model", "judge_model=m", "both_orders=true"], "both_orders=True: not used"),
    "a URL with a command": ([*COMMAND, "judge_url=u"], "judge_url=u: not used with judge=command"),
    "no such prompt": ([*OPENAI, "judge_prompt=dialog"], "judge_prompt=dialog: no such file. Did you mean dialogue?"),
    "a prompt that lacks b": ([*OPENAI, "judge_prompt=lacking.txt"], "judge_prompt=lacking.txt: it lacks {b}"),
    "a timeout of 0": ([*OPENAI, "judge_timeout=0"], "judge_timeout=0: must be 0.001 to 100000"),
    "half a retry": ([*OPENAI, "judge_retries=0.5"], "judge_retries=0.5: expected an integer"),
    "an unknown key": (["judge_promt=x"], "no config key 'judge_promt'. Did you mean judge_prompt? config/judge.yaml"),
    "a key of training": (["lora.r=2", *OPENAI], "no config key 'lora'"),
    "no such file": (["a=nowhere", *OPENAI], "a=nowhere: can't read it"),
    "too few responses": (["b=few.jsonl", *OPENAI], "prompt_index=3, sample=0 is in a and not in b (5 responses are"),
    "an output that is an input": (["output=a.jsonl", *OPENAI], "output=a.jsonl is also the file of a"),
    "an output of something else": (["output=other.jsonl", *OPENAI], "doesn't hold verdicts"),
    "an output of one line without an end": (["output=mine.json", *OPENAI], "doesn't hold verdicts"),
    "a summary in the place of an input": (
        ["b=v_summary.json", *OPENAI], "the summary of output=v_summary.json is also the file of b; give another"
    ),
    "an output without scores": (["output=scores.jsonl", *OPENAI], "doesn't hold verdicts"),
    "nowhere to write": (["output=no/where.jsonl", *OPENAI], "output=no/where.jsonl: there is no such directory"),
    "a model that isn't there": (["judge=model", "judge_model=nowhere/x"], "can't load judge_model=nowhere/x"),
    "a model without a score": (["judge=model", f"judge_model={ORACLE}/model"], "score.weight"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_judge_input_is_refused_before_any_request(name, judge, tmp_path):
    overrides, message = BAD[name]
    lines = (tmp_path / "b.jsonl").read_text().splitlines(keepends=True)
    contents = {
        "other.jsonl": lines[0] + '{"x": 1}\n', "few.jsonl": "".join(lines[:3]), "lacking.txt": "{prompt} {a}",
        "mine.json": '{"my": "data"}', "v_summary.json": "".join(lines),
        "scores.jsonl": '{"settings": "s", "prompt_index": 0, "sample": 0, "first": "a", "texts": "t", '
                        '"failure": null, "verdict": "scored", "scores": []}\n',
    }  # fmt: skip
    if "b=v_summary.json" not in overrides:  # an existing summary would be refused first
        del contents["v_summary.json"]
    for file, content in contents.items():
        (tmp_path / file).write_text(content)
    given = {word.split("=")[0] for word in overrides}
    output = judge.refusal(*overrides, files=tuple(word for word in FILES if word.split("=")[0] not in given))
    assert message in output
    assert "calls to" not in output
    assert not (tmp_path / "v.jsonl").exists()
    assert {file: (tmp_path / file).read_text() for file in contents} == contents  # unchanged


def test_judge_sweep_is_refused(judge):
    assert "only train.py supports sweeps with -m" in judge.refusal(*OPENAI, files=("-m", *FILES))
