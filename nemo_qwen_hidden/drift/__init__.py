"""How the states of the same tokens change from step to step."""
