"""Adapters: open one in any format, match its tensors to a base model, and compute its weight deltas."""
