"""`make bench-data`: how fast data is prepared, against LLM Foundry and the limits of the underlying libraries.

Every measurement prints one row. Data is generated in a scratch folder that is removed at the end; nothing is
downloaded. The whole takes about 15 minutes on two cores.
"""

import argparse
import os
import shutil
import tempfile
from functools import partial
from pathlib import Path

from benchmarks.measures import MEASURES, SPARK, Bench
from benchmarks.processes import Lab
from benchmarks.table import machine, show

PACKAGES = (
    *("tundish", "llm-foundry", "mosaicml-streaming", "tiktoken", "tokenizers", "transformers", "datasets"),
    *("orjson", "numpy", "torch", "pyspark"),
)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Benchmarks of data preparation.")
    names = ", ".join(f"{number} {measure.__name__}" for number, measure in MEASURES.items())
    parser.add_argument("--only", default="", metavar="1,3", help=f"measurements to run: {names}")
    parser.add_argument("--runs", type=int, default=3, help="runs of each side; medians are compared (default: 3)")
    parser.add_argument("--cores", type=int, help="CPU cores to use (default: all)")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown, for the README")
    parser.add_argument("--no-spark", action="store_true", help="skip the Spark cluster")
    parser.add_argument("--memory-gb", type=float, default=2, help="size of the file for 9; 0 skips it")
    parser.add_argument("--scale", type=float, default=1, help="scale of all other data, for a quick try")
    return parser.parse_args()


def _wanted(options: argparse.Namespace) -> list[int]:
    given = [int(number) for number in options.only.split(",") if number] or list(MEASURES)
    left_out = {SPARK} if options.no_spark else set[int]()
    if not options.memory_gb:
        left_out.add(max(MEASURES))
    return [number for number in given if number not in left_out]


def main() -> None:
    """Run the measures that the command line names."""
    options = _arguments()
    cores = sorted(os.sched_getaffinity(0))[: options.cores]
    os.sched_setaffinity(0, cores)  # every process started here inherits it
    scratch = Path(tempfile.mkdtemp(prefix="tundish-bench-"))
    try:
        print(machine(len(cores), PACKAGES) + "\n", flush=True)
        bench = Bench(Lab(scratch), options.runs, options.scale, options.memory_gb)
        names = {number: measure.__name__ for number, measure in MEASURES.items()}
        wanted = {number: partial(MEASURES[number], bench) for number in _wanted(options)}
        show(wanted, names, markdown=options.markdown)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
