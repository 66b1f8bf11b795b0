"""The engine that writes, and several of them as one."""
