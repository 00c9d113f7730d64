"""The engine: the loop that steps a scheduler and a runner, and what surrounds it."""
