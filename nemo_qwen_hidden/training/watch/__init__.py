"""Hidden states of a training run while it runs."""
