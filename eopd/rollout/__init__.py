"""The engine that samples responses, and the pool of several engines."""
