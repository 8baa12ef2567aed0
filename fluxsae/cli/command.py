"""The `fluxsae` command: Lightning's Trainer verbs over config files, and commands for a whole study."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import fluxsae
from fluxsae.files import bundled, config_file, unknown_key

VERBS = {
    "fit": "train a sparse autoencoder on captured tokens",
    "validate": "measure a trained autoencoder on held-out prompts",
    "predict": "generate and capture, score, or draw overlays",
    "test": "steer features and measure what changes",
}
"""The Trainer's verbs and what they do here."""

COMMANDS = ("init", "study", "demo", "figures", "verify")
"""All others."""


def main(args: Sequence[str] | None = None) -> int:
    """Run one command; its exit code is 0 when all went well, 2 after a sentence on stderr about what did not."""
    arguments = list(sys.argv[1:] if args is None else args)
    show_traceback = "--traceback" in arguments or bool(os.environ.get("FLUXSAE_TRACEBACK"))
    arguments = [argument for argument in arguments if argument != "--traceback"]
    try:
        return _run(arguments)
    except BrokenPipeError:
        return 1
    except KeyboardInterrupt:
        return _interrupted("interrupted", arguments, signal.SIGINT)
    except Exception as error:
        if not _is_users(error):
            raise
        if show_traceback:
            traceback.print_exception(error)
        print(f"fluxsae: {_sentence(error)}", file=sys.stderr)
        return 2


def run_stage(verb: str, arguments: Sequence[str], root: Path | None = None) -> None:
    """Run a Trainer verb in this process, as `fluxsae VERB ARGUMENTS…` does, and let its errors through.

    `root` is the study's folder, where it is known. Nothing keeps what the verb had in memory, so that is free once it
    has been collected.
    """
    from fluxsae.cli.trainer import TrainerCLI  # Lightning takes seconds to import, which `--help` need not wait for

    _quieten()  # after the import, which sets its loggers' levels
    vars(
        TrainerCLI.start(verb, arguments, root=root)
    ).clear()  # jsonargparse holds on to it until another one is parsed


def _draw(arguments: Sequence[str], root: Path | None = None) -> list[Path]:
    from fluxsae.cli.figures import read_figures
    from fluxsae.figures import draw_figures

    return draw_figures(read_figures(arguments, root))


def _run_stage_of_study(command: str, config: Path, more: Sequence[str], root: Path) -> None:
    arguments = ["-c", str(config), *more]
    if command == "figures":
        _draw(arguments, root)
    else:
        run_stage(command, arguments, root)


def _run(arguments: list[str]) -> int:
    verb = arguments[0] if arguments else ""
    if verb in VERBS:
        return _run_interruptible(partial(run_stage, verb, arguments[1:]), arguments)
    if verb == "figures":
        for path in _draw(arguments[1:]):
            print(path)
        return 0
    options = _parser().parse_args(arguments or ["--help"])
    if options.command in ("study", "demo"):
        return _run_interruptible(partial(_study, options), arguments)
    if options.command == "init":
        return _init(options)
    return _verify(options.folder)


def _study(options: argparse.Namespace) -> None:
    from fluxsae.study import run_study

    config = bundled("configs/tiny") / "study.yaml" if options.command == "demo" else options.config
    run_study(config, _run_stage_of_study, force=options.force or (), until=options.until, root=options.root)


def _init(options: argparse.Namespace) -> int:
    from fluxsae.study import start_study

    start = start_study(options.folder, options.like, options.prompts, options.model, options.sites, options.steps)
    sites, steps = ", ".join(start.sites), ", ".join(map(str, start.steps))
    print(f"{start.folder} holds a study like {options.like}: {start.n_prompts} prompts, {start.model},")
    print(f"  {sites} at step {steps}.")
    for text in start.check:
        print(f"  Check: {text}")
    print(f"Run it with:\n  fluxsae study -c {shlex.quote(str(start.folder / 'study.yaml'))}")
    return 0


def _run_interruptible(run: Callable[[], None], arguments: list[str]) -> int:
    from fluxsae.runtime import Interrupted, interruptible

    try:
        with interruptible():
            run()
    except Interrupted as stop:
        return _interrupted(str(stop), arguments, stop.signum)
    return 0


def _interrupted(what: str, arguments: list[str], signum: int) -> int:
    """Say how to go on, once for all processes; the exit code that a shell expects."""
    resume = ["--ckpt_path", "last"] if arguments[:1] == ["fit"] and "--ckpt_path" not in arguments else []
    if os.environ.get("LOCAL_RANK", "0") == "0":
        command = shlex.join(["fluxsae", *arguments, *resume])
        print(f"\nfluxsae: {what}; go on with:\n  {command}", file=sys.stderr)
    return 128 + signum


def _verify(folder: Path) -> int:
    from fluxsae.shards import ShardSet, describe_channels, verify

    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no folder {folder} to verify; name a shard set, or a folder that holds some."
        )
    sets = sorted(path.parent for path in folder.rglob("metadata.json"))
    if not sets:
        raise FileNotFoundError(f"{folder} holds no shard set (no metadata.json); name a folder that a capture left.")
    n_problems = 0
    for shard_set in sets:
        problems = verify(shard_set)
        n_problems += len(problems)
        print(f"{shard_set}: {'whole' if not problems else f'{len(problems)} problems'}")
        if not problems and (shards := ShardSet.open(shard_set)).metadata.kind == "tokens":
            print(f"  {describe_channels(shards)}")
            if shards.skipped:
                print(
                    f"  skipped, as their tokens were not finite: images {', '.join(map(str, sorted(shards.skipped)))}"
                )
        for problem in problems:
            print(f"  {problem}")
        if problems:
            files = shlex.join(sorted({str(shard_set / problem.file) for problem in problems}))
            print(f"  To redo just that, remove the damaged files and run the capture again:\n    rm -f {files}")
    return 1 if n_problems else 0


class _Parser(argparse.ArgumentParser):
    """argparse, with errors that end as every other error does here, and options written out."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, allow_abbrev=False)

    def error(self, message: str) -> Any:
        if match := re.match(r"argument COMMAND: invalid choice: '([^']*)'", message):
            message = unknown_key(match[1], (*VERBS, *COMMANDS), "fluxsae", what="command")
        raise ValueError(f"{message} (see `{self.prog} --help`)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fluxsae",
        description="Read, see and steer what a FLUX.1 text-to-image transformer represents.",
        epilog="Try `fluxsae demo`, then `fluxsae init FOLDER`. `fluxsae COMMAND --help` tells all options of "
        "a command; --traceback (or FLUXSAE_TRACEBACK=1) shows where an error arose.",
    )
    parser.add_argument("--version", action="version", version=f"fluxsae {fluxsae.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    study = commands.add_parser("study", help="run every stage of a study, skipping what is complete and unchanged")
    study.add_argument(
        "-c", "--config", type=config_file, required=True, help="the study's YAML file, or bundled:tiny/study.yaml"
    )
    demo = commands.add_parser("demo", help="run the study of the bundled model, into runs/tiny")
    for command in (study, demo):
        command.add_argument("--root", type=Path, metavar="DIR", help="the study's folder, if not the one that it says")
        command.add_argument(
            "--force", action="append", metavar="STAGE", help="redo this stage and what needs it (or 'all')"
        )
        command.add_argument("--until", metavar="STAGE", help="stop after this stage")
    init = commands.add_parser("init", help="write a study of one's own, like a bundled one")
    init.add_argument(
        "folder", type=Path, metavar="FOLDER", help="for its configs and prompts; results go to FOLDER/run"
    )
    init.add_argument("--like", default="tiny", metavar="STUDY", help="the bundled study it is like: tiny or flux-dev")
    init.add_argument("--prompts", type=Path, metavar="FILE", help="prompts to take in: .txt, .jsonl or .csv")
    init.add_argument("--model", help="a diffusers pipeline folder or a hub id")
    init.add_argument("--sites", nargs="+", metavar="SITE", help="modules to capture; SAEs are of the first")
    init.add_argument("--steps", nargs="+", type=int, metavar="STEP", help="steps to capture; SAEs are of the first")
    for verb, meaning in VERBS.items():
        commands.add_parser(verb, help=f"{meaning} (-c CONFIG)", add_help=False)
    commands.add_parser("figures", help="draw the figures of a study (-c CONFIG)", add_help=False)
    verify = commands.add_parser("verify", help="check shard sets against their checksums")
    verify.add_argument("folder", type=Path, metavar="FOLDER", help="a shard set, or a folder that holds some")
    return parser


def _quieten() -> None:
    """Let through what a user can act on: our own messages and Lightning's warnings, not its advertisements."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    ours = logging.getLogger("fluxsae")
    if not ours.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        ours.addHandler(handler)
        ours.setLevel(logging.INFO)


def _is_users(error: Exception) -> bool:
    """Whether the message, without a traceback, is what the user needs."""
    known = (ValueError, OSError, FloatingPointError, argparse.ArgumentError)
    return isinstance(error, known) or type(error).__name__ in ("MisconfigurationException", "ArgumentError")


ROOM = {errno.ENOSPC, errno.EDQUOT}
REFUSED = {errno.EROFS, errno.EACCES, errno.EPERM}
GONE = {errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ENODEV, errno.ENXIO, errno.EHOSTDOWN}


def _sentence(error: Exception) -> str:
    number = error.errno if isinstance(error, OSError) else None
    about = str(getattr(error, "filename", None) or "the run's folder")
    if number in ROOM:
        return f"there is no room left for {about}; free some and run the same command again, which goes on from here."
    if number in REFUSED:
        return f"{about} may not be written ({os.strerror(number)}); make it writable, or name another folder."
    if number in GONE:
        return f"{about} cannot be reached ({os.strerror(number)}); when the drive is back, run the same command again."
    text = " ".join(str(error).split()) or type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    ours = os.path.dirname(os.path.abspath(__file__))
    foreign = not isinstance(error, argparse.ArgumentError) and frames and not frames[-1].filename.startswith(ours)
    return f"{text} ({type(error).__name__}; --traceback shows where)" if foreign else text
