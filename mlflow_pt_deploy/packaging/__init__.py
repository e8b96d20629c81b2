"""Folders from which images, manifests and functions are built: ``pt-deploy package``."""
