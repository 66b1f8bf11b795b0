"""The comparison of an engine's probe with the learner's."""

from dataclasses import replace

import fakes
import numpy as np
import pytest

from eopd.weights.probe import PROBE_TOKENS, ProbeError, compare_probe, probe_text

LEARNER = np.array([-0.5, -3.0, -11.0, -0.01], np.float32)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        ("float32", 1e-3),
        ("bfloat16", 0.2),
    ],
)
def test_the_mean_absolute_difference_decides(dtype, tolerance):
    # a mean of signed differences would be zero
    differences = tolerance * np.array([1, -1, 1, -1], np.float32)
    near = LEARNER + 0.9 * differences
    found = compare_probe(near, LEARNER, dtype=dtype)
    assert found == pytest.approx(0.9 * tolerance, rel=1e-2)
    far = LEARNER + 1.1 * differences
    with pytest.raises(ProbeError, match=f"more than {tolerance:g} in {dtype}"):
        compare_probe(far, LEARNER, dtype=dtype)


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_what_is_no_number_is_refused(bad):
    engine = LEARNER.copy()
    engine[1] = bad
    with pytest.raises(ProbeError):
        compare_probe(engine, LEARNER, dtype="bfloat16")

    with pytest.raises(ProbeError):
        compare_probe(LEARNER, engine, dtype="bfloat16")


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ((3, 2), [0, 1, 2, 0, 1]),
        ((1, 2), [0, 0, 1]),
        ((1,), [0, 0]),  # one token alone predicts nothing
        ((200, 200), [*range(200), *range(56)]),
    ],
)
def test_the_probe_is_the_first_tokens_of_prompts(lengths, expected):
    prompts = [replace(fakes.prompt(), token_ids=np.arange(n, dtype=np.int32)) for n in lengths]
    assert probe_text(prompts).tolist() == expected
    assert len(expected) <= PROBE_TOKENS
