import fakes

from eopd.rewards.verifier import Verifier
from eopd.tokenizer import load_tokenizer
from eopd.types import StopReason, Trajectory


async def test_a_reward_is_one_nought_or_none(
    tiny_model,
):
    model = tiny_model("qwen3", seed=1)
    tokenizer = load_tokenizer(model)

    def answered(text: str, reference: str | None) -> Trajectory:
        ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
        return fakes.trajectory(ids, of=fakes.prompt(answer=reference), stop=StopReason.END_TOKEN)

    verifier = Verifier("exact", model)

    try:
        assert await verifier.reward(answered("so it is\n24", "24")) == 1.0
        assert await verifier.reward(answered("so it is\n25", "24")) == 0.0
        assert await verifier.reward(answered("24", None)) is None
    finally:
        verifier.close()
