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
                reason = f"the byte at offset {error.start} of a text is not UTF-8. Write the text again as UTF-8."
                yield number + 1, Problem("not UTF-8", reason)
            else:
                messages = row.get("messages")
                if isinstance(messages, str):
                    yield number + 1, rules.parse_messages(messages)
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
        SpecError: they are not there, or there twice.
    """
    if rules.task_type == "CHAT_COMPLETION":
        needed, names = "messages", ["messages"]
    else:
        responses = [name for name in ("response", "completion") if name in columns]
        needed, names = "prompt and response (or completion, not both)", ["prompt", *responses]
        if len(responses) != 1:
            names = []
    if not names or not set(names) <= set(columns):
        text = f"has the columns {', '.join(columns) or 'none'}; {rules.task_type} needs {needed}."
        raise SpecError(f"{given}: {text} Rename the columns, or choose another task_type.")
    if twice := [name for name in names if columns.count(name) > 1]:
        raise SpecError(f"{given}: has two columns named {twice[0]}. Rename or drop one of them.")
    return names


def check_types(fields: Sequence[Any], rules: Rules, given: str) -> None:
    """Refuse columns that cannot hold a sample's texts or messages by their Arrow type.

    A column of nulls passes: its rows are refused one by one, and there may be none.

    Raises:
        SpecError: a column has another type.
    """
    import pyarrow.types as pa_types

    def is_text(kind: Any) -> bool:
        kind = kind.value_type if pa_types.is_dictionary(kind) else kind
        checks = (pa_types.is_string, pa_types.is_large_string, pa_types.is_string_view, pa_types.is_null)
        return any(check(kind) for check in checks)

    def is_messages(kind: Any) -> bool:
        lists = (pa_types.is_list, pa_types.is_large_list, pa_types.is_fixed_size_list, pa_types.is_list_view)
        if not any(check(kind) for check in lists) or not pa_types.is_struct(kind.value_type):
            return any(check(kind) for check in lists) and pa_types.is_null(kind.value_type)
        message = {field.name: field.type for field in kind.value_type}
        return all(name in message and is_text(message[name]) for name in ("role", "content"))

    chat = rules.task_type == "CHAT_COMPLETION"
    needed = "a list of structs with role and content, or JSON text" if chat else "text"
    for field in fields:
        if not (is_text(field.type) or (chat and is_messages(field.type))):
            kind = str(field.type)
            shown = kind if len(kind) <= 200 else f"{kind[:200]}…"
            raise SpecError(f"{given}: the column {field.name} has the type {shown}; it must be {needed}. Convert it.")


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
                f"{place.of(before + 1)}: this row and those after it take more than {BATCH_BYTES >> 20:,} MiB of "
                "memory. Shorten their texts, or write the data again without dictionaries."
            ) from error
        before += rows.units
        if rows.units:
            yield rows


def batch_rows(metadata: Any) -> int:
    """How many rows of a Parquet file to read at a time: fewer of long ones."""
    size = sum(metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups))
    return max(1, min(BATCH_ROWS, (BATCH_BYTES >> 4) * metadata.num_rows // max(1, size)))
