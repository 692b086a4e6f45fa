"""`python -m tundish` works like the `tundish` command."""

from tundish.cli import entry

entry()
