"""Tiny causal language models with a real tokenizer are made in a second, for tests and
``configs/tiny.yaml``.

Under one million parameters, but everything else is real: a byte-level BPE tokenizer trained on the
text handed in, a chat template, end tokens, and a plain Hugging Face directory that vLLM and
DeepSpeed load like any other. ``build_model`` gives random weights, ``write_tiny_pair`` a teacher
with something to say and a student that a few dozen updates bring close to it.
"""

import copy
import itertools
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import eopd

Family = Literal["llama", "qwen3"]

PROMPTS = Path(eopd.__file__).with_name("recipes") / "prompts"

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE tokenizer of at most ``vocab_size`` tokens, of which 259 are the bytes
    and special tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    fast.chat_template = CHAT_TEMPLATE

    return fast


def build_model(
    family: Family,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    layers: int = 2,
    hidden: int = 64,
    scale: float = 0.02,
) -> PreTrainedModel:
    """Returns a randomly initialised model.

    ``scale`` is the standard deviation of its weights: with 0.02 its distributions are nearly
    uniform over the vocabulary, with 0.2 they are peaked.
    """
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,  # the smallest that vLLM's CPU attention takes (0.32: 32, 64, 80, ...)
        "max_position_embeddings": 2048,
        "initializer_range": scale,
        "tie_word_embeddings": family == "qwen3",
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if family == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**sizes))

    return LlamaForCausalLM(LlamaConfig(**sizes))


def write_model(
    directory: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> Path:
    """Saves model and tokenizer as one Hugging Face directory."""
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def write_tiny_pair(directory: Path, family: Family = "qwen3", seed: int = 0) -> tuple[Path, Path]:
    """Makes ``directory/teacher`` and ``directory/student`` in a few seconds; they share one
    tokenizer of 512 tokens.

    The teacher answers any prompt with one of 64 sentences and an end token. Its entropy is low on
    most tokens and log 4 at three choices of four words, so that an entropy gate opens on about a
    fifth of its tokens. The student is the teacher with noise as large as its weights: it is far
    from the teacher at first, and learns quickly.

    Equal arguments give equal files on one machine, whatever its thread settings.
    """
    prompts = [
        _read_prompts(PROMPTS / name) for name in ("demo_train.jsonl", "demo_held_out.jsonl")
    ]
    tokenizer = train_tokenizer(itertools.chain(*prompts), vocab_size=512)
    teacher = build_model(family, tokenizer, seed=seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the order of float sums depends on it

    try:
        _teach(teacher, tokenizer, prompts[0], random.Random(seed))
    finally:
        torch.set_num_threads(threads)

    student = copy.deepcopy(teacher)
    _disturb(student, torch.Generator().manual_seed(seed))
    pair = {"teacher": teacher, "student": student}
    for name, model in pair.items():
        write_model(directory / name, model, tokenizer)

    return directory / "teacher", directory / "student"


def _read_prompts(path: Path) -> list[str]:
    return [json.loads(line)["prompt"] for line in path.read_text(encoding="utf-8").splitlines()]


def _teach(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    rng: random.Random,
) -> None:
    """Trains ``model`` to answer with the sentences; the loss is over answer tokens only."""
    steps = 120
    questions = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
        )
        for prompt in prompts
    ]
    words = itertools.product(
        ("read", "sing", "walk", "rest"),
        ("sea", "lake", "fire", "road"),
        ("day", "night", "week", "year"),
    )
    answers = [
        [
            *tokenizer(f"I like to {verb} by the {place} every {time}.").input_ids,
            tokenizer.eos_token_id,
        ]
        for verb, place, time in words
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(
        optimizer, start_factor=1.0, end_factor=0.0, total_iters=steps
    )

    for _ in range(steps):
        rows = [
            _lesson(rng.choice(questions), rng.choice(answers), len(tokenizer), rng)
            for _ in range(8)
        ]
        ids, labels = (
            torch.nn.utils.rnn.pad_sequence(
                list(part),
                batch_first=True,
                padding_value=-100,
            )
            for part in zip(*rows, strict=True)
        )
        model(input_ids=ids.clamp_min(0), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def _lesson(
    question: list[int], answer: list[int], vocab_size: int, rng: random.Random
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns token ids and labels [T].

    Some answer tokens of the input are replaced at random, so that the teacher learns to continue
    text that it would never write: a student's text is mostly of that kind.
    """
    noisy = [rng.randrange(vocab_size) if rng.random() < 0.15 else token for token in answer]
    return torch.tensor(question + noisy), torch.tensor([-100] * len(question) + answer)


@torch.no_grad()
def _disturb(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Adds noise to every matrix, of the matrix's own standard deviation."""
    for weight in model.parameters():
        if weight.dim() == 2:
            weight += torch.randn(weight.shape, generator=generator) * weight.std()
