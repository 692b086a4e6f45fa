"""The composer launcher, by the name by which the scripts of earlier versions start it, on hosts and in batch jobs."""

import runpy

if __name__ == "__main__":
    runpy.run_module("tundish.launch.composer_launcher", run_name="__main__", alter_sys=True)
