"""What a run needs, reckoned from its config and the ``config.json`` of its models alone: memory of
every device, bytes of a step, and how many engines, replicas and ranks balance each other.

    config.json ─ architecture.py ─▶ shapes ─┐
    config ──────────────────────────────────┼─ needs.py, by memory.py ─▶ Need of each role ─ fitting.py ─▶ advice
    rates that were measured ─────────────── balance.py ─▶ Balance ─ simulate.py, the loop in virtual time ─▶ Simulation

Nothing is started, and no weights are read. Left out: what a process takes before it
has a model; networks, but for the bandwidth that the user names.
"""
