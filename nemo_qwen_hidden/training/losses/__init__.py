"""Losses on hidden states of a training run."""
