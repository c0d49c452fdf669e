"""Files: one writer at a time, whole or not there at all, and what they claim checked before it is used.

An error of the system on the way (a full disk, a read-only folder, a file that is gone) names the path, and `run_main`
makes the user's sentence of it.
"""
import json
import os
import re
import socket
import sys
import tempfile
import types
import zipfile
from contextlib import contextmanager, suppress

from data.cli import BadInput

try:
    import fcntl
except ImportError:                                        # not on Windows
    fcntl = None
NO_LINKS = getattr(os, "O_NOFOLLOW", 0)                    # a planted link would lead to another's file


# ---------------------------------------------------------------------------------------------------------------------
# one writer

def take_lock(path, what, wait=False):
    """Lock a file, which is made, for as long as the file returned is open: whatever ends the process releases it.

    Where another process holds it: BadInput that says which one writes `what`, or, with `wait`, once it has ended.
    Where files cannot be locked (Windows, some network disks), a warning.
    """
    while True:
        f = open(path, "r+", opener=lambda name, flags: os.open(name, os.O_RDWR | os.O_CREAT | NO_LINKS, 0o666))
        try:
            if fcntl is None:
                raise OSError(0, "not on this system")
            fcntl.flock(f, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            pid, _, host = f.read().strip().partition(" ")
            f.close()
            raise BadInput(f"pid {pid or 'unknown'} on {host or 'this machine'} is writing {what}: end it or choose "
                           "another --out") from None
        except OSError as e:
            print(f"{path} cannot be locked ({e.strerror}): see to it that no other command writes {what}",
                  file=sys.stderr)
            return f
        # who held it may have removed it meanwhile: what counts is the file that is there now
        with suppress(OSError):
            if os.path.samestat(os.fstat(f.fileno()), os.stat(path)):
                break
        f.close()
    f.truncate()
    f.write(f"{os.getpid()} {socket.gethostname()}\n")
    f.flush()
    return f


@contextmanager
def writing(folder, what=None, wait=False):
    """While in its body, this process alone writes the folder, which is made. `what`, `wait`: as in `take_lock`."""
    with naming(folder):
        os.makedirs(folder, exist_ok=True)
        f = take_lock(os.path.join(folder, "lock"), what or folder, wait)
    with f:
        try:
            yield
        finally:
            with suppress(OSError):                        # (the folder may have been renamed)
                os.remove(f.name)


def check_folder(flag, path):
    """Refuse a folder that cannot be made, or written: what there is of its path has to be a folder."""
    existing = os.path.abspath(path)
    while not os.path.exists(existing):
        existing = os.path.dirname(existing)
    if not os.path.isdir(existing) or not os.access(existing, os.W_OK):
        raise BadInput(f"{flag}={path} cannot be written, {existing} is a file or read-only: choose another")


# ---------------------------------------------------------------------------------------------------------------------
# whole files

@contextmanager
def naming(path):
    """An error of the system within names this path: those of a write to an open file name none."""
    try:
        yield
    except OSError as e:
        if e.filename is None:
            e.filename = path
        raise
    except RuntimeError as e:                              # what torch.save makes of a full disk
        cause = e.__context__
        if isinstance(cause, OSError):
            raise OSError(cause.errno, cause.strerror, path) from None
        raise


@contextmanager
def replacing(path, mode="w", like=None):
    """A file to write beside `path`; when the body ends well it is on disk and takes the name, else it is gone.

    What killed processes left behind goes as well: temporary files of this name, or of names that match `like`, that
    no process holds.
    """
    is_device = os.path.exists(path) and not os.path.isfile(path) or str(path).startswith("/dev/")
    if is_device:                                          # or a pipe: nothing can take its place
        with naming(path), open(path, mode) as f:
            yield f
        return
    path = os.path.realpath(path)
    folder, name = os.path.split(path)
    remove_left_over(folder, like or re.escape(name))
    part = f"{path}.{os.getpid()}.tmp"
    with naming(path):
        with suppress(FileNotFoundError):                  # of a process of this number, long ago
            os.remove(part)
        number = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | NO_LINKS, 0o666)
        with os.fdopen(number, mode) as f:
            try:
                if fcntl is not None:
                    with suppress(OSError):
                        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield f
                f.flush()
                os.fsync(f.fileno())
                os.replace(part, path)
            except BaseException:
                with suppress(OSError):
                    os.remove(part)
                raise
    sync_folder(folder)


def remove_left_over(folder, like):
    """Remove temporary files `LIKE.PID.tmp` that no process is writing."""
    for name in os.listdir(folder):
        if fcntl is None or not re.fullmatch(rf"(?:{like})\.\d+\.tmp", name):
            continue
        with suppress(OSError):                            # held, or gone
            with open(os.path.join(folder, name), "rb") as f:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.remove(f.name)


def sync_folder(folder):
    """Wait until the names in a folder are on disk. Some systems cannot: then they are when they are."""
    with suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def write_json(path, data):
    with replacing(path) as f:
        json.dump(data, f, indent=1)


def check_output(flag, path, fresh=False):
    """Refuse a file that cannot be written before any work is done; with `fresh`, one that is there already."""
    folder = os.path.dirname(path) or "."
    try:
        if os.path.isdir(path):
            raise IsADirectoryError(0, "it is a folder")
        if fresh and os.path.exists(path):
            raise FileExistsError(0, "it exists already")
        if os.path.exists(path) and not os.path.isfile(path):
            return                                         # a device
        tempfile.TemporaryFile(dir=folder).close()         # it is written beside, and renamed
    except OSError as e:
        raise BadInput(f"{flag}={path} cannot be written ({e.strerror}): choose another file") from None


# ---------------------------------------------------------------------------------------------------------------------
# what files claim

def read_json(path):
    """What a JSON file holds. Raises OSError, or ValueError where it is no JSON."""
    with open(path, encoding="utf-8") as f:
        try:
            return json.load(f)
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{path} is no JSON: {e}") from None


def check_archive(path):
    """ValueError where a part of a zip archive has not its checksum; torch writes these, and does not read them."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged:
        raise ValueError(f"{damaged} in it is damaged: its checksum is wrong")


def whole(low=0, high=2**63 - 1):
    """A check for `check_fields`: a whole number from low to high."""
    return lambda value: type(value) is int and low <= value <= high      # True is an int to isinstance


def share(value):
    """A check: a number from 0 to 1."""
    return type(value) in (int, float) and 0 <= value <= 1


def maybe(check):
    return lambda value: value is None or fits(check, value)


def list_of(check):
    return lambda value: isinstance(value, list) and all(fits(check, item) for item in value)


def fits(check, value):
    """Whether a value is what a check asks for: a type, or a function that says so."""
    if isinstance(check, (type, types.UnionType)):
        return isinstance(value, check) and not (check is int and isinstance(value, bool))
    return check(value)


def check_fields(where, found, fields, remedy):
    """BadInput unless `found`, which the file `where` holds, has these fields: {name: a check, see `fits`}.

    A field that is missing counts as None. `remedy` says what to do.
    """
    if not isinstance(found, dict):
        raise BadInput(f"{where} is damaged, it holds no object but {found!r:.60}: {remedy}")
    for name, check in fields.items():
        if not fits(check, found.get(name)):
            raise BadInput(f"{where} is damaged, its {name} is {found.get(name)!r:.60}: {remedy}")


def is_file_name(value):
    """A check: a name that stays in its folder."""
    return isinstance(value, str) and value not in ("", ".", "..") and os.path.basename(value) == value and (
        "\0" not in value)
