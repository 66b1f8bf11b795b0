"""Explains the terms of the page where they stand: what each means, in words of everyday."""

import re
from typing import Final

from markupsafe import Markup, escape

_UNSURE: Final = (
    "unsure of the next token: 0 nats where one is certain, 0.69 where two are equally likely."
)
TERMS: Final = {
    "reverse KL": (
        "How much surer the student is of its own text than the teacher: the mean of "
        "log p - log q over the tokens that it wrote. 0 where both agree."
    ),
    "forward KL": (
        "How much the student misses of what the teacher would write, over the teacher's "
        "most likely tokens. 0 where both agree. Held out it has the form "
        "`tail`, where all other tokens count as one more; in training that of loss.forward_kl."
    ),
    "top-1 agreement": (
        "The share of tokens at which student and teacher have the same favourite."
    ),
    "student entropy": f"How much the student is {_UNSURE}",
    "teacher entropy": f"How much the teacher is {_UNSURE}",
    "entropy": f"How much a model is {_UNSURE}",
    "gate open": (
        "The tokens on which the forward KL comes on top, since the teacher is unsure there."
    ),
    "staleness": "How many updates older than the learner the weights were that wrote a batch.",
    "top k": "The teacher's k most likely tokens at a position; loss.top_k.",
    "engine against learner": (
        "How far the engine's log-probabilities of what it wrote are from the learner's: a "
        "numeric gap, or old weights."
    ),
    "clipped": (
        "The tokens on which the policy gradient is cut, since the student has moved too far "
        "within the batch."
    ),
    "capped": "The tokens whose importance weight is cut, since older weights wrote them.",
    "gradient norm": "The length of the gradient before it is clipped.",
    "correct answers": (
        "avg@n is the mean share of correct answers, pass@k the share of questions of which "
        "at least one of k answers is correct."
    ),
    "distinct n-grams": (
        "How many different runs of n tokens the answers to a question have, of all their runs of "
        "n tokens: 1 where none comes twice."
    ),
    "held out": "Prompts that are measured and never trained on.",
    "held-out": "Of prompts that are measured and never trained on.",
}
_MEANINGS: Final = {term.lower(): meaning for term, meaning in TERMS.items()}
_TERM: Final = re.compile(
    "|".join(rf"\b{re.escape(term)}\b" for term in sorted(TERMS, key=len, reverse=True)),
    re.IGNORECASE,
)


def explained(text: str) -> Markup:
    """Returns a text with its first term explained: under the pointer, when it has the focus or is
    tapped, and to screen readers through the list of terms at the end of the page.
    """
    match = _TERM.search(text)
    if match is None:
        return escape(text)

    term = match.group()
    shown = Markup('<dfn tabindex="0" data-is="{}" aria-describedby="{}">{}</dfn>')
    meaning = _MEANINGS[term.lower()]
    explanation = shown.format(meaning, anchor(term), term)
    return escape(text[: match.start()]) + explanation + text[match.end() :]


def anchor(term: str) -> str:
    """Returns the name of a term's place in the list of terms."""
    return f"term-{term.lower().replace(' ', '-')}"
