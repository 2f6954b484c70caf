"""The edge to torch.distributed and Megatron: process groups, starting ranks, Megatron on a machine without a GPU."""
