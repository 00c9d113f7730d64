"""Other projects' names over labkit, each only when its module is imported."""
