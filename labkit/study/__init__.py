"""Experiments: serve workloads under a grid of settings and collect one table."""
