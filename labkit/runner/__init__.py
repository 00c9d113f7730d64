"""Runners: compute a plan, or say how long it would take. The interface is in `base.py`."""
