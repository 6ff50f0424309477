"""Rows as people have them: every column is read, left out by name, or refused."""

import json

import pytest

from data.columns import Columns
from data.formats import prompt_example, recognize
from data.messages import BadExample
from utils import UserError


def turn(role: str, content: str, **more) -> dict:
    return {"role": role, "content": content, **more}


def user(content: str) -> dict:
    return turn("user", content)


def assistant(content: str, **more) -> dict:
    return turn("assistant", content, **more)


def read(rows: list[dict], **settings) -> list[tuple]:
    """What rows say: of each prompt, responses, preferred first, and tools if it has some."""
    found = recognize(rows, settings.pop("fields", {}), "datasets=[x]", **settings)
    said = []
    for row in rows:
        example = found.read(row)
        order = example.pairs[0] if example.pairs else [example.target]
        tools = [example.tools] if example.tools else []
        said.append((example.prompt, *(example.responses[i] for i in order), *tools))
    return said


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"properties": {"city": {}}}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome", "unit": None}}}
SAYS, NO = [assistant("A red rose.")], [assistant("No.")]
ASKED = [user("Name a red thing.")]

READ = {  # rows (of each the first is compared), settings, what the first one says
    "Alpaca": (
        [{"instruction": "To French.", "input": f"The {c} cat.", "output": f"Le chat {c}."} for c in ("red", "blue")],
        {},
        ("To French.\nThe red cat.", "Le chat red."),
    ),
    "Alpaca, preferences": (
        [{"instruction": "To French.", "input": f"{c} cat", "chosen": f"chat {c}", "rejected": c} for c in "ab"],
        {},
        ("To French.\na cat", "chat a", "a"),
    ),
    "Alpaca without an input": (
        [
            {"instruction": "Count.", "input": "", "output": "1 2"},
            {"instruction": "Say.", "input": "it", "output": "x"},
        ],
        {},
        ("Count.", "1 2"),
    ),
    "Alpaca with its text written out": (
        [
            {
                "instruction": f"Say {c}.",
                "input": "",
                "output": f"it: {c}",
                "text": f"Below is a task. Say {c}. It: it: {c}",
            }
            for c in "ab"
        ],
        {},
        ("Say a.", "it: a"),
    ),
    "Alpaca with system and history": (
        [
            {
                "system": "Be brief.",
                "history": [["Hi", "Hello"], ["Who?", "Me"]],
                "instruction": "Sum.",
                "input": f"1+{n}",
                "output": "2",
            }
            for n in (1, 2)
        ],
        {},
        (
            [
                turn("system", "Be brief."),
                user("Hi"),
                assistant("Hello"),
                user("Who?"),
                assistant("Me"),
                user("Sum.\n1+1"),
            ],
            [assistant("2")],
        ),
    ),
    "prompt called input": (
        [
            {"input": f"Colour of a {c} car?", "chosen": f"It is {c}.", "rejected": "It is a car."}
            for c in ("red", "blue")
        ],
        {},
        ("Colour of a red car?", "It is red.", "It is a car."),
    ),
    "prompt called query": (
        [{"query": f"Say {c}", "chosen": c, "rejected": "no"} for c in "ab"],
        {},
        ("Say a", "a", "no"),
    ),
    "prompt called context": (
        [{"context": f"Say {c}", "chosen": c, "rejected": "no"} for c in "ab"],
        {},
        ("Say a", "a", "no"),
    ),
    "prompt called input beside a system text": (
        [{"system": "Be brief.", "input": f"Say {c}", "chosen": c, "rejected": "no"} for c in "ab"],
        {},
        ([turn("system", "Be brief."), user("Say a")], [assistant("a")], [assistant("no")]),
    ),
    "system text": (
        [{"system": f"Style {c}.", "question": "Say hello.", "chosen": f"Hello {c}", "rejected": "Bye"} for c in "ab"],
        {},
        ([turn("system", "Style a."), user("Say hello.")], [assistant("Hello a")], [assistant("Bye")]),
    ),
    "system text that some rows lack": (
        [{"system_prompt": s, "prompt": "Hello.", "chosen": "Hi", "rejected": "Bye"} for s in (None, "Be kind.")],
        {},
        ([user("Hello.")], [assistant("Hi")], [assistant("Bye")]),
    ),
    "system text beside messages": (
        [{"system": "Be kind.", "prompt": [user("Hello.")], "chosen": [assistant(c)], "rejected": NO} for c in "ab"],
        {},
        ([turn("system", "Be kind."), user("Hello.")], [assistant("a")], NO),
    ),
    "system message that the messages begin with": (
        [
            {"system": "Be kind.", "prompt": [turn("system", "Be kind."), user(c)], "chosen": SAYS, "rejected": NO}
            for c in "ab"
        ],
        {},
        ([turn("system", "Be kind."), user("a")], SAYS, NO),
    ),
    "system text as messages": (
        [{"system": [turn("system", "Be kind.")], "prompt": c, "chosen": "x", "rejected": "y"} for c in "ab"],
        {},
        ([turn("system", "Be kind."), user("a")], [assistant("x")], [assistant("y")]),
    ),
    "system text beside a dialogue": (
        [{"system": "Be kind.", "messages": [user(c), assistant("x")]} for c in "ab"],
        {},
        ([turn("system", "Be kind."), user("a")], [assistant("x")]),
    ),
    "ShareGPT, preferences": (
        [
            {
                "conversations": [{"from": "human", "value": "Name a red thing."}],
                "chosen": {"from": "gpt", "value": "A red rose."},
                "rejected": {"from": "gpt", "value": "No."},
            }
        ],
        {},
        (ASKED, SAYS, NO),
    ),
    "ShareGPT, preferences of several turns": (
        [
            {
                "conversations": [{"from": "system", "value": "Be kind."}, {"from": "human", "value": "Hi"}],
                "chosen": [
                    {"from": "gpt", "value": "A"},
                    {"from": "human", "value": "B"},
                    {"from": "gpt", "value": "C"},
                ],
                "rejected": [{"from": "gpt", "value": "No."}],
            }
        ],
        {},
        ([turn("system", "Be kind."), user("Hi")], [assistant("A"), user("B"), assistant("C")], NO),
    ),
    "ShareGPT, dialogue": (
        [
            {
                "id": "x1",
                "conversations": [
                    {"from": "human", "value": "Name a red thing."},
                    {"from": "gpt", "value": "A red rose."},
                ],
            }
        ],
        {},
        (ASKED, SAYS),
    ),
    "ShareGPT with a system text, tools, calls and observations": (
        [
            {
                "conversations": [
                    {"from": "human", "value": "Weather?"},
                    {
                        "from": "function_call",
                        "value": '{"name": "weather", "arguments": {"city": "Rome", "unit": null}}',
                    },
                    {"from": "observation", "value": "sun"},
                    {"from": "gpt", "value": "Sunny."},
                ],
                "system": "Be kind.",
                "tools": json.dumps([TOOL]),
            }
        ],
        {},
        (
            [turn("system", "Be kind."), user("Weather?"), assistant("", tool_calls=[CALL]), turn("tool", "sun")],
            [assistant("Sunny.")],
            [TOOL],
        ),
    ),
    "roles of other names": (
        [
            {"messages": [turn("Human", "Hi"), turn("GPT", "Yes")]},
            {"messages": [turn("human", "Ho"), turn("bot", "No")]},
        ],
        {},
        ([user("Hi")], [assistant("Yes")]),
    ),
    "dialogue as a JSON string": (
        [{"messages": json.dumps([user(c), assistant("x")])} for c in "ab"],
        {},
        ([user("a")], [assistant("x")]),
    ),
    "messages as Python writes them": (
        [{"prompt": str([user(c)]), "chosen": str(SAYS), "rejected": str(NO)} for c in "ab"],
        {},
        ([user("a")], SAYS, NO),
    ),
    "responses as a single message": ([{"prompt": ASKED, "chosen": SAYS[0], "rejected": NO[0]}], {}, (ASKED, SAYS, NO)),
    "responses as strings to messages": (
        [{"prompt": ASKED, "chosen": "A red rose.", "rejected": "No."}],
        {},
        (ASKED, SAYS, NO),
    ),
    "prompt as a string to messages": (
        [{"prompt": "Name a red thing.", "chosen": SAYS, "rejected": NO}],
        {},
        (ASKED, SAYS, NO),
    ),
    "system message that only the responses repeat": (
        [
            {
                "prompt": ASKED,
                "chosen": [turn("system", "S"), *ASKED, *SAYS],
                "rejected": [turn("system", "S"), *ASKED, *NO],
            }
        ],
        {},
        ([turn("system", "S"), *ASKED], SAYS, NO),
    ),
    "messages that repeat the chosen dialogue": (
        [
            {"prompt": c, "messages": [user(c), *SAYS], "chosen": [user(c), *SAYS], "rejected": [user(c), *NO]}
            for c in "ab"
        ],
        {},
        ([user("a")], SAYS, NO),
    ),
    "messages without an answer as the prompt of a response": (
        [{"messages": [user(c)], "completion": "x"} for c in "ab"],
        {},
        ([user("a")], [assistant("x")]),
    ),
    "tools as JSON strings": (
        [{"tools": [json.dumps(TOOL)], "prompt": ASKED, "chosen": [assistant("", tool_calls=[CALL])], "rejected": NO}],
        {},
        (ASKED, [assistant("", tool_calls=[CALL])], NO, [TOOL]),
    ),
    "tools and arguments as one JSON string each": (
        [
            {
                "tools": json.dumps([TOOL]),
                "prompt": ASKED,
                "rejected": NO,
                "chosen": [
                    assistant(
                        "",
                        tool_calls=[
                            {
                                "type": "function",
                                "function": {"name": "weather", "arguments": '{"city": "Rome", "unit": null}'},
                            }
                        ],
                    )
                ],
            }
        ],
        {},
        (ASKED, [assistant("", tool_calls=[CALL])], NO, [TOOL]),
    ),
    "tool calls as a JSON string": (
        [
            {
                "tools": [TOOL],
                "prompt": ASKED,
                "chosen": [turn("assistant", None, tool_calls=json.dumps([CALL]))],
                "rejected": [assistant("No.", tool_calls=None)],
            }
        ],
        {},
        (ASKED, [assistant("", tool_calls=[CALL])], NO, [TOOL]),
    ),
    "tools to strings": (
        [{"tools": [TOOL], "prompt": c, "chosen": "x", "rejected": "y"} for c in "ab"],
        {},
        ([user("a")], [assistant("x")], [assistant("y")], [TOOL]),
    ),
    "content in parts": (
        [{"messages": [turn("user", [{"type": "text", "text": "Hi "}, {"type": "text", "text": "you"}]), *SAYS]}],
        {},
        ([user("Hi you")], SAYS),
    ),
    "history of objects": (
        [{"history": [{"user": "Hi", "assistant": "Ho"}], "prompt": c, "chosen": "x", "rejected": "y"} for c in "ab"],
        {},
        ([user("Hi"), assistant("Ho"), user("a")], [assistant("x")], [assistant("y")]),
    ),
    "history of messages": (
        [{"history": [user("Hi"), assistant("Ho")], "prompt": c, "response": "x"} for c in "ab"],
        {},
        ([user("Hi"), assistant("Ho"), user("a")], [assistant("x")]),
    ),
    "fields within objects": (
        [{"prompt": c, "pair": {"good": "x", "bad": "y"}} for c in "ab"],
        {"fields": {"chosen": "pair.good", "rejected": "pair.bad"}},
        ("a", "x", "y"),
    ),
    "context, named as the input": (
        [{"instruction": "Sum up.", "context": f"Text {c} here.", "response": c} for c in "ab"],
        {"fields": {"input": "context"}},
        ("Sum up.\nText a here.", "a"),
    ),
    "column left out by name": (
        [{"prompt": f"Say {c}", "persona": f"{c} pirate", "chosen": "x", "rejected": "y"} for c in "ab"],
        {"ignored": ["persona"]},
        ("Say a", "x", "y"),
    ),
    "strings as messages": (
        [{"prompt": c, "chosen": "x", "rejected": "y"} for c in "ab"],
        {"texts_as_messages": True},
        ([user("a")], [assistant("x")], [assistant("y")]),
    ),
    "dialogues with a label": (
        [
            {"conversations": [{"from": "human", "value": c}, {"from": "gpt", "value": "x"}], "kto_tag": True}
            for c in "ab"
        ],
        {},
        ([user("a")], [assistant("x")]),
    ),
    "scored responses as messages": (
        [
            {"prompt": c, "completions": [turn("assistant", "x", score=1), turn("assistant", "y", score=2)]}
            for c in "ab"
        ],
        {},
        ([user("a")], [assistant("y")], [assistant("x")]),
    ),
}


@pytest.mark.parametrize("name", READ)
def test_row_is_read_as_written_by_hand(name):
    rows, settings, expected = READ[name]
    assert read(rows, **settings)[0] == expected


PAIR = {"chosen": "A red rose.", "rejected": "No."}
REFUSED = {  # rows, settings, what the message says
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
    "a constant context": ([{"context": "The same.", "prompt": c, **PAIR} for c in "ab"], {}, "column 'context' may"),
    "a string that differs": ([{"persona": c, "prompt": c * 3, **PAIR} for c in "abc"], {}, "column 'persona' may"),
    "other messages": (
        [{"dialog": [user(f"Hi {c}"), *SAYS], "prompt": c, **PAIR} for c in "ab"],
        {},
        "column 'dialog' may",
    ),
    "what may be the prompt of whole dialogues": (
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
    "no rejected": ([{"prompt": "a", "chosen": "b"}], {}, "'rejected' is missing beside 'chosen'.*loss=sft"),
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


BAD = {  # a good row before it tells the format; the bad row; what is wrong
    "image part": (
        {"messages": [*ASKED, *SAYS]},
        {"messages": [turn("user", [{"type": "image"}]), *SAYS]},
        "a part of type 'image'",
    ),
    "images in a message": (
        {"messages": [*ASKED, *SAYS]},
        {"messages": [turn("user", "Hi", images=["a"]), *SAYS]},
        "has 'images'",
    ),
    "unknown role": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"conversations": [{"from": "oracle", "value": "a"}, {"from": "gpt", "value": "b"}]},
        "unknown role 'oracle'",
    ),
    "call that is no JSON": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "weather(Rome)"}]},
        "expected a list of calls",
    ),
    "arguments that are no JSON": (
        {"messages": [*ASKED, *SAYS]},
        {"messages": [*ASKED, assistant("", tool_calls=[{"function": {"name": "f", "arguments": "{oops"}}])]},
        "its arguments are '{oops'",
    ),
    "tools that are no JSON": (
        {"messages": [*ASKED, *SAYS], "tools": [TOOL]},
        {"messages": [*ASKED, *SAYS], "tools": "weather"},
        "a string that is no JSON",
    ),
    "two system texts": (
        {"system": "A", "messages": [*ASKED, *SAYS]},
        {"system": "A", "messages": [turn("system", "B"), *ASKED, *SAYS]},
        "a system message besides",
    ),
    "a system text that comes late": (
        {"system": "", "prompt": "a", **PAIR},
        {"system": "Be kind.", "prompt": "b", **PAIR},
        "column 'system' is 'Be kind.'",
    ),
    "a weight of 0": (
        {"messages": [*ASKED, *SAYS]},
        {"messages": [*ASKED, assistant("x", weight=0), user("y"), *SAYS]},
        "weight=0",
    ),
    "response that begins with another prompt": (
        {"prompt": ASKED, "chosen": [*ASKED, *SAYS], "rejected": [*ASKED, *NO]},
        {"prompt": ASKED, "chosen": [user("Hm?"), *SAYS], "rejected": [user("So?"), *NO]},
        "begins with a message of role",
    ),
    "prompt that isn't in the messages": (
        {"prompt": "Name a red thing.", "chosen": [*ASKED, *SAYS], "rejected": [*ASKED, *NO]},
        {"prompt": "Something else", "chosen": [*ASKED, *SAYS], "rejected": [*ASKED, *NO]},
        "begin with other messages than",
    ),
    "history of another form": (
        {"history": [["a", "b"]], "prompt": "a", **PAIR},
        {"history": [["a"]], "prompt": "b", **PAIR},
        "expected messages or pairs",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_row_says_what_is_wrong(name):
    good, bad, message = BAD[name]
    found = recognize([good, good], {}, "datasets=[x]")
    found.read(good)
    with pytest.raises(BadExample, match=message):
        found.read(bad)


def test_columns_that_say_something_about_a_row_are_listed():
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


def test_prompts_alone_have_what_belongs_to_them():
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


def test_kinds_of_values_are_those_of_most_rows():
    columns = Columns([{"a": "x"}, {"a": 1}, {"a": "y"}, {"a": None, "b": [{"from": "human", "value": "x"}]}])
    assert columns.kinds == {"a": "string", "b": "messages"}
