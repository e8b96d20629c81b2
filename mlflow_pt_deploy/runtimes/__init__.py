"""Runtimes: one `Variant` class per runtime that exports and loads a model."""
