"""What a check of `tundish doctor` has found, without the secrets that the environment holds."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from tundish.base.text import redacted


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    check: str
    state: Literal["ok", "problem", "absent"]
    """`absent`: not there, and not needed by everybody."""
    found: str
    advice: str = ""
    """What to do; sometimes there is something though nothing is wrong."""

    def redacted(self) -> "Finding":
        """The same without passwords and tokens."""
        return dataclasses.replace(self, found=redacted(self.found), advice=redacted(self.advice))
