"""A chat template that loops or writes forever is stopped with an error that names row and template."""

import json
import threading
import time

import pytest
from conftest import REPOSITORY, mark_exhaustive_except
from hydra import compose, initialize_config_dir
from transformers import AutoTokenizer

from config_checks.schema import CONFIG_DIR
from data import chat, template_limits
from data.choice import Choice, Settings
from data.messages import BadExample
from data.preparation import prepare
from data.rows import Example
from evaluation.sample_prompts import read_requests
from utils import UserError

LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}"
LOOPS += "{% endfor %}"
TEMPLATES = {
    "nested loops": (LOOPS, "takes more than 0.4 seconds"),
    "loops in a marked turn": (f"{{% generation %}}{LOOPS}{{% endgeneration %}}", "takes more than 0.4 seconds"),
    "loop inside a filter": ("{{ lipsum(n=10**9) }}", "takes more than 0.4 seconds"),
    "macro that calls itself twice": (
        "{% macro f(n) %}{{ f(n - 1) if n }}{{ f(n - 1) if n }}{% endmacro %}{{ f(60) }}",
        "takes more than 0.4 seconds",
    ),
    "long range": ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
    "long output": ("{% for i in range(90000) %}" + 20 * "a" + "{% endfor %}", "writes 1,800,000 characters from"),
}  # fmt: skip


@pytest.fixture
def tokenizer(monkeypatch):
    monkeypatch.setattr(template_limits, "SECONDS", 0.4)
    monkeypatch.setattr(template_limits, "_TICK", 0.1)
    tokenizer = AutoTokenizer.from_pretrained(REPOSITORY / "assets/tiny")
    tokenizer.chat_template = "{{ messages[0].content }}{% if messages[0].content == 'q' %}LOOPS{% endif %}"
    return tokenizer


def messages(role: str, text: str) -> list[dict]:
    return [{"role": role, "content": text}]


@pytest.mark.parametrize(
    ("name", "in_thread"),
    mark_exhaustive_except(
        [*((name, False) for name in TEMPLATES), ("nested loops", True)],
        lambda case: case[0] not in ("loops in a marked turn", "loop inside a filter"),
    ),
)
def test_endless_template_is_refused(name, in_thread, tokenizer):
    template, reason = TEMPLATES[name]
    tokenizer.chat_template = "{% if messages[0].content == 'q' %}" + template + "{% endif %}"
    renderer, errors = chat.Renderer(tokenizer, None), []

    def render():
        try:
            renderer.render(Example(messages("user", "q"), [messages("assistant", "yes")]))
        except (UserError, BadExample) as error:
            errors.append(str(error))

    thread = threading.Thread(target=render) if in_thread else None
    thread.start() if in_thread else render()
    if in_thread:
        thread.join()
    assert reason in errors[0]


def test_limits_end_with_the_rendering(tokenizer):
    tokenizer.chat_template = "{{ messages[0].content }}"
    renderer = chat.Renderer(tokenizer, None)
    with template_limits.limited("t"):
        assert renderer.render_dialogue(messages("user", "hi")) == "hi"  # sets a limit within the limit
    end = time.monotonic() + 0.8  # longer than the limit: nothing is raised here
    while time.monotonic() < end:
        sum(range(1000))
    assert not template_limits._watch.ticks and template_limits._watch.thread is None


def write_rows(path):
    rows = [{"prompt": messages("user", text), "chosen": messages("assistant", "yes"),
             "rejected": messages("assistant", "no")} for text in ("a", "b", "q", "c")]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("skips", mark_exhaustive_except([False, True], True))
def test_row_of_an_endless_template_is_named(skips, tokenizer, tmp_path):
    tokenizer.chat_template = tokenizer.chat_template.replace("LOOPS", LOOPS)
    choice, settings = Choice(str(write_rows(tmp_path / "data.jsonl"))), Settings(skips_bad=skips)
    with pytest.raises(UserError, match=r"row 2 \(.*data.jsonl, line 3\): the chat template of .*tiny takes"):
        prepare(choice, settings, tokenizer, "keep_end", ("pairs",), f"{tmp_path}/cache", silent=True)


def test_prompt_of_an_endless_template_is_named(tokenizer, tmp_path):
    tokenizer.chat_template = tokenizer.chat_template.replace("LOOPS", LOOPS)
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": messages("user", text)}) + "\n" for text in "abq"))
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        config = compose("config", ["model=tiny", "datasets=[toy]", f"local_dirs=[{tmp_path}/cache]"])
    with pytest.raises(
        UserError, match=r"prompts.jsonl, row 2: the chat template of .*tiny takes more than 0.4 seconds"
    ):
        read_requests(config, tokenizer, None, str(path))


def test_template_file_that_loops_is_named(tokenizer, tmp_path):
    (tmp_path / "loops.jinja").write_text(LOOPS)
    with pytest.raises(UserError, match=r"chat_template=.*loops.jinja takes more than 0.4 seconds to render"):
        chat.read_template(tokenizer, str(tmp_path / "loops.jinja"))
