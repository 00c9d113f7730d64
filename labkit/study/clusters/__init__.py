"""Simulated clusters: replicas on one virtual clock behind a router, and prefill apart from decode."""
