"""Training of small things in a notebook cell, with transformers' models. The engine does not depend on it."""
