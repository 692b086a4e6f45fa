"""One finding of `tundish doctor`, without secrets from the environment."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from tundish.base.text import redacted


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    check: str
    state: Literal["ok", "problem", "absent"]
    """`absent`: not there, and not needed for every run."""
    found: str
    advice: str = ""
    """What to do; may also be set where nothing is wrong."""

    def redacted(self) -> "Finding":
        """The same without passwords and tokens."""
        return dataclasses.replace(self, found=redacted(self.found), advice=redacted(self.advice))
