"""Metrics, traces, access log and server log."""
