"""A teacher may have a prompt of its own: a template of the user's, which is filled in from the row and
rendered by the teacher's chat template.
"""

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import jinja2
from jinja2 import meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from eopd.config import ConfigError
from eopd.prompts.rendering import OverlongError, Rendering
from eopd.prompts.rows import Question

# ``{name}`` as Python's and LangChain's templates fill it in; behind a command or an index of LaTeX
# braces are something else.
_SINGLE_BRACES: Final = re.compile(r"(?<![\w\\^_{}%#\]])\{\s*([A-Za-z_]\w*)\s*\}(?!\})")
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
        rendering: How the messages are rendered for the teacher.
        max_tokens: The length of the longest prompt that is allowed.
    """

    name: str
    template: str
    rendering: Rendering
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

    def token_ids(self, question: Question, where: str) -> tuple[list[int], list[str]]:
        """Returns the token ids of the teacher's prompt, and notes on it.

        Raises:
            ConfigError: the template is broken or names a column the row lacks.
            OverlongError: the prompt is too long.
        """
        for match in _SINGLE_BRACES.finditer(self.template):
            if (name := match[1]) in (*question.columns, "prompt"):
                raise ConfigError(
                    f"teachers.{self.name}.template: {where}: {match[0]} is plain text there; "
                    f"write {{{{ {name} }}}} to have the column in its place"
                )

        try:
            template, columns = _compiled(self.template)
            text = template.render({**question.columns, "prompt": question.text})
        except Exception as error:  # noqa: BLE001 - a template is a program of the user's, and raises what it likes
            raise ConfigError(
                f"teachers.{self.name}.template: {where}: {error or type(error).__name__}"
            ) from None

        chat = question.with_text(text)
        token_ids, notes = self.rendering.token_ids(chat, question.tools, where)
        if not columns:
            notes.append(
                f"the template of teacher {self.name} uses no column, so that it "
                "asks the same in every row"
            )

        if len(token_ids) > self.max_tokens:
            raise OverlongError(
                len(token_ids),
                f"longer than teachers.{self.name}.max_prompt_tokens "
                f"{self.max_tokens} in its template",
            )

        return token_ids, notes


@cache
def _compiled(text: str) -> tuple[jinja2.Template, frozenset[str]]:
    """Returns a template, and the names in it that are columns of the row."""
    columns = meta.find_undeclared_variables(_TEMPLATES.parse(text))
    return _TEMPLATES.from_string(text), frozenset(columns)
