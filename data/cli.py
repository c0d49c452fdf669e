"""What every command shares: flags, one sentence on bad input, exit code 2.
"""
import argparse
import errno
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
    """An argparse parser that says one sentence on an error (stderr, exit code 2); no short forms, no empty values."""
    given = {}                                             # of the last command line: flag, without dashes -> text
    MAY_BE_EMPTY = {"--prompt", "--separator"}

    def __init__(self, **kw):
        super().__init__(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kw)

    def parse_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else list(args)
        Parser.given = {}
        flag = ""
        for word in words:
            value = word
            if word.startswith("--"):
                flag, has_value, value = word.partition("=")
                Parser.given[flag.removeprefix("--")] = value
                if not has_value:                          # it may be the next word
                    continue
            if value == "" and flag not in self.MAY_BE_EMPTY:
                self.error(f"{flag} is empty: give it a value, or leave it out")
            Parser.given[flag.removeprefix("--")] = value
        return super().parse_args(args, namespace)

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
    if not (low <= value <= high and value > above) or math.isinf(value):
        bounds = [("at least", low), ("above", above), ("at most", high)]
        wanted = " and ".join(f"{words} {bound}" for words, bound in bounds if abs(bound) < math.inf) or "finite"
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


def refuse_unread(flags, read, reason):
    """BadInput for one of these flags (names without dashes) that was given on the command line and is not `read`."""
    for flag in flags:
        if flag in Parser.given and flag not in read:
            typed = f"--{flag}={Parser.given[flag]}".rstrip("=")
            raise BadInput(f"{typed} has no effect {reason}: leave it out, or change the other flags")


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
    """Call a script's main. What the user, the system or memory refuses becomes one line on stderr and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):                 # a terminal without some characters shows ? for them
            stream.reconfigure(errors="replace")
    try:
        main()
        sys.stdout.flush()
    except BadInput as e:
        end_with(str(e))
    except KeyboardInterrupt:
        sys.exit(130)                                      # what a shell expects of a command ended by Ctrl-C
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)       # Python flushes stdout once more
        end_with("standard output was closed before everything was printed: read it to its end, or send it to a file")
    except OSError as e:
        remedy = "put that right, and repeat the command"
        if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            remedy = "make room, and repeat the command"
        end_with(f"{e.filename or 'a file'} cannot be read or written ({e.strerror or e}): {remedy}")
    except (MemoryError, RuntimeError) as e:
        if not is_lack_of_memory(e):
            raise
        if "CUDA" in str(e) and sys.argv[0].endswith("train.py"):
            end_with("the GPU has not enough memory for this: lower --micro_batch_size; `python -m extra.bench plan` "
                     "says what fits")
        sizes = [f"--{flag}" for flag in SIZE_FLAGS if flag in Parser.given] or ["--batch_size"]
        end_with(f"there is not enough memory for this: lower {' or '.join(sizes)}")


def end_with(sentence):
    if os.environ.get("LOCAL_RANK", "0") != "0":
        # a bad flag fails in every process: the first speaks for all, and torchrun ends the others meanwhile
        time.sleep(5)
    print(f"{os.path.basename(sys.argv[0])}: error: {sentence}", file=sys.stderr)
    sys.exit(2)


# flags that decide how much memory a command takes
SIZE_FLAGS = ("batch_size", "micro_batch_size", "length", "n", "n_layer", "n_embd", "heads", "max_lookahead", "size")


def is_lack_of_memory(e):
    """Whether an error is that of an allocation: Python's, or torch's, which is a RuntimeError."""
    return isinstance(e, MemoryError) or any(words in str(e) for words in (
        "out of memory", "allocate memory", "Storage size calculation overflowed"))


def environment_number(name, default):
    """A whole number from the environment, as torchrun sets them. Raises BadInput."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise BadInput(f"the environment has {name}={text}, which is no number: start with torchrun, or unset it")
    return int(text)


@functools.cache                                           # once
def say_once(text):
    """A line on stderr, by one process of a run."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(text, file=sys.stderr)


def git_commit():
    """The commit of this code, with + when it was changed since, or "" outside a checkout."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    # --exclude=*: no tag, so that the answer is a hash
    command = ["git", "-C", root, "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:                                        # no git here
        return ""
