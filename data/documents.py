"""Documents: the one door through which every text comes in, from local files or from a hub's datasets.

A stream of documents yields (source, text, ends): the file or the hub's split that the text is from, the text, and
whether it ends its document. A document of ordinary size is one item. A very long one, such as a file of gigabytes
without a separator, comes in several pieces, of which only the last has `ends`: so memory stays flat.
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


# ---------------------------------------------------------------------------------------------------------------------
# one text file

def documents(f, separator, piece=1 << 20):
    """The documents of an open text file, in pieces of bounded size: yields (text, whether it ends its document).

    A long document is cut between a non-space and a space, where GPT-2's pre-tokenizer never joins: the tokens of the
    pieces are the tokens of the whole (but for a run of `piece` characters without such a place). A file's end ends a
    document. Line ends around a document are dropped, and empty documents left out. No `separator`: one document.
    """
    # so many characters at the end of what is read stay there: a separator may have begun in them
    margin = max(1, len(separator))
    buffer = ""
    is_first = True                                        # of its document, the next piece
    while True:
        block = f.read(piece)
        buffer += block
        ended = []
        if separator:
            *ended, buffer = buffer.split(separator)
        if not block:                                      # the end of the file
            ended.append(buffer)
        for text in ended:
            text = text.rstrip("\r\n")
            if is_first:
                text = text.lstrip("\r\n")
            if text or not is_first:                       # the last piece counts if empty: it ends its document
                yield text, True
            is_first = True
        if not block:
            return
        # what is left is the beginning of a document, or more of one that has begun: a long one is not kept whole
        if len(buffer) > piece + len(separator):
            cut = place_to_cut(buffer, margin)
            text = buffer[:cut]
            if is_first:
                text = text.lstrip("\r\n")
            yield text, False
            is_first = False
            buffer = buffer[cut:]


def place_to_cut(text, margin):
    """The last place between a non-space and a space that leaves `margin` characters or more; else just these."""
    # greedy: the longest match ends at the last such place
    place = re.match(r".*\S(?=\s)", text[:len(text) - margin + 1], re.DOTALL)
    if place:
        return place.end()
    return len(text) - margin


# ---------------------------------------------------------------------------------------------------------------------
# files of every kind

class Reader:
    """Reads the documents of a file, by the end of its name; `read` yields (name, text, whether it ends its document).

    .parquet and .jsonl: a document is the text in `field`. .csv: the columns after the first. .tar, .gz, .xz: what is
    in it. Other: text, cut at `separator`, or at each line (`by_line`). `errors`: what happens to bytes that are not
    UTF-8, as in Python's open.
    """

    def __init__(self, separator="", by_line=False, field="text", errors="strict"):
        self.separator = separator
        self.by_line = by_line
        self.field = field
        self.errors = errors

    def read(self, path, file=None):
        """The documents of the file of this path, or of `file`, open in binary: an archive's member of this name."""
        name = os.path.basename(path).lower()
        with file or open(path, "rb") as f:
            if name.endswith((".gz", ".tgz")):
                yield from self.read(self.unpacked(path), gzip.open(f))
            elif name.endswith(".xz"):
                yield from self.read(self.unpacked(path), lzma.open(f))
            elif name.endswith(".tar"):
                yield from self.read_tar(f)
            elif name.endswith(".parquet"):
                yield from self.read_parquet(path, f)
            elif name.endswith((".jsonl", ".json")):
                for line in f:
                    if line.strip():                       # an empty line at the end is no damage
                        yield path, json.loads(line)[self.field], True
            else:
                yield from self.read_text(path, f)

    def unpacked(self, path):
        """The name of what a packed file holds."""
        inner = path[:path.rindex(".")]
        if path.lower().endswith((".tgz", "_data.xz")):    # _data.xz: OpenWebText's subsets, each a tar
            return inner + ".tar"
        return inner

    def read_tar(self, f):
        # mode "r:": plain tar only, since what packs it is undone in `read`
        archive = tarfile.open(fileobj=f, mode="r:")
        for member in archive:
            if member.isfile():
                yield from self.read(member.name, archive.extractfile(member))
        if f.tell() < archive.offset + tarfile.BLOCKSIZE:  # tarfile itself takes this for the end
            raise EOFError("the archive ends within a header")

    def read_parquet(self, path, f):
        parquet = optional("pyarrow.parquet", path)
        # a few rows at a time: a file may be larger than memory
        for batch in parquet.ParquetFile(f).iter_batches(256, columns=[self.field]):
            for text in batch.column(0).to_pylist():
                yield path, text, True

    def read_text(self, path, f):
        # newline="": line ends stay as they are
        text_file = io.TextIOWrapper(f, encoding="utf-8", errors=self.errors, newline="")
        if path.lower().endswith(".csv"):
            for row in csv.reader(text_file):
                yield path, " ".join(row[1:]), True        # the first is a label
        elif self.by_line:
            for line in text_file:
                if line.strip():
                    yield path, line, True
        else:
            for text, ends in documents(text_file, self.separator):
                yield path, text, ends


def expand(files):
    """Files as they are; a folder as all files in it, sorted, but for those with a dot name. Raises BadInput."""
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
    """The documents of these files, in this order: yields (file's name, text, ends). `how`: see `Reader`.

    Raises BadInput for what cannot be read, when it comes to it.
    """
    reader = Reader(**how)
    for path in paths:
        try:
            for name, text, ends in reader.read(path):
                check_text(text)
                yield name, text, ends
        except UnicodeDecodeError as e:
            raise BadInput(f"--files: {path} holds bytes that are not UTF-8 ({e.reason} at byte {e.start} "
                           "of a block): convert them, or use --tokenizer=bytes") from None
        except (OSError, EOFError, ValueError, LookupError, TypeError, tarfile.TarError, csv.Error,
                lzma.LZMAError, zlib.error) as e:
            raise BadInput(f"--files: {path} cannot be read ({type(e).__name__}: {e}): truncated, or not "
                           "of the kind its name says, or without the field of the text") from None


def check_text(text):
    """TypeError for what is no str: a field may hold null, or a list."""
    if not isinstance(text, str):
        raise TypeError(f"a document is {text!r}, which is no text")


# ---------------------------------------------------------------------------------------------------------------------
# a hub's datasets, NAME[:CONFIG][@REVISION], through `datasets` (optional). NAME may be a local folder

def parse_hub(hub):
    """NAME[:CONFIG][@REVISION] -> (name, config or None, revision or None)."""
    where, _, revision = hub.partition("@")
    name, _, config = where.partition(":")
    return name, config or None, revision or None


def hub_splits(hub):
    """The names of a dataset's splits: "train", "validation", "test", or others. Raises BadInput."""
    name, config, revision = parse_hub(hub)
    datasets = import_datasets(hub)
    try:
        return datasets.get_dataset_split_names(name, config, revision=revision)
    except Exception as e:                                 # a hub and its library fail in a hundred ways
        raise hub_failure(hub, e) from None


def stream_hub(hub, splits, field):
    """The documents of these splits of a dataset, streamed: yields ("NAME:SPLIT", text, True). Raises BadInput."""
    name, config, revision = parse_hub(hub)
    datasets = import_datasets(hub)
    try:
        for split in splits:
            for row in datasets.load_dataset(name, config, split=split, streaming=True, revision=revision):
                check_text(row[field])
                yield f"{name}:{split}", row[field], True
    except Exception as e:
        raise hub_failure(hub, e) from None


def import_datasets(hub):
    return optional("datasets", f"{hub} without --files")


def hub_failure(hub, e):
    """The BadInput for whatever `datasets` has raised."""
    lines = (str(e) or "-").splitlines()
    return BadInput(f"datasets cannot stream {hub} ({type(e).__name__}: {lines[0]}): go online, "
                    "name a copy with --hub, or give local files with --files")
