"""`judge=openai`: prompts, answers and failures of an endpoint; no verdict is lost or requested twice."""

import json
import re
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import read_jsonl
from judging import A, B, Judging, write_samples
from launcher import wait_until

from evaluation.chat_completions import RateLimit, retry_after
from evaluation.pairs import Pair, Task
from evaluation.prompts import PROMPTS, fill, load_template, read_verdict


@pytest.fixture
def judge(launcher, tmp_path) -> Judging:
    return Judging(launcher, tmp_path)


# ---- prompts and answers --------------------------------------------------------------------------------------------


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
    summary = judge.run(*endpoint.options, *prices, "judge_args.max_tokens=50", "judge_concurrency=3", env=key)
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
    judge.run(*endpoint.options, *prices, "judge_args.max_tokens=50")
    assert "7 verdicts in the file" in launcher.output
    assert len(endpoint.seen) == 7


def test_judge_that_always_prefers_the_first_finds_no_winner(judge, endpoint, launcher, tmp_path):
    endpoint.answer = lambda *_: "More helpful: A"
    both = judge.run(*endpoint.options, "both_orders=true", "judge_args.temperature=null")
    assert both["win_rate"] == 0.5
    assert both["length_controlled_win_rate"] == pytest.approx(0.5)
    assert (both["ties"], both["agreement"], both["first_wins"]) == (8, 0, 1)
    assert "temperature" not in endpoint.bodies[0]
    (tmp_path / "v.jsonl").unlink()
    one = judge.run(*endpoint.options)
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
    summary = judge.run(*endpoint.options, "judge_retries=1", "judge_timeout=1")
    released.set()
    first, again = (moment for moment, seen in zip(endpoint.moments, endpoint.seen, strict=True) if seen[0] == 0)
    assert again - first >= 2  # the Retry-After; the default is a second
    kinds = {"no verdict in the answer": 1, "no chat completion": 1, "HTTP 400": 1, "timeout": 1}
    assert summary["failures"] == kinds
    assert (summary["n_judged"], summary["n_failed"]) == (4, 4)
    assert (summary["wins"], summary["ties"], summary["losses"]) == (2, 1, 1)  # prompts 1 and 7 won, 4 tied, 0 lost
    assert [endpoint.times(number) for number in range(8)] == [2, 2, 2, 2, 0, 1, 2, 1]
    assert "4 pairs FAILED, not counted" in launcher.output
    assert summary["input_tokens"] == 100 * 5  # including the two answers without a verdict
    endpoint.answer = endpoint.longer
    summary = judge.run(*endpoint.options, "judge_retries=1")
    assert (summary["wins"], summary["ties"], summary["losses"], summary["failures"]) == (2, 2, 4, {})
    assert [endpoint.times(number) for number in range(8)] == [2, 2, 3, 3, 0, 2, 3, 1]


def test_pair_with_one_order_failed_is_not_judged(judge, endpoint):
    endpoint.answer = lambda number, a, b: (
        (400, {}, "no") if (number, a) == (1, A[1]) else endpoint.longer(number, a, b)
    )
    summary = judge.run(*endpoint.options, "both_orders=true")
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
    judge.start(*endpoint.options, "judge_concurrency=2")
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
    summary = judge.run(*endpoint.options, "judge_concurrency=2")
    assert len(endpoint.seen) - n_asked == n - len(kept)
    lines = read_jsonl(tmp_path / "v.jsonl")
    assert lines[: len(kept)] == kept
    assert sorted(line["prompt_index"] for line in lines) == list(range(n))
    # up to i = 19, b's response is longer
    assert (summary["wins"], summary["ties"], summary["losses"]) == (20, 0, 20)


def test_refusing_endpoint_ends_the_command(judge, endpoint):
    endpoint.answer = lambda *_: (401, {}, "bad key")
    output = judge.refusal(*endpoint.options)
    assert "answers 401 for judge_model=m: bad key\ncheck OPENAI_API_KEY" in output
    assert len(endpoint.seen) <= 8


def test_command_without_any_verdict_ends_with_an_error(judge, endpoint):
    endpoint.answer = lambda *_: (400, {}, "no")
    assert "error: no pair could be judged: 7 HTTP 400" in judge.refusal(*endpoint.options)


def test_verdicts_of_other_settings_or_texts_are_not_mixed(judge, endpoint, tmp_path):
    judge.run(*endpoint.options)
    assert "v.jsonl has verdicts that were written under other settings" in judge.refusal(
        *endpoint.options, "judge_args.temperature=1"
    )
    write_samples(tmp_path / "a.jsonl", ["other", *A[1:]])
    assert "v.jsonl has verdicts on other texts than those of a and b (prompt_index=0)" in judge.refusal(
        *endpoint.options
    )
    assert len(endpoint.seen) == 7


SECRET = "sk-0123456789"


def test_api_key_is_not_replaced_by_netrc(judge, endpoint, tmp_path):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password hidden\n")
    env = {"NETRC": str(tmp_path / "netrc"), "OPENAI_API_KEY": f" {SECRET}\n"}
    judge.run(*endpoint.options, env=env)
    assert endpoint.keys == {f"Bearer {SECRET}"}
    endpoint.keys.clear()
    (tmp_path / "v.jsonl").unlink()
    judge.run(*endpoint.options, env=env | {"OPENAI_API_KEY": " "})
    assert endpoint.keys == {None}


def test_secrets_that_an_endpoint_echoes_are_masked(judge, endpoint, launcher, tmp_path):
    def answer(number: int, a: str, b: str):
        if number == 0:
            return 400, {}, f"bad request by Bearer {SECRET}"
        return f"{SECRET} says\nMore helpful: A"

    endpoint.answer = answer
    summary = judge.run(*endpoint.options, "judge_retries=0", env={"OPENAI_API_KEY": SECRET})
    assert summary["failures"] == {"HTTP 400": 1}
    kept = (tmp_path / "v.jsonl").read_text() + (tmp_path / "v_summary.json").read_text() + launcher.output
    assert SECRET not in kept
    assert "bad request by Bearer ***" in kept and "*** says" in kept
    endpoint.answer = lambda *_: (401, {}, f"\x1b[2Jno such key: {SECRET}\x07")
    (tmp_path / "v.jsonl").unlink()
    output = judge.refusal(*endpoint.options, env={"OPENAI_API_KEY": SECRET})
    assert "answers 401 for judge_model=m: \\x1b[2Jno such key: ***\\x07" in output


def test_api_key_that_no_http_header_allows_is_refused_without_showing_it(judge, endpoint):
    for key in ("sk-0123\u20ac56789", "sk-0123\n456789"):
        output = judge.refusal(*endpoint.options, env={"OPENAI_API_KEY": key})
        assert "OPENAI_API_KEY has a character that isn't allowed in an HTTP header" in output
        assert "sk-0123" not in output
    assert endpoint.seen == []


NO_COMPLETIONS = {
    "nested too deeply": "[" * 100_000, "not finite": completion("A").replace("100", "Infinity"),
    "no number": completion("A").replace("100", "NaN"), "a list": "[]",
    "longer than 4 MiB": completion("A" + "!" * (5 << 20)),
}  # fmt: skip


def test_malformed_answer_is_a_failed_verdict(judge, endpoint):
    contents = list(NO_COMPLETIONS.values())
    headers = {"Content-Type": "text/html; charset=undefined"}
    endpoint.answer = lambda number, *_: (200, headers, contents[number % len(contents)])
    output = judge.refusal(*endpoint.options, "judge_retries=0")
    assert "error: no pair could be judged: 7 no chat completion" in output


def test_answer_in_an_unknown_charset_is_read_as_utf_8(judge, endpoint):
    def answer(number: int, a: str, b: str):
        return 200, {"Content-Type": "application/json; charset=undefined"}, completion(endpoint.longer(number, a, b))

    endpoint.answer = answer
    assert judge.run(*endpoint.options)["n_judged"] == 8
