"""One function for each command: parsed arguments to a JSON document."""
