"""What is checked before any worker starts: models, native options, prompts. Every failure is one ``ConfigError``."""

from eopd.preflight.inputs import Prepared, check, report, require_answers
from eopd.preflight.models import require_model, require_served

__all__ = ["Prepared", "check", "report", "require_answers", "require_model", "require_served"]
