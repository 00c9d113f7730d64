"""What computes hidden states: a native decoder for the common families, transformers for every other one."""
