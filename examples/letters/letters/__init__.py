"""The functions of this project."""
