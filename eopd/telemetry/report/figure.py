"""A chart as it stands on the page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from eopd.telemetry.report.healthy import Verdict


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart with its caption. ``legend`` names what its colours and dashes mean, by class;
    ``verdicts`` say what is not as in a sound run.
    """

    title: str
    picture: Markup
    note: str
    legend: Mapping[str, str] = field(default_factory=dict)
    verdicts: Sequence[Verdict] = ()
