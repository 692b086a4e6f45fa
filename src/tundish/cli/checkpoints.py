"""The commands for checkpoints: checkpoints, export."""

import argparse
import time

from tundish.base.progress_bar import progress_bar
from tundish.cli.output import RUN_HELP, add_json, print_json
from tundish.cli.parsing import Command
from tundish.errors import CheckpointError, SpecError
from tundish.plan.address import Address, local_path
from tundish.runs import selecting


def checkpoints_options(command: argparse.ArgumentParser) -> None:
    """What `tundish checkpoints` takes."""
    add_json(command)
    command.add_argument(
        "run", metavar="RUN", help=f"{RUN_HELP}; with --verify, also the path or URI of a checkpoint or of its folder"
    )
    command.add_argument(
        "--verify", action="store_true", help="read every byte and compare it with the recorded checksums"
    )


def checkpoints(arguments: argparse.Namespace) -> int:
    """`tundish checkpoints [--verify]`."""
    if arguments.verify:
        return _verify(selecting.named_or_address(arguments.run), as_json=arguments.json)
    paths = selecting.checkpoints(selecting.named(arguments.run))
    if arguments.json:
        return print_json(paths)
    print("\n".join(paths) or "No checkpoints created yet for this run. Please try again later.")
    return 0


def _verify(given: str, *, as_json: bool) -> int:
    from tundish.checkpoints.folder import verify
    from tundish.checkpoints.manifest import MANIFEST
    from tundish.runs.exporting import local_checkpoints

    results: list[dict[str, object]] = []
    for name, folder in local_checkpoints(given):
        if isinstance(folder, CheckpointError):
            results.append({"checkpoint": name, "bytes": None, "problems": [folder.message]})
            if not as_json:
                print(f"{name}: DAMAGED\n  {folder.message}")
            continue
        files = [file for file in folder.iterdir() if file.is_file()] if folder.is_dir() else []
        size, done = sum(file.stat().st_size for file in files), [0]
        with progress_bar(f"Reading {folder.name}") as tell:

            def count(read: int, size: int = size, done: list[int] = done) -> None:
                done[0] += read
                tell(done[0], size)

            problems = verify(folder, count)
        results.append({"checkpoint": str(folder), "bytes": size, "problems": problems})
        if not as_json:
            by = "by SHA-256 from the manifest" if (folder / MANIFEST).is_file() else "by CRC-32; it has no manifest"
            print(f"{folder.name}: {'OK' if not problems else 'DAMAGED'}, {size:,} bytes ({by})")
            for problem in problems:
                print(f"  {problem}")
    if as_json:
        print_json(results)
    elif not results:
        print("No checkpoints created yet for this run. Please try again later.")
    return 1 if any(entry["problems"] for entry in results) else 0


def export_options(command: argparse.ArgumentParser) -> None:
    """What `tundish export` takes."""
    add_json(command)
    command.add_argument(
        "source",
        metavar="RUN|CHECKPOINT",
        help=f"{RUN_HELP} (exports the newest checkpoint), or path or URI of a checkpoint",
    )
    command.add_argument("--out", metavar="DIR", help="folder to create (default: RUN-ep#-ba# in the current folder)")
    command.add_argument(
        "--dtype",
        choices=["bfloat16", "float32"],
        default="bfloat16",
        help="dtype of the exported weights (default bfloat16)",
    )
    command.add_argument(
        "--model", metavar="NAME", help="base model, for a checkpoint that was not made by a run of this machine"
    )


def export(arguments: argparse.Namespace) -> int:
    """`tundish export`."""
    from tundish.runs.exporting import export_checkpoint, find_exportable

    model = Address.parse(arguments.model, "model", "--model").text if arguments.model else None
    source = find_exportable(selecting.named_or_address(arguments.source), model)
    short = "" if arguments.dtype == "bfloat16" else f"-{arguments.dtype}"
    out = local_path(arguments.out or f"{source.name}-{source.checkpoint.name}{short}", "--out")
    if out.exists():
        raise SpecError(f"--out: {out} already exists. Choose a new folder.")
    started, done = time.monotonic(), [0]
    with progress_bar(f"Exporting {source.checkpoint.name}") as tell:

        def count(written: int, total: int) -> None:
            done[0] += written
            tell(done[0], total)

        export_checkpoint(source, out, arguments.dtype, count)
    if arguments.json:
        facts = {"checkpoint": str(source.checkpoint), "export": str(out), "dtype": arguments.dtype}
        return print_json({**facts, "bytes": done[0]})
    seconds = time.monotonic() - started
    print(
        f"{source.checkpoint.name} of {source.name}: {done[0]:,} bytes of {arguments.dtype} weights in {seconds:.1f} s."
    )
    print(out)
    return 0


COMMANDS = {
    "checkpoints": Command(
        options=checkpoints_options,
        action=checkpoints,
        examples=["tundish checkpoints RUN", "tundish checkpoints RUN --verify"],
    ),
    "export": Command(
        options=export_options,
        action=export,
        examples=["tundish export RUN --out ./model", "tundish export ./checkpoints/ep1-ba60 --model ./my-model"],
    ),
}
