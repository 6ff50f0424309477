"""Read responses of two models to the same prompts from files, and match them."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

from utils import UserError

Prompt = str | list[dict]  # text, or messages
Place = tuple[int, int | None]  # prompt number and sample number; None if the file has one response per prompt
_FORMATS = (
    "give JSON Lines written by sample.py (prompt_index, sample, prompt, response) or by evaluate.py with rows=FILE "
    "(prompt, chosen), or AlpacaEval's JSON (instruction, output)"
)


@dataclass(frozen=True)
class Origin:
    """The origin of a response that `sample.py` drew: run and checkpoint (None without a run), sampling settings."""

    run: str | None
    checkpoint: str | None
    examples: int
    temperature: float
    top_p: float
    top_k: int


@dataclass(frozen=True)
class Response:
    """A model's response to a prompt; if known, its origin, and its log-ratio of policy to reference (nats)."""

    prompt: Prompt
    text: str
    origin: Origin | None = None
    logratio: float | None = None


@dataclass(frozen=True)
class Pair:
    """Two responses to a prompt, or a single one (`b` is None)."""

    index: int
    sample: int
    prompt: Prompt
    a: str
    b: str | None


@dataclass(frozen=True)
class Task:
    """A pair in the order in which a judge sees it; `first`: a or b."""

    pair: Pair
    first: str

    @property
    def key(self) -> tuple[int, int, str]:
        """Prompt number, sample number, and whose response comes first."""
        return (self.pair.index, self.pair.sample, self.first)

    @property
    def texts(self) -> tuple[str, str]:
        """The two responses in the order in which the judge sees them."""
        return (self.pair.a, self.pair.b) if self.first == "a" else (self.pair.b, self.pair.a)

    @property
    def digest(self) -> str:
        """A short hash of all texts."""
        texts = json.dumps([self.pair.prompt, self.pair.a, self.pair.b])
        return hashlib.sha256(texts.encode()).hexdigest()[:12]


def first_shown(pair: Pair, seed: int) -> str:
    """Draw whose response a judge sees first, a or b; the draw depends on this pair only."""
    return "ab"[hashlib.sha256(f"{seed}/{pair.index}/{pair.sample}".encode()).digest()[0] & 1]


# ---- files ----------------------------------------------------------------------------------------------------------


def read_responses(key: str, path: str) -> dict[Place, Response]:
    """Return the responses in a file, by their places.

    A row of `evaluate.py` gives its preferred response; only the first row of each prompt counts, and prompts are
    numbered as by `sample.py`. These responses, and those in AlpacaEval's format, have no sample number: `match` pairs
    them with every sample of the other file.

    Args:
        key: the config's key for the file, for messages.

    Raises: UserError if the file can't be read; or for the first row that isn't a response.
    """
    found: dict[Place, Response] = {}
    prompt_numbers: dict[str, int] = {}  # by the prompt as JSON, for rows of evaluate.py
    for number, (where, row) in enumerate(_rows(f"{key}={path}", path)):
        if {"prompt_index", "sample", "prompt", "response"} <= row.keys():
            place = (row["prompt_index"], row["sample"])
            response = Response(row["prompt"], row["response"], _origin(row), _logratio(row))
        elif {"instruction", "output"} <= row.keys():
            message = {"role": "user", "content": row["instruction"]}
            place, response = (number, None), Response([message], row["output"])
        elif {"prompt", "chosen"} <= row.keys():
            response = Response(row["prompt"], row["chosen"])
            if json.dumps(response.prompt) in prompt_numbers:
                continue
            place = (prompt_numbers.setdefault(json.dumps(response.prompt), len(prompt_numbers)), None)
        else:
            raise UserError(f"{where}: not a response: its fields are {', '.join(row) or 'none'}; {_FORMATS}")
        _check(where, place, response)
        if place in found:
            raise UserError(f"{where}: prompt_index={place[0]}, sample={place[1]} is listed twice; leave one out")
        found[place] = response
    if not found:
        raise UserError(f"{key}={path}: it has no responses; {_FORMATS}")
    return found


def _origin(row: dict) -> Origin | None:
    fields = {field.name: row.get(field.name) for field in dataclasses.fields(Origin)}
    names, numbers = list(fields.values())[:2], list(fields.values())[2:]
    is_known = all(isinstance(name, str | None) for name in names) and all(isinstance(n, int | float) for n in numbers)
    return Origin(**fields) if is_known else None


def _logratio(row: dict) -> float | None:
    logps = row.get("policy_logps"), row.get("reference_logps")
    return logps[0] - logps[1] if all(isinstance(value, float) for value in logps) else None


def _rows(where: str, path: str) -> Iterator[tuple[str, dict]]:
    """Yield a file's JSON objects, each with its position (file, line, entry), for messages."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: can't read it: {error}; {_FORMATS}") from error
    is_array = text.lstrip()[:1] == "["
    pieces = [(where, text)] if is_array else [
        (f"{where}, line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()
    ]  # fmt: skip
    for position, piece in pieces:
        try:
            value = json.loads(piece)
        except (ValueError, RecursionError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else error
            raise UserError(f"{position}: invalid JSON: {reason}; {_FORMATS}") from error
        for number, row in enumerate(value if is_array else [value], 1):
            inside = f"{position}, entry {number}" if is_array else position
            if not isinstance(row, dict):
                raise UserError(f"{inside}: not a JSON object; {_FORMATS}")
            yield inside, row


def _check(where: str, place: tuple, response: Response):
    messages = response.prompt if isinstance(response.prompt, list) else []
    is_prompt = isinstance(response.prompt, str) or (
        messages and all(isinstance(m, dict) and isinstance(m.get("content"), str) and "role" in m for m in messages)
    )
    if not is_prompt:
        raise UserError(f"{where}: the prompt is neither a string nor messages with a role and a content each")
    if not isinstance(response.text, str):
        raise UserError(f"{where}: the response isn't a string: {json.dumps(response.text)[:100]}")
    if not all(number is None or (isinstance(number, int) and number >= 0) for number in place):
        raise UserError(f"{where}: prompt_index and sample must be integers, 0 or more")


# ---- matching -------------------------------------------------------------------------------------------------------


def single_responses(a: dict[Place, Response]) -> list[Pair]:
    """Return each response as a pair without `b`."""
    pairs = [Pair(index, sample or 0, response.prompt, response.text, None) for (index, sample), response in a.items()]
    return sorted(pairs, key=lambda pair: (pair.index, pair.sample))


def match(a: dict[Place, Response], b: dict[Place, Response], allow_unmatched: bool) -> tuple[list[Pair], int]:
    """Pair the responses to the same prompt and sample number; also return the number of responses without a partner.

    Raises: UserError if two prompts with the same number differ, or, unless allowed, if a response has no partner.
    """
    pairs, used = [], set()
    samples: dict[int, list[Place]] = {}
    for place in b:
        samples.setdefault(place[0], []).append(place)
    unmatched = []
    for (index, sample), response in a.items():
        others = samples.get(index, [])
        if sample is not None:
            others = [place for place in others if place[1] in (sample, None)]
        for other in others:
            prompt = _same_prompt(response.prompt, b[other].prompt)
            if prompt is None:
                raise UserError(
                    f"a and b have different prompts at prompt_index={index}: {str(response.prompt)[-80:]!r} and "
                    f"{str(b[other].prompt)[-80:]!r}; draw both from the same prompts"
                )
            number = next((s for s in (sample, other[1]) if s is not None), 0)
            pairs.append(Pair(index, number, prompt, response.text, b[other].text))
        used.update(others)
        unmatched += [("a", index, sample)] * (not others)
    unmatched += [("b", *place) for place in b if place not in used]
    if unmatched and (not allow_unmatched or not pairs):
        side, index, sample = unmatched[0]
        other = "b" if side == "a" else "a"
        which = f"prompt_index={index}" + (f", sample={sample}" if sample is not None else "")
        more = f" ({len(unmatched)} responses are without a partner)" if len(unmatched) > 1 else ""
        remedy = "allow_unmatched=true compares what both have" if pairs else "draw both from the same prompts"
        raise UserError(f"{which} is in {side} and not in {other}{more}; {remedy}")
    return sorted(pairs, key=lambda pair: (pair.index, pair.sample)), len(unmatched)


def _same_prompt(one: Prompt, other: Prompt) -> Prompt | None:
    """Return the fuller of two forms of one prompt (AlpacaEval has only the last message); None if they differ."""
    if one == other:
        return one
    short, full = sorted((one, other), key=lambda prompt: len(prompt) if isinstance(prompt, list) else 0)
    last = short if isinstance(short, str) else short[0]["content"]
    is_last = (isinstance(short, str) or len(short) == 1) and isinstance(full, list) and full[-1]["content"] == last
    return full if is_last else None
