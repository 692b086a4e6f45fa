"""The composer launcher, except that it does not end before its ranks: `python -m tundish.launch.composer_launcher`.

A cluster that preempts a run, and a machine that shuts down, send SIGTERM to all of its processes at once. Composer's
own launcher would give its ranks half a minute and then kill them, even while they write a checkpoint.
"""

import signal
import sys

from composer.cli import launcher

if __name__ == "__main__":
    # Composer set handlers when it was imported.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    sys.exit(launcher.main())
