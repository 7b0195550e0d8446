"""Checkpoints of other libraries: one module for each, with its names of tensors, configuration and preprocessing."""
