"""Coded block redundancy: exact gradients from any complete set of data blocks."""
