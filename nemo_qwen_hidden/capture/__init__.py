"""Taking hidden states while a Megatron decoder runs: taps, the forward-only pipeline, gathering.

Knows Megatron's modules and process groups; not how the model was built, and not where its slices go.
"""
