"""Parts of input that only make sense distributed."""
