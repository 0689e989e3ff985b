"""stabletrain: train, watch, compare and explain methods that make training stable."""

__version__ = "0.1.0"
