"""One update of the student from one batch: packed forward, entropy-aware objective,
DeepSpeed step.
"""
