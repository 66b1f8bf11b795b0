"""What the paths of a config stand for, as digests: a checkpoint keeps them, and a run that goes on
is compared.

A path may change where the contents are the same. Left out: the bytes of weights. The student's
come from the checkpoint; those of a teacher would take minutes to read, and stand here by their
names and sizes.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from eopd.config import Config
from eopd.preflight import Prepared
from eopd.prompts import PromptSet

MADE_AS: Final = "1"  # another number with every change of this file that changes a digest
WEIGHTS: Final = ("*.safetensors", "*.bin")
TOKENIZER: Final = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
# the student's is seen in its prompts
RENDERING: Final = ("chat_template.jinja", "tokenizer_config.json")
# of config.json
_SAYS_NOTHING: Final = frozenset({"_name_or_path", "dtype", "torch_dtype", "transformers_version"})


def digests(config: Config, prepared: Prepared) -> dict[str, str]:
    """By key of the config (teachers by name), what it stands for; under ``made_as``, how the
    digests are made.

    Prompts are compared as they are trained on: their order, ids, sources, answers and token ids.
    """
    found = {
        "made_as": MADE_AS,
        "prompts.data": _of_prompts(prepared.train),
        "prompts.held_out": _of_prompts(prepared.held_out),
        "student.model": _of_model(config.student.model, weights=False),
    }
    teachers = {
        f"teachers.{t.name}.model": _of_model(t.model, weights=True) for t in config.teachers
    }
    return found | teachers


def _of_prompts(prompts: PromptSet) -> str:
    return _digest(
        part
        for prompt in prompts.prompts
        for part in (
            prompt.prompt_id.encode(),
            prompt.source.encode(),
            repr(prompt.reference_answer).encode(),
            prompt.token_ids.tobytes(),
        )
    )


def _of_model(directory: Path, *, weights: bool) -> str:
    shape: Mapping[str, object] = json.loads(
        (directory / "config.json").read_text(encoding="utf-8")
    )
    kept = {key: value for key, value in shape.items() if key not in _SAYS_NOTHING}
    parts = [json.dumps(kept, sort_keys=True).encode()]
    parts += [path.read_bytes() for name in TOKENIZER if (path := directory / name).is_file()]
    if weights:
        parts += [path.read_bytes() for name in RENDERING if (path := directory / name).is_file()]
        files = sorted(file for pattern in WEIGHTS for file in directory.glob(pattern))
        parts += [f"{file.name} {file.stat().st_size}".encode() for file in files]

    return _digest(parts)


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)

    return digest.hexdigest()
