"""What every command shares: flags, one sentence on bad input, exit code 2.
"""
import argparse
import importlib
import math
import os
import subprocess
import sys
import time


class BadInput(Exception):
    """The user's mistake. The message is one sentence that names the flag or file and says what to do."""


class Parser(argparse.ArgumentParser):
    """argparse that says one sentence on an error, on stderr, exit code 2, and takes no abbreviated flags."""

    def __init__(self, **kw):
        super().__init__(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kw)

    def error(self, message):
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        sys.exit(2)


def number(kind, low=-math.inf, high=math.inf, above=-math.inf):
    """An argparse type: an int or a float within bounds, refused with a sentence otherwise."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from None
        if not (low <= value <= high and value > above):
            bounds = (("at least", low), ("above", above), ("at most", high))
            wanted = " and ".join(f"{what} {bound}" for what, bound in bounds if abs(bound) < math.inf)
            raise argparse.ArgumentTypeError(f"{text} must be {wanted}")
        return value
    return parse


def optional(package, flag):
    """Import an optional package, or say how to get it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise BadInput(f"{flag} needs {package}: pip install {package.split('.')[0]}, or leave the flag out") from None


def unescape(text):
    """An argparse type: \\n, \\t and the like, as typed in a shell, become the characters they stand for."""
    try:
        return text.encode("latin-1", "backslashreplace").decode("unicode_escape")
    except UnicodeDecodeError:
        raise argparse.ArgumentTypeError(f"{text!r} ends in a lone backslash") from None


def check_output(flag, path, fresh=False):
    """Refuse a file that cannot be written before any work is done; with `fresh`, one that is there already."""
    if os.path.isdir(path) or not os.path.isdir(os.path.dirname(path) or "."):
        raise BadInput(f"{flag}: {path} cannot be written (no such folder, or itself one): choose another file")
    if fresh and os.path.exists(path):
        raise BadInput(f"{flag}: {path} exists already: choose another file, or remove it")


def run_main(main):
    """Call a script's main: a BadInput becomes one line on stderr and exit code 2."""
    try:
        main()
    except BadInput as e:
        if int(os.environ.get("LOCAL_RANK", 0)):           # if the first process fails too, it speaks for all:
            time.sleep(5)                                  # torchrun ends the others meanwhile
        print(f"{os.path.basename(sys.argv[0])}: error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def git_commit():
    """The commit of this code, with + when it was changed since, or "" outside a checkout."""
    describe = ["git", "-C", os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""
