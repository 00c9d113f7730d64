"""The engine: runs the loop over a scheduler and a runner, and everything around it."""
