"""The command line: `lorarecycle tune | recycle | warm-start | convert | evaluate | predict | task-vector | generate |
reproduce | report | serve | demo`."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro
from tyro.conf import subcommand

from .common import Manners
from .convert import Convert
from .demo import Demo
from .evaluate import Evaluate, Predict
from .generate import Generate, TaskVector
from .recycle import Preset, Recycle, WarmStart
from .renamed import current_flags
from .report import Report
from .reproduce import Reproduce
from .serve import Serve
from .tune import Tune


def main(args: Sequence[str] | None = None) -> int:
    """Run a command; the exit status. Bad input ends with one line on standard error and status 2 (see `--debug`)."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    command: Any = None
    try:
        command = _parse(current_flags(sys.argv[1:] if args is None else args))
        command.run()
    except (ValueError, TypeError, FloatingPointError, OSError, ImportError) as error:
        if _manners(command).debug:
            traceback.print_exc()
        print(f"lorarecycle: error: {error}", file=sys.stderr)
        return 2
    return 0


@dataclass(frozen=True)
class _Choice:
    preset: Preset = "default"


def _parse(args: Sequence[str]) -> Any:
    """The command that the arguments describe; `recycle` starts from its preset's settings, which flags override."""
    chosen, _ = tyro.cli(_Choice, args=args, prog="lorarecycle recycle", return_unknown_args=True, add_help=False)
    commands: Any = (
        Annotated[Tune, subcommand("tune")]
        | Annotated[Recycle, subcommand("recycle", default=Recycle.of(chosen.preset))]
        | Annotated[WarmStart, subcommand("warm-start")]
        | Annotated[Convert, subcommand("convert")]
        | Annotated[Evaluate, subcommand("evaluate")]
        | Annotated[Predict, subcommand("predict")]
        | Annotated[TaskVector, subcommand("task-vector")]
        | Annotated[Generate, subcommand("generate")]
        | Annotated[Reproduce, subcommand("reproduce")]
        | Annotated[Report, subcommand("report")]
        | Annotated[Serve, subcommand("serve")]
        | Annotated[Demo, subcommand("demo")]
    )
    return tyro.cli(commands, prog="lorarecycle", args=args)


def _manners(command: Any) -> Manners:
    """Of a command, or of the action that it stands for; the defaults where none was understood."""
    return getattr(getattr(command, "action", command), "manners", Manners())
