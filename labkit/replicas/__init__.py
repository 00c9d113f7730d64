"""Several engines in processes of their own behind one router: `lk.Replicas`, `LLM(data_parallel_size=2)`."""
