"""Ops of LLM inference with references, variants, checks and benches. Knows tensors and scalars; never imports labkit."""
