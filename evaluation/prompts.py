"""Prompts that ask a language model for a verdict, and parsing its answer."""

import os
import re

from evaluation.pairs import Prompt, Task
from utils import UserError, closest_match

_CHOICE = """FIRST provide a one-sentence comparison of the two summaries, explaining which you prefer and why. \
SECOND, on a new line, state only "A" or "B" to indicate your choice. Your response should use the format:
Comparison: <one-sentence comparison and explanation>
Preferred: <"A" or "B">"""
_POST_AND_SUMMARIES = """

Post:
{prompt}

Summary A:
{a}

Summary B:
{b}

"""
# the DPO paper's prompts (https://arxiv.org/abs/2305.18290, appendix C.2): GPT-4 (S), GPT-4 (C), and for dialogue
PROMPTS = {
    "summarization": "Which of the following summaries does a better job of summarizing the most important points in "
    f"the given forum post?{_POST_AND_SUMMARIES}{_CHOICE}",
    "summarization_concise": "Which of the following summaries does a better job of summarizing the most important "
    "points in the given forum post, without including unimportant or irrelevant details? A good summary is both "
    f"precise and concise.{_POST_AND_SUMMARIES}{_CHOICE}",
    "dialogue": """For the following query to a chatbot, which response is more helpful?

Query: {prompt}

Response A:
{a}

Response B:
{b}

FIRST provide a one-sentence comparison of the two responses and explain which you feel is more helpful. SECOND, on a \
new line, state only "A" or "B" to indicate which response is more helpful. Your response should use the format:
Comparison: <one-sentence comparison and explanation>
More helpful: <"A" or "B">""",
}
_PLACEHOLDERS = ("prompt", "a", "b")
_VERDICT = re.compile(
    r"\W*(?:[a-z][a-z ]{0,40}:\W*)?(?:(?:response|summary|answer|option|assistant|output)\W+)?(a|b|tie)\W*",
    re.IGNORECASE,
)


def load_template(name: str) -> str:
    """Return a prompt of the DPO paper by its name, or one in a file.

    Raises: UserError if there is no such prompt, or if it lacks a placeholder.
    """
    if name in PROMPTS:
        return PROMPTS[name]
    if not os.path.isfile(name):
        raise UserError(
            f"judge_prompt={name}: no such file.{closest_match(name, PROMPTS)} Give one of {', '.join(PROMPTS)}, or a "
            "file with {prompt}, {a} and {b} where these belong"
        )
    try:
        with open(name, encoding="utf-8") as file:
            template = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"judge_prompt={name}: can't read it: {error}; give a text file") from error
    if missing := [name for name in _PLACEHOLDERS if f"{{{name}}}" not in template]:
        listed = ", ".join(f"{{{name}}}" for name in missing)
        raise UserError(f"judge_prompt={name}: it lacks {listed}; put it where the text belongs")
    return template


def fill(template: str, task: Task) -> str:
    """Return the template with a task's texts, stripped of white space; A is the first response."""
    texts = dict(zip(_PLACEHOLDERS, (prompt_text(task.pair.prompt), *task.texts), strict=True))
    # in one pass, as a text may contain a placeholder; not by str.format, as a template may have other braces
    return re.sub(r"\{(prompt|a|b)\}", lambda placeholder: texts[placeholder[1]].strip(), template)


def prompt_text(prompt: Prompt) -> str:
    """Return a prompt as one string: each message follows its role; a single message is only its content."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in prompt)


def read_verdict(answer: str) -> str | None:
    """Return the verdict in an answer: 'first', 'second' or 'tie'; None if there is none.

    It is the last line that consists of A, B or tie, optionally after a label such as "Preferred:".
    """
    for line in reversed(answer.splitlines()):
        if (found := _VERDICT.fullmatch(line)) is not None:
            return {"a": "first", "b": "second", "tie": "tie"}[found[1].lower()]
    return None
