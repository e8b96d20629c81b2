"""Folders from which images, manifests and functions are built: ``pt-deploy package``."""

TARGETS = ("docker", "kubernetes", "kserve", "lambda")
"""What a folder can be for."""
