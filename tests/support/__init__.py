"""What several tests share: tiny random models, transformers as the reference, functions that ranks run."""
