"""The user's functions are imported and tried before any worker starts, on small input that is made
up in the right shapes.

A row is a real one, the first of the training data, since nobody else knows its columns. A data
function is tried by reading the data (``prompts/``), and a grader by ``answers.py``.
"""

from dataclasses import replace
from typing import Final

import numpy as np

from eopd.config import Config, ConfigError
from eopd.config.loss import CustomGate, Reward
from eopd.config.sections import FilterConfig
from eopd.plugins import GateTokens, Row, Scored
from eopd.prompts import PromptSet
from eopd.rewards import filtering, verifier
from eopd.rewards.process import Failed, ask_once

_TOKENS: Final = 4
_RESPONSE: Final = "This response is made up."


def require_functions(config: Config, train: PromptSet) -> None:
    """Tries the gate, the reward and the filter that are functions of the user.

    Raises:
        ConfigError: one cannot be imported, fails, or returns what it may not; names the key, the
            function, and the cause.
    """
    if isinstance(config.loss.gate, CustomGate):
        _try_gate(config.loss.gate, config.loss.top_k)

    row = train.prompts[0].row or {}
    if config.loss.reward is not None and not config.loss.reward.is_ours:
        _try_reward(config.loss.reward, row)

    if config.flow.filter is not None:
        _try_filter(config.flow.filter, row, has_reward=config.loss.reward is not None)


def _try_gate(gate: CustomGate, top_k: int) -> None:
    """Tries a gate on four tokens, of which the teacher is ever less sure, and on one; twice each, as
    it must be pure.
    """
    import torch

    from eopd.loss.gate import GateError, custom_gate, load_gate

    function = load_gate(gate)
    shares_RK = torch.full((_TOKENS, top_k), 1.0 / (top_k + 1))
    tokens = GateTokens(
        teacher_entropy=torch.linspace(0.0, 3.0, _TOKENS),
        teacher_logprobs=torch.linspace(-0.1, -4.0, _TOKENS),
        teacher_topk_logprobs=shares_RK.log(),
        teacher_tail_logprobs=(1.0 - shares_RK.sum(1)).log(),
        rollout_logprobs=torch.linspace(-4.0, -0.1, _TOKENS),
        loss_mask=torch.ones(_TOKENS, dtype=torch.bool),
    )

    try:
        for number in (_TOKENS, 1):
            some = {name: getattr(tokens, name)[:number] for name in GateTokens.__slots__}
            first, again = (
                custom_gate(gate.function, function, GateTokens(**some), torch.ones(number).bool())
                for _ in range(2)
            )
            if not torch.equal(first, again):
                raise GateError(
                    f"loss.gate.function: {gate.function}: is not pure (a gate keeps nothing between "
                    f"calls, and draws no numbers): it gave {first.tolist()} and then "
                    f"{again.tolist()}"
                )
    except GateError as error:
        raise ConfigError(f"{error}, for {number} made-up tokens") from None


def _try_reward(reward: Reward, row: Row) -> None:
    said = ask_once(verifier.asked_for(reward), row, _RESPONSE, list(range(_TOKENS)))
    _require(verifier.KEY, verifier.reward_of(reward.function, said))


def _try_filter(config: FilterConfig, row: Row, *, has_reward: bool) -> None:
    numbers = np.linspace(-4.0, -0.1, _TOKENS, dtype=np.float32)
    scored = Scored(
        row=row,
        response=_RESPONSE,
        response_ids=np.arange(_TOKENS, dtype=np.int32),
        loss_mask=np.ones(_TOKENS, np.bool_),
        rollout_logprobs=numbers,
        teacher_logprobs=numbers,
        teacher_entropy=-numbers,
        stop_reason="end_token",
        reward=0.5 if has_reward else None,
    )
    for made_up in (scored, replace(scored, stop_reason="length")):
        said = ask_once(filtering.asked_for(config), made_up)
        _require(filtering.KEY, filtering.decision_of(config.function, said))


def _require(key: str, outcome: object) -> None:
    if isinstance(outcome, Failed):
        raise ConfigError(
            f"{key}: {outcome.cause}, for a made-up response to the first row of prompts.data"
        )
