"""Measurements that `labkit bench` runs, ours and peers'."""
