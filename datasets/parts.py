"""What is kept of a part of a list while a stage works on it: how each row ended, and its picture.

A part is one Parquet file in the work area, its pages with checksums, its rows in list order.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from datasets.curate import Outcome, curate
from datasets.errors import CorruptionError
from datasets.keys import sha256_hex
from datasets.url_list import Row

SCHEMA = pa.schema(
    [("position", pa.int64()), ("outcome", pa.string()), ("sha256", pa.string()), ("png", pa.large_binary())]
)


def curate_part(
    rows: Iterable[tuple[int, bytes | Outcome]],
    *,
    listed: Sequence[Row],
    size_px: int,
    crop: Literal["none", "centre"],
) -> bytes:
    """Return the file to keep for a part: columns position, outcome, sha256 ("" for none) and png.

    Args:
        rows: Position in the list, and the file that came or why none did; in any order.
        listed: The rows of the whole list; a file whose digest differs from the one listed is refused.
        size_px: Side of the pictures.
        crop: How pictures that are not square are cut, see ``curate``.
    """
    ends = sorted(
        (_end(position, got, listed[position], size_px=size_px, crop=crop) for position, got in rows),
        key=lambda end: end[0],
    )
    columns = list(zip(*ends, strict=True))
    arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
    buffer = io.BytesIO()
    pq.write_table(pa.table(arrays, SCHEMA), buffer, compression="none", write_page_checksum=True)
    return buffer.getvalue()


def read_part(data: bytes, columns: list[str], *, num_rows: int) -> Iterator[tuple[Any, ...]]:
    """Yield columns of the rows of a kept part, in list order.

    Raises:
        CorruptionError: When the file is damaged or has another number of rows.
    """
    try:
        table = pq.read_table(io.BytesIO(data), columns=columns, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise CorruptionError(
            f"a kept part must be readable, but is damaged ({error}); run it again"
        ) from error
    if table.num_rows != num_rows:
        raise CorruptionError(
            f"a kept part must have {num_rows} rows, but has {table.num_rows}; run it again"
        )
    yield from zip(*(table.column(name).to_pylist() for name in columns), strict=True)


def _end(
    position: int, got: bytes | Outcome, row: Row, *, size_px: int, crop: Literal["none", "centre"]
) -> tuple[int, str, str, bytes | None]:
    """Return how one row ended: position, outcome, digest of the file that came, picture."""
    if isinstance(got, Outcome):
        return position, got.value, "", None
    digest = sha256_hex(got)
    if row.sha256 and digest != row.sha256:
        return position, Outcome.HASH_MISMATCH.value, digest, None
    picture = curate(got, size_px=size_px, crop=crop)
    if isinstance(picture, Outcome):
        return position, picture.value, digest, None
    return position, Outcome.SUCCESS.value, digest, picture
