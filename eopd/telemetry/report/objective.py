"""Draws the objective L = RKL + alpha g(H) FKL beside real tokens of a run: one on which the gate
is open, and one on which it is shut. A term that a run does not have is left out, and said to be.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from markupsafe import Markup

from eopd.telemetry.report.charts import BOTTOM, HEIGHT, WIDTH, Frame
from eopd.telemetry.report.reading import RunRecord
from eopd.telemetry.report.samples import Token, tokens_of
from eopd.telemetry.report.subject import gate_words, has_forward, has_reverse

CONTEXT: Final = 60  # characters before a token
MOST_CANDIDATES: Final = 5
_OPEN_WHERE_UNSURE: Final = ("hard", "quantile", "sigmoid")  # kinds of gates


@dataclass(frozen=True, slots=True)
class Example:
    """A token of a held-out answer, and what the objective makes of it. ``letter`` is its mark in
    the drawing; ``gate`` is None where the gate depends on more than the token's entropy, and
    without a forward KL.
    """

    letter: str
    context: str
    token: Token
    gate: float | None

    @property
    def candidates(self) -> list[tuple[str, float]]:
        """The teacher's most likely tokens with their probability."""
        most = self.token.candidates[:MOST_CANDIDATES]
        return [(text, math.exp(logprob)) for text, logprob in most]


@dataclass(frozen=True, slots=True)
class Objective:
    """The objective of a run, drawn. ``picture`` is empty where the gate is no function of the
    entropy, and without a forward KL. ``lacks`` says which term there is not, and why;
    ``is_sampled``, that the reverse KL is the one of the sampled token.
    """

    run: str
    has_reverse: bool
    has_forward: bool
    is_sampled: bool
    lacks: str
    alpha: float
    gate: str
    picture: Markup
    examples: Sequence[Example]


def objective_of(run: RunRecord) -> Objective | None:
    """Returns the objective of a run with two of its tokens; None where no tokens were kept."""
    contexts = _in_context(run)
    if not contexts:
        return None

    config, is_gated = run.config, has_forward(run.config)
    examples = _examples(config, contexts)
    alpha = config.get("loss.alpha", 1.0)
    entropies = [token.entropy for _, token in contexts]
    return Objective(
        run.name,
        has_reverse(config),
        is_gated,
        config.get("loss.reverse_kl.kind", "sampled") == "sampled",
        _lacks(config),
        float(alpha) if isinstance(alpha, int | float) else 1.0,
        gate_words(config),
        _picture(config, entropies, examples) if is_gated else Markup(""),
        examples,
    )


def lead_of(runs: Sequence[RunRecord]) -> str:
    """Returns what the objectives of runs do to the tokens, in a few sentences."""
    reverse = [has_reverse(run.config) for run in runs]
    forward = [has_forward(run.config) for run in runs]
    gates = {gate_words(run.config) for run in runs if has_forward(run.config)}
    kinds = {run.config.get("loss.gate.kind") for run in runs if has_forward(run.config)}
    lead = "The student writes, the teacher reads along."
    if any(reverse):
        lead += f" On every token the reverse KL{_some(reverse)} pulls the student to the teacher."

    lead += " Where the teacher itself is unsure, its entropy H is high and several tokens would do"
    forward_kl = f"the forward KL{_some(forward)}"
    if not gates:
        return f"{lead}. There is no forward KL to teach them."

    if kinds <= set(_OPEN_WHERE_UNSURE):
        on_top = " comes on top, and" if any(reverse) else ""
        return f"{lead}: there {forward_kl}{on_top} teaches all of its candidates."

    where = gates.pop() if len(gates) == 1 else "where its gate is open"
    return f"{lead}. T{forward_kl[1:]} teaches all of its candidates {where}."


def _some(have: Sequence[bool]) -> str:
    return "" if all(have) else " of some runs"


def _lacks(config: Mapping[str, object]) -> str:
    """Returns which term an objective does not have; nothing where it has both."""
    if not has_reverse(config):
        return "There is no reverse KL: loss.reverse_kl is none."

    if has_forward(config):
        return ""

    why = "loss.alpha is 0" if config.get("loss.alpha") == 0 else "loss.gate never opens"
    return f"There is no forward KL: {why}."


def gate_value(config: Mapping[str, object], entropy: float) -> float | None:
    """Returns g(H) of the gates that are a function of the teacher's entropy alone."""
    kind, tau, scale = (config.get(f"loss.gate.{key}") for key in ("kind", "tau", "scale"))
    if kind in ("always", "never"):
        return float(kind == "always")

    if kind == "hard" and isinstance(tau, int | float):
        return float(entropy > tau)

    if kind == "sigmoid" and isinstance(tau, int | float) and isinstance(scale, int | float):
        return 0.5 * (1.0 + math.tanh((entropy - tau) / scale / 2))

    return None


def _in_context(run: RunRecord) -> list[tuple[str, Token]]:
    """Returns the tokens of the last samples that enter the loss and can be read, each with what
    was written before it.
    """
    found = []
    records = list(run.held_out.values())
    for sample in records[-1]["samples"] if records else ():
        written = ""
        for token in tokens_of(sample, run.threshold):
            is_word = any(character.isalpha() for character in token.text)
            if is_word and token.counts and math.isfinite(token.kl) and "<|" not in token.text:
                found.append((written[-CONTEXT:], token))

            written += token.text

    return found


def _examples(config: Mapping[str, object], contexts: Sequence[tuple[str, Token]]) -> list[Example]:
    """Returns a usual token of those on which the gate is shut, and one of those on which it is
    open.
    """
    by_entropy = sorted(contexts, key=lambda pair: pair[1].entropy)
    middle = by_entropy[len(by_entropy) // 2][1].entropy
    shut: list[tuple[str, Token, float | None]] = []
    opened: list[tuple[str, Token, float | None]] = []
    for context, token in by_entropy:
        gate = gate_value(config, token.entropy) if has_forward(config) else None
        is_open = token.entropy > middle if gate is None else gate > 0.5
        (opened if is_open else shut).append((context, token, gate))

    found = [tokens[len(tokens) // 2] for tokens in (shut, opened) if tokens]
    return [Example(letter, *one) for letter, one in zip("AB", found, strict=False)]


def _picture(
    config: Mapping[str, object], entropies: Sequence[float], examples: Sequence[Example]
) -> Markup:
    """Draws g(H), where the entropies of the samples lie, and where the examples do."""
    right = max([2.0, *entropies])
    axis = [right * i / 400 for i in range(401)]
    points = [(h, gate_value(config, h)) for h in axis]
    curve = [(h, g) for h, g in points if g is not None]
    if not curve:
        return Markup("")

    frame = Frame([(0.0, 1.0), (right, 0.0)], "H")
    parts = [frame.axes(), f'<path class="line c1" d="{frame.path(curve)}"/>']
    for h in entropies:
        x, foot = frame.x(h), HEIGHT - BOTTOM
        parts.append(f'<line class="rug" x1="{x}" x2="{x}" y1="{foot - 6}" y2="{foot}"/>')

    for example in examples:
        h = example.token.entropy
        x, y = frame.x(h), frame.y(example.gate or 0.0)
        parts.append(f'<circle class="example" cx="{x}" cy="{y}" r="9"/>')
        place = f'x="{x}" y="{y + 4}" text-anchor="middle"'
        parts.append(f'<text class="example" {place}>{example.letter}</text>')

    label = "The gate g over the teacher's entropy H in nats; below, the tokens of the samples"
    opening = Markup('<svg class="gate" viewBox="0 0 {} {}" role="img" aria-label="{}">')
    return opening.format(WIDTH, HEIGHT, label) + Markup("".join(parts)) + Markup("</svg>")
