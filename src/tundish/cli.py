"""The `tundish` command: the verbs of `tundish.foundation_model` for a terminal.

The only place that prints results or exits. Exit codes: 0 done, 1 failed (invalid data, a run that failed), 2 wrong
arguments.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from tundish import __version__

CREATE_OPTIONS: dict[str, dict[str, Any]] = {
    "model": {"help": "supported model's name (see `tundish models`) or folder of a Hugging Face model"},
    "train-data-path": {
        "metavar": "PATH",
        "help": ".jsonl file, catalog.schema.table, org/dataset/split, or folder of .txt files for CONTINUED_PRETRAIN",
    },
    "register-to": {"metavar": "NAME", "help": "catalog.schema or catalog.schema.name"},
    "task-type": {"metavar": "TYPE", "help": "CHAT_COMPLETION (default), INSTRUCTION_FINETUNE or CONTINUED_PRETRAIN"},
    "eval-data-path": {"metavar": "PATH", "help": "evaluation data in the format of the training data"},
    "eval-prompts": {"nargs": "+", "metavar": "TEXT", "help": "texts that the model goes on from at every checkpoint"},
    "training-duration": {"metavar": "N", "help": "3ep, 100ba or 1_000_000tok (default 1ep)"},
    "learning-rate": {"metavar": "X", "help": "peak (default 5e-7; 1e-5 for Llama 3.1 405B)"},
    "context-length": {"type": int, "metavar": "N", "help": "tokens in a row (default 8192 or the model's maximum)"},
    "experiment-path": {"metavar": "NAME", "help": "MLflow experiment (default /Users/<user>/<run name>)"},
    "custom-weights-path": {"metavar": "PATH", "help": "Composer checkpoint to start from"},
    "data-prep-cluster-id": {
        "metavar": "MASTER",
        "help": "Spark that prepares the data: spark://host:port, sc://host:port, local[4] (default: this machine)",
    },
    "run-name": {"metavar": "NAME", "help": "default <task>-<model>-<6 random characters>"},
}


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    description = "Fine-tune language models on your own machines: from data to a registered model in one call."
    parser = argparse.ArgumentParser(prog="tundish", description=description)
    parser.add_argument("--version", action="version", version=f"tundish {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    create = _command(commands, "create", "start a run and return; work goes on in the background")
    _add_create_options(create)
    create.add_argument("--no-validate-inputs", action="store_true", help="leave checking the rows to the run")
    create.add_argument("--wait", action="store_true", help="show the run's progress until it has ended")
    render = _command(commands, "render", "print the LLM-Foundry YAML of a run without running anything", json=False)
    _add_create_options(render)
    render.add_argument(
        "--launch", action="store_true", help="print instead what starts it: sbatch script, or commands"
    )
    render.add_argument("--out", metavar="DIR", help="with --launch: make DIR, with data and a script for each host")
    render.add_argument(
        "--master-addr", metavar="HOST", help="with --launch: the first host's address, as the others reach it"
    )
    render.add_argument("--master-port", metavar="PORT", type=int, default=29500, help="… a port of it that is free")
    validate = _command(commands, "validate", "check every row of the data as create does, and show a sample")
    _add_create_options(validate)
    validate.add_argument("--report", metavar="FILE", help="write the report with all line numbers as JSON")
    estimate = _command(commands, "estimate", "tell how many samples, tokens, rows and steps a run would have")
    _add_create_options(estimate)
    estimate.add_argument("--plot", metavar="FILE", help="draw the histogram of sample lengths as PNG")
    prepare = _command(commands, "prepare", "tokenize and pack the data, for a run to reuse")
    _add_create_options(prepare)
    prepare.add_argument("--out", metavar="DIR", help="copy the shards there: DIR/train and DIR/eval")
    run = _command(
        commands, "run", "start the run that a YAML file of create() arguments describes, and show its progress"
    )
    run.add_argument("file", help="YAML file with the arguments of create()")
    run.add_argument("arguments", nargs="*", metavar="key=value", help="arguments that replace the file's")

    _add_run_commands(commands)
    return parser


def _add_run_commands(commands: Any) -> None:
    """Those that look at runs, or change them."""
    _command(commands, "get", "show one run").add_argument("run", help="run name")
    listing = _command(commands, "list", "show runs, newest first")
    listing.add_argument("--status", action="append", metavar="STATUS", help="only runs with this status (repeatable)")
    listing.add_argument("--limit", type=int, default=100, metavar="N", help="at most N runs (default 100)")
    cancel = _command(commands, "cancel", "stop runs; checkpoints stay")
    cancel.add_argument("runs", nargs="*", metavar="run", help="run names")
    cancel.add_argument("--experiment-id", metavar="ID", help="all runs of an MLflow experiment")
    resume = _command(commands, "resume", "go on with a run that has failed, was canceled or was killed")
    resume.add_argument("run", help="run name")
    resume.add_argument("--wait", action="store_true", help="show the run's progress until it has ended")
    _add_compute_options(resume)
    events = _command(commands, "events", "show what happened to a run")
    events.add_argument("run", help="run name")
    events.add_argument("--follow", action="store_true", help="go on until the run has ended")
    checkpoints = _command(commands, "checkpoints", "list a run's checkpoints, or verify them")
    checkpoints.add_argument("run", help="run name; to verify, also a checkpoint's path or URI, or that of its folder")
    checkpoints.add_argument(
        "--verify", action="store_true", help="read every byte and compare it with what was written"
    )
    export = _command(commands, "export", "write a checkpoint as a Hugging Face folder")
    export.add_argument("source", metavar="RUN|CHECKPOINT", help="run name (its newest) or a checkpoint's path or URI")
    export.add_argument("--out", metavar="DIR", help="folder to make (default: RUN-ep#-ba# in this folder)")
    export.add_argument(
        "--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the weights (default bfloat16)"
    )
    export.add_argument("--model", metavar="NAME", help="base model of a checkpoint that no run here has made")
    _command(commands, "models", "list the supported models")
    _command(commands, "doctor", "tell what this machine and its surroundings lack for a run")


def _command(commands: Any, name: str, text: str, *, json: bool = True) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + "."
    )
    if json:
        command.add_argument("--json", action="store_true", help="print one JSON document")
    return command


def _add_create_options(command: argparse.ArgumentParser) -> None:
    for name, settings in CREATE_OPTIONS.items():
        command.add_argument(f"--{name}", **settings)
    _add_compute_options(command)
    command.add_argument("--set", action="append", metavar="KEY=VALUE", help="LLM-Foundry key to override (repeatable)")


def _add_compute_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--devices", type=int, metavar="N", help="GPUs of a node, or ranks on its CPU (default: all GPUs, else 1)"
    )
    command.add_argument("--nodes", type=int, metavar="N", help="nodes (default 1)")
    command.add_argument("--device", choices=["gpu", "cpu"], help="default: gpu where there is one")
    command.add_argument("--launcher", choices=["local", "slurm"], help="default: local, this machine")
    command.add_argument("--time-limit", metavar="T", help="of a Slurm job: 12:00:00 or 2-00:00:00")
    command.add_argument("--sbatch", action="append", metavar="OPTION=VALUE", help="option of sbatch (repeatable)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    arguments = build_parser().parse_args(argv)
    # Imported after parsing: `--help` answers at once.
    from tundish.cli_commands import COMMANDS
    from tundish.data.findings import printable
    from tundish.errors import DataError, InputError, RequestError, RunNotFoundError, TundishError

    try:
        return COMMANDS[arguments.command](arguments)
    except TundishError as error:
        print(f"tundish: {printable(error.message)}", file=sys.stderr)
        wrong_arguments = isinstance(error, InputError | RequestError | RunNotFoundError)
        return 2 if wrong_arguments and not isinstance(error, DataError) else 1
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except OSError as error:
        print(
            f"tundish: {error}. Check that the path is there and may be written, and that the disk has room.",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        watching = arguments.command in ("create", "run", "resume", "events")
        goes_on = " watching; a run that was started goes on" if watching else ""
        print(f"\ntundish: stopped{goes_on}.", file=sys.stderr)
        return 130
