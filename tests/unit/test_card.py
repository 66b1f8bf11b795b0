"""The model card: what it is made of, what was measured, and nothing of this machine."""

import yaml

from eopd import __version__
from eopd.config import Config, load_config
from eopd.run.card import model_card
from eopd.run.evaluations import Evaluation
from eopd.run.record import Measurement

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def config(tmp_path, student: str, data: str) -> Config:
    (tmp_path / "c.yaml").write_text(
        "run: {name: x, batches: 9}\n"
        f"student: {{model: {student}}}\n"
        "teachers: [{model: /disk/alice/big, name: a}, {model: org/code, name: b, sources: s}]\n"
        f"prompts: {{data: '{data}', held_out: /disk/alice/secret/held_out.jsonl}}\n"
        "flow: {batch_prompts: 4}\n"
        "rollout: {samples_per_prompt: 2}\n"
        "loss: {gate: {kind: hard, tau: 0.75}}\n"
        "learner: {token_budget: 10000}\n"
    )
    return load_config(tmp_path / "c.yaml")


def measured(
    step: int, name: str = "held_out", **numbers: float | tuple[float, float]
) -> Evaluation:
    """An evaluation; a number with its standard error is a pair."""
    pairs = {metric: x if isinstance(x, tuple) else (x, None) for metric, x in numbers.items()}
    return Evaluation(
        step=step,
        phase="during" if step else "before",
        name=name,
        time=0.0,
        seconds=1.0,
        prompts=2,
        samples=4,
        measurements={
            metric: Measurement(mean=mean, standard_error=error)
            for metric, (mean, error) in pairs.items()
        },
    )


MEASURED = [
    measured(0, reverse_kl=(1.5, 0.25)),
    measured(0, "maths", avg_at_n=0.125, pass_at_4=0.25),
    measured(5, reverse_kl=0.75),
    measured(9, reverse_kl=0.5, top1_agreement=(0.75, 0.125)),
    measured(9, "maths", avg_at_n=0.5, pass_at_4=0.75, pass_at_2=0.625),
]


def parts(card: str) -> tuple[dict[str, object], str]:
    _, metadata, text = card.split("---\n", 2)
    return yaml.safe_load(metadata), text


def test_a_card_says_of_what_a_student_is_made(tmp_path):
    named = config(tmp_path, f"org/small@{COMMIT}", f"org/rows@{COMMIT}:main:train")
    metadata, text = parts(model_card(named, MEASURED, 9, "mine"))
    assert metadata == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["eopd", "on-policy-distillation"],
        "base_model": "org/small",
        "datasets": ["org/rows"],
    }
    lines = text.splitlines()
    assert lines[0] == "# mine"
    assert (
        f"org/small@{COMMIT}, distilled on its own responses from big, org/code, with eopd "
        f"{__version__}."
    ) in lines
    assert f"| trained on | org/rows@{COMMIT}:main:train |" in lines
    assert "| batches | 9 of 8 responses each |" in lines
    start = lines.index("| | before | after 9 batches |") + 2
    assert lines[start : start + 5] == [
        "| held out: KL of the student to the teacher, nats a token | 1.5000 ± 0.2500 | 0.5000 |",
        "| held out: positions where both have the same most likely token |  | 0.7500 ± 0.1250 |",
        "| maths: share of responses that are right (avg@4) | 0.1250 | 0.5000 |",
        "| maths: prompts with a right one among 4 (pass@4) | 0.2500 | 0.7500 |",
        "",
    ]
    objective = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    assert objective["loss"]["gate"] == {"kind": "hard", "tau": 0.75}


def test_a_card_names_no_path(tmp_path):
    local = config(tmp_path, "/disk/alice/small", "/disk/alice/secret/rows.jsonl")
    metadata, text = parts(model_card(local, MEASURED, 9, "mine"))
    assert "base_model" not in metadata and "datasets" not in metadata
    assert "/disk" not in text and "alice" not in text
    assert "| student | small |" in text
    assert "| trained on | rows.jsonl |" in text


def test_a_checkpoint_from_the_middle_has_its_own_numbers(tmp_path):
    text = model_card(config(tmp_path, "org/small", "org/rows"), MEASURED, 5, "mine")
    assert "teacher, nats a token | 1.5000 ± 0.2500 | 0.7500 |" in text and "maths" not in text
    assert "| batches | 5 of 8 responses each |" in text


def test_a_checkpoint_that_was_not_measured_has_no_numbers(tmp_path):
    for evaluations in (MEASURED, []):
        text = model_card(
            config(tmp_path, "org/small", "org/rows"),
            evaluations,
            6,
            "mine",
        )
        assert "before" not in text
