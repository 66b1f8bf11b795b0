"""A student and a teacher of the shape of Qwen3-0.6B with random weights, and a run of both on one GPU."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from model_facts import QWEN3_06B
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from eopd.models.tiny import CHAT_TEMPLATE, train_tokenizer, write_model

ROOT = Path(__file__).parents[2]
PROMPTS = ROOT / "configs" / "prompts"


def write_pair(directory: Path, shape: Mapping[str, Any] = QWEN3_06B) -> None:
    """Makes ``directory/student`` and ``directory/teacher``, whose tokenizer has a name for each row
    of the head.

    The teacher's embeddings are larger, so that it prefers some tokens, and a few steps bring the
    student nearer to it.
    """
    tokenizer = _tokenizer(shape["vocab_size"])
    special = {
        name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    config = Qwen3Config.from_dict({**shape, **special})
    device = "cuda" if torch.cuda.is_available() else "cpu"

    for seed, (name, scale) in enumerate({"student": 1.0, "teacher": 3.0}.items()):
        torch.manual_seed(seed)
        with torch.device(device):
            model = Qwen3ForCausalLM(config).to(torch.bfloat16)

        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(scale)

        write_model(directory / name, model.cpu(), tokenizer)


def write_config(path: Path, pair: Path, **sections: dict[str, Any]) -> Path:
    """Writes a config in which engine, teacher and learner share one GPU; ``sections`` override
    keys."""
    share = {"gpus": 0.3, "cpus": 2, "threads": 2, "vllm": {"gpu_memory_utilization": 0.25}}
    config: dict[str, Any] = {
        "run": {"name": "gpu", "directory": str(pair / "runs"), "batches": 10},
        "student": {"model": str(pair / "student")},
        "teachers": [{"model": str(pair / "teacher"), **share}],
        "prompts": {
            "data": str(PROMPTS / "demo_train.jsonl"),
            "held_out": str(PROMPTS / "demo_held_out.jsonl"),
            "max_tokens": 128,
        },
        "rollout": {"engines": 1, **share, "max_response_tokens": 256},
        "flow": {"batch_prompts": 64},
        "loss": {"gate": {"kind": "hard", "tau": 0.8}},
        "learner": {"gpus": 0.4, "cpus": 2, "threads": 2, "token_budget": 8192, "lr": 3.0e-4},
        "evaluation": {"prompts": 32, "max_response_tokens": 64},
    }
    for name, keys in sections.items():
        config[name] |= keys

    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def _tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of so many tokens. No merge leads to those after the first 512: they are
    sampled, and never read from a text."""
    lines = (PROMPTS / "demo_train.jsonl").read_text(encoding="utf-8").splitlines()
    small = train_tokenizer((json.loads(line)["prompt"] for line in lines), vocab_size=512)
    state = json.loads(small.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary |= {f"t{index}": index for index in range(len(vocabulary), size)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        bos_token=small.bos_token,
        eos_token=small.eos_token,
        pad_token=small.pad_token,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
