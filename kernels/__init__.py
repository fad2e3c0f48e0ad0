"""Numerical kernels; need torch, triton and numpy only."""
