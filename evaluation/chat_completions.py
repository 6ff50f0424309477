"""A judge behind an OpenAI-compatible chat-completions endpoint (https://platform.openai.com/docs/api-reference/chat)."""

import contextlib
import email.utils
import json
import math
import os
import queue
import random
import threading
import time
from collections.abc import Iterator
from urllib.parse import SplitResult, urlsplit, urlunsplit

from basics.printing import masked
from evaluation.pairs import Task
from evaluation.prompts import fill, read_verdict
from evaluation.verdicts import Verdict
from utils import UserError, is_short_of_files

_KEY = "OPENAI_API_KEY"  # the environment variable
_TEMPORARY = (408, 409, 425, 429)  # HTTP statuses after which a request is retried, like all from 500 on
_LONGEST_ANSWER = 1 << 22  # bytes
_LONGEST_PAUSE = 600  # seconds
_SHOWN = 300  # characters of a failed request's answer


class Endpoint:
    """An endpoint's address, and the key from the environment."""

    def __init__(self, url: str):
        """
        Args:
            url: the base URL, such as http://localhost:8000/v1.

        Raises: UserError if `url` isn't valid, if the key can't be sent, or if OpenAI's own endpoint lacks a key.
        """
        parts = _checked_parts(url)
        path = parts.path.rstrip("/").removesuffix("/chat/completions")
        self.url = urlunsplit((parts.scheme, parts.netloc, path, "", ""))
        self.completions_url = urlunsplit((parts.scheme, parts.netloc, f"{path}/chat/completions", parts.query, ""))
        self.key = os.environ.get(_KEY, "").strip() or None
        if not all("!" <= character <= "~" for character in self.key or ""):
            raise UserError(f"{_KEY} has a character that isn't allowed in an HTTP header; copy the key again")
        if parts.hostname == "api.openai.com" and self.key is None:
            raise UserError(f"judge_url={self.url} needs a key; set the variable {_KEY}")

    def authorize(self, request):
        """Set a request's Authorization header; called by the library `requests`, instead of reading .netrc."""
        if self.key is not None:
            request.headers["Authorization"] = f"Bearer {self.key}"
        return request


def _checked_parts(url: str) -> SplitResult:
    """Return a URL's parts.

    Raises: UserError if requests can't be sent there; its message leaves out user and password.
    """
    scheme, separator, rest = url.partition("://")
    shown = f"{scheme}{separator}{rest.rpartition('@')[2]}"
    expected = "expected a URL, e.g. judge_url=http://localhost:8000/v1"
    try:
        parts = urlsplit(url)
        port = parts.port  # raises ValueError for a port that isn't a number, or is too large
        host = (parts.hostname or "").encode("idna").decode()  # raises for labels over 63 characters
    except ValueError:  # its message may contain part of the password
        raise UserError(f"judge_url={shown}: its host or port isn't valid; {expected}") from None
    if parts.scheme not in ("http", "https") or not host or port == 0 or any(not "!" <= c <= "~" for c in host):
        raise UserError(f"judge_url={shown}: {expected}")
    if "@" in parts.netloc:
        raise UserError(f"judge_url={shown}: leave out user and password; only the key in {_KEY} is sent")
    if parts.fragment:
        raise UserError(f"judge_url={shown}: leave out # and what follows it; {expected}")
    return parts


class RateLimit:
    """Spaces the requests of all threads evenly, at most `per_minute`; None means no limit."""

    def __init__(self, per_minute: float | None):
        self.gap = 60 / per_minute if per_minute else 0.0
        self.next, self.lock = 0.0, threading.Lock()

    def wait(self):
        """Wait until the next request may start."""
        with self.lock:
            start = max(self.next, time.monotonic())
            self.next = start + self.gap
        time.sleep(max(0.0, start - time.monotonic()))

    def pause(self, seconds: float):
        """Start no request for `seconds` from now on."""
        with self.lock:
            self.next = max(self.next, time.monotonic() + seconds)


class ChatCompletions:
    """Asks a language model which of two responses is better, several requests at a time."""

    def __init__(
        self,
        endpoint: Endpoint,
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
            template: the judge's prompt, with {prompt}, {a} and {b}.
            arguments: further fields of a request.
            retries: how often to retry a failed request; the pauses start at one second and double.
            timeout: of a request (seconds).
        """
        self.endpoint, self.model, self.template, self.arguments = endpoint, model, template, arguments
        self.retries, self.timeout, self.concurrency = retries, timeout, concurrency
        self.limit = RateLimit(requests_per_minute)

    def n_characters(self, tasks: list[Task]) -> int:
        """Return the number of characters in the requests for these tasks."""
        return sum(len(fill(self.template, task)) for task in tasks)

    def judge(self, tasks: list[Task]) -> Iterator[tuple[Task, Verdict]]:
        """Yield verdicts as they come, in any order.

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
                except BaseException as error:  # raised in the main thread
                    done.put((task, error))

        for _ in range(min(self.concurrency, len(tasks))):
            threading.Thread(target=work, daemon=True).start()  # a signal ends the process without waiting for them
        try:
            for _ in tasks:
                task, outcome = done.get()
                if isinstance(outcome, BaseException):
                    raise outcome
                yield task, outcome
        finally:
            stopped.set()

    def _ask(self, task: Task) -> Verdict:
        """Return the verdict on a task; retry failed requests up to `retries` times."""
        content, tokens = fill(self.template, task), {"input_tokens": 0, "output_tokens": 0}
        verdict = Verdict(failure="nothing sent")
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(min(2 ** (attempt - 1), 60) * random.uniform(0.75, 1.25))  # threads retry at different times
            self.limit.wait()
            verdict, is_worth_retrying = self._request(content)
            for name in tokens:  # an answer without a verdict costs money, too
                tokens[name] += verdict.details.pop(name, 0)
            if not is_worth_retrying:
                break
        verdict.details |= tokens
        return verdict

    def _request(self, content: str) -> tuple[Verdict, bool]:
        """Send a request; return a verdict or a failure, and True if the request is worth retrying."""
        import requests
        import urllib3

        body = {"model": self.model, "messages": [{"role": "user", "content": content}], **self.arguments}
        data = json.dumps(body).encode()  # dumps escapes lone surrogates
        try:
            with requests.post(
                self.endpoint.completions_url, data=data, headers={"Content-Type": "application/json"},
                auth=self.endpoint.authorize, timeout=self.timeout, allow_redirects=False, stream=True,
            ) as response:  # fmt: skip
                content = _first_bytes(response)
        except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema) as error:
            raise UserError(f"judge_url={self.endpoint.url}: {error}") from error
        except requests.Timeout:
            return Verdict(failure="timeout"), True
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            if is_short_of_files(error):
                raise UserError(
                    f"too many open files for judge_concurrency={self.concurrency}: give a smaller one, or raise the "
                    "limit (ulimit -n)"
                ) from error
            return Verdict(failure="no connection", details={"answer": masked(str(error))[:_SHOWN]}), True
        text = content.decode("utf-8", "replace")  # JSON is UTF-8, whatever charset the header names
        shown = masked(text)[:_SHOWN]
        if response.status_code in (401, 403, 404):
            remedy = "check judge_url and judge_model" if response.status_code == 404 else f"check {_KEY}"
            raise UserError(
                f"{self.endpoint.url} answers {response.status_code} for judge_model={self.model}: {shown}\n{remedy}"
            )
        if response.status_code != 200:
            is_temporary = response.status_code in _TEMPORARY or response.status_code >= 500
            if is_temporary:
                self.limit.pause(retry_after(response.headers.get("Retry-After")))
            return Verdict(failure=f"HTTP {response.status_code}", details={"answer": shown}), is_temporary
        try:
            answer, tokens = _content(json.loads(text))
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError):
            return Verdict(failure="no chat completion", details={"answer": shown}), True
        verdict = read_verdict(answer)
        failure = None if verdict is not None else "no verdict in the answer"
        return Verdict(verdict, failure, {"answer": masked(answer), **tokens}), verdict is None


def _first_bytes(response) -> bytes:
    """Return an answer; stop reading after about `_LONGEST_ANSWER` bytes."""
    content = b""
    for chunk in response.iter_content(1 << 16):
        content += chunk
        if len(content) > _LONGEST_ANSWER:
            break
    return content


def _content(body: dict) -> tuple[str, dict[str, int]]:
    """Return the text of a chat completion, and the endpoint's counts of tokens."""
    usage = body.get("usage") or {}
    tokens = {"input_tokens": usage.get("prompt_tokens"), "output_tokens": usage.get("completion_tokens")}
    content = body["choices"][0]["message"]["content"] or ""
    return content + "", {name: int(count or 0) for name, count in tokens.items()}


def retry_after(value: str | None) -> float:
    """Return how long a Retry-After header, a number of seconds or a date, asks to wait: seconds, at most 600."""
    seconds = 0.0
    try:
        seconds = float(value or 0)
    except ValueError:
        with contextlib.suppress(ValueError, OverflowError):
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    return min(max(seconds, 0.0), _LONGEST_PAUSE) if math.isfinite(seconds) else 0.0
