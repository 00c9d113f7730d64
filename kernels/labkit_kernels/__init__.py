"""Ops of LLM inference: references, variants, checks, benches. Knows tensors and scalars; never imports labkit."""
