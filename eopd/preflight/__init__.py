"""What is checked before any worker starts: models, native options, prompts. Every failure is
one ``ConfigError``.
"""

from eopd.preflight.answers import require_answers, require_readable_answers
from eopd.preflight.inputs import Prepared, check
from eopd.preflight.models import require_model, require_served
from eopd.preflight.report import notes, report

__all__ = [
    "Prepared",
    "check",
    "notes",
    "report",
    "require_answers",
    "require_model",
    "require_readable_answers",
    "require_served",
]
