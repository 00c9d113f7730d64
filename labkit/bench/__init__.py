"""The benchmarks behind `labkit bench`: labkit's own, and of other engines for comparison."""
