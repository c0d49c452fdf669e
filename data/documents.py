"""Documents: the one door through which every text comes in, from local files or from a hub's datasets.

A stream of documents yields (source, text, ends): the file or the hub's split that the text is from, the text, and
whether it ends its document. A document of ordinary size is one item. A very long one, such as a file of gigabytes
without a separator, comes in several pieces, of which only the last has `ends`: so memory stays flat.
"""
import bz2
import contextlib
import csv
import functools
import glob
import gzip
import io
import itertools
import json
import lzma
import os
import re
import tarfile

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
# the door: what text is, and what becomes of everything else

@contextlib.contextmanager
def reading(where, remedy):
    """Whatever is refused or fails within becomes a BadInput that names the file or the hub."""
    try:
        yield
    except BadInput as e:
        raise BadInput(f"{where}: {e}") from None
    except UnicodeDecodeError as e:
        raise BadInput(f"{where} holds bytes that are not UTF-8 ({e.reason} at byte {e.start} of a block): convert "
                       "them, or, where it is plain text, use --tokenizer=bytes") from None
    except Exception as e:                                 # decoders and hubs fail in a hundred ways
        raise BadInput(f"{where} cannot be read ({e!r:.200}): {remedy}") from None


def pick(row, field):
    """The text in this field of a row {field: value}. Half a surrogate pair, which JSON may hold, becomes U+FFFD."""
    if not isinstance(row, dict):
        raise BadInput(f"a document is {row!r:.40}: put an object for each document on one line")
    if field not in row:
        raise BadInput(f"--field names {field!r}, but its columns are {', '.join(row)!r:.200}: choose one of these")
    text = row[field]
    if not isinstance(text, str):
        raise BadInput(f"a document is {text!r:.40}, which is no text: name the text's field with --field")
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# ---------------------------------------------------------------------------------------------------------------------
# files of every kind

# what a file holds, by its first bytes
MAGIC = {
    "gz": rb"\x1f\x8b\x08", "xz": rb"\xfd7zXZ\0", "bz2": rb"BZh[1-9](1AY&SY|\x17rE8P)", "parquet": rb"PAR1\x15",
    "zip": rb"PK(\x03\x04|\x05\x06)", "zst": rb"\x28\xb5\x2f\xfd", "7z": rb"7z\xbc\xaf",
    "UTF-16 or UTF-32": rb"\xff\xfe|\xfe\xff|\0\0\xfe\xff"}
# by the end of its name, where these do not tell; what else there is, is text
ENDS = {f".{kind}": kind for kind in (*MAGIC, "tar", "jsonl", "csv", "tsv")}
ENDS |= {".tgz": "gz", ".txz": "xz", ".tbz2": "bz2", ".json": "jsonl"}
UNPACK = dict(gz=gzip.open, xz=lzma.open, bz2=bz2.open)
csv.field_size_limit(2**31 - 1)                            # a document may be long (Windows takes no more)


def kind_of(head, path):
    """What a file is, by its first 512 bytes, else by its name: one of ENDS' values, or "text"."""
    for kind, magic in MAGIC.items():
        if re.match(magic, head):
            return kind
    try:
        tarfile.TarInfo.frombuf(head[:512], "utf-8", "surrogateescape")        # there is a checksum in it
        return "tar"
    except tarfile.HeaderError:
        return ENDS.get(os.path.splitext(path)[1].lower(), "text")


def kind_of_file(path):
    with open(path, "rb") as f:
        return kind_of(f.read(512), path)


class Reader:
    """Reads the documents of a file of any kind; `read` yields (name, text, whether it ends its document).

    .parquet, .jsonl, .csv and .tsv: a document is the text in `field`. .tar, .gz, .xz, .bz2: what is in it. Other:
    text, cut at `separator`, or at each line (`by_line`). `errors`: what becomes of bytes in it that are not UTF-8, as
    in Python's open. `headless`: a .csv may be AG News as published, a label and columns of text without names.
    """

    def __init__(self, separator="", by_line=False, field="text", errors="strict", headless=False):
        self.separator = separator
        self.by_line = by_line
        self.field = field
        self.errors = errors
        self.headless = headless

    def read(self, path, file=None):
        """The documents of the file of this path, or of `file`, open in binary: an archive's member of this name."""
        with file or open(path, "rb") as f:
            kind = kind_of(f.peek(512), path)
            if kind in UNPACK:
                stem, end = os.path.splitext(path)
                inner = stem if ENDS.get(end.lower()) in UNPACK else path
                yield from self.read(inner, UNPACK[kind](f))
            elif kind == "tar":
                yield from self.read_tar(f)
            elif hasattr(self, f"read_{kind}"):
                for text, ends in getattr(self, f"read_{kind}")(f):
                    yield path, text, ends
            else:
                raise BadInput(f"this is {kind}, which is not read: unpack it, or convert it to UTF-8")

    def read_tar(self, f):
        # mode "r:": plain tar only, since what packs it is undone in `read`
        archive = tarfile.open(fileobj=f, mode="r:")
        for member in archive:
            if member.isfile():
                yield from self.read(member.name, archive.extractfile(member))
        if f.tell() < archive.offset + tarfile.BLOCKSIZE:  # tarfile itself takes this for the end
            raise EOFError("the archive ends within a header")

    def read_parquet(self, f):
        file = optional("pyarrow.parquet", "parquet").ParquetFile(f)
        # (all columns where the field is none of them: `pick` names them)
        columns = [self.field] if self.field in file.schema_arrow.names else None
        # a few rows at a time: a file may be larger than memory
        for batch in file.iter_batches(256, columns=columns):
            for row in batch.to_pylist():
                yield pick(row, self.field), True

    def read_jsonl(self, f):
        for n, line in enumerate(f, 1):
            if line.strip():                               # an empty line at the end is no damage
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as e:
                    raise BadInput(f"line {n} is no JSON ({e!r:.80}): put each document's object on one line") from None
                yield pick(row, self.field), True

    def read_csv(self, f, delimiter=","):
        text_file = io.TextIOWrapper(f, "utf-8-sig", newline="")
        rows = filter(None, csv.reader(text_file, delimiter=delimiter, strict=True))
        header = next(rows, [])
        if self.headless and self.field not in header:
            if header and header[0].isdigit():             # a label, no name of a column
                rows = itertools.chain([header], rows)
            return ((" ".join(row[1:]), True) for row in rows)
        return ((pick(dict(zip(header, row)), self.field), True) for row in rows)

    read_tsv = functools.partialmethod(read_csv, delimiter="\t")

    def read_text(self, f):
        # newline="": line ends stay as they are; -sig: a mark of the encoding in front is no text
        text_file = io.TextIOWrapper(f, "utf-8-sig", self.errors, newline="")
        if self.by_line:
            return ((line, True) for line in text_file if line.strip())
        return documents(text_file, self.separator)


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
    """Yields (file's name, text, ends) for these files, in this order, or raises BadInput. `how`: see `Reader`."""
    reader = Reader(**how)
    for path in paths:
        with reading(f"--files: {path}", "it is truncated or damaged, or not of the kind that its name says"):
            yield from reader.read(path)


# ---------------------------------------------------------------------------------------------------------------------
# a hub's datasets, NAME[:CONFIG][@REVISION], through `datasets` (optional). NAME may be a local folder

GO_ONLINE = "go online, name a copy with --hub, or give local files with --files"


def parse_hub(hub):
    """NAME[:CONFIG][@REVISION] -> (name, config or None, revision or None), and the package that reads it."""
    where, _, revision = hub.partition("@")
    name, _, config = where.partition(":")
    return name, config or None, revision or None, optional("datasets", f"{hub} without --files")


def hub_splits(hub):
    """The names of a dataset's splits: "train", "validation", "test", or others. Raises BadInput."""
    name, config, revision, datasets = parse_hub(hub)
    with reading(f"--hub={hub}", GO_ONLINE):
        return datasets.get_dataset_split_names(name, config, revision=revision)


def stream_hub(hub, splits, field):
    """The documents of these splits of a dataset, streamed: yields ("NAME:SPLIT", text, True). Raises BadInput."""
    name, config, revision, datasets = parse_hub(hub)
    with reading(f"--hub={hub}", GO_ONLINE):
        for split in splits:
            for row in datasets.load_dataset(name, config, split=split, streaming=True, revision=revision):
                yield f"{name}:{split}", pick(row, field), True
