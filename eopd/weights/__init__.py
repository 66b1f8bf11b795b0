"""The wire from the learner to every engine."""
