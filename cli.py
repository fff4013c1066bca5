"""What the commands of all files share: one way to say that input cannot be used, to show progress, to find a device, to draw."""
import argparse
import os
import sys
import time
from pathlib import Path

import torch

DEMO = Path(os.path.relpath(Path(__file__).parent / "demo"))    # as seen from where a command is run


class InputError(ValueError):
    """What the user gave cannot be used. The message is one line: what was found, what was expected."""


def progress_line(text):
    """Shows `text` in place of the last such line, where somebody watches; results go to standard output alone."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="\r", file=sys.stderr, flush=True)


class Parser(argparse.ArgumentParser):
    """A command line whose errors are one line, as all others here are."""

    def error(self, message):
        raise InputError(message)

    def add_device(self):
        self.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                          help="(default: cuda where there is one, else cpu)")

    def add_precision(self, needs=""):
        """How a model is loaded, as load_model takes it; needs: what more --quantize asks for."""
        self.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="(default: the checkpoint's own)")
        self.add_argument("--quantize", choices=["int8", "int4"], help=f"round the blocks' weights first{needs} (default: as they are)")


def refuse_beside(arguments, meaningless):
    """Raises InputError where an option is given beside one that leaves it without meaning: {that one: the others}."""
    for option, others in meaningless.items():
        for other in others:
            if getattr(arguments, option) and getattr(arguments, other):
                raise InputError(f"--{other.replace('_', '-')} means nothing with --{option.replace('_', '-')}")


def command_line(main):
    """Runs a file's `main()`; input it cannot use ends it with one line and exit status 2, not a traceback."""
    sys.stdout.reconfigure(errors="backslashreplace")      # a terminal that lacks a character shows its number
    try:
        main()
    except BrokenPipeError:                                # the reader of our output has closed it (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (InputError, OSError) as error:
        if os.environ.get("RANK", "0") != "0":             # what all processes meet the first one says, which ends the others
            time.sleep(1)
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            sys.stdout.flush()
            os._exit(2)                                    # threads that wait for a process which is gone would abort an orderly end
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        sys.exit(130)


def find_device(name):
    """The torch.device of a name, or an InputError if it cannot be used here."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name} cannot be used: {str(error).splitlines()[0]}") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device {name} cannot be used: supported are cpu and cuda")
    return device


def natural(text):
    """A whole number above 0, for the command line."""
    if not text.isdecimal() or not 0 < int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def pyplot():
    """matplotlib, set up for figures that can be read on a light and on a dark page."""
    try:
        import matplotlib
    except ImportError:
        raise InputError("figures need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    pyplot.rcParams.update({"figure.dpi": 110, "savefig.facecolor": "white", "font.size": 9, "axes.spines.top": False,
                            "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False})
    return pyplot


def check_figure(path):
    """Raises InputError, before anything is measured, if no PNG can be drawn at `path`."""
    if not str(path).endswith(".png") or not Path(path).parent.is_dir():
        raise InputError(f"--figure is {path}, expected a name in a folder that exists, ending in .png")
    pyplot()
