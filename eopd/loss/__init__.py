"""The objective of entropy-aware on-policy distillation, gated and chunked; torch and pydantic
only.

    objective.py      the loss of a micro-batch, from the three terms of a token
    gate.py, forward_kl.py, reverse_kl.py      those terms
    chunked.py, logits.py      the sum over loss rows, without a [T, V] tensor
    kernels.py      what CPUs and GPUs do differently to a chunk of logits
    head.py, tokens.py      what goes in besides hidden states

Out come a scalar loss with gradients, and sums for metrics. Left out: where the tokens come from
and how ranks share them (``learner/``).
"""
