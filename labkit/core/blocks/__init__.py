"""KV cache blocks: the pool, block tables, prefix cache, eviction, and the block manager."""
