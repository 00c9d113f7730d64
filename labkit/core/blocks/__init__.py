"""Blocks of the KV cache: the pool, the tables, the prefix cache, eviction, and the manager over them."""
