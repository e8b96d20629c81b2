"""One copy of a model on each GPU, however many workers the server has."""
