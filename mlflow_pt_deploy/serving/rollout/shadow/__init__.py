"""Versions that score answered requests too, in a process of their own."""
