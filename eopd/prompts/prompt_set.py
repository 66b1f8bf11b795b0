"""A data set becomes the prompts of a run: its rows are read, and rendered for the student, and for a
teacher that has a template of its own.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import chain, zip_longest
from pathlib import Path
from typing import Final

import jinja2
import numpy as np
from jinja2 import meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from eopd.config import ConfigError, Part, PromptsConfig
from eopd.config.prompts import keys_of
from eopd.prompts.files import DataRow, read_part
from eopd.prompts.rendering import Rendering, Tokenizer
from eopd.prompts.rows import Question, read_question
from eopd.types import PromptSample

FAULTS_SHOWN: Final = 5
# ``{name}`` as Python's and LangChain's templates fill it in; behind a command or an index of LaTeX
# braces are something else.
_SINGLE_BRACES: Final = re.compile(r"(?<![\w\\^_{}%#\]])\{\s*([A-Za-z_]\w*)\s*\}(?!\})")
_ROW: Final = "\0"  # stands for a place in a message
_TEMPLATES: Final = ImmutableSandboxedEnvironment(
    undefined=jinja2.StrictUndefined, keep_trailing_newline=True
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherView:
    """A teacher view renders the rows of the data for a teacher that has a prompt of its own.

    Args:
        name: The name of the teacher.
        template: Jinja for the last text of the user. It may use the columns of the row, and
            ``prompt``, the student's text.
        tokenizer: The teacher's tokenizer, whose chat template renders the messages.
        options: The options of that chat template.
        max_tokens: The length of the longest prompt that is allowed.
    """

    name: str
    template: str
    tokenizer: Tokenizer
    options: Mapping[str, object]
    max_tokens: int

    def require_text(self) -> None:
        """Checks that the template is text, and not empty or the name of a file.

        Raises:
            ConfigError: it is empty, or the name of a file.
        """
        key = f"teachers.{self.name}.template"
        if not self.template.strip():
            raise ConfigError(
                f"{key}: is empty; write {{{{ prompt }}}} and what the teacher reads "
                "besides, or take it out"
            )

        with suppress(OSError):  # a text that no disk takes as a name
            if Path(os.path.expanduser(self.template.strip())).is_file():
                raise ConfigError(
                    f"{key}: {self.template.strip()} is a file; write its text "
                    "here, below `template: |`"
                )

    def rendering(self, config: PromptsConfig) -> Rendering:
        """Returns how the teacher's prompts are rendered."""
        return Rendering(
            whose=f"teacher {self.name}",
            tokenizer=self.tokenizer,
            template=config.template,
            options=self.options,
        )

    def token_ids(
        self, question: Question, where: str, config: PromptsConfig
    ) -> tuple[list[int], list[str]]:
        """Returns the token ids of the teacher's prompt, and notes on it.

        Raises:
            ConfigError: the template is broken or names a column the row lacks.
            _TooLong: the prompt is too long.
        """
        for match in _SINGLE_BRACES.finditer(self.template):
            if (name := match[1]) in (*question.columns, "prompt"):
                raise ConfigError(
                    f"teachers.{self.name}.template: {where}: {match[0]} is plain text there; "
                    f"write {{{{ {name} }}}} to have the column in its place"
                )

        try:
            text = _TEMPLATES.from_string(self.template).render(
                {**question.columns, "prompt": question.text}
            )
            columns = _columns_of(self.template)
        except Exception as error:  # noqa: BLE001 - a template is a program of the user's, and raises what it likes
            raise ConfigError(
                f"teachers.{self.name}.template: {where}: {error or type(error).__name__}"
            ) from None

        chat = question.with_text(text)
        token_ids, notes = self.rendering(config).token_ids(chat, question.tools, where)
        if not columns:
            notes.append(
                f"the template of teacher {self.name} uses no column, so that it "
                "asks the same in every row"
            )

        if len(token_ids) > self.max_tokens:
            raise _TooLong(
                len(token_ids),
                f"{{rows}} longer than teachers.{self.name}.max_prompt_tokens "
                f"{self.max_tokens} in its template",
            )

        return token_ids, notes


@cache
def _columns_of(template: str) -> frozenset[str]:
    """Returns the names in a template that are columns of the row."""
    return frozenset(meta.find_undeclared_variables(_TEMPLATES.parse(template)))


class _TooLong(Exception):
    """A prompt has more tokens than it may have; ``fault`` names the limit, with ``{rows}`` in place
    of its rows.
    """

    def __init__(self, num_tokens: int, fault: str) -> None:
        super().__init__(fault)
        self.num_tokens = num_tokens
        self.fault = fault


def list_places(places: Sequence[str]) -> str:
    """Returns the first place and the number of others: ``data.jsonl:3 (and 7 more rows)``."""
    more = len(places) - 1
    return places[0] + (f" (and {more} more row{'s' if more > 1 else ''})" if more else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSet:
    """A prompt set holds rendered and tokenised prompts; ``parts`` has the same prompts by part of
    the data, and ``num_dropped`` rows were too long.

    ``texts`` has the last text of the user, ``places`` the file and row, both by id of the prompt.
    ``notes`` say what is not taken as it stands in the data, and in how many rows.
    """

    prompts: tuple[PromptSample, ...]
    parts: tuple[tuple[PromptSample, ...], ...]
    texts: Mapping[str, str]
    places: Mapping[str, str]
    num_dropped: int
    notes: tuple[str, ...]

    @classmethod
    def load(
        cls,
        data: str | Sequence[Part],
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
            data: The parts; a text is the data of one.
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
        if config.template == "chat" and not tokenizer.chat_template:
            raise ConfigError(
                "prompts.template: chat, but the tokenizer has no chat template; set it to none"
            )

        if config.system is not None:
            student_rendering(config, tokenizer).require_system(config.system)

        parts = [Part(data=data)] if isinstance(data, str) else data
        loaded, faults = [], []
        for index, (part, key_of_part) in enumerate(zip(parts, keys_of(key, parts), strict=True)):
            prefix = f"{index}/" if len(parts) > 1 else ""

            try:
                rows = read_part(part, key_of_part, config.columns)
                loading = _Loading(config, tokenizer, view_of, keep_rows, part.source, prefix)
                loaded.append(loading.load(rows, f"{key_of_part}: {part.name}", key_of_part))
            except ConfigError as error:
                faults.append(str(error))

        if faults:
            raise ConfigError("\n".join(faults))

        return _joined(loaded)

    def in_turn(self) -> "PromptSet":
        """Returns the same prompts with one of each part in turn, so that the first so many are
        of all parts.
        """
        turns = chain.from_iterable(zip_longest(*self.parts))
        return replace(self, prompts=tuple(prompt for prompt in turns if prompt is not None))


def student_rendering(config: PromptsConfig, tokenizer: Tokenizer) -> Rendering:
    """Returns how the student's prompts are rendered."""
    return Rendering(
        whose="student",
        tokenizer=tokenizer,
        template=config.template,
        options=config.template_options,
    )


def _joined(parts: Sequence[PromptSet]) -> PromptSet:
    """Returns one set of all prompts; no two have the same id."""
    return PromptSet(
        prompts=tuple(chain.from_iterable(part.prompts for part in parts)),
        parts=tuple(part.prompts for part in parts),
        texts=dict(chain.from_iterable(part.texts.items() for part in parts)),
        places=dict(chain.from_iterable(part.places.items() for part in parts)),
        num_dropped=sum(part.num_dropped for part in parts),
        notes=tuple(chain.from_iterable(part.notes for part in parts)),
    )


@dataclass(slots=True)
class _Loading:
    """Collects what the rows of a part become, one after the other."""

    config: PromptsConfig
    tokenizer: Tokenizer
    view_of: Callable[[str], TeacherView | None]
    keep_rows: bool
    source: str | None
    prefix: str
    prompts: list[PromptSample] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    num_dropped: int = 0
    notes: Counter[str] = field(default_factory=Counter)

    def load(self, rows: Sequence[DataRow], where: str, key: str) -> PromptSet:
        """Makes prompts of all rows of the data at ``where``, which ``key`` names.

        Raises:
            ConfigError: a row cannot be one, or all of them are too long.
        """
        self._add_all(rows)
        if not self.prompts:
            raise ConfigError(
                f"{where}: all {len(rows)} rows are longer than prompts.max_tokens "
                f"{self.config.max_tokens}"
            )

        prompts = tuple(self.prompts)
        return PromptSet(
            prompts=prompts,
            parts=(prompts,),
            texts=self.texts,
            places=self.places,
            num_dropped=self.num_dropped,
            notes=tuple(
                f"{key}: {number} of {len(rows)} rows: {note}"
                for note, number in self.notes.items()
            ),
        )

    def _add_all(self, rows: Sequence[DataRow]) -> None:
        """Makes a prompt of every row.

        Raises:
            ConfigError: a row cannot be one; every kind of fault is named once, with the first row
                that has it.
        """
        faults: dict[str, list[str]] = {}  # the places of the rows, by what is wrong
        overlong: dict[str, list[tuple[int, str]]] = {}  # tokens and places, by the limit

        for row in rows:
            try:
                self._add(row)
            except ConfigError as error:
                faults.setdefault(str(error).replace(row.where, _ROW), []).append(row.where)
            except _TooLong as error:
                overlong.setdefault(error.fault, []).append((error.num_tokens, row.where))

        lines = [fault.replace(_ROW, list_places(places)) for fault, places in faults.items()]
        if len(lines) > FAULTS_SHOWN:
            more = sum(map(len, [*faults.values()][FAULTS_SHOWN:]))
            verb = "s have" if more > 1 else " has"
            lines[FAULTS_SHOWN:] = [f"{more} more row{verb} other mistakes"]

        lines += [_describe(fault, rows_of, len(rows)) for fault, rows_of in overlong.items()]
        if lines:
            raise ConfigError("\n".join(lines))

    def _add(self, row: DataRow) -> None:
        config = self.config
        question = self._named(read_question(row, config.suffix, config.system), row)
        student = student_rendering(config, self.tokenizer)
        token_ids, notes = student.token_ids(question.chat, question.tools, row.where)
        if len(token_ids) > config.max_tokens:
            if config.overlong == "drop":
                self.num_dropped += 1
                return

            raise _TooLong(
                len(token_ids), f"{{rows}} longer than prompts.max_tokens {config.max_tokens}"
            )

        teacher_token_ids = None
        if (view := self.view_of(question.source)) is not None:
            teacher_ids, teacher_notes = view.token_ids(question, row.where, config)
            teacher_token_ids = np.asarray(teacher_ids, dtype=np.int32)
            notes += teacher_notes

        self.notes.update(list(dict.fromkeys([*question.notes, *notes])))
        self.prompts.append(
            PromptSample(
                epoch=0,
                prompt_id=question.prompt_id,
                source=question.source,
                token_ids=np.asarray(token_ids, dtype=np.int32),
                reference_answer=question.reference_answer,
                teacher_token_ids=teacher_token_ids,
                row=question.row if self.keep_rows else None,
            )
        )

    def _named(self, question: Question, row: DataRow) -> Question:
        """Returns the question with the source and the id that it has in the whole set."""
        prompt_id = f"{self.prefix}{question.prompt_id}"
        if prompt_id in self.places:
            raise ConfigError(
                f"{row.where}: {row.name('id')}: {question.prompt_id!r} stands twice: it is that "
                f"of {self.places[prompt_id]} too (a row without an id is called by its number, "
                'and 1 and "1" are the same); give every row an id of its own'
            )

        self.places[prompt_id] = row.where
        self.texts[prompt_id] = question.text

        return replace(question, prompt_id=prompt_id, source=self.source or question.source)


def _describe(fault: str, overlong: Sequence[tuple[int, str]], num_rows: int) -> str:
    """Returns how many rows are above a limit, and by how much at most: raising it once is enough."""
    num_tokens, where = max(overlong, key=lambda tokens_and_place: tokens_and_place[0])
    rows = f"{len(overlong)} of {num_rows} rows {'is' if len(overlong) == 1 else 'are'}"
    raised = f"raise the limit to {num_tokens}"
    ways = f"or {raised}"
    if "teachers." not in fault:
        ways = f"{raised} (--max-prompt-tokens of eopd eval), or set prompts.overlong: drop"

    return (
        f"{where}: {fault.format(rows=rows)}; this is the longest, with {num_tokens} tokens: "
        f"shorten what is too long, {ways}"
    )
