"""HTTP: requests, responses, MLflow's scoring protocol, tokens."""
