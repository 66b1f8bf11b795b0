"""``eopd show``: training responses in the terminal, token by token, in the colours of the report.

The darker a token's ground, the less sure the teacher is of it, or the further the student is from
the teacher on it. A token is underlined where the gate is open. Where there are no colours, as in a
pipe, the text is the same.
"""

import math
import sys
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, Final, Literal, TypeAlias

import rich.console
from rich.text import Text

from eopd.config import ConfigError
from eopd.telemetry.plain import terminal, visible
from eopd.telemetry.report.samples import ENTROPY_EDGES, KL_EDGES, Token, tokens_of

Shade = Literal["entropy", "kl"]
Response: TypeAlias = Mapping[str, Any]  # a row of ``responses.jsonl``

_LISTS: Final = (
    "ids",
    "loss_mask",
    "student_logprobs",
    "teacher_logprobs",
    "entropy_low",
    "entropy_high",
)
_READ: Final = ("step", "prompt_id", "prompt", "sample_index", "stop_reason", "texts", *_LISTS)
_ENDINGS: Final = {"end_token": "ended by itself", "length": "cut by the length limit"}
_MOST_NAMED: Final = 8

# The report's colours on white, by the edges that a value is above.
_WARM, _COOL, _INK = (217, 95, 2), (0, 103, 168), "#1c1b19"
_ENTROPY_ALPHAS: Final = (0.0, 0.12, 0.22, 0.34, 0.47, 0.6, 0.75)
_KL_ALPHAS: Final = (-0.55, -0.34, -0.16, 0.0, 0.14, 0.3, 0.5, 0.75)


def responses_of(
    rows: Iterable[Response], *, step: int | None, prompt: str | None
) -> list[Response]:
    """Returns the responses of a step, or of the newest step that there are any of, and of one
    prompt where it is named. Rows that are damaged are left out.

    Raises:
        ConfigError: there are none of that step, or of that prompt.
    """
    chosen: list[Response] = []
    steps: set[int] = set()
    for row in rows:
        if not _is_whole(row):
            continue

        steps.add(row["step"])
        wanted = max(steps) if step is None else step
        chosen = [one for one in chosen if one["step"] == wanted]
        if row["step"] == wanted:
            chosen.append(row)

    if not steps:
        raise ConfigError("responses.jsonl holds no whole row")

    if not chosen:
        raise ConfigError(f"--step {step}: there are responses of steps {_named(sorted(steps))}")

    ids = sorted({row["prompt_id"] for row in chosen})
    if prompt is not None and prompt not in ids:
        raise ConfigError(
            f"--prompt {prompt}: step {chosen[0]['step']} has responses to {_named(ids)}"
        )

    return [row for row in chosen if prompt in (None, row["prompt_id"])]


def _is_whole(row: Response) -> bool:
    if any(row.get(key) is None for key in _READ) or not isinstance(row["step"], int):
        return False

    lists = [row[name] for name in _LISTS]
    return all(isinstance(one, list) and len(one) == len(lists[0]) for one in lists)


def _named(values: Sequence[object]) -> str:
    more = f", ... ({len(values)} in all)" if len(values) > _MOST_NAMED else ""
    return ", ".join(map(str, values[-_MOST_NAMED:])) + more


def print_responses(
    responses: Sequence[Response],
    *,
    threshold: float | None,
    shade: Shade = "entropy",
    output: rich.console.Console | None = None,
) -> None:
    """Print responses, below the prompts that they answer.

    Args:
        responses: rows of one step, those to one prompt behind one another.
        threshold: the teacher entropy in nats above which the gate opens, where it has one.
        shade: what the ground of a token shows.
        output: else the terminal.
    """
    output = output or terminal()
    if output.is_terminal and not output.no_color:
        output.print(_scale(shade, threshold), soft_wrap=True)

    shown = None
    for response in responses:
        if response["prompt_id"] != shown:
            shown = response["prompt_id"]
            output.print()
            output.print(Text(f"step {response['step']}, prompt {shown}", style="bold"))
            output.print(Text(visible(response["prompt"])), soft_wrap=True)

        tokens = list(tokens_of(response, threshold, longest=sys.maxsize))
        output.print()
        output.print(Text(_head(response, tokens), style="dim"), soft_wrap=True)
        output.print(_coloured(tokens, shade), soft_wrap=True)


def _head(response: Response, tokens: Sequence[Token]) -> str:
    """Returns what is said of a response: how it ended, its reward, and means over its tokens."""
    counted = [token for token in tokens if token.counts]
    means = {
        "reverse KL": [token.kl for token in counted],
        "teacher entropy": [token.entropy for token in counted],
    }
    parts = [
        f"sample {response['sample_index']}: {len(tokens)} tokens",
        _ENDINGS.get(response["stop_reason"], "ended"),
    ]
    if response.get("reward") is not None:
        parts.append(f"reward {response['reward']:g}")

    for name, values in means.items():
        if finite := list(filter(math.isfinite, values)):
            parts.append(f"{name} {fmean(finite):.3f} nats")

    if gates := [token.gate for token in counted if token.gate]:
        parts.append(f"gate open {gates.count('open') / len(gates):.0%}")

    return ", ".join(parts)


def _coloured(tokens: Sequence[Token], shade: Shade) -> Text:
    text = Text()
    for token in tokens:
        text.append(token.text.replace("\n", "↵\n"), style=_style(token, shade))

    return text


def _style(token: Token, shade: Shade) -> str:
    if not token.counts:
        return "dim"

    if shade == "entropy":
        alpha = _ENTROPY_ALPHAS[bisect_right(ENTROPY_EDGES, token.entropy)]
    else:
        alpha = _KL_ALPHAS[bisect_right(KL_EDGES, token.kl)]

    line = "underline " if token.gate == "open" else ""
    return f"{line}{_ground(alpha)}".strip()


def _ground(alpha: float) -> str:
    """Returns the style of a ground: warm, or cool where ``alpha`` is negative, over white."""
    if alpha == 0.0:
        return ""

    colour, share = (_WARM, alpha) if alpha > 0.0 else (_COOL, -alpha)
    red, green, blue = (round(255 + share * (part - 255)) for part in colour)
    return f"{_INK} on #{red:02x}{green:02x}{blue:02x}"


def _scale(shade: Shade, threshold: float | None) -> Text:
    """Returns the key to the colours."""
    edges = ENTROPY_EDGES if shade == "entropy" else KL_EDGES
    alphas = _ENTROPY_ALPHAS if shade == "entropy" else _KL_ALPHAS
    name = "teacher entropy" if shade == "entropy" else "log p(student) - log p(teacher)"
    text = Text(f"{name}, nats: ")
    for alpha, edge in zip(alphas, (*edges, None), strict=True):
        text.append(f" up to {edge:g} " if edge is not None else " more ", style=_ground(alpha))

    if threshold is not None:
        text.append("  ")
        text.append("gate open", style="underline")

    return text
