"""Several processes serve one model: ranks, what they tell each other, and the runner that drives them."""
