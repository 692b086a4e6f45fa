"""What a check of `tundish doctor` has found, without the secrets that the environment holds."""

import dataclasses
import os
import re
from dataclasses import dataclass
from typing import Literal

_USER_PART = re.compile(r"(?<=://)\S*@")
_QUERY_VALUE = re.compile(r"([?&][^=&\s]+=)[^&\s]+")
_SECRET_NAME = re.compile(r"TOKEN|PASSWORD|SECRET|KEY|CREDENTIAL", re.IGNORECASE)
_SHORTEST_SECRET = 6
"""Characters; `true` and the like are no secrets."""


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


def redacted(text: str) -> str:
    """`text` without what stands before the `@` of a URI, the values of its query, and the environment's secrets.

    A password may hold `/` and `@`, so a URI is masked up to its last `@`.
    """
    secrets = {value for name, value in os.environ.items() if _SECRET_NAME.search(name)}
    # A setting's own password may hold blanks, where a URI in a text would end.
    secrets |= {match[1] for value in os.environ.values() if (match := re.search("://(.*)@", value))}
    shown = text
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= _SHORTEST_SECRET:
            shown = shown.replace(secret, "***")
    return _QUERY_VALUE.sub(r"\1***", _USER_PART.sub("***@", shown))
