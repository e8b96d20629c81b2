"""From a request to its answer: options, batcher, the pyfunc for MLflow, our own small server."""
