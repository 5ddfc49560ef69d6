"""Fused GPU kernels beside the PyTorch code that they replace."""
