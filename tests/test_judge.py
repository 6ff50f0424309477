"""`judge.py`: verdicts of judges with a known rule, counted by hand; no verdict is lost or requested twice."""

import json
import math
import re
import shutil
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ORACLE, REPOSITORY, mark_exhaustive_except, read_jsonl
from launcher import wait_until
from omegaconf import OmegaConf
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from config_checks.schema import own_keys
from evaluation.chat_completions import RateLimit, retry_after
from evaluation.judge import run
from evaluation.judge_summary import summarize, table
from evaluation.pairs import Pair, Response, Task, match, read_responses
from evaluation.prompts import PROMPTS, fill, load_template, read_verdict
from evaluation.statistics import length_controlled, wilson_interval
from utils import UserError, get_local_dir

JUDGE = REPOSITORY / "judge.py"
A = ["yes", "quite long an answer", "no", "it is so", "same", "b is longer here", "x", "the longest of all of them"]
B = ["no, no", "short", "yes, yes", "it isn't", "same", "much, much longer is b", "yy", "not"]
LONGER = ["b", "a", "b", "tie", "tie", "b", "b", "a"]  # the longer response: 2 wins, 2 ties, 4 losses


def write_samples(path, responses: list[str]):
    lines = [{"settings": "s", "prompt_index": i, "sample": 0, "prompt": f"\n\nHuman: say {i}\n\nAssistant:",
              "response": text} for i, text in enumerate(responses)]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def files(tmp_path) -> list[str]:
    write_samples(tmp_path / "a.jsonl", A)
    write_samples(tmp_path / "b.jsonl", B)
    return ["a=a.jsonl", "b=b.jsonl", "output=v.jsonl"]


@pytest.fixture
def judge(launcher, files, tmp_path):
    """Return a function that runs `judge.py` in a directory with the two files and returns the summary."""

    def run(*overrides: str, files: list[str] = files, env: dict | None = None) -> dict:
        env = {"NO_PROXY": "127.0.0.1", **(env or {})}
        code = launcher.run(
            *files, *overrides, script=JUDGE, directory=tmp_path, of_training=False, env=env, in_order=True
        )
        assert code == 0, launcher.output
        return json.loads((tmp_path / "v_summary.json").read_text())

    return run


@pytest.fixture
def refused(launcher, files, tmp_path):
    """Return a function that runs `judge.py` with a mistake and returns its output."""

    def run(*overrides: str, files: list[str] = files) -> str:
        env = {"NO_PROXY": "127.0.0.1", "OPENAI_API_KEY": ""}
        code = launcher.run(
            *files, *overrides, script=JUDGE, directory=tmp_path, of_training=False, env=env, in_order=True
        )
        assert code == 1, launcher.output
        assert "Traceback" not in launcher.output
        return launcher.output

    return run


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


# ---- files, prompts, answers ----------------------------------------------------------------------------------------


def test_alpaca_and_rows_files_match_samples(tmp_path):
    prompts = ["p0", "p1"]
    samples = {(i, k): Response(prompts[i], f"{i}/{k}") for i in (0, 1) for k in (0, 1)}
    (tmp_path / "alpaca.json").write_text(json.dumps([{"instruction": p, "output": f"o {p}"} for p in prompts]))
    rows = [{"index": n, "prompt": p, "chosen": f"c{n} {p}", "rejected": "r"} for n, p in enumerate(["p0", "p0", "p1"])]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs, n_unmatched = match(samples, read_responses("b", str(tmp_path / "alpaca.json")), False)
    assert n_unmatched == 0
    assert [(p.index, p.sample, p.a, p.b) for p in pairs] == [
        (0, 0, "0/0", "o p0"), (0, 1, "0/1", "o p0"), (1, 0, "1/0", "o p1"), (1, 1, "1/1", "o p1"),
    ]  # fmt: skip
    pairs, _ = match(read_responses("a", str(tmp_path / "rows.jsonl")), samples, False)
    assert [(p.index, p.sample, p.a, p.b) for p in pairs] == [
        (0, 0, "c0 p0", "0/0"), (0, 1, "c0 p0", "0/1"), (1, 0, "c2 p1", "1/0"), (1, 1, "c2 p1", "1/1"),
    ]  # fmt: skip


def test_alpaca_instruction_matches_the_last_message():
    roles = {"hi": "user", "?": "assistant", "x": "user"}
    messages = [{"role": role, "content": content} for content, role in roles.items()]
    alpaca = {(0, None): Response([{"role": "user", "content": "x"}], "o")}
    assert match({(0, 0): Response(messages, "r")}, alpaca, False)[0] == [Pair(0, 0, messages, "r", "o")]
    with pytest.raises(UserError, match="different prompts at prompt_index=0"):
        match({(0, 0): Response(messages[:1], "r")}, alpaca, False)


def test_unmatched_responses_are_an_error_or_counted():
    one = {(i, 0): Response("p", "t") for i in (0, 1, 2)}
    other = {(i, 0): Response("p", "u") for i in (1, 3)}
    with pytest.raises(
        UserError, match=r"prompt_index=0, sample=0 is in a and not in b \(3 responses .*allow_unmatched"
    ):
        match(one, other, False)
    pairs, n_unmatched = match(one, other, True)
    assert [pair.index for pair in pairs] == [1]
    assert n_unmatched == 3
    with pytest.raises(UserError, match="prompt_index=0, sample=0 is in a and not in b"):
        match({(0, 0): Response("p", "t")}, other, True)


def test_table_counts_a_single_pair_in_the_singular():
    line = {"prompt_index": 0, "sample": 0, "verdict": "a", "first": "a"}
    summary = summarize([Pair(0, 0, "p", "x", "y")], [line], {"judge": "model"})
    assert "\n  1 pair judged, of 1 prompt: a wins 1, ties 0, b wins 0\n" in table(
        {"a": "a.jsonl", "b": "b.jsonl", "kl": None, **summary}
    )


def test_judge_prompt_takes_texts_verbatim(tmp_path):
    (tmp_path / "t").write_text('{"json": {}} {prompt}|{a}|{b}')
    task = Task(Pair(0, 0, "say {a}", " one {b} \\1", "two"), "b")
    assert fill(load_template(str(tmp_path / "t")), task) == '{"json": {}} say {a}|two|one {b} \\1'
    for name, template in PROMPTS.items():
        text = fill(template, task)
        assert "say {a}" in text and "{prompt}" not in text, name
        assert text.index("A:\ntwo") < text.index("B:\none"), name


ANSWERS = {
    "Comparison: A is shorter.\nPreferred: B": "second", 'Comparison: both.\nMore helpful: "A"': "first",
    "**Preferred:** **A**\n": "first", "A": "first", "b.": "second", "Preferred: Response B": "second",
    "[[A]]": "first", "I think\n\nTie": "tie", "<think>\nA\n</think>\nMore helpful: <\"B\">": "second",
    "Preferred: Summary A\n\n": "first", "I prefer A": None, "": None, "A or B": None, "Preferred: C": None,
}  # fmt: skip


@pytest.mark.parametrize("answer", ANSWERS)
def test_last_verdict_line_decides(answer):
    assert read_verdict(answer) == ANSWERS[answer]


def test_rate_limit_spaces_requests_and_honours_pauses():
    limit, start = RateLimit(6000), time.monotonic()
    for _ in range(5):
        limit.wait()
    assert time.monotonic() - start >= 0.04
    limit.pause(0.2)
    limit.wait()
    assert time.monotonic() - start >= 0.2
    assert [retry_after(value) for value in (None, "3", "1.5", "nonsense", "-1", "99999")] == [0, 3, 1.5, 0, 0, 600]
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0


# ---- a command ------------------------------------------------------------------------------------------------------


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
    summary = judge("judge=command", command)
    lines = {line["prompt_index"]: line for line in read_jsonl(tmp_path / "v.jsonl")}
    assert {i: line["verdict"] for i, line in lines.items()} == {i: v for i, v in enumerate(LONGER) if i != 4}
    assert {line["first"] for line in lines.values()} == {"a", "b"}  # drawn
    expected = {
        "n_pairs": 8, "n_judged": 8, "n_failed": 0, "n_identical": 1, "wins": 2, "ties": 2, "losses": 4,
        "win_rate": 0.375, "mean_length_a": sum(map(len, A)) / 8, "mean_length_b": sum(map(len, B)) / 8,
        "n_decided": 6, "agreement": None,
    }  # fmt: skip
    assert {key: summary[key] for key in expected} == expected
    assert summary["win_rate_ci95"] == pytest.approx(wilson_interval(0.375, 8))
    firsts = [line["first"] == line["verdict"] for line in lines.values() if line["verdict"] != "tie"]
    assert summary["first_wins"] == sum(firsts) / 6


def test_both_orders_reuse_the_verdicts_of_one(judge, command, tmp_path, launcher):
    judge("judge=command", command)
    summary = judge("judge=command", command, "both_orders=true")
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
def test_faulty_judge_command_is_reported_and_can_be_repeated(name, refused, judge, command, tmp_path):
    script, message = COMMANDS[name]
    (tmp_path / "c.sh").write_text(script)
    assert message in refused("judge=command", "judge_command='sh c.sh'")
    kept = (tmp_path / "v.jsonl").read_text().count("\n") if (tmp_path / "v.jsonl").exists() else 0
    assert kept == {"fails": 1, "prints too little": 2, "prints too much": 0, "prints something else": 1}[name]
    (tmp_path / "c.sh").write_text("exec python3 longer.py")
    assert judge("judge=command", "judge_command='sh c.sh'")["n_judged"] == 8


# ---- an endpoint ----------------------------------------------------------------------------------------------------


class Endpoint:
    """An OpenAI-compatible server on loopback.

    `answer(number, a, b)` returns the text of its answer to a prompt, or the response's status, headers and body.
    """

    def __init__(self):
        self.seen: list[tuple[int, str, str]] = []
        self.bodies: list[dict] = []
        self.moments: list[float] = []
        self.keys: set[str | None] = set()
        self.answer, self.running, self.most_running = self.longer, 0, 0
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                endpoint.running += 1
                endpoint.most_running = max(endpoint.running, endpoint.most_running)
                try:
                    self.reply()
                except OSError:  # the client has gone
                    pass
                finally:
                    endpoint.running -= 1

            def reply(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                text = body["messages"][0]["content"]
                number, a, b = re.search(r"say (\d+)(?:.|\n)*<a>(.*)</a><b>(.*)</b>", text).groups()
                endpoint.seen.append((int(number), a, b))
                endpoint.bodies.append(body)
                endpoint.moments.append(time.monotonic())
                endpoint.keys.add(self.headers["Authorization"])
                answer = endpoint.answer(int(number), a, b)
                status, headers, content = answer if isinstance(answer, tuple) else (200, {}, completion(answer))
                self.send_response(status)
                for key, value in {"Content-Length": len(content.encode()), **headers}.items():
                    self.send_header(key, str(value))
                self.end_headers()
                self.wfile.write(content.encode())

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def options(self) -> list[str]:
        port = self.server.server_address[1]
        return ["judge=openai", f"judge_url=http://127.0.0.1:{port}/v1", "judge_model=m", "judge_prompt=t.txt"]

    def times(self, number: int) -> int:
        """Return how often the endpoint was asked about a prompt."""
        return sum(seen[0] == number for seen in self.seen)

    @staticmethod
    def longer(_number: int, a: str, b: str) -> str:
        return "Comparison: by length.\nMore helpful: " + (
            "tie" if len(a) == len(b) else "A" if len(a) > len(b) else "B"
        )


def completion(text: str) -> str:
    usage = {"prompt_tokens": 100, "completion_tokens": 10}
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}], "usage": usage})


@pytest.fixture
def endpoint(tmp_path):
    (tmp_path / "t.txt").write_text("{prompt}\n<a>{a}</a><b>{b}</b>")
    endpoint = Endpoint()
    yield endpoint
    endpoint.server.shutdown()
    endpoint.server.server_close()


def test_verdicts_of_an_endpoint_are_counted(judge, endpoint, launcher, tmp_path):
    prices = ["judge_input_price=10", "judge_output_price=1000"]
    key = {"OPENAI_API_KEY": "secret"}
    summary = judge(*endpoint.options, *prices, "judge_args.max_tokens=50", "judge_concurrency=3", env=key)
    assert (summary["wins"], summary["ties"], summary["losses"], summary["n_failed"]) == (2, 2, 4, 0)
    assert (summary["input_tokens"], summary["output_tokens"]) == (700, 70)
    assert summary["cost"] == pytest.approx((700 * 10 + 70 * 1000) / 10**6)
    output = launcher.output
    assert output.index("7 calls to m at http://127.0.0.1") < output.index("win rate of a")
    assert "cost about 0.70" in output  # 7 * 100 output tokens at 1000 per million, and a few input tokens
    assert endpoint.keys == {"Bearer secret"}
    assert "secret" not in output + (tmp_path / "v.jsonl").read_text()
    assert all(body["temperature"] == 0 and body["max_tokens"] == 50 for body in endpoint.bodies)
    assert 1 <= endpoint.most_running <= 3
    for line in read_jsonl(tmp_path / "v.jsonl"):
        i, texts = line["prompt_index"], (A[line["prompt_index"]], B[line["prompt_index"]])
        assert (i, *(texts if line["first"] == "a" else texts[::-1])) in endpoint.seen
    judge(*endpoint.options, *prices, "judge_args.max_tokens=50")
    assert "7 verdicts in the file" in launcher.output
    assert len(endpoint.seen) == 7


def test_judge_that_always_prefers_the_first_finds_no_winner(judge, endpoint, launcher, tmp_path):
    endpoint.answer = lambda *_: "More helpful: A"
    both = judge(*endpoint.options, "both_orders=true", "judge_args.temperature=null")
    assert both["win_rate"] == 0.5
    assert both["length_controlled_win_rate"] == pytest.approx(0.5)
    assert (both["ties"], both["agreement"], both["first_wins"]) == (8, 0, 1)
    assert "temperature" not in endpoint.bodies[0]
    (tmp_path / "v.jsonl").unlink()
    one = judge(*endpoint.options)
    n_first = sum(line["first"] == "a" for line in read_jsonl(tmp_path / "v.jsonl"))
    assert (one["wins"], one["losses"], one["first_wins"]) == (n_first, 7 - n_first, 1)


def test_failed_requests_are_retried_then_counted_as_failed(judge, endpoint, launcher, tmp_path):
    def answer(number: int, a: str, b: str):
        n = endpoint.times(number)
        if number == 0 and n == 1:
            return 429, {"Retry-After": "2"}, "slow down"
        if number == 1 and n == 1:
            return 500, {}, "oops"
        if number == 2:
            return "I can't decide"
        if number == 3:
            return 200, {}, "<html>"
        if number == 5:
            return 400, {}, "too long"
        if number == 6:
            released.wait(60)
        return endpoint.longer(number, a, b)

    endpoint.answer, released = answer, threading.Event()
    summary = judge(*endpoint.options, "judge_retries=1", "judge_timeout=1")
    released.set()
    first, again = (moment for moment, seen in zip(endpoint.moments, endpoint.seen, strict=True) if seen[0] == 0)
    assert again - first >= 2  # the Retry-After; the default is a second
    kinds = {"no verdict in the answer": 1, "no chat completion": 1, "HTTP 400": 1, "timeout": 1}
    assert summary["failures"] == kinds
    assert (summary["n_judged"], summary["n_failed"]) == (4, 4)
    assert (summary["wins"], summary["ties"], summary["losses"]) == (2, 1, 1)  # 1, 7; 4; 0
    assert [endpoint.times(number) for number in range(8)] == [2, 2, 2, 2, 0, 1, 2, 1]
    assert "4 pairs FAILED, not counted" in launcher.output
    assert summary["input_tokens"] == 100 * 5  # including the two answers without a verdict
    endpoint.answer = endpoint.longer
    summary = judge(*endpoint.options, "judge_retries=1")
    assert (summary["wins"], summary["ties"], summary["losses"], summary["failures"]) == (2, 2, 4, {})
    assert [endpoint.times(number) for number in range(8)] == [2, 2, 3, 3, 0, 2, 3, 1]


def test_pair_with_one_order_failed_is_not_judged(judge, endpoint):
    endpoint.answer = lambda number, a, b: (
        (400, {}, "no") if (number, a) == (1, A[1]) else endpoint.longer(number, a, b)
    )
    summary = judge(*endpoint.options, "both_orders=true")
    assert (summary["wins"], summary["ties"], summary["losses"]) == (1, 2, 4)
    assert (summary["n_failed"], summary["failures"]) == (1, {"HTTP 400": 1})


@pytest.mark.exhaustive
def test_killed_judge_loses_no_verdict_and_repeats_none(judge, endpoint, launcher, tmp_path):
    n = 40
    write_samples(tmp_path / "a.jsonl", ["x" * (i + 1) for i in range(n)])
    write_samples(tmp_path / "b.jsonl", ["y" * (n - i) for i in range(n)])

    def answer(number: int, a: str, b: str) -> str:
        time.sleep(0.05)
        return endpoint.longer(number, a, b)

    endpoint.answer = answer
    run = ["a=a.jsonl", "b=b.jsonl", "output=v.jsonl", *endpoint.options, "judge_concurrency=2"]
    launcher.start(*run, script=JUDGE, directory=tmp_path, of_training=False, env={"NO_PROXY": "127.0.0.1"})
    verdicts = tmp_path / "v.jsonl"
    wait_until(lambda: verdicts.exists() and verdicts.read_text().count("\n") >= 8)
    launcher.kill(signal.SIGKILL)
    assert launcher.wait() == -signal.SIGKILL
    wait_until(lambda: endpoint.running == 0)
    kept = read_jsonl(tmp_path / "v.jsonl")
    assert 8 <= len(kept) < n
    n_asked = len(endpoint.seen)
    assert n_asked <= len(kept) + 2 + 1  # two requests in flight, and one verdict about to be written
    with open(tmp_path / "v.jsonl", "a") as file:
        file.write(json.dumps({**kept[0], "verdict": "a"})[:-1])  # cut off by a crash
    summary = judge(*endpoint.options, "judge_concurrency=2")
    assert len(endpoint.seen) - n_asked == n - len(kept)
    lines = read_jsonl(tmp_path / "v.jsonl")
    assert lines[: len(kept)] == kept
    assert sorted(line["prompt_index"] for line in lines) == list(range(n))
    assert (summary["wins"], summary["ties"], summary["losses"]) == (20, 0, 20)  # 20 x at i = 19, and 21 y


def test_refusing_endpoint_ends_the_command(refused, endpoint):
    endpoint.answer = lambda *_: (401, {}, "bad key")
    output = refused(*endpoint.options)
    assert "answers 401 for judge_model=m: bad key\ncheck OPENAI_API_KEY" in output
    assert len(endpoint.seen) <= 8


def test_no_successful_verdict_is_an_error(refused, endpoint):
    endpoint.answer = lambda *_: (400, {}, "no")
    assert "error: no pair could be judged: 7 HTTP 400" in refused(*endpoint.options)


def test_verdicts_of_other_settings_or_texts_are_not_mixed(judge, refused, endpoint, tmp_path):
    judge(*endpoint.options)
    assert "v.jsonl has verdicts under other settings" in refused(*endpoint.options, "judge_args.temperature=1")
    write_samples(tmp_path / "a.jsonl", ["other", *A[1:]])
    assert "v.jsonl has verdicts on other texts than those of a and b (prompt_index=0)" in refused(*endpoint.options)
    assert len(endpoint.seen) == 7


SECRET = "sk-0123456789"


def test_api_key_is_not_replaced_by_netrc(judge, endpoint, tmp_path):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password hidden\n")
    env = {"NETRC": str(tmp_path / "netrc"), "OPENAI_API_KEY": f" {SECRET}\n"}
    judge(*endpoint.options, env=env)
    assert endpoint.keys == {f"Bearer {SECRET}"}
    endpoint.keys.clear()
    (tmp_path / "v.jsonl").unlink()
    judge(*endpoint.options, env=env | {"OPENAI_API_KEY": " "})
    assert endpoint.keys == {None}


def test_secrets_that_an_endpoint_echoes_are_masked(judge, endpoint, launcher, tmp_path):
    def answer(number: int, a: str, b: str):
        if number == 0:
            return 400, {}, f"bad request by Bearer {SECRET}"
        return f"{SECRET} says\nMore helpful: A"

    endpoint.answer = answer
    summary = judge(*endpoint.options, "judge_retries=0", env={"OPENAI_API_KEY": SECRET})
    assert summary["failures"] == {"HTTP 400": 1}
    kept = (tmp_path / "v.jsonl").read_text() + (tmp_path / "v_summary.json").read_text() + launcher.output
    assert SECRET not in kept
    assert "bad request by Bearer ***" in kept and "*** says" in kept
    endpoint.answer = lambda *_: (401, {}, f"\x1b[2Jno such key: {SECRET}\x07")
    (tmp_path / "v.jsonl").unlink()
    words = ["a=a.jsonl", "b=b.jsonl", "output=v.jsonl", *endpoint.options]
    env = {"NO_PROXY": "127.0.0.1", "OPENAI_API_KEY": SECRET}
    assert launcher.run(*words, script=JUDGE, directory=tmp_path, of_training=False, env=env, in_order=True) == 1
    assert "answers 401 for judge_model=m: \\x1b[2Jno such key: ***\\x07" in launcher.output


def test_api_key_that_no_http_header_allows_is_refused_without_showing_it(launcher, files, endpoint, tmp_path):
    for key in ("sk-0123\u20ac56789", "sk-0123\n456789"):
        env = {"NO_PROXY": "127.0.0.1", "OPENAI_API_KEY": key}
        words = [*files, *endpoint.options]
        assert launcher.run(*words, script=JUDGE, directory=tmp_path, of_training=False, env=env, in_order=True) == 1
        assert "OPENAI_API_KEY has a character that no HTTP header takes" in launcher.output
        assert "Traceback" not in launcher.output
        assert "sk-0123" not in launcher.output
    assert endpoint.seen == []


NO_COMPLETIONS = {
    "nested too deeply": "[" * 100_000, "not finite": completion("A").replace("100", "Infinity"),
    "no number": completion("A").replace("100", "NaN"), "a list": "[]",
    "longer than 4 MiB": completion("A" + "!" * (5 << 20)),
}  # fmt: skip


def test_malformed_answer_is_a_failed_verdict(launcher, files, endpoint, tmp_path):
    contents = list(NO_COMPLETIONS.values())
    headers = {"Content-Type": "text/html; charset=undefined"}
    endpoint.answer = lambda number, *_: (200, headers, contents[number % len(contents)])
    words = [*files, *endpoint.options, "judge_retries=0"]
    env = {"NO_PROXY": "127.0.0.1", "OPENAI_API_KEY": ""}
    assert launcher.run(*words, script=JUDGE, directory=tmp_path, of_training=False, env=env, in_order=True) == 1
    assert "error: no pair could be judged: 7 no chat completion" in launcher.output
    assert "Traceback" not in launcher.output


def test_answer_in_an_unknown_charset_is_read_as_utf_8(judge, endpoint):
    def answer(number: int, a: str, b: str):
        return 200, {"Content-Type": "application/json; charset=undefined"}, completion(endpoint.longer(number, a, b))

    endpoint.answer = answer
    assert judge(*endpoint.options)["n_judged"] == 8


@pytest.mark.parametrize("number", mark_exhaustive_except([signal.SIGTERM, signal.SIGINT], signal.SIGTERM))
def test_signal_ends_the_judge_command_with_all_its_processes(number, launcher, files, tmp_path):
    (tmp_path / "c.sh").write_text("sleep 1000 & echo $! > child; echo A; wait")
    words = [*files, "judge=command", "judge_command='sh c.sh'"]
    launcher.start(*words, script=JUDGE, directory=tmp_path, of_training=False, in_order=True)
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
    summary = judge("judge=model", f"judge_model={path}", "judge_batch_size=6")
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


def test_messages_are_scored_through_the_chat_template(judge, refused, reward_model, tmp_path):
    for name, responses in (("a.jsonl", A), ("b.jsonl", B)):
        rows = [{"instruction": f"say {i}", "output": text} for i, text in enumerate(responses)]
        (tmp_path / name).write_text(json.dumps(rows))
    template = "{% for m in messages %}{{ m.content + '!' }}{% endfor %}"  # all end in the same token
    assert judge("judge=model", f"judge_model={reward_model(chat_template=template)}")["ties"] == 8
    (tmp_path / "v.jsonl").unlink()
    path = reward_model()
    assert "messages need a chat template" in refused("judge=model", f"judge_model={path}")
    template = f"chat_template={REPOSITORY}/assets/human_assistant.jinja"
    assert judge("judge=model", f"judge_model={path}", template)["n_judged"] == 8


def test_texts_longer_than_the_reward_model_are_truncated_with_a_warning(judge, reward_model, tmp_path, launcher):
    write_samples(tmp_path / "a.jsonl", ["long " * 400 + A[0], *A[1:]])
    judge("judge=model", f"judge_model={reward_model()}")
    assert "truncated 1 of 14 texts (prompt + response) to their last 256 tokens" in launcher.output
    line = next(line for line in read_jsonl(tmp_path / "v.jsonl") if line["prompt_index"] == 0)
    assert line["scores"][0] == pytest.approx(expected_score("long " + A[0]), abs=1e-4)


@pytest.mark.parametrize("pad", [True, False])
def test_responses_without_opponents_are_scored_alone(pad, judge, reward_model, tmp_path, launcher):
    options = ["judge=model", f"judge_model={reward_model(pad=pad)}", "judge_batch_size=3"]
    summary = judge(*options, files=["a=a.jsonl", "output=v.jsonl"])
    scores = {line["prompt_index"]: line["scores"] for line in read_jsonl(tmp_path / "v.jsonl")}
    expected = [expected_score(text) for text in A]
    assert [scores[i] for i in range(8)] == [[pytest.approx(score, abs=1e-4)] for score in expected]
    assert summary["score"] == pytest.approx(np.mean(expected), abs=1e-4)
    assert summary["score_se"] == pytest.approx(np.std(expected, ddof=1) / math.sqrt(8), abs=1e-4)
    assert (summary["n_scored"], summary["n_failed"], summary["b"], summary["drawn"]) == (8, 0, None, [])
    assert "8 responses scored, to 8 prompts" in launcher.output
    judge(*options, files=["a=a.jsonl", "output=v.jsonl"])
    assert "8 scored already" in launcher.output


@pytest.mark.parametrize("place", ["folder", "hub"])
def test_verdicts_of_a_retrained_reward_model_are_not_mixed(place, reward_model, files, tmp_path, monkeypatch):
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
    with pytest.raises(UserError, match="has verdicts under other settings"):
        score("v.jsonl")
    score("w.jsonl")
    before, after = ([line["scores"][0] for line in read_jsonl(tmp_path / f"{name}.jsonl")] for name in "vw")
    assert after == pytest.approx([-value for value in before])


def test_summary_records_sampling_settings_and_kl(judge, command, tmp_path):
    origin = {"run": "dpo", "checkpoint": "LATEST", "examples": 9, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
    lines = [{**line, **origin, "policy_logps": -5.0, "reference_logps": -5.0 - i % 2}
             for i, line in enumerate(read_jsonl(tmp_path / "a.jsonl"))]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = judge("judge=command", command)
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
        [*ASKS, f"judge_url=http://{'a' * 64}.com/v1"], "aaa.com/v1: its host or port can't be one; expected a URL"
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
    "a file of something else": (["a=other.jsonl", *OPENAI], "a=other.jsonl, line 2: no response, its fields are x"),
    "a file that is cut off": (["b=cut.jsonl", *OPENAI], "b=cut.jsonl, line 8: no JSON"),
    "a response listed twice": (["b=twice.jsonl", *OPENAI], "line 9: prompt_index=0, sample=0 is listed twice"),
    "too few responses": (["b=few.jsonl", *OPENAI], "prompt_index=3, sample=0 is in a and not in b (5 responses are"),
    "other prompts": (["b=prompts.jsonl", *OPENAI], "a and b have different prompts at prompt_index=0"),
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
def test_bad_judge_input_is_refused_before_any_request(name, refused, files, tmp_path):
    overrides, message = BAD[name]
    lines = (tmp_path / "b.jsonl").read_text().splitlines(keepends=True)
    contents = {
        "other.jsonl": lines[0] + '{"x": 1}\n', "cut.jsonl": "".join(lines)[:-5], "few.jsonl": "".join(lines[:3]),
        "twice.jsonl": "".join([*lines, lines[0]]), "prompts.jsonl": "".join(lines).replace("say", "tell"),
        "lacking.txt": "{prompt} {a}", "mine.json": '{"my": "data"}', "v_summary.json": "".join(lines),
        "scores.jsonl": '{"settings": "s", "prompt_index": 0, "sample": 0, "first": "a", "texts": "t", '
                        '"failure": null, "verdict": "scored", "scores": []}\n',
    }  # fmt: skip
    if "b=v_summary.json" not in overrides:  # an existing summary would be refused first
        del contents["v_summary.json"]
    for file, content in contents.items():
        (tmp_path / file).write_text(content)
    given = {word.split("=")[0] for word in overrides}
    output = refused(*overrides, files=[word for word in files if word.split("=")[0] not in given])
    assert message in output
    assert "calls to" not in output
    assert not (tmp_path / "v.jsonl").exists()
    assert {file: (tmp_path / file).read_text() for file in contents} == contents  # unchanged


def test_judge_sweep_is_refused(refused, files):
    assert "only train.py supports sweeps with -m" in refused(*OPENAI, files=["-m", *files])
