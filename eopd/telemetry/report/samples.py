"""Draws held-out samples token by token: coloured text, and what the page shows of the token
under the pointer.
"""

import itertools
import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Final

from markupsafe import Markup

from eopd.telemetry.plain import visible
from eopd.telemetry.report.charts import as_json
from eopd.telemetry.report.reading import Record, RunRecord

MAX_TOKENS, MAX_PROMPTS, MAX_ALTERNATIVES = 5000, 12, 8  # of the whole page, which stays small
MAX_PROMPT, MAX_TEXT, MAX_ALTERNATIVE = 2000, 40, 16  # characters of a prompt, a token, a candidate

ENTROPY_EDGES: Final = (0.1, 0.4, 0.8, 1.5, 2.5, 4.0)
KL_EDGES: Final = (-2.0, -0.5, -0.1, 0.1, 0.5, 2.0, 5.0)


@dataclass(frozen=True, slots=True)
class Response:
    """What a run wrote to a prompt, before or after training. ``gate_ratio`` is None where the
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
    """Returns the samples of all runs by prompt, as many as the page has room for."""
    samples: dict[str, list[tuple[int, Record, Record]]] = {}
    for color, run in enumerate(runs):
        for measurement in run.held_out.values():
            for sample in measurement["samples"]:
                samples.setdefault(sample["prompt"], []).append((color, measurement, sample))

    texts = _chosen([_prompt_texts(run) for run in runs])
    room = MAX_TOKENS // max(sum(len(samples[text]) for text in texts), 1)

    prompts = []
    for text in texts:
        responses = [
            _response(runs[color], color, measurement, sample, room)
            for color, measurement, sample in samples[text]
        ]
        prompts.append(Prompt(text=_cut(visible(text), MAX_PROMPT), responses=responses))

    return prompts


def count_prompts(runs: Sequence[RunRecord]) -> int:
    """Returns how many prompts there are samples of, shown or not."""
    return len(set(itertools.chain(*map(_prompt_texts, runs))))


def _prompt_texts(run: RunRecord) -> list[str]:
    """Returns the prompts that a run has samples of."""
    samples = itertools.chain(*(record["samples"] for record in run.held_out.values()))
    return list(dict.fromkeys(sample["prompt"] for sample in samples))


def _chosen(texts: Sequence[Sequence[str]]) -> list[str]:
    """Returns the prompts to show, of those of each run: what all runs have, then one of each run
    in turn.
    """
    common = set.intersection(*map(set, texts))
    own = [itertools.filterfalse(common.__contains__, run_texts) for run_texts in texts]
    turns = itertools.chain(*itertools.zip_longest(*own))
    order = dict.fromkeys([*filter(common.__contains__, texts[0]), *turns])
    return [text for text in order if text is not None][:MAX_PROMPTS]


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _response(
    run: RunRecord, color: int, measurement: Record, sample: Record, room: int
) -> Response:
    tokens = list(tokens_of(sample, run.threshold))
    shown = tokens[:room]
    texts = sorted(set(itertools.chain(*(token.texts for token in shown))))
    number = {text: index for index, text in enumerate(texts)}
    loss_tokens = [token for token in tokens if token.counts] or tokens
    finite = [token.kl for token in loss_tokens if math.isfinite(token.kl)]
    gate_ratio = None
    if run.threshold is not None:
        gate_ratio = fmean(token.gate == "open" for token in loss_tokens)

    return Response(
        run=run.name,
        color=color,
        phase=measurement["phase"],
        step=measurement["step"],
        num_tokens=len(tokens),
        shown_tokens=len(shown),
        teacher_entropy=fmean(token.entropy for token in loss_tokens),
        reverse_kl=fmean(finite) if finite else math.nan,
        num_infinite=len(loss_tokens) - len(finite),
        gate_ratio=gate_ratio,
        spans=Markup("").join(token.span for token in shown),
        data=as_json(
            {
                "texts": [text.replace("\n", "↵") for text in texts],
                "tokens": [token.row(number) for token in shown],
            }
        ),
    )


@dataclass(frozen=True, slots=True)
class Token:
    """A token of a response: numbers in nats, and (text, log-probability) of the teacher's
    candidates, most likely first.

    ``low`` and ``high`` bound the teacher's entropy. ``rank`` is where the token itself is among all
    candidates, -1 where it is not; ``rest`` is the probability of all tokens that are no candidate
    here.
    """

    text: str
    token_id: int
    counts: bool
    student_logprob: float | None
    teacher_logprob: float | None
    low: float | None
    high: float | None
    gate: str
    candidates: Sequence[tuple[str, float]]
    rest: float
    rank: int

    @property
    def texts(self) -> list[str]:
        """The texts of the token and of its candidates."""
        return [self.text, *(text for text, _ in self.candidates)]

    @property
    def entropy(self) -> float:
        """The teacher's entropy in nats: the middle of its bounds, infinite where one was not finite."""
        return math.inf if self.low is None or self.high is None else (self.low + self.high) / 2

    @property
    def kl(self) -> float:
        """Log p - log q; infinite where the teacher rules the token out."""
        if self.teacher_logprob is None or self.student_logprob is None:
            return math.inf

        return self.student_logprob - self.teacher_logprob

    @property
    def classes(self) -> str:
        """The classes by entropy, KL and gate; masked where the token does not enter the loss."""
        if not self.counts:
            return "masked"

        entropy = bisect_right(ENTROPY_EDGES, self.entropy)
        return f"e{entropy} k{bisect_right(KL_EDGES, self.kl)} {self.gate}".rstrip()

    @property
    def span(self) -> Markup:
        """The token in the text of the page."""
        text = self.text.replace("\n", "↵\n")
        return Markup('<span class="{}">{}</span>').format(self.classes, text)

    def row(self, number: Mapping[str, int]) -> list[object]:
        """Returns what ``page.js`` shows of the token; ``number`` has the place of every text."""
        return [
            number[self.text],
            self.token_id,
            self.student_logprob,
            self.teacher_logprob,
            self.low,
            self.high,
            self.gate,
            [number[text] for text, _ in self.candidates],
            [round(100 * math.exp(logprob), 2) for _, logprob in self.candidates],
            round(100 * self.rest, 2),
            self.rank,
        ]


def tokens_of(sample: Record, threshold: float | None, longest: int = MAX_TEXT) -> Iterator[Token]:
    """Yields the tokens of a held-out sample, or of a training response, which has no candidates;
    ``longest`` is where their texts are cut.
    """

    def text(token_id: int, most: int) -> str:
        return _cut(visible(sample["texts"].get(str(token_id), "")), most) or f"⟨{token_id}⟩"

    nothing: Sequence[Sequence[float]] = [()] * len(sample["ids"])
    candidate_ids = sample.get("topk_ids", nothing)
    candidate_logprobs = sample.get("topk_logprobs", nothing)

    for r, token_id in enumerate(sample["ids"]):
        low, high = sample["entropy_low"][r], sample["entropy_high"][r]
        pairs = zip(candidate_ids[r], candidate_logprobs[r], strict=True)
        finite = [(candidate, logprob) for candidate, logprob in pairs if logprob is not None]
        ids = [candidate for candidate, _ in finite]
        candidates = [
            (text(candidate, MAX_ALTERNATIVE), logprob)
            for candidate, logprob in finite[:MAX_ALTERNATIVES]
        ]
        yield Token(
            text=text(token_id, longest),
            token_id=token_id,
            counts=bool(sample["loss_mask"][r]),
            student_logprob=sample["student_logprobs"][r],
            teacher_logprob=sample["teacher_logprobs"][r],
            low=low,
            high=high,
            gate=_gate(low, high, threshold),
            candidates=candidates,
            rest=max(0.0, 1.0 - sum(math.exp(logprob) for _, logprob in candidates)),
            rank=ids.index(token_id) if token_id in ids else -1,
        )


def _gate(low: float | None, high: float | None, threshold: float | None) -> str:
    """Returns how the gate stands: unsure where the bounds on the entropy lie on both sides of
    the threshold, or one was not finite; nothing where there is no threshold.
    """
    if threshold is None:
        return ""

    if low is None or high is None:
        return "unsure"

    return "open" if low > threshold else "shut" if high <= threshold else "unsure"
