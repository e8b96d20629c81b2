"""A loaded model: inputs, outputs, pyfunc, inference service."""
