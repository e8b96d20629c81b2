"""Batch prediction: tables of any size in and out."""
