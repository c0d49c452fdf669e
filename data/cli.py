"""What every command shares: flags, one sentence on bad input, exit code 2.
"""
import argparse
import functools
import importlib
import math
import os
import subprocess
import sys
import time


class BadInput(Exception):
    """The user's mistake. The message is one sentence that names the flag or file and says what to do."""


class Parser(argparse.ArgumentParser):
    """An argparse parser that says one sentence on an error (on stderr, exit code 2) and takes no abbreviated flags."""

    def __init__(self, **kw):
        super().__init__(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kw)

    def error(self, message):
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        sys.exit(2)


# ---------------------------------------------------------------------------------------------------------------------
# values of flags

def number(kind, low=-math.inf, high=math.inf, above=-math.inf):
    """An argparse type: number(int, 1, 9) reads a whole number from 1 to 9, number(float, above=0) a positive one."""
    return functools.partial(parse_number, kind, low, high, above)


def parse_number(kind, low, high, above, text):
    """The number that a flag's text stands for; ArgumentTypeError, with a sentence, where it does not fit."""
    try:
        value = kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from None
    # (nan compares false with everything, so it is refused here as well)
    if not (low <= value <= high and value > above):
        bounds = [("at least", low), ("above", above), ("at most", high)]
        wanted = " and ".join(f"{words} {bound}" for words, bound in bounds if abs(bound) < math.inf)
        raise argparse.ArgumentTypeError(f"{text} must be {wanted}")
    return value


def add_flags(parser, groups):
    """Flags by group: {title: [(name, default, what it takes, what it means)]}. It takes bool (a switch), a function of
    the text, or one of several names. The defaults are for --help only.
    """
    for title, flags in groups.items():
        group = parser.add_argument_group(title)
        for name, default, takes, meaning in flags:
            if default is not None and default is not False:
                meaning += f" (default: {default})"
            if takes is bool:
                group.add_argument(f"--{name}", action="store_true", help=meaning)
            elif callable(takes):
                group.add_argument(f"--{name}", type=takes, help=meaning)
            else:
                group.add_argument(f"--{name}", choices=list(takes), help=meaning)


def unescape(text):
    """An argparse type: \\n, \\t and the like, as typed in a shell, become the characters they stand for."""
    try:
        return text.encode("latin-1", "backslashreplace").decode("unicode_escape")
    except UnicodeDecodeError:
        raise argparse.ArgumentTypeError(f"{text!r} ends in a lone backslash") from None


# ---------------------------------------------------------------------------------------------------------------------
# around a command

def optional(package, flag):
    """Import a package that only `flag` needs, or say how to get it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        name = package.split(".")[0]
        raise BadInput(f"{flag} needs {package}: pip install {name}, or leave the flag out") from None


def run_main(main):
    """Call a script's main: a BadInput becomes one line on stderr and exit code 2."""
    try:
        main()
    except BadInput as e:
        if int(os.environ.get("LOCAL_RANK", 0)):
            # a bad flag fails in every process: the first speaks for all, and torchrun ends the others meanwhile
            time.sleep(5)
        print(f"{os.path.basename(sys.argv[0])}: error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)                                      # what a shell expects of a command ended by Ctrl-C


def git_commit():
    """The commit of this code, with + when it was changed since, or "" outside a checkout."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    # --exclude=*: no tag, so that the answer is a hash
    command = ["git", "-C", root, "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:                                        # no git here
        return ""
