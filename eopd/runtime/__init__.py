"""The only room that knows Ray: placement, actors, and the life of a run."""
