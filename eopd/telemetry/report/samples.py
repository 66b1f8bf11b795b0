"""Held-out samples token by token: coloured text, and what the page shows of the token under
the pointer.
"""

import itertools
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from markupsafe import Markup

from eopd.telemetry.report.charts import as_json
from eopd.telemetry.report.reading import Record, RunRecord

MAX_TOKENS, MAX_PROMPTS, MAX_ALTERNATIVES = 5000, 12, 8  # of the whole page, which stays small
MAX_PROMPT, MAX_TEXT, MAX_ALTERNATIVE = 2000, 40, 16  # characters of a prompt, a token, a candidate

ENTROPY_EDGES: Final = (0.1, 0.4, 0.8, 1.5, 2.5, 4.0)
KL_EDGES: Final = (-2.0, -0.5, -0.1, 0.1, 0.5, 2.0, 5.0)


@dataclass(frozen=True, slots=True)
class Response:
    """What one run wrote to one prompt, before or after. ``gate_ratio`` is None where the
    gate has no threshold.
    """

    run: str
    color: int
    phase: str
    step: int
    num_tokens: int
    shown_tokens: int
    teacher_entropy: float
    reverse_kl: float  # over the tokens where it is finite; nan where there are none
    num_infinite: int
    gate_ratio: float | None
    spans: Markup
    data: Markup


@dataclass(frozen=True, slots=True)
class Prompt:
    """A held-out prompt and everything that was written to it."""

    text: str
    responses: Sequence[Response]


def prompts_of(runs: Sequence[RunRecord]) -> list[Prompt]:
    """The samples of all runs by prompt, as many as the page has room for."""
    found: dict[str, list[tuple[int, Record, Record]]] = {}
    for color, run in enumerate(runs):
        for measured in run.held_out.values():
            for sample in measured["samples"]:
                found.setdefault(sample["prompt"], []).append((color, measured, sample))

    by_run: list[list[str]] = [[] for _ in runs]
    for text, samples in found.items():
        for color in dict.fromkeys(color for color, *_ in samples):
            by_run[color].append(text)

    shown = _chosen(by_run)
    room = MAX_TOKENS // max(sum(len(found[text]) for text in shown), 1)

    prompts = []
    for text in shown:
        responses = [
            _response(runs[color], color, measured, sample, room)
            for color, measured, sample in found[text]
        ]
        prompts.append(Prompt(text=_cut(visible(text), MAX_PROMPT), responses=responses))

    return prompts


def count_prompts(runs: Sequence[RunRecord]) -> int:
    """How many prompts there are samples of, shown or not."""
    measured = [one for run in runs for one in run.held_out.values()]
    return len({sample["prompt"] for one in measured for sample in one["samples"]})


def _chosen(texts: Sequence[Sequence[str]]) -> list[str]:
    """Prompts (of each run) to show: those that all runs have, then one of each run in turn."""
    common = set.intersection(*map(set, texts))
    own = [[text for text in of_run if text not in common] for of_run in texts]
    turns = [text for turn in itertools.zip_longest(*own) for text in turn if text is not None]
    return list(dict.fromkeys([text for text in texts[0] if text in common] + turns))[:MAX_PROMPTS]


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def visible(text: str) -> str:
    """A model's text as a person can see it: no control characters, none that turn the line
    around.
    """
    kept = (c if c.isprintable() or c in "\n\t\u00a0\u3000" else "\ufffd" for c in text)
    return "".join(kept)


def _response(run: RunRecord, color: int, measured: Record, sample: Record, room: int) -> Response:
    tokens = list(_tokens(sample, run.threshold))
    occurring = set()
    for token in tokens[:room]:
        occurring |= {token.text, *(text for text, _ in token.candidates)}

    texts = sorted(occurring)
    number = {text: index for index, text in enumerate(texts)}
    spans = Markup("").join(
        Markup('<span class="{}">{}</span>').format(token.classes, token.text.replace("\n", "↵\n"))
        for token in tokens[:room]
    )
    rows = [
        [
            number[token.text],
            token.token_id,
            token.student_logprob,
            token.teacher_logprob,
            token.low,
            token.high,
            token.gate,
            [number[text] for text, _ in token.candidates],
            [round(100 * math.exp(logprob), 2) for _, logprob in token.candidates],
            round(100 * token.rest, 2),
            token.rank,
        ]
        for token in tokens[:room]
    ]
    kept = [token for token in tokens if token.counts] or tokens
    finite = [token.kl for token in kept if math.isfinite(token.kl)]

    return Response(
        run=run.name,
        color=color,
        phase=measured["phase"],
        step=measured["step"],
        num_tokens=len(tokens),
        shown_tokens=min(len(tokens), room),
        teacher_entropy=_mean([(token.low + token.high) / 2 for token in kept]),
        reverse_kl=_mean(finite) if finite else math.nan,
        num_infinite=len(kept) - len(finite),
        gate_ratio=None
        if run.threshold is None
        else _mean([float(token.gate == "open") for token in kept]),
        spans=spans,
        data=as_json({"texts": [text.replace("\n", "↵") for text in texts], "tokens": rows}),
    )


@dataclass(frozen=True, slots=True)
class Token:
    """One token; nats, and (text, log-probability) of the teacher's candidates, most likely first.

    ``rank`` is where the token itself is among all of them, -1 where it is not.
    """

    text: str
    token_id: int
    counts: bool
    student_logprob: float | None
    teacher_logprob: float | None
    low: float
    high: float
    gate: str
    candidates: Sequence[tuple[str, float]]
    rest: float
    rank: int

    @property
    def kl(self) -> float:
        """Log p - log q; infinite where the teacher rules the token out."""
        if self.teacher_logprob is None or self.student_logprob is None:
            return math.inf

        return self.student_logprob - self.teacher_logprob

    @property
    def classes(self) -> str:
        """How the page draws it: entropy, KL, gate; masked where it does not enter the loss."""
        if not self.counts:
            return "masked"

        entropy, kl = (
            bisect_right(ENTROPY_EDGES, (self.low + self.high) / 2),
            bisect_right(KL_EDGES, self.kl),
        )
        return f"e{entropy} k{kl} {self.gate}".rstrip()


def _tokens(sample: Record, threshold: float | None) -> Iterator[Token]:
    def text(token_id: int, most: int) -> str:
        return _cut(visible(sample["texts"][str(token_id)]), most) or f"⟨{token_id}⟩"

    for r, token_id in enumerate(sample["ids"]):
        low, high = sample["entropy_low"][r], sample["entropy_high"][r]
        both = zip(sample["topk_ids"][r], sample["topk_logprobs"][r], strict=True)
        best = [(one, logprob) for one, logprob in both if logprob is not None]
        ids = [one for one, _ in best]
        shown = [(text(one, MAX_ALTERNATIVE), logprob) for one, logprob in best[:MAX_ALTERNATIVES]]
        yield Token(
            text=text(token_id, MAX_TEXT),
            token_id=token_id,
            counts=bool(sample["loss_mask"][r]),
            student_logprob=sample["student_logprobs"][r],
            teacher_logprob=sample["teacher_logprobs"][r],
            low=low,
            high=high,
            gate=_gate(low, high, threshold),
            candidates=shown,
            rest=max(0.0, 1.0 - sum(math.exp(logprob) for _, logprob in shown)),
            rank=ids.index(token_id) if token_id in ids else -1,
        )


def _gate(low: float, high: float, threshold: float | None) -> str:
    """Nothing where there is no threshold; unsure where the bounds on the entropy lie on both
    sides of it.
    """
    if threshold is None:
        return ""

    return "open" if low > threshold else "shut" if high <= threshold else "unsure"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
