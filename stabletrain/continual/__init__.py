"""Parallel continual learning: tasks whose data streams overlap in time, and one network that learns them all."""
