"""A version that answers a share of the requests, until a guardrail ends it."""
