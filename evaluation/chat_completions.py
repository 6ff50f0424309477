"""A judge behind an OpenAI-compatible chat-completions endpoint (https://platform.openai.com/docs/api-reference/chat)."""

import email.utils
import os
import queue
import random
import threading
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

from evaluation.pairs import Task
from evaluation.prompts import fill, read_verdict
from evaluation.verdicts import Verdict
from utils import UserError

_FOR_NOW = (408, 409, 425, 429)  # statuses, beside those from 500 on, after which it's worth another try
_LONGEST_PAUSE = 600  # seconds


def check_url(url: str) -> str:
    """The endpoint's base, that ends in /v1 or the like.

    Raises: UserError if it is no URL, or OpenAI's own and there is no key.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"judge_url={url}: expected a URL, e.g. judge_url=http://localhost:8000/v1")
    if parts.hostname == "api.openai.com" and not os.environ.get("OPENAI_API_KEY"):
        raise UserError(f"judge_url={url} needs a key; set the variable OPENAI_API_KEY")
    return url.rstrip("/").removesuffix("/chat/completions")


class RateLimit:
    """Lets requests of all threads start at most `per_minute` a minute, evenly; None: at once."""

    def __init__(self, per_minute: float | None):
        self.gap = 60 / per_minute if per_minute else 0.0
        self.next, self.lock = 0.0, threading.Lock()

    def wait(self):
        with self.lock:
            start = max(self.next, time.monotonic())
            self.next = start + self.gap
        time.sleep(max(0.0, start - time.monotonic()))

    def pause(self, seconds: float):
        """Let nothing more start for so long."""
        with self.lock:
            self.next = max(self.next, time.monotonic() + seconds)


class ChatCompletions:
    """Asks a language model which of two responses is better, several requests at a time."""

    sees_order = True

    def __init__(
        self,
        url: str,
        model: str,
        template: str,
        arguments: dict,
        retries: int,
        timeout: float,
        concurrency: int,
        requests_per_minute: float | None,
    ):
        """
        Args:
            template: with {prompt}, {a} and {b}.
            arguments: further fields of a request.
            retries: how often what fails is asked again, after pauses that double from a second on.
            timeout: without an answer (seconds).
        """
        self.url, self.model, self.template, self.arguments = url, model, template, arguments
        self.retries, self.timeout, self.concurrency = retries, timeout, concurrency
        self.limit = RateLimit(requests_per_minute)

    def n_characters(self, tasks: list[Task]) -> int:
        """Of what is sent."""
        return sum(len(fill(self.template, task)) for task in tasks)

    def judge(self, tasks: list[Task]) -> Iterator[tuple[Task, Verdict]]:
        """Verdicts as they come, in any order.

        Raises: UserError if the endpoint refuses this user, or has no such model.
        """
        waiting: queue.SimpleQueue = queue.SimpleQueue()
        done: queue.SimpleQueue = queue.SimpleQueue()
        stopped = threading.Event()
        for task in tasks:
            waiting.put(task)

        def work():
            while not stopped.is_set():
                try:
                    task = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    done.put((task, self._ask(task)))
                except BaseException as error:  # the main thread's to raise
                    done.put((task, error))

        for _ in range(min(self.concurrency, len(tasks))):
            threading.Thread(target=work, daemon=True).start()  # the process doesn't wait for it where a signal ends it
        try:
            for _ in tasks:
                task, outcome = done.get()
                if isinstance(outcome, BaseException):
                    raise outcome
                yield task, outcome
        finally:
            stopped.set()

    def _ask(self, task: Task) -> Verdict:
        content, tokens = fill(self.template, task), {"input_tokens": 0, "output_tokens": 0}
        verdict = Verdict(failure="nothing sent")
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(min(2 ** (attempt - 1), 60) * random.uniform(0.75, 1.25))  # so that not all come at once
            self.limit.wait()
            verdict, may_be_repeated = self._request(content)
            for name in tokens:  # of answers that can't be read, too: they are paid for
                tokens[name] += verdict.details.pop(name, 0)
            if not may_be_repeated:
                break
        verdict.details |= tokens
        return verdict

    def _request(self, content: str) -> tuple[Verdict, bool]:
        """A verdict or why there is none, and whether it's worth another try."""
        import requests

        body = {"model": self.model, "messages": [{"role": "user", "content": content}], **self.arguments}
        key = os.environ.get("OPENAI_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            response = requests.post(
                f"{self.url}/chat/completions", json=body, headers=headers, timeout=self.timeout, allow_redirects=False
            )
        except requests.Timeout:
            return Verdict(failure="timeout"), True
        except requests.RequestException as error:
            return Verdict(failure="no connection", details={"answer": str(error)[:300]}), True
        text = response.text[:300]
        if response.status_code in (401, 403, 404):
            remedy = "check judge_url and judge_model" if response.status_code == 404 else "check OPENAI_API_KEY"
            raise UserError(f"{self.url} answers {response.status_code} for judge_model={self.model}: {text}\n{remedy}")
        if response.status_code != 200:
            may_be_repeated = response.status_code in _FOR_NOW or response.status_code >= 500
            if may_be_repeated:
                self.limit.pause(retry_after(response.headers.get("Retry-After")))
            return Verdict(failure=f"HTTP {response.status_code}", details={"answer": text}), may_be_repeated
        try:
            answer, tokens = _content(response.json())
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            return Verdict(failure="no chat completion", details={"answer": text}), True
        verdict = read_verdict(answer)
        failure = None if verdict is not None else "no verdict in the answer"
        return Verdict(verdict, failure, {"answer": answer, **tokens}), verdict is None


def _content(body: dict) -> tuple[str, dict[str, int]]:
    """The text of a chat completion, and its tokens as the endpoint counts them."""
    usage = body.get("usage") or {}
    tokens = {"input_tokens": usage.get("prompt_tokens"), "output_tokens": usage.get("completion_tokens")}
    content = body["choices"][0]["message"]["content"] or ""
    return content + "", {name: int(count or 0) for name, count in tokens.items()}


def retry_after(value: str | None) -> float:
    """The pause that a Retry-After header asks for, in seconds or until a date; at most ten minutes (seconds)."""
    try:
        seconds = float(value or 0)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return 0.0
    return min(max(seconds, 0.0), _LONGEST_PAUSE)
