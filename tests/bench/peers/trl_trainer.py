"""Steps of one of the trainers of TRL, in a process of its own: prints one JSON line a step, with
``seconds`` and ``tokens``, the response tokens up to and with their first end token.

    python trl_trainer.py distillation|gkd STUDENT TEACHER PROMPTS --steps 10 ...

Checked against TRL 1.16.0. Everything on-policy, reverse KL, no gradient checkpointing, which costs
time and saves memory; the optimiser is AdamW, as it is ours.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback


class Clock(TrainerCallback):
    """Says how long each step took, and how many tokens were written in it."""

    def __init__(self, model) -> None:
        self.tokens = 0
        self.started = 0.0
        self.generate, model.generate = model.generate, self.counted
        self.ends = torch.tensor(model.generation_config.eos_token_id).reshape(-1)

    def counted(self, *args, **kwargs):
        made = self.generate(*args, **kwargs)
        sequences = getattr(made, "sequences", made)
        responses = sequences[:, kwargs["input_ids"].shape[1] :]
        has_ended = torch.isin(responses, self.ends).int().cumsum(1)
        before_end = has_ended - torch.isin(responses, self.ends).int()
        self.tokens += int((before_end == 0).sum())
        return made

    def on_step_begin(self, *args, **kwargs):
        self.started = time.monotonic()

    def on_step_end(self, *args, **kwargs):
        seconds, self.started = time.monotonic() - self.started, time.monotonic()
        sys.stdout.write(json.dumps({"seconds": seconds, "tokens": self.tokens}) + "\n")
        sys.stdout.flush()
        self.tokens = 0


def trainer_of(options, student, teacher, tokenizer, output: str):
    common = {
        "output_dir": output,
        "max_steps": options.steps,
        "per_device_train_batch_size": options.batch,
        "learning_rate": options.lr,
        "optim": "adamw_torch_fused",
        "temperature": options.temperature,
        "beta": 1.0,
        "bf16": options.bf16,
        "gradient_checkpointing": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
    }
    prompts = [json.loads(line)["prompt"] for line in options.prompts.read_text().splitlines()]
    asked = [[{"role": "user", "content": prompt}] for prompt in prompts]

    if options.trainer == "distillation":
        from trl import DistillationConfig, DistillationTrainer

        return DistillationTrainer(
            model=student,
            teacher_model=teacher,
            args=DistillationConfig(max_completion_length=options.tokens, **common),
            train_dataset=Dataset.from_dict({"prompt": asked}),
            processing_class=tokenizer,
        )

    from trl.experimental.gkd import GKDConfig, GKDTrainer

    messages = [[*one, {"role": "assistant", "content": "."}] for one in asked]  # never trained on
    return GKDTrainer(
        model=student,
        teacher_model=teacher,
        args=GKDConfig(max_new_tokens=options.tokens, lmbda=1.0, **common),
        train_dataset=Dataset.from_dict({"messages": messages}),
        processing_class=tokenizer,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trainer", choices=["distillation", "gkd"])
    parser.add_argument("student", type=Path)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("prompts", type=Path, help="JSON lines with `prompt`")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--lr", type=float, default=1e-6)
    parser.add_argument("--bf16", action="store_true", help="autocast, and a teacher in bfloat16")
    options = parser.parse_args()

    student = AutoModelForCausalLM.from_pretrained(options.student, dtype=torch.float32)
    precision = torch.bfloat16 if options.bf16 else torch.float32
    teacher = AutoModelForCausalLM.from_pretrained(options.teacher, dtype=precision)
    tokenizer = AutoTokenizer.from_pretrained(options.student, padding_side="left")
    clock = Clock(student)

    with tempfile.TemporaryDirectory() as output:
        trainer = trainer_of(options, student, teacher, tokenizer, output)
        trainer.add_callback(clock)
        trainer.train()


if __name__ == "__main__":
    main()
