"""The objective of entropy-aware on-policy distillation, gated and chunked; torch and pydantic
only.

    objective.py    the loss of a micro-batch, from the reverse and forward KL of a token
    gate.py         how much forward KL a token gets
    chunked.py      from hidden states to sums over loss rows and back, without a [T, V] tensor
    kernels.py      what CPUs and GPUs do differently to a chunk of logits

In go hidden states, the student's output head, and what sampler and teacher gave of every token.
Out come a scalar loss with gradients, and sums for metrics. Left out: where the tokens come from
and how ranks share them (``learner/``).
"""
