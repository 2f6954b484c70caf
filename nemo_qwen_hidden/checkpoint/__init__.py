"""A Qwen2 checkpoint folder in Hugging Face's form: where it is, its architecture, its tensors.

Knows neither NeMo nor Megatron; torch is imported only when a tensor is read.
"""
