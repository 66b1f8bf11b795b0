"""A run is a directory of files: its config, checkpoints, metrics, lock and progress. Nothing here
starts anything.
"""
