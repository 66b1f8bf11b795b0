"""Data sets become prompts: rows go in; rendered, tokenised prompts and their order come out.

    data set ─▶ files: rows ─▶ rows: questions ─▶ rendering: token ids ─▶ prompt_set ─▶ order

``prompt_set`` holds the prompts for a student and its teachers, and ``order`` decides which prompt
comes when. Nothing is consumed: sample number i of a run is a pure function of the seed and i, so
that a resumed run needs no state but a number.
"""

from eopd.prompts.files import DataRow, read_data
from eopd.prompts.order import PromptOrder
from eopd.prompts.prompt_set import PromptSet, list_places
from eopd.prompts.teacher_view import TeacherView

__all__ = ["DataRow", "PromptOrder", "PromptSet", "TeacherView", "list_places", "read_data"]
