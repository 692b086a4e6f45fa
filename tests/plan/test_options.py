"""plan/options.py: what the command line needs of a field is found at the field."""

from dataclasses import dataclass
from typing import Annotated

from tundish.plan.compute import Compute
from tundish.plan.options import Option, documented_fields


@dataclass
class Sample:
    """A class with each kind of field."""

    plain: int
    """A field
    on two lines."""
    silent: str
    offered: Annotated[int | None, Option(group="g", metavar="N")] = None
    """Offered."""


def test_fields_have_type_docstring_and_option() -> None:
    """A help text would be another field's, or an option have the wrong type."""
    found = [(field.name, field.type, field.text, field.option) for field in documented_fields(Sample)]
    assert found == [
        ("plain", int, "A field on two lines.", None),
        ("silent", str, "", None),
        ("offered", int | None, "Offered.", Option(group="g", metavar="N")),
    ]


def test_every_field_of_compute_says_what_it_is() -> None:
    """An option would have no help text."""
    fields = documented_fields(Compute)
    assert len(fields) == 8 and all(field.text.endswith(".") for field in fields)
