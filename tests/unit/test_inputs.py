"""What the paths of a config stand for: the same contents are the same run, whatever their
names.
"""

import json
import shutil

import pytest
from safetensors.numpy import load_file, save_file

from eopd import preflight
from eopd.config import load_config
from eopd.models.tiny import build_model, train_tokenizer, write_model
from eopd.runtime.inputs import digests

ROWS = [
    {"id": f"r{i}", "prompt": f"few words {i}", "answer": str(i), "source": "s"} for i in range(3)
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer(["a few words to cut into pieces"], 270)
    for name in ("student", "teacher"):
        write_model(root / name, build_model("qwen3", tokenizer, seed=0, layers=1), tokenizer)

    return root


@pytest.fixture
def of(models, tmp_path):
    """The digests of a run in a folder, its data written anew, after a change to the folder."""

    def make(name, train=ROWS, held_out=ROWS, change=lambda root: None, *overrides):
        root = tmp_path / name
        shutil.copytree(models, root)
        for file, rows in (("train", train), ("held_out", held_out)):
            (root / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

        change(root)
        (root / "c.yaml").write_text(
            f"run: {{name: r, batches: 1, directory: {root}/runs}}\nstudent: {{model: {root}/student}}\n"
            f"teachers: [{{model: {root}/teacher, name: t}}]\nflow: {{batch_prompts: 1}}\n"
            f"prompts: {{data: {root}/train.jsonl, held_out: {root}/held_out.jsonl, max_tokens: 64}}\n"
        )
        config = load_config(root / "c.yaml", overrides)

        return digests(config, preflight.prepare(config))

    return make


def edit(file, **changes):
    def change(root):
        path = root / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def written_again(root):
    path = root / "teacher" / "model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt", "note": "other weights"})


def test_what_was_moved_is_the_same(of):
    first, second = of("first"), of("second")
    assert first == second
    assert set(first) == {
        "made_as",
        "prompts.data",
        "prompts.held_out",
        "student.model",
        "teachers.t.model",
    }


@pytest.mark.parametrize(
    ("arguments", "differs"),
    [
        ({"train": ROWS[::-1]}, {"prompts.data"}),
        ({"train": ROWS[:2]}, {"prompts.data"}),
        ({"train": [ROWS[0] | {"id": "other"}, *ROWS[1:]]}, {"prompts.data"}),
        ({"train": [ROWS[0] | {"answer": "7"}, *ROWS[1:]]}, {"prompts.data"}),
        ({"train": [ROWS[0] | {"source": "x"}, *ROWS[1:]]}, {"prompts.data"}),
        ({"train": [ROWS[0] | {"prompt": "few words 7"}, *ROWS[1:]]}, {"prompts.data"}),
        ({"train": [ROWS[0] | {"note": "not read"}, *ROWS[1:]]}, set()),
        ({"held_out": ROWS[:2]}, {"prompts.held_out"}),
        ({"change": edit("student/config.json", transformers_version="9")}, set()),
        ({"change": edit("student/config.json", rope_theta=7.0)}, {"student.model"}),
        ({"change": edit("teacher/config.json", rope_theta=7.0)}, {"teachers.t.model"}),
        ({"change": written_again}, {"teachers.t.model"}),
        ({"change": edit("teacher/tokenizer_config.json", padding_side="left")}, {"teachers.t.model"}),
    ],
)  # fmt: skip
def test_a_digest_tells_what_is_trained_on_and_by_what(of, arguments, differs):
    before, after = of("before"), of("after", **arguments)
    assert {key for key in before if before[key] != after[key]} == differs


def test_a_suffix_makes_other_prompts(of):
    before, after = (
        of("before"),
        of("after", ROWS, ROWS, lambda root: None, "prompts.suffix= words"),
    )
    assert {key for key in before if before[key] != after[key]} == {
        "prompts.data",
        "prompts.held_out",
    }
