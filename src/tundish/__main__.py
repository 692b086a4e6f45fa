"""`python -m tundish` works like the `tundish` command."""

import sys

from tundish.cli import main

sys.exit(main())
