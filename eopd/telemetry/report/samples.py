"""Held-out samples token by token: coloured text, and what the page shows of the token under the pointer."""

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from markupsafe import Markup

from eopd.telemetry.report.charts import as_json
from eopd.telemetry.report.reading import Record, RunRecord

MAX_TOKENS, MAX_PROMPTS, MAX_ALTERNATIVES = 5000, 12, 8  # of the whole page, which stays small
MAX_TEXT, MAX_ALTERNATIVE = 40, 16  # characters of a token and of a candidate

ENTROPY_EDGES: Final = (0.1, 0.4, 0.8, 1.5, 2.5, 4.0)
KL_EDGES: Final = (-2.0, -0.5, -0.1, 0.1, 0.5, 2.0, 5.0)


@dataclass(frozen=True, slots=True)
class Response:
    """What one run wrote to one prompt, before or after. ``gate_ratio`` is None where the gate has no threshold."""

    run: str
    color: int
    phase: str
    step: int
    num_tokens: int
    shown_tokens: int
    teacher_entropy: float
    reverse_kl: float
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
    shown = list(found.items())[:MAX_PROMPTS]
    room = MAX_TOKENS // max(sum(len(of_prompt) for _, of_prompt in shown), 1)
    return [
        Prompt(
            text=visible(text[:2000]),
            responses=[_response(runs[color], color, measured, sample, room) for color, measured, sample in of_prompt],
        )
        for text, of_prompt in shown
    ]


def visible(text: str) -> str:
    """A model's text as a person can see it: no control characters, none that turn the line around."""
    kept = (c if c.isprintable() or c in "\n\t\u00a0\u3000" else "\ufffd" for c in text)
    return "".join(kept)


def _response(run: RunRecord, color: int, measured: Record, sample: Record, room: int) -> Response:
    tokens = list(_tokens(sample, run.threshold))
    texts = sorted({text for token in tokens[:room] for text in (token.text, *(one for one, _ in token.candidates))})
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
        ]
        for token in tokens[:room]
    ]
    kept = [token for token in tokens if token.counts] or tokens
    return Response(
        run=run.name,
        color=color,
        phase=measured["phase"],
        step=measured["step"],
        num_tokens=len(tokens),
        shown_tokens=min(len(tokens), room),
        teacher_entropy=_mean([(token.low + token.high) / 2 for token in kept]),
        reverse_kl=_mean([token.kl for token in kept]),
        gate_ratio=None if run.threshold is None else _mean([float(token.gate == "open") for token in kept]),
        spans=spans,
        data=as_json({"texts": [text.replace("\n", "↵") for text in texts], "tokens": rows}),
    )


@dataclass(frozen=True, slots=True)
class Token:
    """One token; nats, and (text, log-probability) of the teacher's candidates, most likely first."""

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
        entropy, kl = bisect_right(ENTROPY_EDGES, (self.low + self.high) / 2), bisect_right(KL_EDGES, self.kl)
        return f"e{entropy} k{kl} {self.gate}".rstrip()


def _tokens(sample: Record, threshold: float | None) -> Iterator[Token]:
    def text(token_id: int, most: int) -> str:
        return visible(sample["texts"][str(token_id)])[:most] or f"⟨{token_id}⟩"

    for r, token_id in enumerate(sample["ids"]):
        low, high = sample["entropy_low"][r], sample["entropy_high"][r]
        best = [
            (text(one, MAX_ALTERNATIVE), logprob)
            for one, logprob in zip(sample["topk_ids"][r], sample["topk_logprobs"][r], strict=True)
            if logprob is not None
        ]
        shown = best[:MAX_ALTERNATIVES]
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
        )


def _gate(low: float, high: float, threshold: float | None) -> str:
    """Nothing where there is no threshold; unsure where the bounds on the entropy lie on both sides of it."""
    if threshold is None:
        return ""
    return "open" if low > threshold else "shut" if high <= threshold else "unsure"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
