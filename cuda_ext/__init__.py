"""Tensor operations with a CPU path and a reference; no search code."""
