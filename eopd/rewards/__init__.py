"""Is a response right? Graders of final answers, and the verifier beside every rollout engine that
turns their verdicts into rewards.
"""
