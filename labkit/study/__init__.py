"""Workloads served under a grid of settings, into one table. Knows engines from outside; nothing here serves anyone."""
