"""A chat is rendered to token ids by the chat template and the tokenizer, which are foreign code.

Any error of theirs becomes one message that names the row. What a template does not show, and what
a tokenizer adds, is refused or noted: a prompt never loses or gains anything silently.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Final, Literal, Protocol

from eopd.config import ConfigError
from eopd.prompts.rows import Message, Tool, fault_of

# What a template that asks for the date is told, so that prompts are the same on every day, and on
# the one on which a run is resumed: the date of templates that ask for none (Llama 3.2).
TODAY: Final = date(2024, 7, 26)
_ASKS_DATE: Final = "strftime_now"

# fields of a chat without which the prompt asks something else
MUST_SHOW: Final = frozenset({"tools", "tool_calls"})


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that rendering uses."""

    chat_template: str | Mapping[str, str] | None
    bos_token_id: int | None
    eos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...  # noqa: D102
    def decode(self, token_ids: Sequence[int]) -> str: ...  # noqa: D102
    def apply_chat_template(  # noqa: D102
        self,
        conversation: Sequence[Message],
        *,
        tokenize: bool,
        add_generation_prompt: bool,
        **options: object,
    ) -> str: ...


class OverlongError(Exception):
    """A prompt has more tokens than it may have; ``limit`` says it, such as ``longer than
    prompts.max_tokens 64``.
    """

    def __init__(self, num_tokens: int, limit: str) -> None:
        super().__init__(limit)
        self.num_tokens = num_tokens
        self.limit = limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendering:
    """A rendering turns chats into the token ids of one model.

    Args:
        whose: ``student`` or ``teacher NAME``, for messages.
        tokenizer: The model's tokenizer.
        template: ``chat`` renders with its chat template, ``none`` takes the text as it is.
        options: The options of the chat template.
    """

    whose: str
    tokenizer: Tokenizer
    template: Literal["chat", "none"]
    options: Mapping[str, object]

    def token_ids(
        self, chat: Sequence[Message], tools: Sequence[Tool], where: str
    ) -> tuple[list[int], list[str]]:
        """Returns the prompt's token ids, and notes on what was left out.

        Raises:
            ConfigError: template or tokenizer refuse the row, the template does not show its tools,
                or the prompt has no token.
        """
        if self.template == "none":
            token_ids, notes = self._plain(chat, tools, where)
        else:
            token_ids, notes = self._chat(chat, tools, where)

        if not token_ids:
            raise ConfigError(
                f"{where}: is empty: the {self.whose}'s tokenizer makes no token of it"
            )

        if token_ids[-1] == self.tokenizer.eos_token_id:
            end = self.tokenizer.decode(token_ids[-1:])
            notes.append(
                f"the prompt ends with the {self.whose}'s end token {end!r}: the "
                "response comes after an end"
            )

        return token_ids, notes

    def require_system(self, system: str) -> None:
        """Checks that the chat template shows a message of the system.

        Raises:
            ConfigError: it refuses the message, or leaves it out.
        """
        chat = [{"role": "system", "content": system}, {"role": "user", "content": "?"}]
        try:
            text, fault = self._render(chat, (), ""), "it is not in the text"
        except ConfigError as error:
            text, fault = "", str(error).rpartition(": ")[2]

        if system.strip() not in text:
            raise ConfigError(
                f"prompts.system: the {self.whose}'s chat template takes no system message "
                f"({fault}); leave it out (--system of eopd eval), or say it in prompts.suffix"
            )

    def _plain(
        self, chat: Sequence[Message], tools: Sequence[Tool], where: str
    ) -> tuple[list[int], list[str]]:
        """Encodes one text with the special tokens that the tokenizer puts before it, none of them
        twice, and none behind.
        """
        if len(chat) != 1:
            raise ConfigError(
                f"{where}: a chat of {len(chat)} messages needs prompts.template: chat"
            )

        if further := [*(["tools"] if tools else []), *(chat[0].keys() - {"role", "content"})]:
            raise ConfigError(f"{where}: {', '.join(sorted(further))}: need prompts.template: chat")

        text = str(chat[0]["content"])
        own, whole = (self._encode(text, where, special=special) for special in (False, True))
        starts = range(len(whole) - len(own) + 1)
        begin = next((start for start in starts if whole[start : start + len(own)] == own), None)
        if begin is None:  # with its special tokens it cuts the text in another way
            return whole, []

        before, behind, notes = whole[:begin], whole[begin + len(own) :], []
        if behind:
            added = self.tokenizer.decode(behind)
            notes.append(
                f"the {self.whose}'s tokenizer adds {added!r} behind plain text, which is left out"
            )

        if before and own[: len(before)] == before:
            notes.append(self._twice(before))
            before = []

        return [*before, *own], notes

    def _chat(
        self, chat: Sequence[Message], tools: Sequence[Tool], where: str
    ) -> tuple[list[int], list[str]]:
        text = self._render(chat, tools, where)
        notes = [*self._hidden(chat, tools, text, where), *self._unread()]
        token_ids = self._encode(text, where, special=False)
        bos = self.tokenizer.bos_token_id
        if bos is not None and token_ids[:2] == [bos, bos]:
            notes.append(self._twice([bos]))
            token_ids = token_ids[1:]

        return token_ids, notes

    def _twice(self, tokens: Sequence[int]) -> str:
        begin = self.tokenizer.decode(tokens)
        return (
            f"the text begins with the {self.whose}'s {begin!r}, which would come first "
            "anyway; it is there once"
        )

    def _hidden(
        self, chat: Sequence[Message], tools: Sequence[Tool], text: str, where: str
    ) -> Iterator[str]:
        """Yields notes on what the template does not show.

        Raises:
            ConfigError: without it the prompt asks something else.
        """
        names = dict.fromkeys(
            name for message in chat for name in message if name not in ("role", "content")
        )
        without: dict[str, tuple[Sequence[Message], Sequence[Tool]]] = {}
        for name in names:
            without[name] = [_without(message, name) for message in chat], tools
        if tools:
            without["tools"] = chat, ()

        for name, (other_chat, other_tools) in without.items():
            if not self._renders_as(text, other_chat, other_tools, where):
                continue

            if name in MUST_SHOW:
                raise ConfigError(
                    f"{where}: {name}: the {self.whose}'s chat template does not show them, "
                    "so that the prompt would lack them; use a model whose template does, "
                    "or take such rows out"
                )

            yield f"the {self.whose}'s chat template does not show `{name}` of the messages"

        for message in chat:
            if message["role"] != "assistant" and str(message["content"]).strip() not in text:
                yield (
                    f"the {self.whose}'s chat template does not show `{message['role']}` "
                    "messages as they stand"
                )

    def _renders_as(
        self, text: str, chat: Sequence[Message], tools: Sequence[Tool], where: str
    ) -> bool:
        try:
            return self._render(chat, tools, where) == text
        except ConfigError:  # what is missing is needed
            return False

    def _unread(self) -> Iterator[str]:
        source = self._source()
        if _ASKS_DATE in source:
            yield (
                f"the {self.whose}'s chat template asks for the date, and is always told "
                f"{TODAY}, so that prompts do not change from day to day"
            )

        for name in self.options:
            if not re.search(rf"\b{re.escape(name)}\b", source) and name != "chat_template":
                yield f"the {self.whose}'s chat template does not know the template option {name}"

    def _source(self) -> str:
        return str(self.options.get("chat_template", self.tokenizer.chat_template))

    def _render(self, chat: Sequence[Message], tools: Sequence[Tool], where: str) -> str:
        options = {**self.options, "tools": list(tools)} if tools else dict(self.options)
        if _ASKS_DATE in self._source():
            options[_ASKS_DATE] = TODAY.strftime

        try:
            return self.tokenizer.apply_chat_template(
                [dict(message) for message in chat],
                tokenize=False,
                add_generation_prompt=True,
                **options,
            )
        except Exception as error:  # noqa: BLE001 - a template is a program of the model's, and raises what it likes
            raise ConfigError(
                f"{where}: the {self.whose}'s chat template refuses it: "
                f"{error or type(error).__name__}"
            ) from None

    def _encode(self, text: str, where: str, *, special: bool) -> list[int]:
        if fault := fault_of(text):
            raise ConfigError(f"{where}: {fault}")

        try:
            return list(self.tokenizer.encode(text, add_special_tokens=special))
        except Exception as error:  # noqa: BLE001 - `tokenizers` raises bare Exception
            raise ConfigError(
                f"{where}: the {self.whose}'s tokenizer refuses it: {error or type(error).__name__}"
            ) from None


def _without(message: Message, name: str) -> Message:
    return {key: value for key, value in message.items() if key != name}
