"""The supervisor, by the name by which the batch scripts of earlier versions start it.

A job may wait in its cluster's queue, or be requeued, after tundish was upgraded: its script is that of its submission.
"""

import sys

from tundish.supervise.supervisor import main

if __name__ == "__main__":
    main(*sys.argv[1:])
