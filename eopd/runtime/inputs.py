"""The contents of a config's paths are digested. A checkpoint keeps the digests, and a run that
continues from it is compared with them: a path may change where the contents are the same.

Left out: the bytes of weights. The student's come from the checkpoint; those of a teacher would
take minutes to read, so that their names and sizes stand for them, or the commit of a model by
name.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from eopd.config import Config
from eopd.config.names import ModelName
from eopd.config.prompts import keys_of
from eopd.hub import model_directory
from eopd.preflight import Prepared
from eopd.types import PromptSample

MADE_AS: Final = "1"  # another number with every change of this file that changes a digest
WEIGHTS: Final = ("*.safetensors", "*.bin")
TOKENIZER: Final = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
# how a teacher renders prompts; how the student does shows in the token ids of its prompts
RENDERING: Final = ("chat_template.jinja", "tokenizer_config.json")
# keys of config.json that change nothing of the model
_IRRELEVANT: Final = frozenset({"_name_or_path", "dtype", "torch_dtype", "transformers_version"})


def digests(config: Config, prepared: Prepared) -> dict[str, str]:
    """Returns the digest of each path's contents by key of the config, and by name for teachers;
    ``made_as`` is the version of the digests.

    Prompts are compared as they are trained on: their order, ids, sources, answers and token ids.
    """
    digest_of = {
        "made_as": MADE_AS,
        "prompts.data": _digest(_of_prompts(prepared.train.prompts)),
        "prompts.held_out": _digest(_of_prompts(prepared.held_out.prompts)),
        "student.model": _digest_model(config.student.model, weights=False),
    }
    for name, data in prepared.benchmarks.items():
        digest_of[f"evaluation.benchmarks.{name}.data"] = _digest(_of_prompts(data.prompts))

    keys = keys_of("prompts.data", config.prompts.data)
    for key, prompts in zip(keys, prepared.train.parts, strict=True):
        digest_of[key] = _digest(_of_prompts(prompts))

    for teacher in config.teachers:
        digest_of[f"teachers.{teacher.name}.model"] = _digest_model(teacher.model, weights=True)

    return digest_of


def _of_prompts(prompts: Iterable[PromptSample]) -> Iterator[bytes]:
    for prompt in prompts:
        yield prompt.prompt_id.encode()
        yield prompt.source.encode()
        yield repr(prompt.reference_answer).encode()
        yield prompt.token_ids.tobytes()


def _digest_model(spec: str, *, weights: bool) -> str:
    directory = model_directory(spec)
    keys: Mapping[str, object] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    relevant = {key: value for key, value in keys.items() if key not in _IRRELEVANT}
    parts = [json.dumps(relevant, sort_keys=True).encode()]
    parts += [path.read_bytes() for name in TOKENIZER if (path := directory / name).is_file()]
    if weights:
        parts += [path.read_bytes() for name in RENDERING if (path := directory / name).is_file()]
        parts += _weights(spec, directory)

    return _digest(parts)


def _weights(spec: str, directory: Path) -> list[bytes]:
    """Returns what stands for a model's weights. A cache may hold more files of a commit than a run
    reads.
    """
    if ModelName.parse(spec) is not None:
        return [spec.encode()]

    files = sorted(file for pattern in WEIGHTS for file in directory.glob(pattern))
    return [f"{file.name} {file.stat().st_size}".encode() for file in files]


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)

    return digest.hexdigest()
