"""Graders decide whether a response is right, by its final answer. A verifier in the process of every
rollout engine turns their verdicts into rewards.
"""
