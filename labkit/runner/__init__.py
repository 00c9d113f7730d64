"""What computes a plan, or says how long it would take: `base.py` is the boundary."""
