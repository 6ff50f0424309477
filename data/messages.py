"""Normalize messages of several formats to lists of {"role": ..., "content": ...}.

These formats are ShareGPT's turns ({"from": ..., "value": ...}), a single message instead of a list, histories as
pairs of strings, and messages, tools and tool calls that are stored as JSON strings.
"""

import ast
import json

MEDIA = ("image", "images", "audio", "audios", "video", "videos", "pixel_values")
_MEDIA_PARTS = (*MEDIA, "image_url", "input_image", "input_audio", "video_url", "file")
_CALL = "function call"  # the role of an assistant turn that only calls functions
_ROLES = {  # maps names of roles to the roles of chat templates, which are on the first line
    "user": "user", "assistant": "assistant", "system": "system", "tool": "tool", "developer": "developer",
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "chatbot": "assistant",
    "ai": "assistant", "model": "assistant", "bing": "assistant", "bard": "assistant",
    "function_call": _CALL, "tool_call": _CALL,
    "observation": "tool", "function_response": "tool", "tool_response": "tool",
}  # fmt: skip
# in a history of objects, the keys of the user's and of the assistant's text
_USER_KEYS = ("user", "human", "instruction", "question", "prompt", "input", "query")
_ASSISTANT_KEYS = ("assistant", "gpt", "bot", "response", "answer", "output", "completion")


class BadExample(Exception):
    """Raised if a row can't be used, with the reason; rows of the same `kind` are counted together."""

    def __init__(self, kind: str, reason: str | None = None):
        super().__init__(reason or kind)
        self.kind = kind


# ---- recognizing ----------------------------------------------------------------------------------------------------


def is_blank(value: object) -> bool:
    """True for null, an empty list or object, and white space."""
    return value is None or value == [] or value == {} or (isinstance(value, str) and not value.strip())


def is_message(value: object) -> bool:
    """True for an object with a role, under the key of chat templates or of ShareGPT."""
    return isinstance(value, dict) and (
        "role" in value or ("from" in value and ("value" in value or "content" in value))
    )


def is_messages(value: object) -> bool:
    """True for a non-empty list of messages."""
    return isinstance(value, list) and bool(value) and all(map(is_message, value))


def decoded(value: object) -> object:
    """Return the list or object that a string holds as JSON or as a Python literal; otherwise the value itself."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    for parse in (json.loads, ast.literal_eval):
        try:
            parsed = parse(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        return parsed if isinstance(parsed, list | dict) else value
    return value


# ---- reading --------------------------------------------------------------------------------------------------------


def as_turn(text: str, role: str) -> list[dict]:
    """Return a string as a list of one message."""
    return [{"role": role, "content": text}]


def message_list(value: object, column: str) -> list[dict]:
    """Return messages (or a single one, as a list) with the roles of chat templates, without keys that hold null.

    Raises: BadExample if the value isn't messages, or a content isn't a string.
    """
    messages = decoded(value)
    messages = [messages] if is_message(messages) else messages
    if not is_messages(messages):
        raise BadExample(
            "wrong type", f"field {column!r} is {value!r:.60}, expected messages with 'role' and 'content'"
        )
    return [_message(message, f"field {column!r}, message {number}") for number, message in enumerate(messages)]


def _message(given: dict, place: str) -> dict:
    message = {key: value for key, value in given.items() if value is not None}
    is_sharegpt = "role" not in given
    role = message.pop("from" if is_sharegpt else "role", None)
    if not isinstance(role, str):
        raise BadExample("wrong type", f"{place}: its role is {role!r:.60}, expected a string")
    contents = [message.pop(key) for key in ("content", "value") if key in message]
    content = contents[0] if contents else None
    role = _known_role(role, is_sharegpt, place)
    for key in ("weight", "train"):
        if key in message and message[key] in (0, False):
            raise BadExample(
                "untrained message", f"{place}: {key}={message[key]}: single messages can't be excluded from training"
            )
    if found := next((key for key in MEDIA if message.get(key)), None):
        raise BadExample("images, audio or video", f"{place} has {found!r}; this program trains on text")
    if role == _CALL:
        return {"role": "assistant", "content": "", "tool_calls": _tool_calls(content, f"{place}: the function call")}
    if "function_call" in message:
        message["tool_calls"] = message.pop("function_call")
    if message.get("tool_calls"):
        message["tool_calls"] = _tool_calls(message["tool_calls"], f"{place}: tool_calls")
    else:
        message.pop("tool_calls", None)
    content = _joined_parts(content, place)
    if not isinstance(content, str) and "tool_calls" not in message:
        raise BadExample("wrong type", f"{place}: its content is {content!r:.60}, expected a string")
    return {"role": role, "content": "" if content is None else content} | message


def _known_role(role: str, is_sharegpt: bool, place: str) -> str:
    known = _ROLES.get(role.strip().lower())
    if known is None and is_sharegpt:
        if role == "function":
            return "tool"
        raise BadExample("unknown role", f"{place}: unknown role {role!r}; known are {', '.join(_ROLES)}")
    return known or role  # the template may know other roles


def _joined_parts(content: object, place: str) -> object:
    """Return the text of a content that is a list of text parts; any other content as it is."""
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        return content
    kinds = [part.get("type") for part in content]
    if media := next((kind for kind in kinds if kind in _MEDIA_PARTS), None):
        raise BadExample("images, audio or video", f"{place} has a part of type {media!r}; this program trains on text")
    return "".join(str(part.get("text") or "") for part in content) if set(kinds) <= {"text"} else content


# ---- tools ----------------------------------------------------------------------------------------------------------


def _tool_calls(value: object, place: str) -> list[dict]:
    """Return calls as {"type": "function", "function": {"name": ..., "arguments": {...}}}.

    Keys that hold null are left out, except in arguments.
    """
    calls = decoded(value)
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list) or not calls:
        raise BadExample("wrong type", f"{place}: {value!r:.60}, expected a list of calls, or such a list as JSON")
    return [_tool_call(decoded(call), place) for call in calls]


def _tool_call(call: object, place: str) -> dict:
    if isinstance(call, dict) and isinstance(decoded(call.get("function")), dict):
        call = call | {"function": decoded(call["function"])}
    elif isinstance(call, dict) and "name" in call:
        call = {"type": "function", "function": call}
    else:
        raise BadExample("wrong type", f"{place}: {call!r:.60} isn't a function call with name and arguments")
    function = {key: item for key, item in call["function"].items() if item is not None}
    if isinstance(arguments := function.get("arguments"), str):
        function["arguments"] = decoded(arguments) if arguments.strip() else {}
        if not isinstance(function["arguments"], dict):
            raise BadExample("wrong type", f"{place}: its arguments are {arguments!r:.60}, expected a JSON object")
    function.setdefault("arguments", {})
    return {key: item for key, item in call.items() if item is not None} | {"function": function}


def tool_list(value: object, column: str) -> list | None:
    """Return the tools of a row for the chat template; None if it has none.

    Raises: BadExample if they aren't objects, or JSON of objects.
    """
    tools = decoded(value)
    if is_blank(tools):
        return None
    tools = [tools] if isinstance(tools, dict) else tools
    if isinstance(tools, str):
        raise BadExample("wrong type", f"field {column!r} is {tools!r:.60}, a string that isn't JSON")
    tools = [decoded(tool) for tool in tools] if isinstance(tools, list) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadExample("wrong type", f"field {column!r} is {value!r:.60}, expected a list of objects")
    return tools


# ---- context of a prompt --------------------------------------------------------------------------------------------


def system_messages(value: object, column: str) -> list[dict]:
    """Return a system text, or messages, as messages; an empty list if there are none."""
    if is_blank(value):
        return []
    if isinstance(value, str) and not is_messages(decoded(value)):
        return as_turn(value, "system")
    return message_list(value, column)


def history_messages(value: object, column: str) -> list[dict]:
    """Return a history (messages, or pairs of user and assistant texts) as messages.

    Raises: BadExample if they are neither.
    """
    turns = decoded(value)
    if is_blank(turns):
        return []
    if is_messages(turns) or is_message(turns):
        return message_list(turns, column)
    if isinstance(turns, list):
        pairs = [_pair(turn) for turn in turns]
        if all(pairs):
            return [message for pair in pairs for message in as_turn(pair[0], "user") + as_turn(pair[1], "assistant")]
    reason = f"field {column!r} is {value!r:.60}, expected messages or pairs of user and assistant texts"
    raise BadExample("wrong type", reason)


def _pair(turn: object) -> tuple[str, str] | None:
    """Return the user's and the assistant's text of a turn given as a pair or an object; None if it is neither."""
    if isinstance(turn, dict) and len(turn) == 2:
        turn = [next((turn[key] for key in keys if key in turn), None) for keys in (_USER_KEYS, _ASSISTANT_KEYS)]
    if isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn):
        return turn[0], turn[1]
    return None
