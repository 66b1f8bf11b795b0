"""The objective of entropy-aware on-policy distillation, gated and chunked; torch and pydantic
only.

In: hidden states, the output head, what sampler and teacher said of every token. Out: a scalar loss
with gradients, and sums for metrics. Left out: where the tokens come from and how ranks share them
(``learner/``).
"""
