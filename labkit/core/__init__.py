"""The scheduler and what it needs. numpy and the standard library only: no torch, clock, I/O or tokenizer.

Start with `scheduling/scheduler.py`.
"""
