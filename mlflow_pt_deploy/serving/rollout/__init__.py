"""A second version beside the one that serves."""
