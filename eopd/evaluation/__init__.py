"""Benchmarks: many samples per prompt, graded, and summed up as avg@n and pass@k with standard
errors.

Prompts and engines come in, one ``BenchmarkResult`` goes out. Knows only roles, so it runs on any
engine.
"""
