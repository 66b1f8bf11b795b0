import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from eopd.learner.collate import Packed
from eopd.learner.nonfinite import BrokenRow, dump, explain, find_rows
from eopd.loss.chunked import LossTokens
from eopd.types import TrajectoryKey

KEYS = [TrajectoryKey(0, "a", 0), TrajectoryKey(0, "b", 1)]
T, K = 7, 2


@pytest.fixture
def packed() -> Packed:
    """Trajectory a: prompt 2, response 3 (rows 1 to 3); b: prompt 1, response 3 (rows 4 to
    6), its second masked.
    """
    mask = torch.tensor([False, True, True, True, True, False, True])
    return Packed(
        input_ids_T=torch.zeros(T, dtype=torch.int64),
        position_ids_T=torch.zeros(T, dtype=torch.int64),
        tokens=LossTokens(
            target_ids_T=torch.zeros(T, dtype=torch.int64),
            loss_mask_T=mask,
            rollout_logprobs_T=torch.zeros(T),
            gate_T=torch.zeros(T),
            teacher_logprobs_T=torch.zeros(T),
            teacher_topk_ids_TK=torch.zeros(T, K, dtype=torch.int64),
            teacher_topk_logprobs_TK=torch.zeros(T, K),
            teacher_tail_logprobs_T=torch.zeros(T),
            teacher_entropy_T=torch.zeros(T),
        ),
        rows=(slice(1, 4), slice(4, 7)),
    )


def with_values(packed: Packed, **values: tuple[int | tuple[int, int], float]) -> Packed:
    columns = {name: getattr(packed.tokens, name).clone() for name in values}
    for name, (where, value) in values.items():
        columns[name][where] = value

    return replace(packed, tokens=replace(packed.tokens, **columns))


def test_rows_are_named_by_response_position_and_column(packed):
    broken = with_values(
        packed,
        rollout_logprobs_T=(2, torch.inf),
        teacher_topk_logprobs_TK=((6, 1), torch.nan),
        gate_T=(6, torch.nan),
        teacher_logprobs_T=(6, torch.nan),
    )
    assert list(find_rows(broken, KEYS, torch.zeros(T))) == [
        BrokenRow(trajectory=KEYS[0], position=1, columns=("rollout_logprobs_T",)),
        BrokenRow(
            trajectory=KEYS[1],
            position=2,
            columns=("teacher_logprobs_T", "teacher_topk_logprobs_TK"),
        ),
    ]


def test_the_student_may_be_to_blame(packed):
    for value in (torch.nan, -torch.inf):
        logprobs = torch.zeros(T).index_fill(0, torch.tensor([3]), value)
        assert list(find_rows(packed, KEYS, logprobs)) == [
            BrokenRow(trajectory=KEYS[0], position=2, columns=("student_logprobs_T",))
        ]


def test_freed_slots_empty_tails_and_masked_rows_are_not_to_blame(packed):
    sound = with_values(
        packed,
        teacher_topk_logprobs_TK=((1, 0), -torch.inf),
        teacher_tail_logprobs_T=(2, -torch.inf),
        teacher_logprobs_T=(5, torch.nan),
    )
    assert not list(find_rows(sound, KEYS, torch.zeros(T)))


def test_an_impossible_token_is_to_blame(packed):
    for name, where, value in [
        ("teacher_logprobs_T", 1, -torch.inf),
        ("teacher_topk_logprobs_TK", (1, 0), torch.inf),
        ("teacher_tail_logprobs_T", 1, torch.inf),
    ]:
        broken = with_values(packed, **{name: (where, value)})
        assert [
            row.columns
            for row in find_rows(
                broken,
                KEYS,
                torch.zeros(T),
            )
        ] == [(name,)]


def test_the_dump_of_a_step_is_whole(packed, tmp_path):
    row = BrokenRow(trajectory=KEYS[0], position=1, columns=("gate_T",))
    for rank in (0, 1):
        dump(tmp_path / "step", "loss", [row], KEYS, rank=rank, packs=[packed, packed])

    assert sorted(path.name for path in (tmp_path / "step").iterdir()) == [
        "rank-0.safetensors", "rank-1.safetensors", "rows.json"
    ]  # fmt: skip
    record = json.loads((tmp_path / "step" / "rows.json").read_text())
    assert record["what"] == "loss"
    assert record["rows"][0]["position"] == 1
    assert record["trajectories"] == [[0, "a", 0], [0, "b", 1]]
    assert torch.equal(
        load_file(tmp_path / "step" / "rank-1.safetensors")["1.loss_mask_T"],
        packed.tokens.loss_mask_T,
    )


def test_the_message_names_a_few_rows_and_where_the_rest_is(tmp_path):
    rows = [
        BrokenRow(
            trajectory=KEYS[0],
            position=r,
            columns=("gate_T",),
        )
        for r in range(7)
    ]
    message = explain("loss", rows, KEYS, tmp_path)
    assert "(0, 'a', 0) token 4 (gate_T) and 2 more" in message
    assert "token 5" not in message
    assert str(tmp_path) in message
    assert "trajectories: (0, 'a', 0), (0, 'b', 1);" in explain(
        "gradient",
        [],
        KEYS,
        tmp_path,
    )
