"""Rows, messages and tools in all supported shapes, and the examples read from them."""

import json

import pytest

from data.formats import recognize


def turn(role: str, content: str, **more) -> dict:
    return {"role": role, "content": content, **more}


def user(content: str) -> dict:
    return turn("user", content)


def assistant(content: str, **more) -> dict:
    return turn("assistant", content, **more)


def read(rows: list[dict], **settings) -> list[tuple]:
    """Return a tuple for each row: its prompt, its responses (the preferred one first), and its tools if it has any."""
    found = recognize(rows, settings.pop("fields", {}), "datasets=[x]", **settings)
    examples = []
    for row in rows:
        example = found.read(row)
        order = example.pairs[0] if example.pairs else [example.target]
        tools = [example.tools] if example.tools else []
        examples.append((example.prompt, *(example.responses[i] for i in order), *tools))
    return examples


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"properties": {"city": {}}}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome", "unit": None}}}
ROSE, NO = [assistant("A red rose.")], [assistant("No.")]
ASKED = [user("Name a red thing.")]

READ = {  # rows (only the first of each is compared), settings, the example in the first row
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
            {"system": "Be kind.", "prompt": [turn("system", "Be kind."), user(c)], "chosen": ROSE, "rejected": NO}
            for c in "ab"
        ],
        {},
        ([turn("system", "Be kind."), user("a")], ROSE, NO),
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
        (ASKED, ROSE, NO),
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
        (ASKED, ROSE),
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
            [turn("system", "Be kind."), user("Weather?")],
            [assistant("", tool_calls=[CALL]), turn("tool", "sun"), assistant("Sunny.")],
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
    "roles and contents under other keys": (
        [{"messages": [{"from": "human", "content": "Hi"}, {"role": "assistant", "value": "Yes"}]}],
        {},
        ([user("Hi")], [assistant("Yes")]),
    ),
    "tools that are empty everywhere": (
        [{"tools": "[]", "prompt": "a", "chosen": "x", "rejected": "y"}],
        {},
        ("a", "x", "y"),
    ),
    "fields of an OpenAI preference": (
        [{"input": {"messages": ASKED, "tools": [TOOL]}, "preferred_output": ROSE, "non_preferred_output": NO}],
        {
            "fields": {
                "prompt": "input.messages",
                "tools": "input.tools",
                "chosen": "preferred_output",
                "rejected": "non_preferred_output",
            }
        },
        (ASKED, ROSE, NO, [TOOL]),
    ),
    "dialogue as a JSON string": (
        [{"messages": json.dumps([user(c), assistant("x")])} for c in "ab"],
        {},
        ([user("a")], [assistant("x")]),
    ),
    "messages as Python writes them": (
        [{"prompt": str([user(c)]), "chosen": str(ROSE), "rejected": str(NO)} for c in "ab"],
        {},
        ([user("a")], ROSE, NO),
    ),
    "responses as a single message": ([{"prompt": ASKED, "chosen": ROSE[0], "rejected": NO[0]}], {}, (ASKED, ROSE, NO)),
    "strings as responses to messages": (
        [{"prompt": ASKED, "chosen": "A red rose.", "rejected": "No."}],
        {},
        (ASKED, ROSE, NO),
    ),
    "a string as the prompt of messages": (
        [{"prompt": "Name a red thing.", "chosen": ROSE, "rejected": NO}],
        {},
        (ASKED, ROSE, NO),
    ),
    "system message that only the responses repeat": (
        [
            {
                "prompt": ASKED,
                "chosen": [turn("system", "S"), *ASKED, *ROSE],
                "rejected": [turn("system", "S"), *ASKED, *NO],
            }
        ],
        {},
        ([turn("system", "S"), *ASKED], ROSE, NO),
    ),
    "messages that repeat the chosen dialogue": (
        [
            {"prompt": c, "messages": [user(c), *ROSE], "chosen": [user(c), *ROSE], "rejected": [user(c), *NO]}
            for c in "ab"
        ],
        {},
        ([user("a")], ROSE, NO),
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
    "tools with plain strings": (
        [{"tools": [TOOL], "prompt": c, "chosen": "x", "rejected": "y"} for c in "ab"],
        {},
        ([user("a")], [assistant("x")], [assistant("y")], [TOOL]),
    ),
    "content in parts": (
        [{"messages": [turn("user", [{"type": "text", "text": "Hi "}, {"type": "text", "text": "you"}]), *ROSE]}],
        {},
        ([user("Hi you")], ROSE),
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
    "call without arguments": (
        [
            {
                "prompt": [
                    user(c),
                    turn("assistant", None, tool_calls=[{"function": {"name": "now"}}]),
                    turn("tool", "9"),
                ],
                "chosen": assistant("x"),
                "rejected": assistant("y"),
            }
            for c in "ab"
        ],
        {},
        (
            [user("a"), assistant("", tool_calls=[{"function": {"name": "now", "arguments": {}}}]), turn("tool", "9")],
            [assistant("x")],
            [assistant("y")],
        ),
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
def test_rows_give_the_expected_example(name):
    rows, settings, expected = READ[name]
    assert read(rows, **settings)[0] == expected
