"""The engine that samples responses."""
