"""A scored trajectory as people look at it."""

import json

import fakes
import numpy as np

from eopd.evaluation.samples import sample_record, token_texts
from eopd.types import Bounds, Exact


def test_a_record_has_every_token_and_strict_json():
    exact = fakes.scored(Exact(np.array([0.0, 0.123456, 2.0], np.float32)))
    record = json.loads(
        json.dumps(
            sample_record(
                exact,
                "What?",
                fakes.Strips(),
            ),
            allow_nan=False,
        )
    )
    assert record == {
        "prompt_id": "p",
        "prompt": "What?",
        "response": "the sea",
        "teacher": "t",
        "ids": [1, 2, 0],
        "loss_mask": [1, 0, 1],
        "student_logprobs": [None, -1.25, -0.5],
        "teacher_logprobs": [-0.5, -1.25, None],
        "entropy_low": [0.0, 0.1235, 2.0],
        "entropy_high": [0.0, 0.1235, 2.0],
        "topk_ids": [[1, 3], [1, 2], [0, 1]],
        "topk_logprobs": [[-0.5, -2.0], [-0.25, None], [-0.1, -3.0]],
        "texts": {"0": "<end>", "1": " the", "2": " sea", "3": "s"},
    }


def test_bounds_are_kept_as_bounds():
    low, high = np.array([0.0, 0.5, 1.0], np.float32), np.array([0.25, 0.75, 1.5], np.float32)
    record = sample_record(fakes.scored(Bounds(low, high)), "What?", fakes.Strips())
    assert (record["entropy_low"], record["entropy_high"]) == (low.tolist(), high.tolist())


def test_a_token_keeps_the_space_it_adds_inside_a_text():
    assert token_texts([1, 3], lambda ids: fakes.Strips().decode(ids, False)) == {1: " the", 3: "s"}
    parts = {1: b" \xe6", 2: b"\x96\x87"}  # two tokens of one character: neither is text by itself
    texts = token_texts(
        [1, 2], lambda ids: b"".join(parts[i] for i in ids).decode(errors="replace")
    )
    assert texts == {1: " \ufffd", 2: "\ufffd\ufffd"}
