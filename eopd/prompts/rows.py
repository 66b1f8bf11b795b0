"""A row must hold a prompt or a chat, and may hold tools, an id, a source, and an accepted answer.

Every odd value is taken as what it plainly means, or refused with file, row, field and what is
allowed. Nothing becomes text by accident: neither null, nor a list, nor half a character, nor what
an escape left of a command of LaTeX.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Final, NoReturn, TypeGuard

from eopd.config import ConfigError
from eopd.config.escapes import eaten_by_json
from eopd.config.json_text import JsonError, parse_json, told
from eopd.plugins import Row
from eopd.prompts.files import DataRow
from eopd.types import Reference

# role and content, both text, and further fields that a chat template may use
Message = Mapping[str, object]
Tool = Mapping[str, object]  # a JSON schema

ASKING: Final = ("prompt", "messages")  # the roles of columns of which one asks
INSTRUCTING: Final = ("system", "developer")
ROLES: Final = ("system", "developer", "user", "assistant", "tool")
_OF_A_MESSAGE: Final = ("role", "content")
CHAT_AS_TEXT: Final = (
    "the prompt is JSON text of a chat, and taken as it stands; prompts.columns: {messages: prompt} "
    "reads it as messages"
)
# half of a character, and NUL
_NO_TEXT: Final = re.compile("[\ud800-\udfff\0]")
_CHAT_TEXT: Final = re.compile(r'\s*\[\s*\{.*"role"', re.DOTALL)
ANSWER_LEFT_OUT: Final = (
    "the chat ends with the assistant's answer, which is left out: the prompt is what comes before"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question is what a row of the data asks.

    ``last_user`` is the position in ``chat`` of the last message of the user. ``columns`` are those
    of the row, also under the names of their roles, for the template of a teacher. ``notes`` say
    what is not taken as it stands.
    """

    prompt_id: str
    source: str
    chat: Sequence[Message]
    last_user: int
    tools: Sequence[Tool]
    reference_answer: Reference | None
    columns: Mapping[str, object]
    notes: Sequence[str]

    @property
    def text(self) -> str:
        """Returns the last text of the user."""
        return str(self.chat[self.last_user]["content"])

    @property
    def row(self) -> Row:
        """Returns what a function of the user sees of the row."""
        return {
            **self.columns,
            "id": self.prompt_id,
            "source": self.source,
            "prompt": self.text,
            "messages": self.chat,
            "answer": self.reference_answer,
        }

    def with_text(self, text: str) -> Sequence[Message]:
        """Returns the chat with another last text of the user."""
        changed = {**self.chat[self.last_user], "content": text}
        return [*self.chat[: self.last_user], changed, *self.chat[self.last_user + 1 :]]


def read_question(row: DataRow, suffix: str, system: str | None = None) -> Question:
    """Reads a row, and adds ``suffix`` to the last text of the user. Where the row has no message
    of the system, ``system`` is put before the others.

    Raises:
        ConfigError: names the row, the field, its value, and what is allowed.
    """
    try:
        return _read(row, suffix, system)
    except RecursionError:
        raise ConfigError(f"{row.where}: is nested too deeply") from None


def _read(row: DataRow, suffix: str, system: str | None) -> Question:
    chat, notes = _chat(row)
    if system is not None and not any(message["role"] in INSTRUCTING for message in chat):
        chat = [{"role": "system", "content": system}, *chat]

    users = [index for index, message in enumerate(chat) if message["role"] == "user"]
    if not users:
        fault = "none is the user's (role: user), so there is nothing to answer"
        _refuse(row, row.name("messages"), fault)

    last_user = users[-1]
    text = str(chat[last_user]["content"])
    if not text.strip():
        role = "prompt" if isinstance(row.get("prompt"), str) else "messages"
        _refuse(row, row.name(role), "the user's text is empty")

    chat[last_user] = {**chat[last_user], "content": text + suffix}

    return Question(
        prompt_id=_id(row),
        source=_source(row),
        chat=chat,
        last_user=last_user,
        tools=_tools(row),
        reference_answer=_answer(row),
        columns={**row.columns, **{role: row.get(role) for role in row.names}},
        notes=notes,
    )


def _refuse(row: DataRow, field: str, fault: str) -> NoReturn:
    raise ConfigError(f"{row.where}: {field}: {fault}")


def _chat(row: DataRow) -> tuple[list[Message], list[str]]:
    """Returns the messages that are to be answered, and a note where the data has the answer too.
    Messages may be JSON text, as data sets keep them.
    """
    asking = [role for role in ASKING if role in row.names] or ASKING
    found = {row.name(role): row.get(role) for role in asking if row.get(role) is not None}
    if len(found) > 1:
        fault = "both are there; keep the one that is meant, or name it under columns"
        _refuse(row, ", ".join(found), fault)

    if not found:
        _refuse_without_prompt(row, [row.name(role) for role in asking])

    ((field, value),) = found.items()
    may_be_text = field == row.name("prompt")
    if may_be_text and isinstance(value, str):
        notes = [CHAT_AS_TEXT] if _CHAT_TEXT.match(value) else []
        return [{"role": "user", "content": _clean(row, field, value)}], notes

    if isinstance(value, str) and _CHAT_TEXT.match(value):
        value = _parsed(row, field, value)

    allowed = "text or a list of messages" if may_be_text else "a list of messages"
    if not isinstance(value, list) or not value:
        _refuse(row, field, f"must be {allowed}, is {told(value)}")

    chat = [
        _message(row, f"{field}, number {number}", message)
        for number, message in enumerate(value, start=1)
    ]

    length = len(chat)
    while length and chat[length - 1]["role"] == "assistant":
        length -= 1

    return chat[:length], [ANSWER_LEFT_OUT] if length < len(chat) else []


def _refuse_without_prompt(row: DataRow, names: Sequence[str]) -> NoReturn:
    """Refuses a row that asks nothing; ``names`` are the columns that might."""
    if nulls := [name for name in names if name in row.columns]:
        _refuse(row, ", ".join(nulls), "is null; write text, or a list of messages")

    fields = ", ".join(f"`{name}`" for name in row.columns) or "none"
    if row.names.keys() & set(ASKING):
        raise ConfigError(f"{row.where}: has no `{names[0]}`; its fields are {fields}")

    raise ConfigError(
        f"{row.where}: needs either `prompt` (text, or a list of messages) or `messages` "
        f"(a list of messages, each with role and content); its fields are {fields}; a column of "
        "another name is named by columns: {prompt: NAME}"
    )


def _message(row: DataRow, field: str, value: object) -> Message:
    """Returns a message as templates take it: its content is text, and empty fields are removed."""
    if not isinstance(value, Mapping):
        _refuse(row, field, f"must be an object with role and content, is {told(value)}")

    role = value.get("role")
    if lacking := [
        name for name in _OF_A_MESSAGE[: 1 + (role != "assistant")] if name not in value
    ]:
        fields = ", ".join(f"`{name}`" for name in value) or "none"
        fault = (
            f"has no {' and no '.join(lacking)}; its fields are {fields}. A message has a role, one "
            f"of {', '.join(ROLES)}, and content; a data function can rename its fields: "
            "docs/extending.md#your-own-functions"
        )
        _refuse(row, field, fault)

    if role not in ROLES:
        _refuse(
            row,
            f"{field}, role",
            f"must be one of {', '.join(ROLES)}; is {told(role)}",
        )

    rest = {
        name: inner
        for name, inner in value.items()
        if name not in ("role", "content") and inner not in (None, "", [], {})
    }
    if "tool_calls" in rest:
        rest["tool_calls"] = _tool_calls(row, f"{field}, tool_calls", rest["tool_calls"])

    for name, inner in rest.items():
        _clean(row, field, name)
        _require_clean(row, f"{field}, {name}", inner)

    content = _content(
        row, f"{field}, content", value.get("content"), may_lack=role == "assistant" and bool(rest)
    )

    return {"role": role, "content": content, **rest}


def _content(row: DataRow, field: str, value: object, *, may_lack: bool) -> str:
    """Returns the text of a message.

    Several parts of text are joined by line ends. The content of an assistant that calls a tool or
    only thinks may be null, which becomes no text. vLLM's servers (0.32.0) read both this way.
    """
    if isinstance(value, str):
        return _clean(row, field, value)

    if value in (None, []) and may_lack:
        return ""

    if not isinstance(value, list) or not value:
        _refuse(row, field, f"must be text or a list of parts of text, is {told(value)}")

    texts = []

    for part in value:
        match part:
            case {"type": "text", "text": str(text)}:
                texts.append(_clean(row, field, text))
            case _:
                kind = part.get("type") if isinstance(part, Mapping) else part
                _refuse(
                    row,
                    field,
                    f'every part must be {{"type": "text", "text": "..."}}; one is {told(kind)}',
                )

    return "\n".join(texts)


def _tool_calls(row: DataRow, field: str, calls: object) -> list[object]:
    """Returns calls with their arguments as objects, as chat templates take them; OpenAI's API has
    JSON text there.
    """
    if not isinstance(calls, list):
        _refuse(row, field, f"must be a list, is {told(calls)}")

    return [_tool_call(row, field, call) for call in calls]


def _tool_call(row: DataRow, field: str, call: object) -> object:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if (
        not isinstance(call, Mapping)
        or not isinstance(function, Mapping)
        or not isinstance(function.get("name"), str)
    ):
        _refuse(
            row,
            field,
            'each must be {"type": "function", "function": {"name": "...", "arguments": {...}}}',
        )

    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        arguments = _parsed(row, f"{field}, arguments", arguments)

    if not isinstance(arguments, Mapping):
        _refuse(row, f"{field}, arguments", f"must be an object, is {told(arguments)}")

    whole = {**function, "arguments": arguments}

    return {**call, "function": whole} if "function" in call else whole


def _tools(row: DataRow) -> Sequence[Tool]:
    """Returns the JSON schemas under ``tools``, which may be JSON text as data sets keep it."""
    field = row.name("tools")
    tools = row.get("tools") or []
    if isinstance(tools, str):
        tools = _parsed(row, field, tools)

    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        _refuse(row, field, f"must be a list of JSON schemas (objects), is {told(tools)}")

    _require_clean(row, field, tools)
    return tools


def _parsed(row: DataRow, field: str, text: str) -> object:
    try:
        return parse_json(text)
    except JsonError as error:
        _refuse(row, field, f"is text, which {error}")


def _id(row: DataRow) -> str:
    """Returns the row's id, or its number where it has none."""
    value = row.get("id")
    if value is None:
        return str(row.number)

    # a table makes floats of whole numbers where some are missing
    if isinstance(value, float) and value.is_integer():
        value = int(value)

    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)

    if not isinstance(value, str) or not value.strip():
        _refuse(row, row.name("id"), f"must be text or a whole number, is {told(value)}")

    return _clean(row, row.name("id"), value)


def _source(row: DataRow) -> str:
    value = row.get("source")
    if value is None:
        return "default"

    if not isinstance(value, str) or not value.strip():
        _refuse(row, row.name("source"), f"must be text, is {told(value)}")

    return _clean(row, row.name("source"), value)


def _answer(row: DataRow) -> Reference | None:
    """Returns the accepted answer, or several of which any is right."""
    value = row.get("answer")
    if value is None:
        return None

    if not isinstance(value, list):
        return _accepted(row, value)

    if not value:
        fault = "is an empty list; name an accepted answer, or leave the field out"
        _refuse(row, row.name("answer"), fault)

    answers = tuple(dict.fromkeys(_accepted(row, answer) for answer in value))

    return answers[0] if len(answers) == 1 else answers


def _accepted(row: DataRow, value: object) -> str:
    if isinstance(value, str):
        return _clean(row, row.name("answer"), value, formula=True)

    if _is_number(value):
        return written(value)

    _refuse(
        row,
        row.name("answer"),
        f"must be text, a number, or a list of these that are all right; is {told(value)}",
    )


def _is_number(value: object) -> TypeGuard[float | Decimal]:
    """Tells whether a value is a finite number; whole ones of JSON may be beyond all floats."""
    if isinstance(value, float | Decimal):
        return math.isfinite(value)

    return isinstance(value, int) and not isinstance(value, bool)


def written(number: float | Decimal) -> str:
    """Returns a number as a person writes it: 72 for 72.0, 0.5, 0.0000001, never with an exponent."""
    if number == 0:
        return "0"

    digits = f"{Decimal(number) if isinstance(number, int) else Decimal(str(number)):f}"
    return digits.rstrip("0").rstrip(".") if "." in digits else digits


def fault_of(text: str) -> str | None:
    r"""Returns what keeps ``text`` from being tokenised, or None.

    JSON can write half of a character that UTF-16 needs two units for (``"\ud83d"``); no tokenizer
    takes it.
    """
    match = _NO_TEXT.search(text)
    if match is None:
        return None

    if match.group() == "\0":
        return (
            f"holds the NUL character (\\u0000 at position {match.start()}), which is no "
            "text; take it out"
        )

    return (
        f"holds half a character (\\u{ord(match.group()):04x} at position {match.start()}), "
        "which is no text; write the whole character, or \\ufffd in its place"
    )


def fault_of_field(text: str, *, formula: bool = False) -> str | None:
    r"""Returns why a text of a row cannot be what was meant, or None.

    JSON reads ``"\frac"`` as a form feed and ``rac``, which silently makes a wrong prompt or answer.
    ``formula`` says that the text is short, and no prose behind tabs.
    """
    if fault := fault_of(text):
        return fault

    escape = eaten_by_json(text, formula=formula)
    if escape is None:
        return None

    return f"{escape}, which JSON makes of {escape.meant}; double the backslash: \\{escape.meant}"


def _clean(row: DataRow, field: str, text: str, *, formula: bool = False) -> str:
    if fault := fault_of_field(text, formula=formula):
        _refuse(row, field, fault)

    return text


def _require_clean(row: DataRow, field: str, value: object) -> None:
    """Refuses text that cannot be tokenised, however deep it lies in ``value``."""
    if isinstance(value, str):
        _clean(row, field, value)
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            _clean(row, field, name)
            _require_clean(row, field, inner)
    elif isinstance(value, list):
        for inner in value:
            _require_clean(row, field, inner)
