"""Gradient aggregators: several gradients become one update."""
