"""Documents: the one door through which every text comes in, from local files or from a hub's datasets.
"""
import csv
import glob
import gzip
import io
import json
import lzma
import os
import re
import tarfile
import zlib

from data.cli import BadInput, optional


def documents(f, separator, piece=1 << 20):
    """The documents of an open text file, in pieces of bounded size: yields (text, whether it ends its document).

    A long document is cut between a non-space and a space, where GPT-2's pre-tokenizer never joins: the tokens of the
    pieces are the tokens of the whole (but for a run of `piece` characters without such a place). A file's end ends a
    document. Empty documents are left out.
    """
    keep = max(1, len(separator))                          # characters in which a separator may have begun
    buffer, first, block = "", True, None                  # first: nothing of the current document yielded yet
    while block != "":
        block = f.read(piece)
        *ended, buffer = (buffer + block).split(separator) if separator else [buffer + block]
        for text in ended + [buffer] * (not block):
            text = text.strip("\r\n") if first else text.rstrip("\r\n")
            if text or not first:
                yield text, True
            first = True
        if block and len(buffer) > piece + len(separator):
            place = re.match(r".*\S(?=\s)", buffer[:len(buffer) - keep + 1], re.DOTALL)
            cut = place.end() if place else len(buffer) - keep
            yield (buffer[:cut].lstrip("\r\n") if first else buffer[:cut]), False
            first, buffer = False, buffer[cut:]


def read_documents(path, separator="", by_line=False, field="text", errors="strict", file=None):
    """The documents of a file, by the end of its name: yields (name, text, whether it ends its document).

    .parquet and .jsonl: a document is the text in `field`. .csv: the columns after the first. .tar, .gz, .xz: what is
    in it. Other: text, cut at `separator`, or at each line. `file`: the open (binary) file, in an archive.
    """
    name, inner = os.path.basename(path).lower(), (separator, by_line, field, errors)
    with file or open(path, "rb") as f:
        if name.endswith((".gz", ".tgz", ".xz")):
            f = (lzma.open if name.endswith(".xz") else gzip.open)(f)
            packed = name.endswith((".tgz", "_data.xz"))                       # _data.xz: OpenWebText's subsets
            yield from read_documents(path[:path.rindex(".")] + ".tar" * packed, *inner, file=f)
        elif name.endswith(".tar"):
            for member in (archive := tarfile.open(fileobj=f, mode="r:")):
                if member.isfile():
                    yield from read_documents(member.name, *inner, file=archive.extractfile(member))
            if f.tell() < archive.offset + tarfile.BLOCKSIZE:                  # tarfile itself takes this for the end
                raise EOFError("the archive ends within a header")
        elif name.endswith(".parquet"):
            for batch in optional("pyarrow.parquet", path).ParquetFile(f).iter_batches(256, columns=[field]):
                yield from ((path, text, True) for text in batch.column(0).to_pylist())
        elif name.endswith((".jsonl", ".json")):
            yield from ((path, json.loads(line)[field], True) for line in f if line.strip())
        else:
            text = io.TextIOWrapper(f, encoding="utf-8", errors=errors, newline="")
            if name.endswith(".csv"):
                yield from ((path, " ".join(row[1:]), True) for row in csv.reader(text))
            elif by_line:
                yield from ((path, line, True) for line in text if line.strip())
            else:
                yield from ((path, *piece) for piece in documents(text, separator))


def expand(files):
    """Files as they are; a folder as all files in it, sorted, but for those with a dot name."""
    paths = []
    for f in files:
        if os.path.isdir(f):
            inside = glob.glob(os.path.join(glob.escape(f), "**"), recursive=True)
            paths += sorted(path for path in inside if os.path.isfile(path))
        elif os.path.isfile(f):
            paths.append(f)
        else:
            raise BadInput(f"--files: {f} is not a file or a folder")
    return paths


def stream_files(paths, **how):
    """The documents of files: yields (file's name, text, whether it ends its document). Raises BadInput."""
    for path in paths:
        try:
            for name, text, ends in read_documents(path, **how):
                if not isinstance(text, str):
                    raise TypeError(f"a document is {text!r}, which is no text")
                yield name, text, ends
        except UnicodeDecodeError as e:
            raise BadInput(f"--files: {path} holds bytes that are not UTF-8 ({e.reason} at byte {e.start} of a block): "
                           "convert them, or use --tokenizer=bytes") from None
        except (OSError, EOFError, ValueError, LookupError, TypeError, tarfile.TarError, csv.Error, lzma.LZMAError,
                zlib.error) as e:
            raise BadInput(f"--files: {path} cannot be read ({type(e).__name__}: {e}): truncated, or not of the kind "
                           "its name says, or without the field of the text") from None


def stream_hub(hub, splits, field):
    """The same from a Hugging Face dataset NAME[:CONFIG][@REVISION], through `datasets`, named NAME:SPLIT."""
    where, _, revision = hub.partition("@")
    where, _, config = where.partition(":")
    load = optional("datasets", f"{hub} without --files").load_dataset
    try:
        for split in splits:
            for row in load(where, config or None, split=split, streaming=True, revision=revision or None):
                yield f"{where}:{split}", row[field], True
    except Exception as e:                                 # a hub and its library fail in a hundred ways
        raise BadInput(f"datasets cannot stream {hub} ({type(e).__name__}: {(str(e) or '-').splitlines()[0]}): go "
                       "online, name a copy with --hub, or give local files with --files") from None
