"""Versions beside the one that serves."""
