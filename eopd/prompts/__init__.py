"""From data sets to ``PromptSample``: rows in; rendered, tokenised prompts and the order they are
asked in out.

``files`` reads rows, ``rows`` says what each must hold, ``rendering`` turns a chat into token ids,
``prompt_set`` puts them together for a student and its teachers, and ``order`` says which prompt
comes when. Nothing is consumed: sample number i of a run is a pure function of the seed and i, so
that resuming needs no state beyond a number.
"""

from eopd.prompts.files import Row, read_rows
from eopd.prompts.order import PromptOrder
from eopd.prompts.prompt_set import PromptSet, TeacherView, listed

__all__ = ["PromptOrder", "PromptSet", "Row", "TeacherView", "listed", "read_rows"]
