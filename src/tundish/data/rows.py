"""Rows of tables (Delta, Parquet, Hugging Face datasets), as Arrow batches in bounded memory.

Only the columns of a sample are read; others are dropped, as the managed service did.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

from tundish.base.workers import limited
from tundish.data.findings import Location
from tundish.data.samples import Problem, Rules, Sample
from tundish.errors import DataError, SpecError

BATCH_ROWS = 256
BATCH_BYTES = 1 << 30
"""Of memory, for a batch of rows; those of the usual size take a thousandth."""


@dataclass(frozen=True, slots=True)
class TableRows:
    """Rows of a table, as an Arrow stream."""

    data: bytes
    units: int
    """Rows."""

    @property
    def size(self) -> int:
        """Rows."""
        return self.units

    def samples(self, rules: Rules) -> Iterator[tuple[int, Sample | Problem]]:
        """See Chunk."""
        import pyarrow as pa

        table = pa.ipc.open_stream(self.data).read_all()
        for number in range(table.num_rows):
            try:
                (row,) = table.slice(number, 1).to_pylist()
            except UnicodeDecodeError as error:
                found = f"the byte at offset {error.start} of a text is not UTF-8. Write the text anew."
                yield number + 1, Problem("not UTF-8", found)
            else:
                yield number + 1, rules.check(_without_nulls(row))

    @classmethod
    def of(cls, table: Any) -> "TableRows":
        """From an Arrow table or record batch."""
        import pyarrow as pa

        sink = io.BytesIO()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write(table)
        return cls(sink.getvalue(), table.num_rows)


def _without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose messages lack the fields that are null, as fields of a struct are where a message has none."""
    messages = row.get("messages")
    if not isinstance(messages, list):
        return row
    kept = [
        {
            name: value
            for name, value in cast(dict[str, Any], message).items()
            if value is not None or name in ("role", "content")
        }
        if isinstance(message, dict)
        else message
        for message in cast(list[Any], messages)
    ]
    return {**row, "messages": kept}


def sample_columns(columns: Sequence[str], rules: Rules, given: str) -> list[str]:
    """The columns of a table that make a sample.

    Raises:
        SpecError: they are not there.
    """
    if rules.task_type == "CHAT_COMPLETION":
        needed, found = "messages", ["messages"]
    else:
        responses = [name for name in ("response", "completion") if name in columns]
        needed, found = "prompt and response (or completion, not both)", ["prompt", *responses]
        if len(responses) != 1:
            found = []
    if not found or not set(found) <= set(columns):
        text = f"found the columns {', '.join(columns) or 'none'}; {rules.task_type} needs {needed}."
        raise SpecError(f"{given}: {text} Rename the columns, or choose another task_type.")
    return found


def bounded(place: Location, batches: Iterator[Any]) -> Iterator[TableRows]:
    """Arrow batches or tables as chunks, each in bounded memory: a file of few bytes can hold texts of any length.

    Raises:
        DataError: one takes more.
    """
    before = 0
    while True:
        try:
            with limited(f"{place.of(before + 1)}: the reader of tables", memory=BATCH_BYTES):
                batch = next(batches, None)
                if batch is None:
                    return
                rows = TableRows.of(batch)
        except MemoryError as error:
            raise DataError(
                f"{place.of(before + 1)}: this row and those after it take more than {BATCH_BYTES >> 20:,} MiB. "
                "Shorten their texts, or write the table anew without dictionaries."
            ) from error
        before += rows.units
        if rows.units:
            yield rows


def batch_rows(metadata: Any) -> int:
    """How many rows of a Parquet file to read at a time: fewer of long ones."""
    size = sum(metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups))
    return max(1, min(BATCH_ROWS, (BATCH_BYTES >> 4) * metadata.num_rows // max(1, size)))
