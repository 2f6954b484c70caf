"""The NeMo side: Qwen2HiddenModel, its configuration, layer spec and weights. Imports NeMo (9 to 14 s on first use)."""
