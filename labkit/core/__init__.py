"""The scheduler's world: no torch, no clock, no I/O, no tokenizer; numpy and the standard library.

Start with `scheduler.py`.
"""
