"""Inside NeMo's own training: hidden states of a run as it goes, and losses on them."""
