"""What a Parquet body unpacks to, found out before it is made into a table.

Ten kilobytes can hold the same text a million times, or one text of 300 MB.
"""

from __future__ import annotations

from io import BytesIO

from mlflow_pt_deploy.errors import RequestError

UNPACKED_BYTES = 4 * 2**20
_BATCH_ROWS = 16


def check_unpacked(body: bytes, most_rows: int) -> None:
    """Refuse a file of too many rows, or of more bytes than JSON could have carried.

    The limit is `UNPACKED_BYTES`, or twice the body where that is longer: image files hardly
    compress. It is unpacked a few rows at a time, so a single text can still go over the limit,
    for as long as it takes to see that.

    Raises:
        RequestError: It is too large, or holds lists or records; says so.
        Exception: Whatever Arrow raises where it is no Parquet file.
    """
    from pyarrow import types  # type: ignore[import-untyped]
    from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]

    # Of what the footer says, sizes are left alone: in a damaged file Arrow (25.0) looks for a row
    # group's, or a column's, with no net under it, and ends the process.
    file, most_bytes = ParquetFile(BytesIO(body)), max(UNPACKED_BYTES, 2 * len(body))
    if file.metadata.num_rows > most_rows:
        raise RequestError(
            f"the Parquet file has {file.metadata.num_rows} rows; one request may have "
            f"{most_rows} (queue_rows). Send several smaller requests."
        )
    # no model takes them, and a list of a billion nulls takes no space
    if any(types.is_nested(field.type) for field in file.schema_arrow):
        raise RequestError("the Parquet file's columns must be flat, without lists and records")
    seen = 0
    for batch in file.iter_batches(_BATCH_ROWS, use_threads=False):
        seen += batch.nbytes
        if seen > most_bytes:
            raise RequestError(
                f"the Parquet file unpacks to more than {most_bytes} bytes. "
                "Send several smaller requests."
            )
