"""The nouns: what a header says of its trajectory."""

import numpy as np

from eopd.types import Header, PromptSample, StopReason, Trajectory


def test_a_header_is_that_of_its_trajectory():
    prompt = PromptSample(
        epoch=2,
        prompt_id="p",
        source="math",
        token_ids=np.array([1, 2, 3], np.int32),
        reference_answer=None,
    )
    trajectory = Trajectory(
        prompt=prompt,
        sample_index=4,
        response_ids=np.array([5, 6, 7, 8], np.int32),
        loss_mask=np.array([True, False, True, True]),
        rollout_logprobs=np.zeros(4, np.float32),
        policy_versions=np.array([5, 3, 6, 4], np.int32),
        stop_reason=StopReason.END_TOKEN,
    )
    header = Header.of(trajectory, {"generate_s": 1.0}, 0.5)
    assert header == Header(
        key=(2, "p", 4),
        source="math",
        num_prompt_tokens=3,
        num_response_tokens=4,
        num_loss_tokens=3,
        stop_reason=StopReason.END_TOKEN,
        oldest_version=3,
        newest_version=6,
        response_crc32=0xB6AE1255,  # of 16 bytes: 5, 6, 7, 8 as int32, lowest byte first
        sums={"generate_s": 1.0},
        reward=0.5,
    )
    assert header.num_tokens == 7
