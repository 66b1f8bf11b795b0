"""A data set as the prompts of a run: read, rendered for the student and, where it reads
otherwise, for its teacher.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Final

import jinja2
import numpy as np
from jinja2 import meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from eopd.config import ConfigError, PromptsConfig
from eopd.prompts.files import Row, read_rows
from eopd.prompts.rendering import Rendering, Tokenizer
from eopd.prompts.rows import Question, read_question
from eopd.types import PromptSample

FAULTS_SHOWN: Final = 5
# What Python's and LangChain's templates fill in; behind a command or an index of LaTeX braces are
# braces.
_SINGLE_BRACES: Final = re.compile(r"(?<![\w\\^_{}%#\]])\{\s*([A-Za-z_]\w*)\s*\}(?!\})")
_ROW: Final = "\0"  # stands for a place in a message
_TEMPLATES: Final = ImmutableSandboxedEnvironment(
    undefined=jinja2.StrictUndefined, keep_trailing_newline=True
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherView:
    """How a teacher reads a row of the data when it has a prompt of its own.

    Args:
        name: Of the teacher.
        template: Jinja for the last text of the user: the columns of the row, and ``prompt``, the
            student's text.
        tokenizer: The teacher's; its chat template renders the messages.
        options: Of that chat template.
        max_tokens: The longest such prompt.
    """

    name: str
    template: str
    tokenizer: Tokenizer
    options: Mapping[str, object]
    max_tokens: int

    def require_text(self) -> None:
        """The template is text, and not nothing or the name of the file that holds it.

        Raises:
            ConfigError: it is not.
        """
        key = f"teachers.{self.name}.template"
        if not self.template.strip():
            raise ConfigError(
                f"{key}: is empty; write {{{{ prompt }}}} and what the teacher reads "
                "besides, or take it out"
            )

        with suppress(OSError):  # no name that a disk takes is a name of no file
            if Path(os.path.expanduser(self.template.strip())).is_file():
                raise ConfigError(
                    f"{key}: {self.template.strip()} is a file; write its text "
                    "here, below `template: |`"
                )

    def token_ids(
        self, question: Question, where: str, config: PromptsConfig
    ) -> tuple[list[int], list[str]]:
        """The teacher's prompt, and notes on it.

        Raises:
            ConfigError: the template is broken or names a column the row lacks.
            _TooLong: its prompt is.
        """
        for one in _SINGLE_BRACES.finditer(self.template):
            if (name := one[1]) in (*question.columns, "prompt"):
                raise ConfigError(
                    f"teachers.{self.name}.template: {where}: {one[0]} is plain text there; "
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

        rendering = Rendering(
            whose=f"teacher {self.name}",
            tokenizer=self.tokenizer,
            template=config.template,
            options=self.options,
        )
        found, notes = rendering.token_ids(question.with_text(text), question.tools, where)
        if not columns:
            notes.append(
                f"the template of teacher {self.name} uses no column, so that it "
                "asks the same in every row"
            )

        if len(found) > self.max_tokens:
            raise _TooLong(
                len(found),
                f"{{rows}} longer than teachers.{self.name}.max_prompt_tokens "
                f"{self.max_tokens} in its template",
            )

        return found, notes


@cache
def _columns_of(template: str) -> frozenset[str]:
    """What a template names that a row must have."""
    return frozenset(meta.find_undeclared_variables(_TEMPLATES.parse(template)))


class _TooLong(Exception):
    """A prompt of more tokens than it may have; ``what`` says of which limit, with ``{rows}``
    in place of its rows.
    """

    def __init__(self, num_tokens: int, what: str) -> None:
        super().__init__(what)
        self.num_tokens = num_tokens
        self.what = what


def listed(places: Sequence[str]) -> str:
    """``prompts.data: rows.jsonl:3 (and 7 more rows)``."""
    more = len(places) - 1
    return places[0] + (f" (and {more} more row{'s' if more > 1 else ''})" if more else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSet:
    """Rendered and tokenised prompts; ``num_dropped`` of the data were too long.

    ``texts`` has what the user said last, ``places`` the file and row, both by id of the prompt.
    ``notes`` say what was read otherwise than it stands in the data, and in how many rows.
    """

    prompts: tuple[PromptSample, ...]
    texts: Mapping[str, str]
    places: Mapping[str, str]
    num_dropped: int
    notes: tuple[str, ...]

    @classmethod
    def load(
        cls,
        spec: str,
        config: PromptsConfig,
        tokenizer: Tokenizer,
        view_of: Callable[[str], TeacherView | None] = lambda source: None,
        *,
        key: str = "prompts.data",
    ) -> "PromptSet":
        """Read, render and tokenise every row.

        Args:
            spec: The data set.
            config: How its rows become prompts.
            tokenizer: The student's.
            view_of: How the teacher of a source reads, where that is another way.
            key: The key of the config that names the data set, for messages.

        Raises:
            ConfigError: rows are malformed (the first few kinds of fault are named), an id stands
                twice, a prompt is too long under ``overlong: error`` or for its teacher, or none is
                left.
        """
        if config.template == "chat" and not tokenizer.chat_template:
            raise ConfigError(
                "prompts.template: chat, but the tokenizer has no chat template; set it to none"
            )

        loading = _Loading(config, tokenizer, view_of)
        rows = read_rows(spec, key)
        loading.add_all(rows)
        if not loading.prompts:
            raise ConfigError(
                f"{key}: {spec}: all {len(rows)} rows are longer than prompts.max_tokens "
                f"{config.max_tokens}"
            )

        return cls(
            prompts=tuple(loading.prompts),
            texts=loading.texts,
            places=loading.places,
            num_dropped=loading.num_dropped,
            notes=tuple(
                f"{key}: {number} of {len(rows)} rows: {note}"
                for note, number in loading.notes.items()
            ),
        )


@dataclass(slots=True)
class _Loading:
    """What was made of the rows so far."""

    config: PromptsConfig
    tokenizer: Tokenizer
    view_of: Callable[[str], TeacherView | None]
    prompts: list[PromptSample] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    num_dropped: int = 0
    notes: Counter[str] = field(default_factory=Counter)

    def add_all(self, rows: Sequence[Row]) -> None:
        """Make a prompt of every row.

        Raises:
            ConfigError: some cannot be one; every kind of fault is named once, with the first row
                that has it.
        """
        faults: dict[str, list[str]] = {}  # by what is wrong, the rows in question
        overlong: dict[str, list[tuple[int, str]]] = {}  # by limit, tokens and place

        for row in rows:
            try:
                self._add(row)
            except ConfigError as error:
                faults.setdefault(str(error).replace(row.where, _ROW), []).append(row.where)
            except _TooLong as error:
                overlong.setdefault(error.what, []).append((error.num_tokens, row.where))

        told = [fault.replace(_ROW, listed(places)) for fault, places in faults.items()]
        if len(told) > FAULTS_SHOWN:
            more = sum(map(len, [*faults.values()][FAULTS_SHOWN:]))
            told[FAULTS_SHOWN:] = [
                f"{more} more row{'s have' if more > 1 else ' has'} other mistakes"
            ]

        told += [_told(what, found, len(rows)) for what, found in overlong.items()]
        if told:
            raise ConfigError("\n".join(told))

    def _add(self, row: Row) -> None:
        config = self.config
        question = read_question(row, config.suffix)
        self._name(question, row)

        student = Rendering(
            whose="student",
            tokenizer=self.tokenizer,
            template=config.template,
            options=config.template_options,
        )
        token_ids, notes = student.token_ids(question.chat, question.tools, row.where)
        if len(token_ids) > config.max_tokens:
            if config.overlong == "drop":
                self.num_dropped += 1
                return

            raise _TooLong(
                len(token_ids), f"{{rows}} longer than prompts.max_tokens {config.max_tokens}"
            )

        view = self.view_of(question.source)
        as_teacher, more_notes = (
            (None, []) if view is None else view.token_ids(question, row.where, config)
        )
        self.notes.update(dict.fromkeys([*question.notes, *notes, *more_notes], 1))
        self.prompts.append(
            PromptSample(
                epoch=0,
                prompt_id=question.prompt_id,
                source=question.source,
                token_ids=np.asarray(token_ids, dtype=np.int32),
                reference_answer=question.reference_answer,
                teacher_token_ids=None
                if as_teacher is None
                else np.asarray(as_teacher, dtype=np.int32),
            )
        )

    def _name(self, question: Question, row: Row) -> None:
        prompt_id = question.prompt_id
        if prompt_id in self.places:
            raise ConfigError(
                f"{row.where}: id: {prompt_id!r} stands twice: it is that of {self.places[prompt_id]} too (a row "
                'without an id is called by its number, and 1 and "1" are the same); give every row an id of its own'
            )

        self.places[prompt_id] = row.where
        self.texts[prompt_id] = question.text


def _told(what: str, found: Sequence[tuple[int, str]], num_rows: int) -> str:
    """How many rows are above a limit, and by how much at most: raising it once is enough."""
    num_tokens, where = max(found, key=lambda one: one[0])
    rows = f"{len(found)} of {num_rows} rows {'is' if len(found) == 1 else 'are'}"
    raised = f"raise the limit to {num_tokens}"
    ways = ["shorten what is too long", f"or {raised}"]
    if "teachers." not in what:
        ways[1:] = [f"{raised} (--max-prompt-tokens of eopd eval)", "or set prompts.overlong: drop"]

    return (
        f"{where}: {what.format(rows=rows)}; this is the longest, with {num_tokens} tokens: "
        f"{', '.join(ways)}"
    )
