"""A config that extends another one: what is merged, what is replaced, and where each value is said
to come from.
"""

import os
from pathlib import Path

import pytest

from eopd.cli.config import config as config_group
from eopd.config import ConfigError, dump_config, load_config
from eopd.config.annotated import annotate
from eopd.config.load import load_with_origins

ROOT = Path(__file__).parents[2]
BASE = """\
run: {name: base, batches: 2}
student: {model: models/s, dtype: float32}
teachers:
  - {model: models/t, dtype: float32, eos_remap: {1: 2}}
prompts: {data: a.jsonl, held_out: b.jsonl, max_tokens: 100}
rollout: {max_response_tokens: 100, vllm: {seed: 3, max_num_seqs: 8}}
evaluation: {max_response_tokens: 50}
flow: {batch_prompts: 8}
telemetry: {trackers: [wandb, mlflow]}
"""


@pytest.fixture
def write(tmp_path):
    """Write files by their names; returns the path of the first."""

    def write(**texts: str) -> Path:
        for name, text in texts.items():
            (tmp_path / f"{name}.yaml").write_text(text)

        return tmp_path / f"{next(iter(texts))}.yaml"

    return write


@pytest.fixture
def load(write):
    """Load a config that extends the base."""

    def load(text: str, base: str = "", overrides=()):
        return load_config(write(c=f"extends: base.yaml\n{text}", base=BASE + base), overrides)

    return load


def test_mappings_are_merged_and_lists_and_values_replaced(load):
    config = load(
        "run: {batches: 5}\n"
        "rollout: {vllm: {max_num_seqs: 4}}\n"
        "telemetry: {trackers: tensorboard}\n"
        "prompts: {data: [c.jsonl, {data: d.jsonl}]}\n"
    )
    assert (config.run.name, config.run.batches) == ("base", 5)
    assert config.rollout.vllm == {"seed": 3, "max_num_seqs": 4}
    assert config.rollout.max_response_tokens == 100
    assert config.telemetry.trackers == ["tensorboard"]
    assert [Path(part.data).name for part in config.prompts.data] == ["c.jsonl", "d.jsonl"]
    assert Path(config.prompts.held_out[0].data).name == "b.jsonl"


def test_keys_that_are_numbers_are_merged_however_they_are_written(load):
    merged = load("loss: {}\nlearner: {}\nx-unused: 1\nteachers: {model: t, eos_remap: {'1': 4}}\n")
    assert merged.teachers[0].eos_remap == {1: 4}
    assert merged.teachers[0].dtype != "auto"


@pytest.mark.parametrize(
    ("base", "text", "gate"),
    [
        ("", "loss: {gate: {tau: 0.5}}", {"kind": "hard", "tau": 0.5}),
        ("loss: {gate: hard}", "loss: {gate: {tau: 0.5}}", {"kind": "hard", "tau": 0.5}),
        ("loss: {gate: {tau: 0.5}}", "loss: {gate: hard}", {"kind": "hard", "tau": 0.5}),
        ("loss: {gate: {tau: 0.5}}", "loss: {gate: }", {"kind": "hard", "tau": 0.5}),
        ("loss: {gate: {tau: 0.5}}", "loss:", {"kind": "hard", "tau": 0.5}),
        (
            "loss: {gate: {kind: sigmoid, scale: 0.2}}",
            "loss: {gate: {tau: 0.5}}",
            {"kind": "sigmoid", "tau": 0.5, "scale": 0.2},
        ),
        (
            "loss: {gate: {kind: sigmoid, scale: 0.2}}",
            "loss: {gate: {kind: hard}}",
            {"kind": "hard", "tau": 0.8},
        ),
        ("loss: {gate: {kind: sigmoid, scale: 0.2}}", "loss: {gate: always}", {"kind": "always"}),
    ],
)
def test_a_short_form_means_beside_a_long_one_what_it_means_alone(load, base, text, gate):
    assert load(text, base).loss.gate.model_dump() == gate


@pytest.mark.parametrize(
    ("base", "text", "rank"),
    [
        ("true", "{rank: 4}", 4),
        ("{rank: 4}", "true", 4),
        ("{rank: 4}", "{alpha: 1}", 4),
        ("{rank: 4}", "false", None),
        ("false", "true", 16),
    ],
)
def test_a_section_that_is_switched_on_keeps_what_was_said_of_it(write, base, text, rank):
    whole = BASE.replace("dtype: float32}\nteachers", f"dtype: float32, lora: {base}}}\nteachers")
    path = write(c=f"extends: base.yaml\nstudent: {{lora: {text}}}", base=whole)
    lora = load_config(path).student.lora
    assert (None if lora is None else lora.rank) == rank


def test_a_chain_has_any_length_and_overrides_come_last(write, tmp_path):
    (tmp_path / "below").mkdir()
    path = write(
        top="extends: below/middle.yaml\nlearner: {lr: 3e-6}\n",
        base=f"x-own: &gate {{kind: random, rate: 0.5}}\n{BASE}loss: {{gate: *gate}}\n",
    )
    (tmp_path / "below/middle.yaml").write_text(
        "extends: ../base.yaml\nx-own: &own 7\nlearner: {lr: 2e-6, warmup_batches: *own}\n"
    )
    config = load_config(path, ["learner.warmup_batches=9", "loss.gate.rate=0.25"])
    assert (config.learner.lr, config.learner.warmup_batches) == (3e-6, 9)
    assert config.loss.gate.model_dump() == {"kind": "random", "rate": 0.25}


def test_paths_begin_at_the_working_directory_in_every_file(load, monkeypatch, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = load("")
    assert config.student.model == str(tmp_path / "elsewhere/models/s")
    assert config.prompts.data[0].data == str(tmp_path / "elsewhere/a.jsonl")


def test_what_a_run_keeps_can_be_extended_and_loses_the_reasons_of_what_is_set(write, tmp_path):
    first = load_config(write(base=BASE), ["student.dtype=auto"])
    assert first.student.dtype_reason is not None
    resolved = dump_config(first)
    assert "extends:" not in resolved
    path = write(c="extends: run.yaml\nlearner: {zero_stage: 2}\n", run=resolved)
    second = load_config(path)
    assert (second.learner.zero_stage, second.learner.zero_stage_reason) == (2, None)
    assert second.student.dtype_reason == first.student.dtype_reason


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"c": "extends: no.yaml\n"},
            "{d}/no.yaml: cannot be read (No such file or directory) "
            "(chain: {d}/c.yaml -> {d}/no.yaml)",
        ),
        (
            {"c": "extends: a.yaml\n", "a": "extends: c.yaml\n"},
            "{d}/a.yaml: extends: leads back to {d}/c.yaml "
            "(chain: {d}/c.yaml -> {d}/a.yaml -> {d}/c.yaml)",
        ),
        (
            {"c": "extends: ./c.yaml\n"},
            "{d}/c.yaml: extends: leads back to {d}/c.yaml (chain: {d}/c.yaml -> {d}/c.yaml)",
        ),
        (
            {"c": "extends: [a.yaml, b.yaml]\n"},
            "{d}/c.yaml: extends: must be the path of one file, from the folder of this one "
            "(is [a.yaml, b.yaml])",
        ),
        (
            {"c": "extends: a.yaml\n", "a": "extends:\n"},
            "{d}/a.yaml: extends: must be the path of one file, from the folder of this one "
            "(is null) (chain: {d}/c.yaml -> {d}/a.yaml)",
        ),
        (
            {"c": "extends: a.yaml\n", "a": "run: {name: x\n"},
            "{d}/a.yaml: is not YAML: line 1: a {{ is never closed, or a comma is missing in it "
            "(chain: {d}/c.yaml -> {d}/a.yaml)",
        ),
        (
            {"c": "extends: a.yaml\n", "a": "[]\n"},
            "{d}/a.yaml: must be a mapping of sections (is []) (chain: {d}/c.yaml -> {d}/a.yaml)",
        ),
        (
            {"c": "extends: a.yaml\nflow: {batch_prompts: 0}", "a": BASE + "learner: {lr: -1}\n"},
            "{d}/c.yaml: flow.batch_prompts: must be a whole number from 1 to 1000000 (is 0)\n"
            "learner.lr: must be a number above 0, at most 1 (is -1) (in {d}/a.yaml:10)",
        ),
        (
            {"c": "extends: a.yaml\n", "a": BASE + "learner:\n  lrr: 1\n"},
            "{d}/c.yaml: learner.lrr: unknown key; did you mean lr? (in {d}/a.yaml:11)",
        ),
    ],
)
def test_a_mistake_in_a_chain_is_one_message_with_its_file(write, tmp_path, files, message):
    path = write(**files)
    with pytest.raises(ConfigError) as caught:
        load_config(path)

    assert str(caught.value) == message.format(d=tmp_path)


def test_no_override_extends(write):
    with pytest.raises(ConfigError, match=r"--set extends=b\.yaml: a config extends"):
        load_config(write(base=BASE), ["extends=b.yaml"])


def origins(path: Path, *overrides: str) -> dict[str, str]:
    """The comment of every key of the annotated config, by the last part of the key and its value."""
    rows = annotate(load_with_origins(path, overrides)).splitlines()
    split = [row.partition("  # ") for row in rows if "  # " in row]
    return {row.strip(): comment for row, _, comment in split}


def test_every_value_says_where_it_was_written(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(
        c="extends: base.yaml\nloss:\n  gate: {tau: 0.5}\nlearner:\n  lr: 2e-6\n",
        base=BASE + "loss: {gate: sigmoid}\nweights: {bucket_bytes: 1024}\n",
    )
    said = origins(Path("c.yaml"), "flow.batch_prompts=9", "teachers.teacher.temperature=0.5")
    assert said["kind: sigmoid"] == "base.yaml:10"
    assert said["tau: 0.5"] == "c.yaml:3"
    assert said["scale: 0.1"] == "default"
    assert said["lr: 2.0e-06"] == "c.yaml:5"
    assert said["batch_prompts: 9"] == said["temperature: 0.5"] == "--set"
    assert said["temperature: 1.0"] == "default"
    assert said["1: 2"] == "base.yaml:4"
    assert said["- mlflow"] == "base.yaml:9"
    assert said[f"- data: {tmp_path}/a.jsonl"] == "base.yaml:5"
    assert said["weight: null"] == "default"
    assert said["zero_stage: 0"] == "chosen: the fastest on one rank in float32"
    assert said["bucket_bytes: 1024"] == "base.yaml:11"


def test_an_override_of_a_section_leaves_no_older_origin_in_it(write):
    path = write(base=BASE + "loss: {gate: {kind: sigmoid, tau: 1, scale: 0.3}}\n")
    said = origins(path, "loss.gate={tau: 0.5}")
    assert said["kind: hard"] == said["tau: 0.5"] == "--set"
    assert "scale: 0.3" not in said


def test_a_key_merged_by_an_anchor_has_the_line_of_its_merge(write):
    path = write(base="x-more: &more {lr: 2e-6}\n" + BASE + "learner:\n  <<: *more\n  ranks: 2\n")
    assert origins(path)["lr: 2.0e-06"] == f"{path}:12"
    assert origins(path)["ranks: 2"] == f"{path}:13"


@pytest.mark.parametrize("options", [[], ["--plain"]])
def test_what_is_shown_loads_as_the_same_config(eopd, write, tmp_path, options):
    texts = 'prompts: {suffix: "\\n# a, ## b: #### c", system: "  one:\\n\\ttwo #"}\n'
    path = write(c=f"extends: base.yaml\n{texts}", base=BASE)
    settings = [
        "student.dtype=auto",
        "telemetry.trackers=[]",
        'learner.deepspeed={a: {b: []}, c: "\\u2028 #"}',
    ]
    chosen = [part for setting in settings for part in ("--set", setting)]
    done = eopd("config", "show", path, *options, *chosen)
    assert done.code == 0
    assert ("  # " in done.out.replace(" # a", "")) == (not options)
    (tmp_path / "again.yaml").write_text(done.out)
    assert load_config(tmp_path / "again.yaml") == load_config(path, settings)


def test_the_schema_and_the_reference_page_are_printed(eopd):
    assert {command.name for command in config_group.registered_commands} == {
        "show",
        "schema",
        "docs",
    }
    assert eopd("config", "schema").out == (ROOT / "configs/schema.json").read_text()
    assert eopd("config", "docs").out == (ROOT / "docs/configuration-reference.md").read_text()
    assert os.path.samefile(ROOT / "eopd/reference.md", ROOT / "docs/configuration-reference.md")
