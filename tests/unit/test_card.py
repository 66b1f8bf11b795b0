"""The model card: what it is made of, what was measured, and nothing of this machine."""

import yaml

from eopd import __version__
from eopd.config import Config, load_config
from eopd.run.card import model_card
from eopd.run.record import HeldOut, Measurement, Summary

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


SUMMARY = Summary(
    status="completed",
    steps=9,
    held_out=HeldOut(
        before={"reverse_kl": Measurement(mean=1.5, standard_error=0.25)},
        after={
            "reverse_kl": Measurement(mean=0.5, standard_error=None),
            "top1_agreement": Measurement(mean=0.75, standard_error=0.125),
        },
    ),
)


def parts(card: str) -> tuple[dict[str, object], str]:
    _, metadata, text = card.split("---\n", 2)
    return yaml.safe_load(metadata), text


def test_a_card_says_of_what_a_student_is_made(tmp_path):
    named = config(tmp_path, f"org/small@{COMMIT}", f"org/rows@{COMMIT}:main:train")
    metadata, text = parts(model_card(named, SUMMARY, 9, "mine"))
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
    assert "| KL of the student to the teacher, nats a token | 1.5000 ± 0.2500 | 0.5000 |" in lines
    told = "| positions where both have the same most likely token |  | 0.7500 ± 0.1250 |"
    assert told in lines
    objective = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    assert objective["loss"]["gate"] == {"kind": "hard", "tau": 0.75}


def test_a_card_names_no_path(tmp_path):
    local = config(tmp_path, "/disk/alice/small", "/disk/alice/secret/rows.jsonl")
    metadata, text = parts(model_card(local, SUMMARY, 9, "mine"))
    assert "base_model" not in metadata and "datasets" not in metadata
    assert "/disk" not in text and "alice" not in text
    assert "| student | small |" in text
    assert "| trained on | rows.jsonl |" in text


def test_a_checkpoint_from_the_middle_has_no_numbers_of_its_own(tmp_path):
    named = config(tmp_path, "org/small", "org/rows")
    for summary in (SUMMARY, None):
        text = model_card(named, summary, 5, "mine")
        assert "before" not in text
        assert "| batches | 5 of 8 responses each |" in text
