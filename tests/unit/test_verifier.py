import numpy as np

from eopd.evaluation.verifier import Verifier
from eopd.teacher.vocabulary import load_tokenizer
from eopd.types import PromptSample, StopReason, Trajectory


async def test_a_reward_is_one_for_a_right_answer_nought_for_a_wrong_one_and_none_without_a_reference(tiny_model):
    model = tiny_model("qwen3", seed=1)
    tokenizer = load_tokenizer(model)

    def answered(text: str, reference: str | None) -> Trajectory:
        ids = np.array([*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id], np.int32)
        prompt = PromptSample(
            epoch=0, prompt_id="p", source="s", token_ids=np.array([1], np.int32), reference_answer=reference
        )
        return Trajectory(
            prompt=prompt,
            sample_index=0,
            response_ids=ids,
            loss_mask=np.ones(len(ids), np.bool_),
            rollout_logprobs=np.zeros(len(ids), np.float32),
            policy_versions=np.zeros(len(ids), np.int32),
            stop_reason=StopReason.END_TOKEN,
        )

    verifier = Verifier("exact", model)
    try:
        assert await verifier.reward(answered("so it is\n24", "24")) == 1.0
        assert await verifier.reward(answered("so it is\n25", "24")) == 0.0
        assert await verifier.reward(answered("24", None)) is None
    finally:
        verifier.close()
