"""What is public of the models that the recipes name: the numbers of their ``config.json``, and no
weights. Tests write them into a cache of the Hub, or into a directory, that holds nothing else.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000,
    "rms_norm_eps": 1e-6,
    "torch_dtype": "bfloat16",
}
QWEN3_06B = QWEN3 | {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "tie_word_embeddings": True,
}
QWEN3_17B = QWEN3_06B | {"hidden_size": 2048, "intermediate_size": 6144}
QWEN3_4B = QWEN3 | {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "tie_word_embeddings": True,
}
QWEN3_8B = QWEN3_4B | {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "tie_word_embeddings": False,
}
QWEN3_32B = QWEN3_8B | {
    "hidden_size": 5120,
    "intermediate_size": 25600,
    "num_hidden_layers": 64,
    "num_attention_heads": 64,
}
BASE = {"max_position_embeddings": 32768}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}
ROPE_OF_LLAMA = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA_1B = LLAMA | {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "head_dim": 64,
    "tie_word_embeddings": True,
    "rope_scaling": ROPE_OF_LLAMA | {"factor": 32.0},
}
LLAMA_8B = LLAMA | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "tie_word_embeddings": False,
    "rope_scaling": ROPE_OF_LLAMA | {"factor": 8.0},
}

ON_THE_HUB: Mapping[str, Mapping[str, object]] = {
    "Qwen/Qwen3-0.6B-Base": QWEN3_06B | BASE,
    "Qwen/Qwen3-1.7B-Base": QWEN3_17B | BASE,
    "Qwen/Qwen3-4B-Base": QWEN3_4B | BASE,
    "Qwen/Qwen3-1.7B": QWEN3_17B,
    "Qwen/Qwen3-4B": QWEN3_4B,
    "Qwen/Qwen3-4B-Instruct-2507": QWEN3_4B
    | {"max_position_embeddings": 262144, "rope_theta": 5000000},
    "Qwen/Qwen3-8B": QWEN3_8B,
    "Qwen/Qwen3-32B": QWEN3_32B,
    "meta-llama/Llama-3.1-8B-Instruct": LLAMA_8B,
}
IN_DIRECTORIES: Mapping[str, Mapping[str, object]] = {"models/Llama-3.2-1B": LLAMA_1B}


def write_cache(folder: Path, models: Mapping[str, Mapping[str, object]] = ON_THE_HUB) -> Path:
    """Write a cache as ``huggingface_hub`` does, of which each model has its ``config.json``."""
    for name, config in models.items():
        repository = folder / f"models--{name.replace('/', '--')}"
        commit = hashlib.sha1(name.encode()).hexdigest()
        (repository / "refs").mkdir(parents=True)
        (repository / "refs/main").write_text(commit)
        write_directory(repository / "snapshots" / commit, config)

    return folder


def write_directory(directory: Path, config: Mapping[str, object]) -> Path:
    """Write a model directory that has only its ``config.json``."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    return directory
