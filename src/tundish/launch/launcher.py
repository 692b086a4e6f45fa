"""The composer launcher, except that it does not end before its ranks: `python -m tundish.launch.launcher -n 2 …`.

A cluster that preempts a run, and a machine that shuts down, send SIGTERM to all of its processes at once. Composer's
launcher would give its ranks half a minute and kill them, however far their checkpoint is.
"""

import signal
import sys

from composer.cli import launcher

if __name__ == "__main__":
    # Composer has set handlers when it was imported.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    sys.exit(launcher.main())
