"""Versions of a model over time: hot swap, registry polls, model cache."""
