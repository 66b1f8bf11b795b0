"""A data set becomes the prompts of a run: its rows are read, and rendered for the student, and for a
teacher that has a template of its own.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, zip_longest
from typing import Final

import numpy as np

from eopd.config import ConfigError, Part, PromptsConfig
from eopd.config.prompts import keys_of
from eopd.prompts.files import DataRow, read_part
from eopd.prompts.rendering import OverlongError, Rendering, Tokenizer
from eopd.prompts.rows import Question, read_question
from eopd.prompts.teacher_view import TeacherView
from eopd.types import PromptSample

FAULTS_SHOWN: Final = 5
_ROW: Final = "\0"  # stands for a place in a message
# what a message tells of a value: rows that differ in it alone have the same mistake
_VALUE: Final = re.compile(
    r"(?<=is )(?:the number .*|\".*)$|(?<=: )'.*' stands twice: it is that of .*(?= too )",
    re.DOTALL,
)


def list_places(places: Sequence[str]) -> str:
    """Returns the first place and the number of others: ``data.jsonl:3 (and 7 more rows)``."""
    more = len(places) - 1
    return places[0] + (f" (and {more} more row{'s' if more > 1 else ''})" if more else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSet:
    """A prompt set holds rendered and tokenised prompts; ``parts`` has the same prompts by part of
    the data.

    ``texts`` has the last text of the user, ``places`` the file and row, both by id of the prompt.
    ``notes`` say what is not taken as it stands in the data, and in how many rows.
    """

    prompts: tuple[PromptSample, ...]
    parts: tuple[tuple[PromptSample, ...], ...]
    texts: Mapping[str, str]
    places: Mapping[str, str]
    notes: tuple[str, ...]

    @classmethod
    def load(
        cls,
        parts: Sequence[Part],
        config: PromptsConfig,
        tokenizer: Tokenizer,
        view_of: Callable[[str], TeacherView | None] = lambda source: None,
        *,
        key: str = "prompts.data",
        keep_rows: bool = False,
    ) -> "PromptSet":
        """Reads, renders and tokenises every row. Of several parts each id begins with the number
        of its part: ``1/ID``.

        Args:
            parts: Where the rows come from.
            config: How their rows become prompts.
            tokenizer: The student's tokenizer.
            view_of: Returns the view of a source's teacher; None where it takes the student's prompt.
            key: The key of the config that names the data, for messages.
            keep_rows: Whether every prompt gets the row of the data, for functions that read it.

        Raises:
            ConfigError: rows are malformed (the first few kinds of fault are named), an id stands
                twice, a prompt is too long under ``overlong: error`` or for its teacher, or none is
                left of a part.
        """
        loading = _Loading(config, _rendering(config, tokenizer), view_of, keep_rows)
        loaded, faults = [], []
        for index, (part, key_of_part) in enumerate(zip(parts, keys_of(key, parts), strict=True)):
            prefix = f"{index}/" if len(parts) > 1 else ""

            try:
                loaded.append(loading.part(part, key_of_part, prefix))
            except ConfigError as error:
                faults.append(str(error))

        if faults:
            raise ConfigError("\n".join(faults))

        return cls(
            prompts=tuple(chain.from_iterable(loaded)),
            parts=tuple(loaded),
            texts=loading.texts,
            places=loading.places,
            notes=tuple(loading.notes),
        )

    def in_turn(self) -> "PromptSet":
        """Returns the same prompts with one of each part in turn, so that the first so many are
        of all parts.
        """
        turns = chain.from_iterable(zip_longest(*self.parts))
        return replace(self, prompts=tuple(prompt for prompt in turns if prompt is not None))


def _rendering(config: PromptsConfig, tokenizer: Tokenizer) -> Rendering:
    """Returns how the student's prompts are rendered.

    Raises:
        ConfigError: there is no chat template, or it shows no message of the system.
    """
    if config.template == "chat" and not tokenizer.chat_template:
        raise ConfigError(
            "prompts.template: chat, but the tokenizer has no chat template; set it to none "
            "(--template none of eopd eval)"
        )

    rendering = Rendering(
        whose="student",
        tokenizer=tokenizer,
        template=config.template,
        options=config.template_options,
    )
    if config.system is not None:
        rendering.require_system(config.system)

    return rendering


@dataclass(slots=True)
class _Loading:
    """Makes prompts of one part after the other, and collects what is said of them."""

    config: PromptsConfig
    rendering: Rendering
    view_of: Callable[[str], TeacherView | None]
    keep_rows: bool
    texts: dict[str, str] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def part(self, part: Part, key: str, prefix: str) -> tuple[PromptSample, ...]:
        """Returns the prompts of a part, which ``key`` of the config names; their ids begin with
        ``prefix``.

        Raises:
            ConfigError: a row cannot be one, or all of them are too long; every kind of fault is
                named once, with the first row that has it.
        """
        rows = read_part(part, key, self.config.columns)
        prompts: list[PromptSample] = []
        noted: Counter[str] = Counter()
        faults: dict[str, tuple[str, list[str]]] = {}  # the first message and all places, by kind
        overlong: dict[str, list[tuple[int, str]]] = {}  # tokens and places, by the limit

        for row in rows:
            try:
                prompts.append(self._prompt(self._read(row, part.source, prefix), row.where, noted))
            except ConfigError as error:
                fault = str(error).replace(row.where, _ROW)
                faults.setdefault(_VALUE.sub("", fault), (fault, []))[1].append(row.where)
            except OverlongError as error:
                overlong.setdefault(error.limit, []).append((error.num_tokens, row.where))

        is_fault = self.config.overlong == "error"
        if lines := [
            *_first([*faults.values()]),
            *(_longest(overlong, len(rows)) if is_fault else ()),
        ]:
            raise ConfigError("\n".join(lines))

        if not prompts:
            limits = " or ".join(overlong)
            raise ConfigError(f"{key}: {part.name}: all {len(rows)} rows are {limits}")

        noted.update({f"left out, {limit}": len(rows) for limit, rows in overlong.items()})
        self.notes += [
            f"{key}: {number} of {len(rows)} rows: {note}" for note, number in noted.items()
        ]
        return tuple(prompts)

    def _read(self, row: DataRow, source: str | None, prefix: str) -> Question:
        """Returns the question of a row, with the source and the id that it has in the whole set."""
        question = read_question(row, self.config.suffix, self.config.system)
        prompt_id = f"{prefix}{question.prompt_id}"
        if prompt_id in self.places:
            raise ConfigError(
                f"{row.where}: {row.name('id')}: {question.prompt_id!r} stands twice: it is that "
                f"of {self.places[prompt_id]} too (a row without an id is called by its number, "
                'and 1 and "1" are the same); give every row an id of its own'
            )

        self.places[prompt_id] = row.where
        self.texts[prompt_id] = question.text

        return replace(question, prompt_id=prompt_id, source=source or question.source)

    def _prompt(self, question: Question, where: str, noted: Counter[str]) -> PromptSample:
        """Returns the prompt of a question.

        Raises:
            ConfigError: it cannot be rendered.
            OverlongError: it is too long, as the student reads it or as its teacher does.
        """
        config = self.config
        token_ids, notes = self.rendering.token_ids(question.chat, question.tools, where)
        if len(token_ids) > config.max_tokens:
            raise OverlongError(
                len(token_ids), f"longer than prompts.max_tokens {config.max_tokens}"
            )

        teacher_token_ids = None
        if (view := self.view_of(question.source)) is not None:
            teacher_ids, teacher_notes = view.token_ids(question, where)
            teacher_token_ids = np.asarray(teacher_ids, dtype=np.int32)
            notes += teacher_notes

        noted.update(list(dict.fromkeys([*question.notes, *notes])))
        return PromptSample(
            epoch=0,
            prompt_id=question.prompt_id,
            source=question.source,
            token_ids=np.asarray(token_ids, dtype=np.int32),
            reference_answer=question.reference_answer,
            teacher_token_ids=teacher_token_ids,
            row=question.row if self.keep_rows else None,
        )


def _first(faults: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    """Returns the first few kinds of fault, a line each, and the number of rows that have others."""
    lines = [fault.replace(_ROW, list_places(places)) for fault, places in faults]
    if len(lines) > FAULTS_SHOWN:
        more = sum(len(places) for _, places in faults[FAULTS_SHOWN:])
        verb = "s have" if more > 1 else " has"
        lines[FAULTS_SHOWN:] = [f"{more} more row{verb} other mistakes"]

    return lines


def _longest(overlong: Mapping[str, Sequence[tuple[int, str]]], num_rows: int) -> list[str]:
    """Returns how many rows are above each limit, and by how much at most: raising it once is
    enough.
    """
    lines = []
    for limit, rows in overlong.items():
        num_tokens, where = max(rows, key=lambda tokens_and_place: tokens_and_place[0])
        count = f"{len(rows)} of {num_rows} rows {'is' if len(rows) == 1 else 'are'}"
        raised = f"raise the limit to {num_tokens}"
        if "teachers." not in limit:
            raised += " (--max-prompt-tokens of eopd eval)"

        lines.append(
            f"{where}: {count} {limit}; this is the longest, with {num_tokens} tokens: shorten what "
            f"is too long, {raised}, or set prompts.overlong: drop"
        )

    return lines
