"""``configs/schema.json`` takes what the program takes, and refuses what an editor can see."""

import json
from pathlib import Path

import jsonschema
import pytest

from eopd.config import ConfigError, dump_config, load_config
from eopd.config.document import read_document
from eopd.config.scalars import Plain, native

ROOT = Path(__file__).parents[2]
SCHEMA = json.loads((ROOT / "configs/schema.json").read_text(encoding="utf-8"))
VALIDATOR = jsonschema.Draft7Validator(SCHEMA)
MINIMAL = """\
run: {name: test, batches: 1}
student: {model: student, dtype: float32}
teachers: [{model: teacher, dtype: float32}]
prompts: {data: train.jsonl, held_out: test.jsonl}
flow: {batch_prompts: 2}
"""


def seen_by_an_editor(tree: object) -> object:
    """The JSON of a tree as YAML 1.2 reads it: scalars by their looks, and keys as text."""
    match tree:
        case dict():
            return {str(key): seen_by_an_editor(value) for key, value in tree.items()}
        case list():
            return [seen_by_an_editor(item) for item in tree]
        case Plain():
            return native(tree)
        case _:
            return tree


def config_with(section: str, text: str) -> str:
    """The minimal config, with a section written as ``text``."""
    kept = [line for line in MINIMAL.splitlines() if not line.startswith(f"{section}:")]
    return "\n".join([*kept, text, ""])


def marks(text: str) -> list[str]:
    """What an editor marks in a config."""
    tree = seen_by_an_editor(read_document(text)[0])
    return [error.message for error in VALIDATOR.iter_errors(tree)]


def is_loaded(text: str, folder: Path) -> bool:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    try:
        load_config(path)
    except ConfigError:
        return False

    return True


def test_the_schema_is_one_of_the_draft_that_editors_know():
    assert SCHEMA["$schema"] == "http://json-schema.org/draft-07/schema#"
    jsonschema.Draft7Validator.check_schema(SCHEMA)


@pytest.mark.parametrize(
    "path",
    sorted((ROOT / "configs").glob("*.yaml")),
    ids=lambda p: p.name,
)
def test_every_recipe_names_the_schema_and_is_free_of_marks(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# yaml-language-server: $schema=schema.json\n")
    assert marks(text) == []
    assert marks(dump_config(load_config(path))) == []


@pytest.mark.parametrize(
    "section, text",
    [
        ("loss", "loss: {gate: hard, forward_kl: tail, reverse_kl: sampled}"),
        ("loss", "loss: {gate: {tau: 0.5}, reverse_kl: {clip: 0.1}}"),
        ("loss", "loss: {gate: {kind: sigmoid, tau: 1, scale: 0.2}, reverse_kl: {}}"),
        ("loss", "loss: {gate: , alpha_warmup: }"),
        ("student", "student: {model: student, lora: true}"),
        ("student", "student: {model: student, lora: false}"),
        ("student", "student: {model: student, lora: {target_modules: q_proj}}"),
        ("student", "student: {model: student, lora: null}"),
        ("telemetry", "telemetry: {trackers: wandb, port: null}"),
        ("telemetry", "telemetry: {trackers: }"),
        ("teachers", "teachers: {model: teacher, sources: maths}"),
        (
            "teachers",
            "teachers: {model: teacher, eos_remap: {151643: 151645}, max_prompt_tokens: }",
        ),
        ("teachers", "teachers: [{model: t, backend: eopd, server: {url: 'http://host:1'}}]"),
        ("learner", "learner:"),
        ("learner", "learner: {lr: 1e-5, betas: [0.9, 0.95], zero_stage: 2, deepspeed: }"),
        ("learner", "learner: {zero_stage: auto}"),
        ("rollout", "rollout: {vllm: {max_num_seqs: 64, quantization: null}}"),
        ("cluster", "cluster: {address: auto, cpus: 2}"),
        ("run", "run: {name: 2024, batches: 3, expected_minutes: }"),
        ("run", "run: {name: true, batches: 3}"),
        ("prompts", "prompts: {data: [a, {data: b, source: c}], held_out: {data: d}}"),
        (
            "prompts",
            "prompts: {data: {data: a, weight: 2}, held_out: {function: 'm:f', options: }}",
        ),
        ("prompts", "prompts: {data: a, held_out: b, columns: {prompt: question}, system: Think.}"),
        ("x-mine", "x-mine: {anything: [1]}"),
    ],
)
def test_what_the_program_takes_has_no_marks(section, text, tmp_path):
    config = config_with(section, text)
    assert is_loaded(config, tmp_path)
    assert marks(config) == []


@pytest.mark.parametrize(
    "section, text",
    [
        ("run", "run: {name: test}"),
        ("run", "run: {name: test, batches: 0}"),
        ("run", "run: {name: a/b, batches: 1}"),
        ("run", "run:"),
        ("flow", "flow: {batch_prompts: 2, max_stalenes: 1}"),
        ("loss", "loss: {gate: hrad}"),
        ("loss", "loss: {gate: {top: 0.3}}"),
        ("loss", "loss: {gate: {kind: always, rate: 0.8}}"),
        ("loss", "loss: {reverse_kl: {clip: 1.0}}"),
        ("learner", "learner: {betas: [0.9]}"),
        ("learner", "learner: {zero_stage: 4}"),
        ("learner", "learner: {zero_stage: fastest}"),
        ("learner", "learner: {lr: null}"),
        ("teachers", "teachers: [{name: lonely}]"),
        ("teachers", "teachers: [{model: teacher, eos_remap: {end: 1}}]"),
        ("teachers", "teachers: [{model: teacher, max_prompt_tokens: 0}]"),
        ("telemetry", "telemetry: {trackers: [tensorbord]}"),
        ("prompts", "prompts: {data: [], held_out: b}"),
        ("prompts", "prompts: {data: {data: a, weigth: 2}, held_out: b}"),
        ("prompts", "prompts: {data: a, held_out: {data: b, weight: 2}}"),
        ("rollouts", "rollouts: {engines: 2}"),
    ],
)
def test_what_the_program_refuses_is_marked(section, text, tmp_path):
    config = config_with(section, text)
    assert not is_loaded(config, tmp_path)
    assert marks(config) != []


@pytest.mark.parametrize(
    ("text", "is_marked"),
    [
        ("extends: base.yaml", False),
        ("extends: base.yaml\nrun: {batches: 3}\nloss: {gate: {scale: 0.2}}", False),
        ("extends: base.yaml\ncheckpoint: {keep_best: {n: 2}}\nx-mine: 1", False),
        ("extends: base.yaml\nteachers: [{model: t}]", False),
        ("extends: [base.yaml]", True),
        ("extends:", True),
        ("extends: base.yaml\nrun: {batch: 3}", True),
        ("extends: base.yaml\nlearner: {lr: 3}", True),
        ("extends: base.yaml\nloss: {gate: {scala: 0.2}}", True),
        ("extends: base.yaml\nteachers: [{name: t}, {name: u}]", True),
        ("run: {batches: 3}", True),
    ],
)
def test_a_config_that_extends_another_needs_no_keys_but_in_lists(text, is_marked):
    assert bool(marks(text)) == is_marked


@pytest.mark.parametrize(
    "section, text",
    [
        ("run", "run: {name: test, batches: 1_000}"),
        ("run", "run: {name: test, batches: '10'}"),
        ("learner", "learner: {activation_checkpointing: yes}"),
    ],
)
def test_it_is_stricter_where_the_page_says_so(section, text, tmp_path):
    config = config_with(section, text)
    assert is_loaded(config, tmp_path)
    assert marks(config) != []
