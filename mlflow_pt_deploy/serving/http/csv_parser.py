"""Reads one column of a CSV body as text, without pandas."""

from __future__ import annotations

import csv
import sys
from io import StringIO

from mlflow_pt_deploy.errors import RequestError
from mlflow_pt_deploy.serving.model.inputs import check_names


def parse_csv(body: bytes, column: str, max_rows: int) -> list[str]:
    """Read the cells of a column as text; no cell is converted to a number or to null.

    Args:
        body: UTF-8, with a header line.
        column: Name of the column.
        max_rows: Most rows.

    Raises:
        RequestError: The column is missing, a line does not match the header, or there are too many
            rows.
    """
    csv.field_size_limit(sys.maxsize)  # applies to the process; the body size is limited already
    try:
        reader = csv.reader(StringIO(body.decode("utf-8-sig"), newline=""), strict=True)
        lines = (line for line in reader if line)  # skips empty lines; an empty text is ""
        header = next(lines, None)
        if header is None:
            return []
        check_names(header, column)
        if column not in header:
            raise RequestError(
                f"the column '{column}' is missing; write the names of the columns into the first "
                "line, with commas between"
            )
        index = header.index(column)
        cells = []
        for line in lines:
            if len(line) != len(header):
                cells_of_line = f"{len(line)} cell{'s' if len(line) > 1 else ''}"
                raise RequestError(
                    f"line {reader.line_num} of the CSV has {cells_of_line} and its header "
                    f'{len(header)}; put texts with commas or quotes in double quotes ("...")'
                )
            cells.append(line[index])
            if len(cells) > max_rows:
                raise RequestError(
                    f"the CSV has more than {max_rows} rows, the most in one request (queue_rows). "
                    "Send several smaller requests."
                )
    except UnicodeDecodeError as error:
        raise RequestError("the body cannot be read as text/csv: it is not UTF-8") from error
    except csv.Error as error:
        raise RequestError(
            f"the body cannot be read as text/csv: quotes do not match near line "
            f"{reader.line_num}; "
            'put texts with commas or quotes in double quotes ("..."), and double the quotes inside'
        ) from error
    return cells
