"""Config to resources: what roles ask for is compared with what there is, and with what is free."""

from collections import Counter
from dataclasses import replace

import pytest
from fakes import write_config

from eopd.config import ConfigError, load_config
from eopd.runtime.placement import (
    Capacity,
    Node,
    RoleResources,
    choose_nodes,
    learner_env,
    plan,
    require_capacity,
    shares_gpus,
    vllm_env,
)


def role(name: str, actors: int, cpus: float, gpus: float = 0.0) -> RoleResources:
    return RoleResources(role=name, actors=actors, cpus=cpus, gpus=gpus, env={})


def node(
    cpus: float, gpus: float = 0.0, *, free: float | None = None, free_gpus: float | None = None
) -> Node:
    left = Capacity(
        cpus=cpus if free is None else free, gpus=gpus if free_gpus is None else free_gpus
    )
    return Node(total=Capacity(cpus=cpus, gpus=gpus), free=left)


def test_fractions_that_add_up_fit():
    require_capacity(
        [
            role(
                "learner",
                2,
                0.25,
            ),
            role("rollout", 2, 0.25),
            role("teacher a", 1, 1.0),
        ],
        [node(2)],
    )
    require_capacity([role("rollout", 10, 0.1)], [node(2, free=1.0)])
    require_capacity(
        [
            role(
                "rollout",
                3,
                0.1,
                1.0,
            ),
            role("learner", 1, 1.0),
        ],
        [node(2), node(1, 1), node(1, 2)],
    )


@pytest.mark.parametrize(
    ("roles", "nodes", "message"),
    [
        (
            [role("learner", 2, 1.0), role("rollout", 3, 0.5)],
            [node(2)],
            "the roles ask for 3.5 cpus (learner 2 x 1, rollout 3 x 0.5); the cluster has 2",
        ),
        (
            [role("teacher a", 1, 0.0, gpus=1.0)],
            [node(2)],
            "the roles ask for 1 gpus (teacher a 1 x 1); the cluster has 0",
        ),
        (
            [
                role(
                    "learner",
                    1,
                    0.25,
                ),
                role("rollout", 1, 1.0),
                role("teacher a", 1, 0.25),
            ],
            [node(2, free=0.5)],
            "the roles ask for 1.5 cpus (learner 1 x 0.25, rollout 1 x 1, teacher a 1 x "
            "0.25); 0.5 of 2 are free (1.5 are held by others)",
        ),
        (
            [role("rollout", 4, 0.0, gpus=1.0)],
            [node(8, 4, free_gpus=1), node(8, 4, free_gpus=1)],
            "the roles ask for 4 gpus (rollout 4 x 1); 2 of 8 are free (6 are held by others)",
        ),
        (
            [role("learner", 1, 3.0)],
            [node(2)] * 4,
            "learner.cpus: one actor asks for 3; the largest node has 2",
        ),
        (
            [role("teacher a", 1, 0.0, gpus=4.0)],
            [node(8, 4, free_gpus=2), node(8, 4, free_gpus=3)],
            "teachers.a.gpus: one actor asks for 4; no node has more than 3 free",
        ),
        (
            [role("rollout", 3, 0.6)],
            [node(1), node(1)],
            "rollout: 3 x 0.6 cpus and 0 gpus find no room beside the other roles; free on "
            "single nodes are 1 cpus and 0 gpus, 1 cpus and 0 gpus",
        ),
        (  # the node with GPUs has no CPU left for whom they are
            [role("rollout", 1, 1.0, gpus=1.0)],
            [node(8), node(8, 1, free=0.5)],
            "rollout: 1 x 1 cpus and 1 gpus find no room beside the other roles; free on "
            "single nodes are 8 cpus and 0 gpus, 0.5 cpus and 1 gpus",
        ),
        (  # 1.8 of 2 GPUs, and 0.4 twice is not 0.6
            [role("rollout", 3, 1.0, gpus=0.6)],
            [node(8, 2)],
            "rollout: 3 x 1 cpus and 0.6 gpus find no room beside the other roles; free on "
            "single nodes are 8 cpus and 2 gpus; a share comes from one GPU",
        ),
    ],
)
def test_asking_for_too_much_says_what_there_is_and_what_is_free(roles, nodes, message):
    with pytest.raises(ConfigError) as caught:
        require_capacity(roles, nodes)

    assert str(caught.value) == message


@pytest.mark.parametrize(
    "shares",
    [
        {"rollout": (3, 0.3), "teacher a": (1, 1.0)},  # three shares lie on one GPU
        {"rollout": (2, 0.6), "teacher a": (2, 0.4)},
        {"learner": (1, 0.4), "rollout": (4, 0.2), "teacher a": (1, 0.6)},
        {"rollout": (20, 0.1)},
    ],
)
def test_shares_fill_one_gpu_after_the_other(shares):
    roles = [role(name, actors, 0.1, gpus=gpus) for name, (actors, gpus) in shares.items()]
    require_capacity(roles, [node(8, 2)])


def machines(*gpus):
    """Nodes a, b, ... with so many free GPUs."""
    here = [node(64, free_gpus) for free_gpus in gpus]
    return [replace(one, id=name) for one, name in zip(here, "abcd", strict=False)]


def test_a_learner_without_gpus_goes_to_the_node_that_holds_all_of_it():
    nodes = [replace(node(8, 8), id="a"), replace(node(64), id="b")]
    assert set(choose_nodes([role("learner", 4, 4.0)], nodes).values()) == {"b"}


@pytest.mark.parametrize("order", [1, -1])
def test_the_learner_leaves_the_large_node_to_whom_only_that_has_room(order):
    nodes = [replace(node(16, 4), id="a"), replace(node(32, 4), id="b")][::order]
    roles = [role("learner", 4, 4.0, gpus=1.0), role("rollout", 1, 28.0)]
    assert choose_nodes(roles, nodes)["rollout", 0] == "b"


LEARNER, ENGINE = role("learner", 4, 1.0, gpus=1.0), role("rollout", 2, 1.0, gpus=1.0)


@pytest.mark.parametrize(
    ("roles", "gpus", "expected"),
    [
        # the ranks lie together, also where the first node has room for some of them
        ([ENGINE, LEARNER], (2, 4), {"learner": "bbbb", "rollout": "aa"}),
        # on as few nodes as there are, and rank by rank
        ([LEARNER, ENGINE], (1, 3, 2), {"learner": "bbbc", "rollout": "ac"}),
        # an engine of four GPUs needs the only node that has them
        (
            [LEARNER, role("rollout", 1, 1.0, gpus=4.0)],
            (2, 4, 2),
            {"learner": "aacc", "rollout": "b"},
        ),
        # the largest first: else the smaller ones would take its node
        (
            [role("rollout", 2, 1.0, gpus=1.0), role("teacher a", 1, 1.0, gpus=2.0)],
            (2, 2),
            {"teacher a": "a", "rollout": "bb"},
        ),
    ],
)
def test_the_learner_lies_together_and_nobody_takes_the_place_of_a_larger_one(
    roles, gpus, expected
):
    places = choose_nodes(roles, machines(*gpus))
    assert places == {
        (name, number): place
        for name, letters in expected.items()
        for number, place in enumerate(letters)
    }


def test_engines_are_spread_where_that_is_asked_for():
    nodes = [replace(node(8, gpus), id=name) for name, gpus in (("a", 4), ("b", 6), ("c", 8))]
    roles = [role("rollout", 6, 1.0, 1.0), role("learner", 2, 1.0, 2.0)]
    packed, spread = (choose_nodes(roles, nodes, spread=asked) for asked in (False, True))
    assert Counter(packed.values()) == {"a": 2, "b": 6}
    assert Counter(spread.values()) == {"a": 2, "b": 2, "c": 4}
    assert spread["learner", 0] == spread["learner", 1] == "a"


def test_what_finds_room_only_packed_is_packed():
    nodes = [replace(node(8, 2), id=name) for name in "ab"]
    roles = [role("rollout", 2, 1.0, 1.0), role("teacher a", 1, 8.0)]
    places = choose_nodes(roles, nodes, spread=True)
    assert places["rollout", 0] == places["rollout", 1] != places["teacher a", 0]


OLD, NEW = {"pool": "old"}, {"pool": "new", "disk": "fast"}


def test_a_role_goes_to_nodes_of_its_labels_alone():
    nodes = [
        replace(node(8), id="any"),
        replace(node(8), id="old", labels=OLD),
        replace(node(2), id="new", labels=NEW),
    ]
    engines = replace(role("rollout", 2, 1.0), labels={"pool": "new"})
    places = choose_nodes([role("learner", 1, 2.0), role("teacher a", 1, 2.0), engines], nodes)
    assert places["rollout", 0] == places["rollout", 1] == "new"
    assert "new" not in (places["learner", 0], places["teacher a", 0])


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            replace(role("rollout", 1, 1.0), labels={"pool": "newer", "disk": "fast"}),
            "rollout.node_labels: no node has pool: newer, disk: fast",
        ),
        (
            replace(role("teacher a", 1, 4.0), labels=NEW),
            "teachers.a.cpus: one actor asks for 4; the largest node with pool: new, disk: fast has 2",
        ),
        (
            replace(role("learner", 1, 2.0), labels={"disk": "fast"}),
            "learner.cpus: one actor asks for 2; no node with disk: fast has more than 1 free",
        ),
        (
            replace(role("rollout", 2, 1.0), labels={"disk": "fast"}),
            "rollout: 2 x 1 cpus and 0 gpus find no room beside the other roles; free on single "
            "nodes are 1 cpus and 0 gpus",
        ),
    ],
)
def test_what_nodes_of_its_labels_lack_is_told(asked, message):
    nodes = [replace(node(8), labels=OLD), replace(node(2, free=1), labels=NEW)]
    with pytest.raises(ConfigError) as caught:
        require_capacity([asked], nodes)

    assert str(caught.value) == message


def test_each_role_asks_for_its_own_labels(tmp_path):
    names = ("learner", "rollout", "teachers.0")
    overrides = [f"{name}.node_labels={{pool: {name}}}" for name in names]
    roles = plan(load_config(write_config(tmp_path), overrides))
    assert [role.labels["pool"] for role in roles] == list(names)


def test_threads_are_explicit():
    assert vllm_env(3)["OMP_NUM_THREADS"] == learner_env(3, gpu=True)["OMP_NUM_THREADS"] == "3"
    assert (
        vllm_env(3)["OMP_WAIT_POLICY"] == learner_env(3, gpu=False)["OMP_WAIT_POLICY"] == "PASSIVE"
    )
    assert "DS_ACCELERATOR" not in learner_env(1, gpu=True)


def test_who_asks_for_no_gpu_sees_none(tmp_path):
    config = load_config(write_config(tmp_path), ["learner.gpus=1", "rollout.gpus=1"])
    learner, rollout, teacher = plan(config)
    assert "CUDA_VISIBLE_DEVICES" not in learner.env | rollout.env, "Ray says which they see"
    assert teacher.env["CUDA_VISIBLE_DEVICES"] == ""
    assert teacher.env["VLLM_PLUGINS"] == "eopd"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], False),
        (["learner.gpus=1", "rollout={gpus: 2, vllm: {tensor_parallel_size: 2}}"], False),
        (["learner.gpus=0.5"], True),
        (["teachers.0.gpus=0.3", "teachers.0.vllm={kv_cache_memory_bytes: 1000000}"], True),
    ],
)
def test_a_gpu_is_shared_where_a_role_asks_for_a_part_of_it(tmp_path, overrides, expected):
    assert shares_gpus(load_config(write_config(tmp_path), overrides)) == expected


@pytest.mark.parametrize(
    ("overrides", "compiles"),
    [
        ([], False),
        (["rollout.vllm.enforce_eager=false"], True),
        (["rollout.gpus=1"], True),
    ],
)
def test_an_engine_on_cpus_compiles_nothing_unless_it_is_told_to(tmp_path, overrides, compiles):
    _, rollout, _ = plan(load_config(write_config(tmp_path), overrides))
    assert ("TORCHDYNAMO_DISABLE" not in rollout.env) == compiles


def test_a_learner_compiles_its_kernels_on_gpus_only():
    assert "TORCHDYNAMO_DISABLE" in learner_env(1, gpu=False)
    assert "TORCHDYNAMO_DISABLE" not in learner_env(1, gpu=True)
