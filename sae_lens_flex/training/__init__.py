"""A training step as a function of tensors. Imports `ops` and torch only."""
