"""Stages of the pipeline, and the run of all of them."""
