"""Tables that are read and written in chunks: Parquet, CSV, JSON lines."""
