"""The command `sana`: one verb each, whose module is imported when the verb is chosen.

`main` returns the exit code: 0, 2 for a request or a flag that cannot be, 130 after Ctrl-C, and 1
for every other failure that a user can cause, each with one message on stderr and no traceback.
SANA_DEBUG=1 shows the traceback. An error that is our own mistake is not caught.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys
from typing import TYPE_CHECKING

from sana.errors import (
    CheckpointError,
    MissingExtra,
    NumericsError,
    RequestError,
    TrainingError,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cyclopts import App

VERBS = {
    "generate": "Draw pictures from a sentence.",
    "info": "Say how a picture was made, what a model is, or which models there are.",
    "convert": "Convert weights between layouts: NVIDIA's, diffusers', single file, ours.",
    "data": "Make the data that models are trained on.",
    "train": "Train a model by a recipe.",
    "reproduce": "Try one of the papers' claims, small.",
    "evaluate": "Draw prompt lists, and measure what was drawn.",
    "bench": "Time models on this machine: text, steps, decoding, memory.",
    "doctor": "Say what is installed, what it can compute on, and which models would fit.",
}

SELDOM = 100_000
"""New objects from one search for garbage to the next; Python's own number is 700."""
OUT_OF_MEMORY = (
    "out of memory; ask for a smaller picture or fewer of them, or state with --memory what may be "
    "taken, for example --memory 6GiB"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; `arguments` default to the process's own. Returns the exit code."""
    if arguments is None:
        _collect_seldom()
    try:
        return _run(list(sys.argv[1:] if arguments is None else arguments))
    except KeyboardInterrupt:
        return _fail("stopped", 130)
    except BrokenPipeError:
        # The reader of our output has gone; a flush at exit must not complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except RequestError as error:
        return _fail(str(error), 2)
    except OSError as error:
        return _fail(_of_system(error), 1)
    except (CheckpointError, MissingExtra, NumericsError, TrainingError) as error:
        return _fail(str(error), 1)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        return _fail(OUT_OF_MEMORY, 1)


def make_app() -> App:
    """The table of verbs, none of them imported yet."""
    from cyclopts import App

    from sana import __version__

    app = App(name="sana", help="Text to image in plain PyTorch.", version=__version__)
    for verb, help_text in VERBS.items():
        app.command(f"sana.cli.{verb}:{verb}", name=verb, help=help_text)
    return app


def _collect_seldom() -> None:
    """For a process of our own: no garbage is looked for in what an import keeps, nor at the end.

    torch makes hundreds of thousands of objects that stay; going through them again and again, and
    once more before the process ends, took half a second.
    """
    gc.set_threshold(SELDOM)
    atexit.register(_end)


def _end() -> None:
    """The last thing a process of our own does, after all else that was registered.

    triton's bindings print pages about every object that is not collected; nobody can use them.
    """
    gc.freeze()
    if "triton" in sys.modules:
        sys.stderr.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _run(arguments: list[str]) -> int:
    from cyclopts import CycloptsError, UnusedCliTokensError

    try:
        command, bound, _ = make_app().parse_args(
            _with_lone_dash_last(arguments) or ["--help"], print_error=False, exit_on_error=False
        )
    except UnusedCliTokensError as error:
        extra = " ".join(error.unused_tokens or ())
        return _fail(f"{extra!r} is left over; put a sentence of several words in quotes", 2)
    except CycloptsError as error:
        verb = f" {arguments[0]}" if arguments[0] in VERBS else ""
        return _fail(f"{str(error).rstrip()} See `sana{verb} --help`.", 2)
    command(*bound.args, **bound.kwargs)
    return 0


def _with_lone_dash_last(arguments: list[str]) -> list[str]:
    """A dash alone means stdin, and the parser takes it for a flag unless it follows `--`."""
    if "-" not in arguments or "--" in arguments:
        return arguments
    return [word for word in arguments if word != "-"] + ["--", "-"]


def _is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    """torch's own class is told by its name, since torch may not be here."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def _of_system(error: OSError) -> str:
    """The message alone where we wrote it; the system's, with the file it is about, otherwise."""
    if error.filename is None:
        return error.strerror or str(error)
    return f"{error.filename}: {error.strerror}"


def _fail(message: str, code: int) -> int:
    if os.environ.get("SANA_DEBUG") == "1" and sys.exc_info()[0] is not None:
        import traceback

        traceback.print_exc()
    print(f"sana: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
