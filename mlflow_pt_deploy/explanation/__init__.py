"""Which words of a text made its label."""
