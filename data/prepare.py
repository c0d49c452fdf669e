"""Datasets: makes shards, reads shards, checks shards; owns the maze.

    python data/prepare.py maze                                            # 2000 paths, no download
    python data/prepare.py text --files a.txt b.txt --tokenizer=bytes --out=data/mine
    python data/prepare.py openwebtext                                     # or lm1b: streamed; or --files=..., local
    python data/prepare.py zeroshot ptb --files ptb.test.txt               # one of the paper's zero-shot sets
    python data/prepare.py verify data/mine                                # sizes, hashes and ids of every shard

A dataset is a folder of raw little-endian uint16 token ids, `train.bin` and `val.bin` (or `train_000.bin`, ...), and a
`meta.json` (tokenizer, vocab_size, bos, row_length, and per file: split, tokens, sha256). It is made in `OUT.partial`
and renamed when complete: an interrupted run leaves nothing that training would accept, and the same command continues
it. Memory is flat, whatever the input's size. Without a meta.json, nanoGPT's .bin files are taken as GPT-2 ids, and
llm.c's (256-int32 header) are read too. A training row is [BOS] + the next L - 1 tokens; rows do not overlap.
"""
import argparse
import collections
import csv
import functools
import glob
import gzip
import hashlib
import importlib
import io
import itertools
import json
import lzma
import math
import os
import re
import shutil
import sys
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
from tqdm import tqdm


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


# ---------------------------------------------------------------------------------------------------------------------
# the maze: U D L R PAD BOS = 0 .. 5; rows of 10 tokens

MAZE = ["......",
        "......",
        "#S..#.",
        "......",
        "....T.",
        "..#..."]
FREE = {(r, c) for r, line in enumerate(MAZE) for c, cell in enumerate(line) if cell != "#"}
START, TARGET = (2, 1), (4, 4)
MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1))
PAD, MAZE_BOS, MAZE_LENGTH = 4, 5, 10


@functools.cache                                         # half a second, and every table row asks for it
def maze_paths():
    """All valid sequences, [2000, 10] uint16, sorted by length: free cells only, target first reached at the end."""
    paths, frontier = [], [((), START)]
    for m in range(1, MAZE_LENGTH + 1):
        steps = [(path + (k,), (r + dr, c + dc)) for path, (r, c) in frontier for k, (dr, dc) in enumerate(MOVES)]
        paths += [path + (PAD,) * (MAZE_LENGTH - m) for path, at in steps if at == TARGET]
        frontier = [(path, at) for path, at in steps if at in FREE and at != TARGET]
    paths = np.array(paths, dtype=np.uint16)
    paths.setflags(write=False)
    return paths


def maze_keys(rows):
    """Rows [N, 10 or more] -> one integer each, to compare and count; -1: not of U D L R PAD, or no PAD in the tail."""
    path, tail = np.split(np.asarray(rows, dtype=np.int64), [MAZE_LENGTH], axis=1)
    fits = (path <= PAD).all(1) & (path >= 0).all(1) & (tail == PAD).all(1)
    return np.where(fits, path @ 5 ** np.arange(MAZE_LENGTH), -1)


def maze_valid(rows):
    """Rows [N, 10 or more] (without BOS) -> [N] bool: membership in the 2000 valid sequences, the task's success."""
    return np.isin(maze_keys(rows), maze_keys(maze_paths()))


def maze_dataset(name):
    """The rows of `maze` (the 2000 sequences) or `maze_skewed` (2000 draws that favour short ones)."""
    paths = maze_paths()
    if name == "maze":
        return paths
    weight = np.exp(-5 * ((paths != PAD).sum(1) - 5) / 2)
    return paths[np.random.default_rng(0).choice(len(paths), 2000, p=weight / weight.sum())]


def draw_maze(row):
    """A path on the grid, for the terminal: digits are the visiting order (latest at a cell); how it ends."""
    grid, at, note = [list(line) for line in MAZE], START, "does not reach T"
    for i, k in enumerate(row, 1):
        if k >= PAD:
            break
        at = at[0] + MOVES[k][0], at[1] + MOVES[k][1]
        if at not in FREE:
            note = f"move {i} leaves the free cells"
            break
        if at == TARGET:
            note = f"reaches T in {i} moves" if all(k == PAD for k in row[i:]) else "goes on after T"
            break
        grid[at[0]][at[1]] = str(i % 10)
    moves = "".join("UDLR.?"[min(k, 5)] for k in row)
    return "\n".join(" ".join(line) for line in grid) + f"\n{moves}: {note}\n"


# ---------------------------------------------------------------------------------------------------------------------
# tokenizers

class Tokenizer:
    """encode(list of str) -> list of id arrays; decode(ids) -> str. name: "gpt2" (tiktoken); "bytes" (ids 0..255, any
    file); "chars:" + the characters it knows; "hf:NAME" (a Hugging Face name, folder or .gguf file, through
    `transformers`); "maze"; "ids", numbers as they are, for a checkpoint that names no tokenizer.
    """

    def __init__(self, name, vocab_size=None):
        self.name, self.vocab_size, self.bos, self.chars = name, vocab_size, None, None
        if name == "gpt2":
            import tiktoken
            try:
                self.bpe = tiktoken.get_encoding("gpt2")
            except Exception as e:                       # tiktoken lets through whatever its download raised
                raise BadInput(f"tiktoken could not fetch its GPT-2 files ({type(e).__name__}): go online once, or set "
                               "TIKTOKEN_CACHE_DIR to a folder that holds them") from None
            self.vocab_size, self.bos = 50257, 50256
        elif name == "bytes":
            self.vocab_size, self.bos = 257, 256
        elif name == "maze" or name.startswith("chars:"):
            self.chars = "UDLR." if name == "maze" else name[6:]
            self.vocab_size, self.bos = len(self.chars) + 1, len(self.chars)
        elif name.startswith("hf:"):
            transformers = optional("transformers", f"tokenizer {name}")
            folder, file = os.path.split(name[3:]) if name.endswith(".gguf") else (name[3:], None)
            try:
                self.bpe = transformers.AutoTokenizer.from_pretrained(folder or ".", gguf_file=file)
            except (OSError, ValueError, ImportError) as e:
                raise BadInput(f"transformers cannot load the tokenizer {name}: {str(e).splitlines()[0]}") from None
            try:                                         # a model may have a few ids more than its tokenizer
                known = transformers.AutoConfig.from_pretrained(folder or ".", gguf_file=file).vocab_size
            except (OSError, ValueError, AttributeError):
                known = 0                                # no model beside it
            self.vocab_size = max(len(self.bpe), known)
            self.bos = self.bpe.eos_token_id if self.bpe.bos_token_id is None else self.bpe.bos_token_id
            if self.bos is None:
                raise BadInput(f"tokenizer {name} has neither BOS nor EOS, and rows begin with one")
        elif name != "ids":
            raise BadInput(f"unknown tokenizer {name!r}: one of gpt2, bytes, hf:NAME, and for `text` chars")
        if (self.vocab_size or 0) > 1 << 16:
            raise BadInput(f"tokenizer {name[:40]} has {self.vocab_size} ids, but shards hold at most 65536")

    def encode(self, texts):
        if self.name == "gpt2":                          # tiktoken releases the GIL: real threads, order kept
            rows = self.bpe.encode_ordinary_batch(texts, num_threads=os.cpu_count())
        elif self.name.startswith("hf:"):
            rows = self.bpe(texts, add_special_tokens=False, verbose=False)["input_ids"]
        elif self.name == "bytes":
            rows = [np.frombuffer(text.encode("utf-8", "surrogateescape"), dtype=np.uint8) for text in texts]
        elif self.name == "ids":
            rows = [text.split() for text in texts]
        else:
            ids = {c: i for i, c in enumerate(self.chars)}
            try:
                rows = [[ids[c] for c in text] for text in texts]
            except KeyError as e:
                raise BadInput(f"the character {e} is not among the tokenizer's {len(ids)}: "
                               f"{' '.join(self.chars[:60])!r}") from None
        return [np.array(row, dtype=np.uint16) for row in rows]

    def decode(self, ids):
        """Ids of one row, without BOS in front -> text."""
        ids = [int(i) for i in ids if self.name == "ids" or i < self.vocab_size]
        if self.name == "bytes":
            return bytes(i for i in ids if i < 256).decode("utf-8", "replace")
        if self.name == "ids":
            return " ".join(map(str, ids))
        if self.chars is not None:
            return "".join(self.chars[i] for i in ids if i != self.bos)
        return self.bpe.decode(ids)


# ---------------------------------------------------------------------------------------------------------------------
# writing

def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def write_json(path, data):
    with open(path, "w") as f:
        json.dump(data, f, indent=1)
        f.flush()
        os.fsync(f.fileno())


class Writer:
    """Writes a dataset into OUT.partial and renames it to OUT when it is complete.

    With a `key` (whatever decides the content, as JSON has it), a run that was interrupted goes on after the last
    `commit(done)`: `self.done` says where. Another key starts over.
    """

    def __init__(self, out, meta, key=None, shard_tokens=100_000_000):
        self.out, self.meta, self.key, self.shard_tokens = os.path.normpath(out), meta, key, shard_tokens
        self.partial, self.done, self.files = Path(self.out + ".partial"), 0, []
        if (meta.get("vocab_size") or 0) > 1 << 16:
            raise BadInput(f"shards hold at most 65536 ids, this vocabulary has {meta['vocab_size']}")
        if os.path.isfile(self.out) or os.path.isdir(self.out) and os.listdir(self.out):
            raise BadInput(f"{self.out} exists already: choose another --out, or remove it")
        if key is None or not self._resume():
            shutil.rmtree(self.partial, ignore_errors=True)
            try:
                os.makedirs(self.partial)
            except OSError as e:
                raise BadInput(f"{self.partial} cannot be made ({e.strerror}): choose another --out") from None

    def _resume(self):
        """Go back to the last commit of a run with the same key. False: there is none that is whole."""
        try:
            last = json.loads((self.partial / "progress.json").read_text())
            sizes = {self.partial / f["name"]: 2 * f["tokens"] for f in last["files"]}
            if last["key"] != self.key or any(os.path.getsize(path) < size for path, size in sizes.items()):
                return False
        except (OSError, ValueError, KeyError):
            return False
        for path, size in sizes.items():
            os.truncate(path, size)
        self.done, self.files = last["done"], last["files"]
        print(f"{self.partial}: continuing after {self.done} units", file=sys.stderr)
        return True

    def write(self, split, ids):
        ids = np.ascontiguousarray(ids, dtype="<u2")
        while len(ids):
            files = [f for f in self.files if f["split"] == split]
            if not files or files[-1]["tokens"] == self.shard_tokens:
                files.append(dict(name=f"{split}_{len(files):03d}.bin", split=split, tokens=0))
                self.files.append(files[-1])
            last = files[-1]
            part, ids = np.split(ids, [self.shard_tokens - last["tokens"]])
            with open(self.partial / last["name"], "ab" if last["tokens"] else "wb") as f:
                f.write(part)
            last["tokens"] += len(part)

    def commit(self, done):
        """All that was written is on disk, and stands for `done` units of the input."""
        for f in self.files:
            with open(self.partial / f["name"], "rb") as file:
                os.fsync(file.fileno())
        self.done = done
        write_json(self.partial / "progress.tmp", dict(key=self.key, done=done, files=self.files))
        os.replace(self.partial / "progress.tmp", self.partial / "progress.json")

    def finish(self):
        """Hash, name, write meta.json, rename the folder. Returns tokens per split."""
        self.commit(self.done)
        for f in self.files:
            f["sha256"] = sha256(self.partial / f["name"])
        for split in ("train", "val"):
            files = [f for f in self.files if f["split"] == split]
            if len(files) == 1:                            # the usual case: one file a split, with a plain name
                os.rename(self.partial / files[0]["name"], self.partial / f"{split}.bin")
                files[0]["name"] = f"{split}.bin"
        write_json(self.partial / "meta.json", self.meta | {"files": self.files})
        os.rename(self.partial, self.out)                  # fails if someone filled OUT meanwhile
        os.remove(os.path.join(self.out, "progress.json"))
        return {split: sum(f["tokens"] for f in self.files if f["split"] == split) for split in ("train", "val")}


def make_maze(name, out=None):
    out, rows = out or f"data/{name}", maze_dataset(name)
    writer = Writer(out, dict(name=name, tokenizer="maze", vocab_size=6, bos=MAZE_BOS, predict_bos=False,
                              row_length=MAZE_LENGTH))
    for split in ("train", "val"):                       # the language is finite: the same rows
        writer.write(split, rows.ravel())
    writer.finish()
    print(f"{out}: {len(rows)} paths, {len(np.unique(rows, axis=0))} distinct", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# text: files or a hub's datasets -> documents -> shards

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


def begin(args, hub=None, splits=("train",), field="text", **how):
    """What all kinds of text begin with: (tokenizer, a function that streams the documents anew, writer)."""
    if args.tokenizer.startswith(("maze", "ids", "chars:")):
        raise BadInput(f"--tokenizer={args.tokenizer} is none for text: use gpt2, bytes, chars or hf:NAME")
    chars = args.what == "text" and args.tokenizer == "chars"                  # which ones: when the text is read
    tokenizer, paths = Tokenizer("chars:" if chars else args.tokenizer), expand(args.files or [])
    field = args.field or field
    if args.files:
        errors = "surrogateescape" if args.tokenizer == "bytes" else "strict"
        stream = functools.partial(stream_files, paths, field=field, errors=errors, **how)
    else:
        stream = functools.partial(stream_hub, args.hub or hub, splits, field)
    meta = dict(name=os.path.basename(os.path.normpath(args.out)), tokenizer=tokenizer.name, row_length=None,
                vocab_size=tokenizer.vocab_size, bos=int(tokenizer.bos), predict_bos=True)
    key = vars(args) | {"sizes": [[path, os.path.getsize(path)] for path in paths]}      # what decides the content
    return tokenizer, stream, Writer(args.out, meta, key)


def take(stream, chars):
    """The next items (split, text, whether it ends its document) of an iterator, with some `chars` characters."""
    batch = []
    while chars >= 0 and (item := next(stream, None)):
        batch.append(item)
        chars -= len(item[1])
    return batch


COMMIT = 1 << 25                                         # tokens between two points at which a run can be continued


def write_text(writer, stream, tokenizer, eos=True, hold_out=0, batch_chars=1 << 22):
    """Encode a stream of (split, text, whether it ends its document), EOS (= BOS) after each. -> {split: tokens}.

    A few MB are in flight, whatever the input's size. `hold_out`: so many of the last documents become the val split;
    a document waits in memory (2 bytes a token) until as many have followed it.
    """
    stream, done, since = itertools.islice(stream, writer.done, None), writer.done, 0
    waiting, whole = collections.deque(), 0                # encoded and not yet written; documents that end among them
    with tqdm(unit="token", unit_scale=True, desc=writer.out, mininterval=1) as bar:
        while batch := take(stream, batch_chars):
            for (split, _, ends), ids in zip(batch, tokenizer.encode([text for _, text, _ in batch])):
                waiting.append((split, np.append(ids, np.uint16(tokenizer.bos)) if ends and eos else ids, ends))
                whole += ends
            ready = collections.defaultdict(list)
            while waiting and (whole > hold_out or not hold_out):
                split, ids, ends = waiting.popleft()
                ready[split].append(ids)
                done, whole = done + 1, whole - ends
            for split, parts in ready.items():
                ids = np.concatenate(parts)
                writer.write(split, ids)
                bar.update(len(ids))
                since += len(ids)
            if since > COMMIT:
                writer.commit(done)
                since = 0
    if hold_out and not done:
        raise BadInput(f"there are {whole} documents, and the last {hold_out} should be held out: set a smaller "
                       "--val_documents")
    for _, ids, _ in waiting:
        writer.write("val", ids)
    if not writer.files:
        raise BadInput(f"{writer.out} is empty: give files that hold text")
    writer.done = done + len(waiting)
    tokens = writer.finish()
    print(f"{writer.out}: {tokens['train']} tokens for training, {tokens['val']} for validation", file=sys.stderr)
    return tokens


def make_text(args):
    """Any UTF-8 text files (any files at all with `bytes`) -> shards; whole documents are held out for validation."""
    tokenizer, stream, writer = begin(args, separator=args.separator)
    n, chars = 0, set()
    for _, text, ends in tqdm(stream(), desc="counting documents", unit="", mininterval=1):
        n += ends
        chars.update(text if tokenizer.chars is not None else "")
    if n < 2:
        raise BadInput(f"--files hold {n} document{'s' * (n != 1)}, and at least one must go to each of train "
                       "and val: set --separator to what stands between documents, or split the text")
    if tokenizer.chars is not None:
        tokenizer = Tokenizer("chars:" + "".join(sorted(chars)))
        writer.meta |= dict(tokenizer=tokenizer.name, vocab_size=tokenizer.vocab_size, bos=tokenizer.bos)
    hold = max(1, round(args.val_fraction * n))

    def split():                                         # in all `hold` of n documents, without a list of them
        draws, held, doc = np.random.default_rng(args.seed), 0, 0
        val = draws.random() < hold / n
        for _, text, ends in stream():
            yield "val" if val else "train", text, ends
            if ends:
                held, doc = held + val, doc + 1
                val = doc < n and draws.random() < (hold - held) / (n - doc)
    write_text(writer, split(), tokenizer)
    print(f"{args.out}: {n} documents ({hold} for validation)", file=sys.stderr)


def make_openwebtext(args):
    """OpenWebText, its last documents held out (Appendix C.1: 100,000), EOS after each document."""
    tokenizer, stream, writer = begin(args, "Skylion007/openwebtext")
    write_text(writer, (("train", text, ends) for _, text, ends in stream()), tokenizer, hold_out=args.val_documents)


def make_lm1b(args):
    """The One Billion Word benchmark, detokenised; val is its held-out part (files with `heldout` in their names)."""
    tokenizer, stream, writer = begin(args, ZEROSHOT["lm1b"][0], ("train", "test"), by_line=True)

    def split():
        for name, text, ends in stream():
            held_out = "heldout" in name or name.endswith(":test")              # the latter: the hub's name for it
            yield "val" if held_out else "train", detokenize(text, LM1B), ends
    if not write_text(writer, split(), tokenizer)["val"]:
        print(f"{args.out}: no file has `heldout` in its name: there is no validation split, which training needs",
              file=sys.stderr)


# Detokenisers, as the field uses them (GPT-2's and Megatron's; the set of kuleshov-group/mdlm): (pattern, replacement)
WIKITEXT = [(r"s '", "s'"), (" @-@ ", "-"), (" @,@ ", ","), (r" @\.@ ", "."), (" : ", ": "),
            (" ; ", "; "), (r" \. ", ". "), (" ! ", "! "), (r" \? ", "? "), (" , ", ", "),
            (r"\(\s*([^\)]*?)\s*\)", r"(\1)"), (r"\[\s*([^\]]*?)\s*\]", r"[\1]"), (r"{\s*([^}]*?)\s*}", r"{\1}"),
            (r"\"\s*([^\"]*?)\s*\"", r'"\1"'), (r"'\s*([^']*?)\s*'", r"'\1'"), (r"= = = =", "===="), (r"= = =", "==="),
            (r"= =", "=="), (" \u00b0 ", "\u00b0"), (r" \n", "\n"), (r"\n ", "\n"), (" N ", " 1 "), (" 's", "'s")]
STRIP = (r"^\s+|\s+\Z", "")
PTB = [STRIP, (" 's", "'s"), ("s ' ", "s' "), (" n't", "n't"), (r" \n ", "\n"), (r"\\/", "/"), *[(" N ", " 1 ")] * 10,
       (r"\$ 1", "$1"), (r"# 1", "#1"), ("<unk>", "?")]
LM1B = [STRIP, ("http : / / ", "http://"), ("https : / / ", "https://"), (r" '(\w+)", r"'\1"),
        (r" (\w+) \. ", r" \1. "), (r" (\w+) \.$", r" \1."),
        (r" \? ", "? "), (r" \?$", "?"), (" ! ", "! "), (" !$", "!"), (" , ", ", "),
        (" : ", ": "), (" ; ", "; "), (" / ", "/"), (r'" ([^"]+) "', r'"\1"'), (r"' ([^']+) '", r"'\1'"),
        (r"\( ([^\(\)]+) \)", r"(\1)"), (r"\[ ([^\[\]]+) \]", r"[\1]"), (r"\$ ", "$"), ("\u00a3 ", "\u00a3")]
LAMBADA = [("[\u201c\u201d]", '"'), STRIP, (r"\A", "\n")]

# name: (on the hub, field, by line, detokeniser); val is what is evaluated
ZEROSHOT = dict(
    ptb=("ptb-text-only/ptb_text_only@refs/convert/parquet", "sentence", True, PTB),
    wikitext=("Salesforce/wikitext:wikitext-2-raw-v1", "text", True, WIKITEXT),
    lm1b=("billion-word-benchmark/lm1b@refs/convert/parquet", "text", True, LM1B),
    lambada=("EleutherAI/lambada_openai", "text", False, LAMBADA),
    ag_news=("fancyzhx/ag_news", "text", False, []),
    pubmed=("armanc/scientific_papers:pubmed@refs/convert/parquet", "article", False, WIKITEXT + LM1B[1:]),
    arxiv=("armanc/scientific_papers:arxiv@refs/convert/parquet", "article", False, WIKITEXT + LM1B[1:]))


def detokenize(text, rules):
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


def make_zeroshot(args):
    """A zero-shot set (Table 8): its test texts, detokenised, in one stream without EOS, as the paper wraps them."""
    hub, field, by_line, rules = ZEROSHOT[args.name]
    tokenizer, stream, writer = begin(args, hub, ("test",), field, by_line=by_line)
    write_text(writer, (("val", detokenize(text, rules), ends) for _, text, ends in stream()), tokenizer, eos=False)


# ---------------------------------------------------------------------------------------------------------------------
# reading

class Shards:
    """One split of a dataset, memmapped: `rows(indices)` -> int64 [n, length], each [BOS] + length - 1 tokens.

    On opening, sizes are checked against meta.json and ids in the first and last MiB of each file; every batch is
    checked as it is read. Raises BadInput. `length` None: the dataset's own row_length + 1 (+ 2 on the maze: a PAD).
    """

    def __init__(self, path, split, length=None):
        self.path, self.meta, files = path, *read_meta(path)
        fixed = self.meta["row_length"]
        if fixed and length not in (None, fixed + 1) and (length, self.meta["tokenizer"]) != (fixed + 2, "maze"):
            raise BadInput(f"--length={length} does not fit {path}, whose rows are cut to {fixed} tokens: "
                           f"use --length={fixed + 1} (BOS included), or leave it out")
        if not fixed and length is None:
            raise BadInput(f"{path} is text without a fixed row length: give --length")
        self.length = length or fixed + 1
        self.stored = fixed or self.length - 1                 # tokens of a row in the file
        self.files = [f for f in files if f["split"] == split]
        for f in self.files:
            self._check(f["ids"][:1 << 19], f["path"])
            self._check(f["ids"][-(1 << 19):], f["path"])
        # rows never cross files: the tail of a file that does not fill a row is left out
        self.starts = np.cumsum([0] + [f["tokens"] // self.stored for f in self.files])
        if not len(self):
            raise BadInput(f"{path} holds no {split} row of {self.length - 1} tokens: "
                           "prepare more text, or use a smaller --length")

    def _check(self, ids, path):
        if len(ids) and ids.max() >= self.meta["vocab_size"]:
            raise BadInput(f"{path} holds token id {ids.max()}, but the vocabulary has {self.meta['vocab_size']}: "
                           "prepare the data again with the right tokenizer")

    def __len__(self):
        return int(self.starts[-1])

    def hashes(self):
        """What identifies each file: its sha256 in meta.json, or that of its first and last MiB where it has none."""
        return [f.get("sha256") or hashlib.sha256(f["ids"][:1 << 19].tobytes() + f["ids"][-(1 << 19):].tobytes()
                                                  + bytes(str(f["tokens"]), "ascii")).hexdigest() for f in self.files]

    def frequency(self):
        """How often each token occurs, each once more than counted, as fractions: float32 [vocab_size]."""
        counts = 1 + sum(np.bincount(part, minlength=self.meta["vocab_size"]) for f in self.files
                         for part in np.array_split(f["ids"], 1 + len(f["ids"]) // 10**8))
        return (counts / counts.sum()).astype(np.float32)

    def rows(self, indices):
        out = np.full((len(indices), self.length), PAD, dtype=np.int64)
        out[:, 0] = self.meta["bos"]
        for row, i in zip(out, indices):
            k = np.searchsorted(self.starts, i, side="right") - 1
            a = (i - self.starts[k]) * self.stored
            row[1:1 + self.stored] = self.files[k]["ids"][a:a + self.stored]
            self._check(row, self.files[k]["path"])
        return out


def read_meta(path):
    """A dataset's meta.json and its files, sizes checked: (meta, [{path, split, tokens, sha256, ids (memmapped)}])."""
    name = os.path.basename(os.path.normpath(path))
    if not os.path.isdir(path):
        known = name in ("maze", "maze_skewed", "openwebtext", "lm1b")
        raise BadInput(f"{path} is not a folder of shards: make it with `python data/prepare.py "
                       f"{name if known else 'text --files ... --out=' + path}`")
    file = os.path.join(path, "meta.json")
    if os.path.exists(file):
        try:
            with open(file) as f:
                meta = json.load(f)
            files = [dict(path=os.path.join(path, f["name"]), split=f["split"], tokens=int(f["tokens"]), offset=0,
                          sha256=f["sha256"]) for f in meta["files"]]
            meta = {key: meta[key] for key in ("name", "tokenizer", "vocab_size", "bos", "predict_bos", "row_length")}
            if not 0 <= meta["bos"] < meta["vocab_size"] <= 1 << 16:
                raise ValueError(f"bos {meta['bos']} and vocab_size {meta['vocab_size']} do not fit")
            if meta["row_length"] and any(f["tokens"] % meta["row_length"] for f in files):
                raise ValueError(f"the files do not hold whole rows of {meta['row_length']} tokens")
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise BadInput(f"{file} is damaged ({type(e).__name__}: {e}): prepare the data again") from None
    else:
        meta = dict(name=name, tokenizer="gpt2", vocab_size=50257, bos=50256, predict_bos=True, row_length=None)
        files = [foreign(os.path.join(path, f)) for f in sorted(os.listdir(path)) if f.endswith(".bin")]
        if not files:
            raise BadInput(f"{path} holds no .bin shards: make them with `python data/prepare.py`")
    for f in files:
        size = os.path.getsize(f["path"]) if os.path.exists(f["path"]) else 0
        if size != (want := 2 * f["tokens"] + f["offset"]):
            raise BadInput(f"{f['path']} has {size} bytes and should have {want}: it is "
                           f"{'truncated or was changed' if size else 'missing'}, prepare the data again")
        f["ids"] = np.memmap(f["path"], "<u2", "r", f["offset"]) if f["tokens"] else np.zeros(0, "<u2")
    return meta, files


def foreign(path):
    """A shard without meta.json: llm.c's and modded-nanogpt's begin with a header, nanoGPT's have none."""
    size, head = os.path.getsize(path), np.fromfile(path, dtype="<i4", count=3)
    offset, tokens = 0, size // 2
    if size >= 1024 and head[0] == 20240520:               # 256 int32, of these: magic number, version, tokens
        if head[1] != 1:
            raise BadInput(f"{path} has version {head[1]} of llm.c's shard format: only version 1 (uint16) is read")
        offset, tokens = 1024, int(head[2])
    elif size % 2:
        raise BadInput(f"{path} has {size} bytes, an odd number: not uint16 ids, or truncated")
    return dict(path=path, split="val" if "val" in os.path.basename(path) else "train", tokens=tokens, offset=offset)


def verify(path):
    """Check a whole dataset: sizes, sha256 of every file, every id. Prints a line per file; raises BadInput."""
    meta, files = read_meta(path)
    for f in files:
        if "sha256" in f and sha256(f["path"]) != f["sha256"]:
            raise BadInput(f"{f['path']} does not have the sha256 that meta.json names: prepare the data again")
        if (top := f["ids"].max(initial=0)) >= meta["vocab_size"]:
            raise BadInput(f"{f['path']} holds token id {top}, but the vocabulary has {meta['vocab_size']}")
        print(f"{f['path']}: {f['tokens']} tokens, ok")


def main():
    makers = dict(text=make_text, openwebtext=make_openwebtext, lm1b=make_lm1b, zeroshot=make_zeroshot)
    parser = Parser(description="Make, and check, datasets of token shards.")
    sub = parser.add_subparsers(dest="what", required=True, parser_class=Parser)
    p = {name: sub.add_parser(name, help=what) for name, what in dict(
        maze="the 2000 paths of the maze", maze_skewed="the same, short ones favoured", text="any UTF-8 text",
        openwebtext="OpenWebText", lm1b="One Billion Words", zeroshot="a zero-shot evaluation set",
        verify="check sizes, hashes and ids of a dataset").items()}
    p["verify"].add_argument("path", help="its folder")
    p["zeroshot"].add_argument("name", choices=ZEROSHOT, help="which set")
    for name in ("maze", "maze_skewed", *makers):
        p[name].add_argument("--out", required=name == "text", help="folder to write; by default data/ and the name")
    for name in makers:
        p[name].add_argument("--files", nargs="+", required=name == "text", help="text, .jsonl, .parquet, .csv, .tar "
                             "of these, .gz or .xz of these, or folders of these, in this order; without, --hub")
        if name != "text":
            p[name].add_argument("--hub", help="Hugging Face dataset NAME[:CONFIG][@REVISION], streamed by `datasets`")
        p[name].add_argument("--field", help="where .jsonl, .parquet and the hub keep a document's text; by default "
                             "text, or the zero-shot set's own")
        p[name].add_argument("--tokenizer", default="gpt2", help="gpt2, bytes (no download, any file), hf:NAME; for "
                             "`text` also chars (the characters of the text)")
    p["openwebtext"].add_argument("--val_documents", type=number(int, 1), default=100_000,
                                  help="the last so many are held out")
    p["text"].add_argument("--separator", default="<|endoftext|>", type=unescape,
                           help="what stands between documents of a text file; a file's end always ends one")
    p["text"].add_argument("--val_fraction", type=number(float, above=0, high=0.5), default=0.02,
                           help="fraction of the documents held out")
    p["text"].add_argument("--seed", type=number(int, 0), default=0, help="which documents are held out")
    args = parser.parse_args()
    if args.what == "verify":
        return verify(args.path)
    args.out = args.out or f"data/{args.what}" + (f"-{args.name}" if args.what == "zeroshot" else "")
    if args.what.startswith("maze"):
        return make_maze(args.what, args.out)
    try:
        makers[args.what](args)
    except BadInput:                                       # what has no committed part cannot be continued
        partial = os.path.normpath(args.out) + ".partial"
        if not os.path.exists(os.path.join(partial, "progress.json")):
            shutil.rmtree(partial, ignore_errors=True)
        raise


if __name__ == "__main__":
    run_main(main)
