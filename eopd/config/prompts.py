"""The section ``prompts``: where rows come from, how they mix, and how they become prompts."""

import difflib
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Annotated, ClassVar, Final, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from eopd.config.base import (
    DataSpec,
    FunctionName,
    NativeOptions,
    PromptText,
    Section,
    Tokens,
    refuse,
    resolve_data,
)
from eopd.config.teacher import OWNED_BY_TEMPLATE

ROLES_OF_COLUMNS: Final = ("prompt", "messages", "tools", "id", "answer", "source")
MOST_TURNS: Final = 100_000
COLUMNS_WORDS: Final = (
    f"a mapping from {', '.join(ROLES_OF_COLUMNS[:-1])} or {ROLES_OF_COLUMNS[-1]} to the name of "
    "a column"
)
PARTS_WORDS: Final = "text, a mapping of the keys of a part, or a list of these, at least one"


def _roles_and_names(columns: dict[str, str]) -> dict[str, str]:
    for role, name in columns.items():
        if role not in ROLES_OF_COLUMNS:
            close = difflib.get_close_matches(role.lower(), ROLES_OF_COLUMNS, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise ValueError(
                f"no column plays the role {role!r}; {hint}roles are {', '.join(ROLES_OF_COLUMNS)}"
            )

        if not name.strip():
            raise ValueError(f"{role}: must be the name of a column (is {name!r})")

    return columns


def _some_text(text: str) -> str:
    if not text.strip():
        raise ValueError(f"must be text, or null (is {text!r})")

    return text


def _as_parts(value: object) -> object:
    """Writes out the shortest form, a text that is the data of the one part: a mistake in it has the
    key where it stands. The other ones are written out before (``shape.py``).
    """
    return [{"data": resolve_data(value)}] if isinstance(value, str) else value


Columns = Annotated[dict[str, str], AfterValidator(_roles_and_names)]
SystemText = Annotated[PromptText, AfterValidator(_some_text)]


class Part(Section):
    """A part of the prompts: the rows of one file, of one data set, or of one function.

    A text is short for ``{data: TEXT}``.
    """

    short: ClassVar[str | None] = "data"

    data: DataSpec | None = None
    """The rows: a ``.jsonl`` or ``.parquet`` file, or the name of a data set of the ``datasets``
    library (``NAME``, ``NAME:SPLIT`` or ``NAME:SUBSET:SPLIT``, with a revision
    ``NAME@REVISION:SUBSET:SPLIT``).
    """

    function: FunctionName | None = None
    """A function of yours that yields the rows, ``package.module:name``, in the place of ``data``.
    Its signature is that of ``DataFunction`` in ``eopd/plugins.py``.
    """

    options: NativeOptions = {}
    """The keyword arguments of ``function``."""

    source: str | None = Field(None, min_length=1, max_length=200)
    """The source of all these rows, whatever a column of theirs says. It chooses their teacher
    (``teachers[].sources``), and reports show their numbers apart.
    """

    columns: Columns | None = Field(None, description=f"{COLUMNS_WORDS}, or null")
    """The columns of these rows, in the place of ``prompts.columns``, or of those of a benchmark."""

    @property
    def name(self) -> str:
        """The file, the data set or the function, for messages."""
        return self.data if self.data is not None else str(self.function)

    @model_validator(mode="after")
    def _rows_come_from_one_place(self) -> Self:
        if (self.data is None) == (self.function is None):
            raise ValueError("must have one of data and function: a part comes from one place")

        if self.options and self.function is None:
            raise ValueError("options: are keyword arguments of function, which is not there")

        if self.source is not None and "source" in (self.columns or {}):
            raise ValueError("source: is said by columns.source too; keep one of them")

        return self


class TrainingPart(Part):
    """A part of the training prompts: the rows of one file, of one data set, or of one function.

    A text is short for ``{data: TEXT}``.
    """

    weight: float | None = Field(None, gt=0.0, le=1e6)
    """The part's share of the training prompts, as a ratio to the weights of the others: 3 and 1
    are three prompts of every four. The ratio is kept to one part in 100,000. All parts have one or
    none has. Without them every row comes once in an epoch.
    """


Parts = Annotated[tuple[Part, ...], BeforeValidator(_as_parts), Field(min_length=1)]
TrainingParts = Annotated[tuple[TrainingPart, ...], BeforeValidator(_as_parts), Field(min_length=1)]


def names_of(parts: Sequence[Part]) -> str:
    """Returns what the parts are, for messages: ``a.jsonl, b.jsonl``."""
    return ", ".join(part.name for part in parts)


def keys_of(key: str, parts: Sequence[Part]) -> list[str]:
    """Returns the key of each part, for messages: ``prompts.data``, or ``prompts.data.0`` and so
    on where there are several.
    """
    return [key] if len(parts) == 1 else [f"{key}.{index}" for index in range(len(parts))]


class PromptsConfig(Section):
    """The prompts to train on and to measure on, and how they are rendered."""

    data: TrainingParts = Field(description=PARTS_WORDS)
    """The training rows: a ``.jsonl`` or ``.parquet`` file, the name of a data set, a mapping with
    the keys of a part, or a list of these. The chapter docs/configuration.md#rows says what a row
    holds, docs/configuration.md#several-files-and-weights how parts mix.
    """

    held_out: Parts = Field(description=PARTS_WORDS)
    """The rows to measure on, in the same forms as ``prompts.data`` but
    without weights. Of several parts the prompts are taken in turn.
    """

    columns: Columns = Field({}, description=COLUMNS_WORDS)
    """The columns that play a role under another name, such as ``{prompt: question, answer:
    solution}``. A name may lead to a field of an object, as ``reward_model.ground_truth`` does. A
    role that is not named here is played by the column of its own name.
    """

    system: SystemText | None = None
    """A system message that goes before every ``prompt``, and before ``messages`` that have none.
    Nothing is added by default.
    """

    template: Literal["chat", "none"] = "chat"
    """How a row becomes a prompt. ``chat`` renders it with the student's chat template; ``none``
    takes its ``prompt`` as it is, for students without a chat template.
    """

    template_options: NativeOptions = {}
    """Options of the student's chat template, such as ``{enable_thinking: false}``. None are
    given as a rule.
    """

    suffix: PromptText = ""
    """A text that is appended to the last text of the user, before a template renders it. It is
    the place for an instruction that every prompt shares. Nothing is appended by default.
    """

    max_tokens: Tokens = 1024
    """The longest prompt, in tokens. Together with the longest response it must fit into
    ``learner.token_budget``.
    """

    overlong: Literal["error", "drop"] = "error"
    """What becomes of longer prompts, and of those that are longer than
    ``teachers[].max_prompt_tokens`` in the teacher's template. ``error`` ends the command before the
    run starts; ``drop`` leaves them out, and a note counts them.
    """

    @property
    def turns(self) -> tuple[int, ...] | None:
        """How many of the training prompts come from each part until their order begins again;
        None without weights.

        Example: weights of 0.75 and 0.25 are 3 and 1. A ratio that needs more turns than
        ``MOST_TURNS`` is rounded to so many.
        """
        weights = [part.weight for part in self.data if part.weight is not None]
        if not weights:
            return None

        exact = [Fraction(str(weight)) for weight in weights]
        scale = Fraction(math.lcm(*(weight.denominator for weight in exact)))
        scale /= math.gcd(*(int(weight * scale) for weight in exact))
        scale = min(scale, Fraction(MOST_TURNS) / sum(exact))
        whole = [max(1, round(weight * scale)) for weight in exact]
        common = math.gcd(*whole)

        return tuple(number // common for number in whole)

    @model_validator(mode="after")
    def _chats_have_a_template(self) -> Self:
        refuse("template_options", self.template_options, OWNED_BY_TEMPLATE)
        if self.template == "none" and self.template_options:
            raise ValueError("template_options: go to a chat template; template is none")

        if self.template == "none" and self.system is not None:
            raise ValueError("system: is a message of a chat; template is none")

        return self

    @model_validator(mode="after")
    def _weights_are_a_ratio(self) -> Self:
        without = [index for index, part in enumerate(self.data) if part.weight is None]
        if without and len(without) < len(self.data):
            raise ValueError(
                f"data.{without[0]}.weight: is missing; give every part a weight, or none"
            )

        return self
