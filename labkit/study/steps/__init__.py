"""Whole simulations in C++, with the scheduler's Python as their reference."""
