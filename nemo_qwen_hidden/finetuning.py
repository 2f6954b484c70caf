"""A fine-tuning job: NeMo's own training, with capture, from settings."""
