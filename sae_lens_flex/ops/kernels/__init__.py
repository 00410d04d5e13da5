"""Triton kernels. Each file has one family of kernels with its launcher, and imports no other."""
