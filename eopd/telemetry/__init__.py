"""What a run tells: one row of catalogue metrics a step, handed to every sink. Nothing here
decides anything.
"""
