"""Before any worker starts, everything is checked that needs none: the machine, models, native
options, prompts. Every failure is one ``ConfigError``.
"""

from eopd.preflight.answers import require_answers
from eopd.preflight.inputs import Prepared, prepare
from eopd.preflight.models import require_model, require_served, require_top_k
from eopd.preflight.offline import check_offline
from eopd.preflight.pinning import pin_model, pin_parts, pinned
from eopd.preflight.report import describe, notes

__all__ = [
    "Prepared",
    "check_offline",
    "describe",
    "notes",
    "pin_model",
    "pin_parts",
    "pinned",
    "prepare",
    "require_answers",
    "require_model",
    "require_served",
    "require_top_k",
]
