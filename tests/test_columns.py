"""Every column is read, listed as unused, or refused."""

import json

import pytest
from test_row_shapes import ASKED, NO, ROSE, TOOL, assistant, read, turn, user

from data.columns import Columns
from data.formats import prompt_example, recognize
from data.messages import BadExample
from utils import UserError

PAIR = {"chosen": "A red rose.", "rejected": "No."}
REFUSED = {  # rows, settings, parts of the message
    "images": (
        [{"images": ["a.png"], "prompt": "<image>What?", **PAIR}],
        {},
        r"column 'images'.*ignored_columns=\[images\]",
    ),
    "image objects": (
        [{"photo": {"bytes": "x", "path": "a"}, "prompt": "What?", **PAIR}],
        {},
        "column 'photo': images",
    ),
    "audio": ([{"audio": "a.wav", "prompt": "What?", **PAIR}], {}, "column 'audio': images, audio and video can't"),
    "videos": ([{"videos": ["a.mp4"], "prompt": "What?", **PAIR}], {}, "column 'videos'"),
    "context beside a question": (
        [{"context": f"Text {c}.", "question": f"What {c}?", **PAIR} for c in "ab"],
        {},
        r"column 'context' may belong to the prompt.*fields=\{input: context\}.*ignored_columns=\[context\]",
    ),
    "input beside a prompt": (
        [{"prompt": f"Do {c}:", "input": f"{c} it", **PAIR} for c in "ab"],
        {},
        "column 'input' may",
    ),
    "a history as one string": (
        [{"history": f"A: {c} B: d", "prompt": c, **PAIR} for c in "ab"],
        {},
        "'history' may belong",
    ),
    "settings of the template": (
        [{"prompt": [user(c)], **PAIR, "chat_template_kwargs": {"enable_thinking": False}} for c in "ab"],
        {},
        "column 'chat_template_kwargs' may belong to the prompt",
    ),
    "names with capitals and spaces": (
        [{"Prompt": c, "chosen ": "x", "rejected": "y"} for c in "ab"],
        {},
        "lower case, without spaces: fields={prompt: Prompt, chosen: 'chosen '}",
    ),
    "a constant context": ([{"context": "The same.", "prompt": c, **PAIR} for c in "ab"], {}, "column 'context' may"),
    "a string that differs": ([{"persona": c, "prompt": c * 3, **PAIR} for c in "abc"], {}, "column 'persona' may"),
    "other messages": (
        [{"dialog": [user(f"Hi {c}"), *ROSE], "prompt": c, **PAIR} for c in "ab"],
        {},
        "column 'dialog' may",
    ),
    "a column that may hold the prompt of whole dialogues": (
        [{"topic": c, **PAIR} for c in "abab"],
        {},
        r"column 'topic' may belong.*fields=\{prompt: topic\}",
    ),
    "a system text beside whole dialogues": ([{"system": "Be kind.", **PAIR}], {}, "column 'system' may belong"),
    "two columns": (
        [{"persona": c, "mood": f"in {c}", "prompt": c * 3, **PAIR} for c in "ab"],
        {},
        r"columns 'persona', 'mood'.*ignored_columns=\[persona, mood\]",
    ),
    "winner and loser": (
        [{"prompt": "a", "winner": "b", "loser": "c"}],
        {},
        r"fields=\{chosen: winner, rejected: loser\}",
    ),
    "better and worse of a query": (
        [{"query": "a", "better": "b", "worse": "c"}],
        {},
        r"fields=\{prompt: query, chosen: better, rejected: worse\}",
    ),
    "names in another case": (
        [{"Prompt": "a", "Chosen": "b", "Rejected": "c"}],
        {},
        r"fields=\{prompt: Prompt, chosen: Ch",
    ),
    "OpenAI preferences": (
        [{"input": {"messages": ASKED}, "preferred_output": ROSE, "non_preferred_output": NO}],
        {},
        r"fields=\{prompt: input.messages, chosen: preferred_output, rejected: non_preferred_output\}",
    ),
    "a path of an image": (
        [{"image_path": "a.png", "prompt": "<image>What?", **PAIR}],
        {},
        "column 'image_path': images",
    ),
    "messages as NumPy writes them": (
        [{"messages": "[{'role': 'user'}\n {'role': 'b'}]"}],
        {},
        "'messages' holds no messages",
    ),
    "no rejected": ([{"prompt": "a", "chosen": "b"}], {}, "'chosen' is there, but 'rejected' is missing.*loss=sft"),
    "no chosen": ([{"prompt": "a", "rejected": "b", "choosen": "c"}], {}, "'chosen' is missing.*Did you mean choosen"),
    "rows within an object": ([{"data": [{"prompt": "a", **PAIR}]}], {}, r"within 'data'.*jq -c '\.data\[\]'"),
    "responses within an object": (
        [{"prompt": "a", "pair": dict(PAIR)}],
        {},
        r"fields=\{chosen: pair.chosen, rejected: pair.rejected\}",
    ),
    "a field that no format has": (
        [{"q": "a", **PAIR}],
        {"fields": {"promt": "q"}},
        "no format has a field 'promt'.*prompt",
    ),
    "a column to leave out that isn't there": (
        [{"prompt": "a", **PAIR}],
        {"ignored": ["sorce"]},
        r"ignored_columns=\[sorce\]: there is no such column",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_column_that_would_be_lost_is_refused_with_the_remedy(name):
    rows, settings, message = REFUSED[name]
    with pytest.raises(UserError, match=f"(?s){message}"):
        read(rows, **settings)


BAD = {  # a good row, which decides the format; the bad row; the message
    "image part": (
        {"messages": [*ASKED, *ROSE]},
        {"messages": [turn("user", [{"type": "image"}]), *ROSE]},
        "a part of type 'image'",
    ),
    "images in a message": (
        {"messages": [*ASKED, *ROSE]},
        {"messages": [turn("user", "Hi", images=["a"]), *ROSE]},
        "has 'images'",
    ),
    "content that is a number": (
        {"messages": [*ASKED, *ROSE]},
        {"messages": [*ASKED, turn("assistant", 5)]},
        "its content is 5",
    ),
    "unknown role": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"conversations": [{"from": "oracle", "value": "a"}, {"from": "gpt", "value": "b"}]},
        "unknown role 'oracle'",
    ),
    "call that isn't JSON": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "weather(Rome)"}]},
        "expected a list of calls",
    ),
    "arguments that aren't JSON": (
        {"messages": [*ASKED, *ROSE]},
        {"messages": [*ASKED, assistant("", tool_calls=[{"function": {"name": "f", "arguments": "{oops"}}])]},
        "its arguments are '{oops'",
    ),
    "tools that aren't JSON": (
        {"messages": [*ASKED, *ROSE], "tools": [TOOL]},
        {"messages": [*ASKED, *ROSE], "tools": "weather"},
        "a string that isn't JSON",
    ),
    "two system texts": (
        {"system": "A", "messages": [*ASKED, *ROSE]},
        {"system": "A", "messages": [turn("system", "B"), *ASKED, *ROSE]},
        "include a system message, but the row also has",
    ),
    "a system text that comes late": (
        {"system": "", "prompt": "a", **PAIR},
        {"system": "Be kind.", "prompt": "b", **PAIR},
        "column 'system' is 'Be kind.'",
    ),
    "a weight of 0": (
        {"messages": [*ASKED, *ROSE]},
        {"messages": [*ASKED, assistant("x", weight=0), user("y"), *ROSE]},
        "weight=0",
    ),
    "response that begins with another prompt": (
        {"prompt": ASKED, "chosen": [*ASKED, *ROSE], "rejected": [*ASKED, *NO]},
        {"prompt": ASKED, "chosen": [user("Hm?"), *ROSE], "rejected": [user("So?"), *NO]},
        "begins with a message of role",
    ),
    "prompt that isn't in the messages": (
        {"prompt": "Name a red thing.", "chosen": [*ASKED, *ROSE], "rejected": [*ASKED, *NO]},
        {"prompt": "Something else", "chosen": [*ASKED, *ROSE], "rejected": [*ASKED, *NO]},
        "don't begin with the prompt in field",
    ),
    "messages within JSON": (
        {"prompt": "a", **PAIR},
        {"prompt": "b", **PAIR, "chosen": json.dumps({"messages": [*ASKED, *ROSE], "tools": []})},
        "field 'chosen' is JSON of an object whose 'messages' holds messages",
    ),
    "history of another form": (
        {"history": [["a", "b"]], "prompt": "a", **PAIR},
        {"history": [["a"]], "prompt": "b", **PAIR},
        "expected messages or pairs",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_error_for_a_bad_row_says_what_is_wrong(name):
    good, bad, message = BAD[name]
    found = recognize([good, good], {}, "datasets=[x]")
    found.read(good)
    with pytest.raises(BadExample, match=message):
        found.read(bad)


def test_columns_that_describe_a_row_are_listed_as_unused():
    rows = [
        {
            "prompt": f"Say {c}",
            **PAIR,
            "id": c,
            "prompt_id": f"f0e{c}37",
            "source": f"site {c}",
            "chosen_model": f"m {c}",
            "score_chosen": 8.5,
            "tags": [c],
            "url": f"http://{c}",
            "topic": topic,
            "empty": None,
        }
        for c, topic in zip("abcdef", ["art", "art", "law", "law", "art", "law"], strict=True)
    ]
    found = recognize(rows, {}, "datasets=[x]")
    listed = ("id", "prompt_id", "source", "chosen_model", "score_chosen", "tags", "url", "topic")
    assert (found.unread, found.empty) == (listed, ("empty",))


def test_columns_of_the_test_split_are_checked_too():
    found = recognize([{"prompt": "a", **PAIR}], {}, "datasets=[x]")
    found.check_columns([{"prompt": "a", **PAIR}], [], "test")
    with pytest.raises(UserError, match="test: column 'system' may belong to the prompt"):
        found.check_columns([{"prompt": "a", "system": "Be kind.", **PAIR}], [], "test")


def test_prompts_without_responses_are_read_with_input_system_text_and_tools():
    for row, expected in (
        ({"prompt": "a", "chosen": "x"}, "a"),
        ({"instruction": "Sum.", "input": "1+1"}, "Sum.\n1+1"),
        ({"system": "S", "question": "a"}, [turn("system", "S"), user("a")]),
        ({"conversations": [{"from": "human", "value": "a"}]}, [user("a")]),
        ({"messages": json.dumps([user("a")])}, [user("a")]),
    ):
        assert prompt_example(row).prompt == expected, row
    assert prompt_example({"prompt": "a"}, texts_as_messages=True).prompt == [user("a")]
    assert prompt_example({"prompt": [user("a")], "tools": json.dumps([TOOL])}).tools == [TOOL]
    with pytest.raises(BadExample, match="its last turn is the assistant's"):
        prompt_example({"messages": [user("a"), assistant("b")]})


@pytest.mark.parametrize("bad", [5, True, "x", {"a": 1}])
def test_value_of_another_type_in_one_of_the_first_rows_is_a_bad_row(bad):
    good = {"prompt": "a", "completions": ["x", "y"], "scores": [1, 2]}
    found = recognize([good, good, {**good, "completions": bad}], {}, "datasets=[x]")
    assert found.read(good).pairs == [(1, 0)]
    with pytest.raises(BadExample, match="expected responses"):
        found.read({**good, "completions": bad})
    with pytest.raises(UserError, match=r"fields=\{prompt: input.messages, chosen: good, rejected: bad\}"):
        read([{"input": value, "good": "x", "bad": "y"} for value in ({"messages": ASKED}, {"messages": ASKED}, bad)])


def test_kind_of_a_column_is_that_of_most_rows():
    columns = Columns([{"a": "x"}, {"a": 1}, {"a": "y"}, {"a": None, "b": [{"from": "human", "value": "x"}]}])
    assert columns.kinds == {"a": "string", "b": "messages"}
