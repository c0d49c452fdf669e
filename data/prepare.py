"""Datasets: makes shards, reads shards, checks shards; owns the maze.

    python data/prepare.py maze                                            # 2000 paths, no download
    python data/prepare.py text --files a.txt b.txt --tokenizer=bytes --out=data/mine
    python data/prepare.py openwebtext                                     # or lm1b: streamed; or --files=..., local
    python data/prepare.py zeroshot ptb --files ptb.test.txt               # one of the paper's zero-shot sets
    python data/prepare.py verify data/mine                                # sizes, hashes and ids of every shard

A dataset is a folder of raw little-endian uint16 token ids, `train.bin` and `val.bin` (or `train_000.bin`, ...), and a
`meta.json` (tokenizer, vocab_size, bos, row_length, and per file: split, tokens, sha256). It is made in a folder named
`OUT.partial` and renamed when it is complete: an interrupted run leaves nothing that training would accept, and the
same command continues it. Memory is flat, whatever the input's size. Without a meta.json, nanoGPT's .bin files are
taken as GPT-2 ids, and llm.c's (256-int32 header) are read too.
A training row is [BOS] + the next L - 1 tokens; rows do not overlap.
"""
import argparse
import collections
import csv
import functools
import gzip
import hashlib
import importlib
import io
import itertools
import json
import lzma
import os
import re
import shutil
import sys
import tarfile
import zlib

import numpy as np
from tqdm import tqdm

HEADER_BYTES, HEADER_MAGIC = 1024, 20240520             # llm.c, modded-nanogpt: 256 int32, then the tokens


class BadInput(Exception):
    """The user's mistake. The message is one sentence that names the flag or file and says what to do."""


class Parser(argparse.ArgumentParser):
    """argparse that says one sentence on an error, on stderr, exit code 2, and takes no abbreviated flags."""

    def __init__(self, **kw):
        super().__init__(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kw)

    def error(self, message):
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        sys.exit(2)


def number(kind, low=None, high=None, above=None):
    """An argparse type: an int or a float within bounds, refused with a sentence otherwise."""
    def parse(text):
        try:
            value = kind(text.replace("_", "") if kind is int else text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not "
                                             f"{'a whole number' if kind is int else 'a number'}") from None
        bounds = [f"at least {low}"] * (low is not None) + [f"above {above}"] * (above is not None) \
            + [f"at most {high}"] * (high is not None)
        if not ((low is None or value >= low) and (above is None or value > above) and (high is None or value <= high)):
            raise argparse.ArgumentTypeError(f"{text} must be {' and '.join(bounds)}")
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
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
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
MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1))
MOVE_NAMES, PAD, MAZE_BOS, MAZE_LENGTH = "UDLR", 4, 5, 10
START, TARGET = (2, 1), (4, 4)


@functools.cache                                         # half a second, and every table row asks for it
def maze_paths():
    """All valid sequences, [2000, 10] uint16, sorted by length: free cells only, target first reached at the end."""
    paths, frontier = [], [((), START)]
    for m in range(1, MAZE_LENGTH + 1):
        step = []
        for path, (r, c) in frontier:
            for k, (dr, dc) in enumerate(MOVES):
                at = r + dr, c + dc
                if not (0 <= at[0] < 6 and 0 <= at[1] < 6) or MAZE[at[0]][at[1]] == "#":
                    continue
                if at == TARGET:
                    paths.append(path + (k,) + (PAD,) * (MAZE_LENGTH - m))
                else:
                    step.append((path + (k,), at))
        frontier = step
    paths = np.array(paths, dtype=np.uint16)
    paths.setflags(write=False)
    return paths


def maze_keys(rows):
    """Rows [N, 10] -> one integer each, for membership and counting; a token outside U D L R PAD gives -1, as does
    one other than PAD in longer rows' tails."""
    rows, tail = np.asarray(rows, dtype=np.int64)[:, :MAZE_LENGTH], np.asarray(rows)[:, MAZE_LENGTH:]
    fits = (rows < 5).all(1) & (rows >= 0).all(1) & (tail == PAD).all(1)
    return np.where(fits, rows @ 5 ** np.arange(MAZE_LENGTH), -1)


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
    """A path on the grid, for the terminal: digits are the visiting order (latest at a cell), X where it went wrong."""
    grid, at, note = [list(line) for line in MAZE], START, "does not reach T"
    for i, k in enumerate(row):
        if k >= PAD:
            note = "stops before T"
            break
        at = at[0] + MOVES[k][0], at[1] + MOVES[k][1]
        if not (0 <= at[0] < 6 and 0 <= at[1] < 6) or MAZE[at[0]][at[1]] == "#":
            note = f"move {i + 1} leaves the free cells"
            if 0 <= at[0] < 6 and 0 <= at[1] < 6:
                grid[at[0]][at[1]] = "X"
            break
        if at == TARGET:
            note = f"reaches T in {i + 1} moves" if all(k == PAD for k in row[i + 1:]) else "goes on after T"
            break
        grid[at[0]][at[1]] = str((i + 1) % 10)
    moves = "".join("UDLR.?"[min(k, 5)] for k in row)
    return "\n".join(" ".join(line) for line in grid) + f"\n{moves}: {note}\n"


# ---------------------------------------------------------------------------------------------------------------------
# tokenizers

class Tokenizer:
    """encode(list of str) -> list of uint16 arrays; decode(ids) -> str. name: "gpt2" (tiktoken); "bytes" (ids 0..255,
    any file); "chars:" + the characters it knows; "hf:NAME" (a Hugging Face name, folder or .gguf file, through
    `transformers`); "maze"; "ids", numbers as they are, for a checkpoint that names no tokenizer.
    """

    def __init__(self, name, vocab_size=None):
        self.name, self.vocab_size, self.bos = name, vocab_size, None
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
        elif name == "maze":
            self.vocab_size, self.bos = 6, MAZE_BOS
        elif name.startswith("chars:"):
            self.id = {c: i for i, c in enumerate(name[6:])}
            self.vocab_size, self.bos = len(self.id) + 1, len(self.id)
        elif name.startswith("hf:"):
            where, file = os.path.split(name[3:]) if name.endswith(".gguf") else (name[3:], None)
            try:
                self.bpe = optional("transformers", f"tokenizer {name}").AutoTokenizer.from_pretrained(
                    where or ".", **({"gguf_file": file} if file else {}))
            except (OSError, ValueError, ImportError) as e:
                raise BadInput(f"transformers cannot load the tokenizer {name}: {str(e).splitlines()[0]}") from None
            self.vocab_size = len(self.bpe)
            self.bos = self.bpe.eos_token_id if self.bpe.bos_token_id is None else self.bpe.bos_token_id
            if self.bos is None:
                raise BadInput(f"tokenizer {name} has neither BOS nor EOS, and rows begin with one")
        elif name != "ids":
            raise BadInput(f"unknown tokenizer {name!r}: one of gpt2, bytes, hf:NAME, and for `text` chars")
        if (self.vocab_size or 0) > 1 << 16:
            raise BadInput(f"tokenizer {name[:40]} has {self.vocab_size} ids, but shards hold at most 65536")

    def encode(self, texts):
        if self.name == "gpt2":                          # tiktoken releases the GIL: real threads, order kept
            return [np.array(t, dtype=np.uint16)
                    for t in self.bpe.encode_ordinary_batch(texts, num_threads=os.cpu_count())]
        if self.name.startswith("hf:"):
            return [np.array(t, dtype=np.uint16)
                    for t in self.bpe(texts, add_special_tokens=False, verbose=False)["input_ids"]]
        if self.name == "maze":
            return [np.array(["UDLR.".index(c) for c in t], dtype=np.uint16) for t in texts]
        if self.name == "ids":
            return [np.array(t.split(), dtype=np.uint16) for t in texts]
        if self.name.startswith("chars:"):
            try:
                return [np.array([self.id[c] for c in t], dtype=np.uint16) for t in texts]
            except KeyError as e:
                raise BadInput(f"the character {e} is not among this tokenizer's {len(self.id)}") from None
        return [np.frombuffer(t.encode("utf-8", "surrogateescape"), dtype=np.uint8).astype(np.uint16) for t in texts]

    def decode(self, ids):
        """Ids of one row, without BOS in front -> text."""
        if self.name == "gpt2":
            return self.bpe.decode([int(i) for i in ids if i < 50257])
        if self.name == "bytes":
            return bytes(int(i) for i in ids if i < 256).decode("utf-8", "replace")
        if self.name.startswith("hf:"):
            return self.bpe.decode(list(ids))
        if self.name == "ids":
            return " ".join(map(str, ids))
        if self.name.startswith("chars:"):
            return "".join(self.name[6 + i] for i in ids if i < self.bos)
        return "".join("UDLR.?"[min(int(i), 5)] for i in ids)


# ---------------------------------------------------------------------------------------------------------------------
# writing

class Writer:
    """Writes a dataset into OUT.partial and renames it to OUT when it is complete.

    With a `key` (whatever decides the content), a run that was interrupted goes on after the last `commit(done)`:
    `self.done` says where. Another key starts over.
    """

    def __init__(self, out, meta, key=None, shard_tokens=100_000_000):
        out = os.path.normpath(out)
        self.out, self.partial, self.meta, self.shard_tokens = out, out + ".partial", meta, shard_tokens
        self.key, self.done, self.files, self.open = key, 0, [], {}
        if (meta.get("vocab_size") or 0) > 1 << 16:
            raise BadInput(f"shards hold at most 65536 ids, this vocabulary has {meta['vocab_size']}")
        if os.path.isfile(out) or os.path.isdir(out) and os.listdir(out):
            raise BadInput(f"{out} exists already: choose another --out, or remove it")
        self.progress = os.path.join(self.partial, "progress.json")
        if key is None or not self._resume():
            shutil.rmtree(self.partial, ignore_errors=True)
            try:
                os.makedirs(self.partial)
            except OSError as e:
                raise BadInput(f"{self.partial} cannot be made ({e.strerror}): choose another --out") from None

    def _path(self, name):
        return os.path.join(self.partial, name)

    def _resume(self):
        try:
            with open(self.progress) as f:
                p = json.load(f)
            sizes = {f["name"]: 2 * f["tokens"] for f in p["files"]}
            if p["key"] != self.key or any(os.path.getsize(self._path(n)) < size for n, size in sizes.items()):
                return False
        except (OSError, ValueError, KeyError):
            return False
        self.done, self.files = p["done"], p["files"]
        for name in set(os.listdir(self.partial)) - {"progress.json"}:         # what is committed stays, and no more
            if name in sizes:
                os.truncate(self._path(name), sizes[name])
            else:
                os.remove(self._path(name))
        print(f"{self.partial}: continuing after {self.done} units", file=sys.stderr)
        return True

    def write(self, split, ids):
        ids = np.ascontiguousarray(ids, dtype="<u2")
        while len(ids):
            entry = next((f for f in self.files if f["split"] == split and f["tokens"] < self.shard_tokens), None)
            if entry is None:
                n = sum(f["split"] == split for f in self.files)
                entry = dict(name=f"{split}_{n:03d}.bin", split=split, tokens=0)
                self.files.append(entry)
            if entry["name"] not in self.open:
                self.open[entry["name"]] = open(self._path(entry["name"]), "ab")
            part, ids = np.split(ids, [self.shard_tokens - entry["tokens"]])
            self.open[entry["name"]].write(part.tobytes())
            entry["tokens"] += len(part)
            if entry["tokens"] == self.shard_tokens:
                self._close(entry["name"])

    def _close(self, name):
        file = self.open.pop(name)
        file.flush()
        os.fsync(file.fileno())
        file.close()

    def commit(self, done):
        """All that was written is on disk, and stands for `done` units of the input."""
        for name in list(self.open):
            self._close(name)
        self.done = done
        with open(self.progress + ".tmp", "w") as f:
            json.dump(dict(key=self.key, done=done, files=self.files), f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(self.progress + ".tmp", self.progress)

    def finish(self):
        """Hash, name, write meta.json, rename the folder. Returns tokens per split."""
        self.commit(self.done)
        for f in self.files:
            with open(self._path(f["name"]), "rb") as file:
                f["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
        for split in ("train", "val"):                   # the usual case: one file a split, with a plain name
            files = [f for f in self.files if f["split"] == split]
            if len(files) == 1:
                os.rename(self._path(files[0]["name"]), self._path(split + ".bin"))
                files[0]["name"] = split + ".bin"
        with open(self._path("meta.json"), "w") as f:
            json.dump(self.meta | {"files": self.files}, f, indent=1)
            f.flush()
            os.fsync(f.fileno())
        os.rename(self.partial, self.out)                  # fails if someone filled OUT meanwhile
        os.remove(os.path.join(self.out, "progress.json"))
        return {split: sum(f["tokens"] for f in self.files if f["split"] == split) for split in ("train", "val")}


def make_maze(name, out=None):
    out = out or f"data/{name}"
    writer = Writer(out, dict(name=name, tokenizer="maze", vocab_size=6, bos=MAZE_BOS,
                              predict_bos=False, row_length=MAZE_LENGTH))
    rows = maze_dataset(name)
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
    empty, buffer = True, ""                             # nothing of the current document yielded yet
    while True:
        block = f.read(piece)
        *ended, buffer = (buffer + block).split(separator) if separator else [buffer + block]
        for text in ended + [buffer] * (not block):
            text = text.strip("\r\n") if empty else text.rstrip("\r\n")
            if text or not empty:
                yield text, True
            empty = True
        if not block:
            break
        if len(buffer) > piece + len(separator):
            cut = len(buffer) - max(1, len(separator))                          # the separator may have begun
            while cut > 1 and not (buffer[cut].isspace() and not buffer[cut - 1].isspace()):
                cut -= 1
            cut = cut if cut > 1 else len(buffer) - max(1, len(separator))
            yield (buffer[:cut].lstrip("\r\n") if empty else buffer[:cut]), False
            empty, buffer = False, buffer[cut:]


def read_documents(path, separator="", by_line=False, field="text", errors="strict", file=None):
    """The documents of a file, by the end of its name: yields (name, text, whether it ends its document).

    .parquet and .jsonl: a document is the text in `field`. .csv: the columns after the first. .tar: each of its files
    in turn. .gz, .xz: what is in it. Other: text, cut at `separator`, or at each line. `file`: the open (binary) file,
    in an archive.
    """
    name, inner = os.path.basename(path).lower(), (separator, by_line, field, errors)
    if name.endswith(".parquet"):
        for batch in optional("pyarrow.parquet", path).ParquetFile(file or path).iter_batches(256, columns=[field]):
            yield from ((path, text, True) for text in batch.column(0).to_pylist())
        return
    with file or open(path, "rb") as f:
        if name.endswith((".gz", ".tgz", ".xz")):
            f = (lzma.open if name.endswith(".xz") else gzip.open)(f)
            packed = name.endswith((".tgz", "_data.xz"))                       # _data.xz: OpenWebText's subsets
            yield from read_documents(path[:path.rindex(".")] + ".tar" * packed, *inner, file=f)
        elif name.endswith(".tar"):
            for member in (archive := tarfile.open(fileobj=f, mode="r:")):
                if member.isfile():
                    yield from read_documents(member.name, *inner, file=archive.extractfile(member))
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
    return [p for f in files or () for p in ([f] if not os.path.isdir(f) else sorted(
        os.path.join(d, n) for d, _, ns in os.walk(f) for n in ns
        if not any(part.startswith(".") for part in os.path.relpath(os.path.join(d, n), f).split(os.sep))))]


def sources(files, hub, flag="--files", **how):
    """The documents of `files` (folders: all their files, sorted), or without any, of `hub` (NAME[:CONFIG][@REVISION])
    streamed by `datasets`: a function that begins anew -> yields (name, text, whether it ends its document)."""
    paths = expand(files)
    for path in paths:
        if not os.path.isfile(path):
            raise BadInput(f"{flag}: {path} is not a file or a folder")

    def stream(split="train"):
        if files:
            for path in paths:
                try:
                    for document in read_documents(path, **how):
                        if not isinstance(document[1], str):
                            raise TypeError(f"a document is {document[1]!r}, which is no text")
                        yield document
                except UnicodeDecodeError as e:
                    raise BadInput(f"{flag}: {path} holds bytes that are not UTF-8 ({e.reason} at byte {e.start} of a "
                                   "block): convert them, or use --tokenizer=bytes") from None
                except (OSError, EOFError, ValueError, LookupError, TypeError, tarfile.TarError, csv.Error,
                        lzma.LZMAError, zlib.error) as e:
                    raise BadInput(f"{flag}: {path} cannot be read ({type(e).__name__}: {e}): truncated, or not of the "
                                   "kind its name says, or without the field of the text") from None
        else:
            where, _, revision = hub.partition("@")
            where, _, config = where.partition(":")
            load = optional("datasets", f"{hub} without {flag}").load_dataset
            try:
                rows = load(where, config or None, split=split, streaming=True, revision=revision or None)
                for row in rows:
                    yield where, row[how.get("field", "text")], True
            except Exception as e:                       # a hub and its library fail in a hundred ways
                why = (str(e) or "-").splitlines()[0]
                raise BadInput(f"datasets cannot stream {hub} ({type(e).__name__}: {why}): go online, name a copy with "
                               f"--hub, or give local files with {flag}") from None
    return stream


COMMIT = 1 << 25                                         # tokens between two points at which a run can be continued


def write_text(writer, stream, tokenizer, eos=True, hold_out=0, batch_chars=1 << 22):
    """Encode a stream of (split, text, whether it ends its document), EOS (= BOS) after each. -> {split: tokens}.

    `hold_out`: so many of the last documents become the val split; a document waits in memory (2 bytes a token) until
    as many have followed it.
    """
    batch, pending, done, since, n = [], 0, writer.done, 0, 0
    waiting, whole = collections.deque(), 0
    with tqdm(unit="token", unit_scale=True, desc=writer.out, mininterval=1) as bar:
        for split, text, ends in itertools.chain(itertools.islice(stream, done, None), [(None, "", True)]):
            if split:
                batch.append((split, text, ends))
                pending += len(text)
            if split and pending <= batch_chars:         # a few MB in flight, whatever the input's size
                continue
            for ids, (where, _, ends) in zip(tokenizer.encode([text for _, text, _ in batch]), batch):
                ids = np.append(ids, np.uint16(tokenizer.bos)) if ends and eos else ids
                bar.update(len(ids))
                waiting.append((where, ids, ends))
                n, whole = n + ends, whole + ends
                while waiting and (whole > hold_out or not hold_out):
                    where, ids, ends = waiting.popleft()
                    writer.write(where, ids)
                    done, since, whole = done + 1, since + len(ids), whole - ends
            batch, pending = [], 0
            if since > COMMIT:
                writer.commit(done)
                since = 0
            bar.set_postfix(documents=n, refresh=False)
    if hold_out and not done:
        raise BadInput(f"there are {whole} documents, and the last {hold_out} should be held out: set a smaller "
                       "--val_documents")
    for _, ids, _ in waiting:
        writer.write("val", ids)
    writer.done = done + len(waiting)
    tokens = writer.finish()
    print(f"{writer.out}: {tokens['train']} tokens for training, {tokens['val']} for validation", file=sys.stderr)
    return tokens


def text_meta(out, tokenizer):
    return dict(name=os.path.basename(os.path.normpath(out)), tokenizer=tokenizer.name, row_length=None,
                vocab_size=tokenizer.vocab_size, bos=int(tokenizer.bos), predict_bos=True)


def fingerprint(args):
    """What decides the content of a dataset: its flags, and the sizes of its files."""
    return json.loads(json.dumps(vars(args) | {"sizes": [(f, os.path.getsize(f)) for f in expand(args.files)]}))


def make_text(args):
    """Any UTF-8 text files (any files at all with `bytes`) -> shards; whole documents are held out for validation."""
    tokenizer = Tokenizer("chars:" if args.tokenizer == "chars" else args.tokenizer)
    stream = sources(args.files, None, separator=args.separator, field=args.field,
                     errors="surrogateescape" if args.tokenizer == "bytes" else "strict")
    writer = Writer(args.out, text_meta(args.out, tokenizer), fingerprint(args))
    n, chars = 0, set()
    for _, text, ends in tqdm(stream(), desc="counting documents", unit="", mininterval=1):
        n += ends
        chars.update(text if args.tokenizer == "chars" else "")
    if args.tokenizer == "chars":
        tokenizer = Tokenizer("chars:" + "".join(sorted(chars)))
        writer.meta = text_meta(args.out, tokenizer)
    if n < 2:
        raise BadInput(f"--files hold {n} document{'s' * (n != 1)}, and at least one must go to each of train "
                       "and val: set --separator to what stands between documents, or split the text")
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
    tokenizer = Tokenizer(args.tokenizer)
    stream = sources(args.files, args.hub or "Skylion007/openwebtext", field=args.field)
    writer = Writer(args.out, text_meta(args.out, tokenizer), fingerprint(args))
    write_text(writer, (("train", text, ends) for _, text, ends in stream()), tokenizer, hold_out=args.val_documents)


def make_lm1b(args):
    """The One Billion Word benchmark, detokenised; val is its held-out part (files with `heldout` in their names)."""
    tokenizer = Tokenizer(args.tokenizer)
    stream = sources(args.files, args.hub or ZEROSHOT["lm1b"][0], by_line=True, field=args.field)
    writer = Writer(args.out, text_meta(args.out, tokenizer), fingerprint(args))

    def split():
        if args.files:
            yield from (("val" if "heldout" in name else "train", detokenize(text, LM1B), ends)
                        for name, text, ends in stream())
        else:
            for where, hub_split in (("train", "train"), ("val", "test")):
                yield from ((where, detokenize(text, LM1B), ends) for _, text, ends in stream(hub_split))
    tokens = write_text(writer, split(), tokenizer)
    if not tokens["val"]:
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
        (r" (\w+) \. ", r" \1. "),
        (r" (\w+) \.$", r" \1."), (r" \? ", "? "), (r" \?$", "?"), (" ! ", "! "), (" !$", "!"), (" , ", ", "),
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
    tokenizer = Tokenizer(args.tokenizer)
    stream = sources(args.files, args.hub or hub, by_line=by_line, field=args.field or field)
    writer = Writer(args.out, text_meta(args.out, tokenizer), fingerprint(args))
    tokens = write_text(writer, (("val", detokenize(text, rules), ends) for _, text, ends in stream("test")), tokenizer,
                        eos=False)
    if not tokens["val"]:
        raise BadInput(f"{args.name} is empty: give the file of its test split")


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
        self.maps = []
        for f in files:
            if f["split"] != split:
                continue
            data = (np.memmap(f["path"], dtype="<u2", mode="r", offset=f["offset"])
                    if f["tokens"] else np.zeros(0, "<u2"))
            self.maps.append((f["path"], data))
            for part in (data[:1 << 19], data[-(1 << 19):]):
                self._check(part, f["path"])
        # rows never cross files: the tail of a file that does not fill a row is left out
        self.ends = np.cumsum([len(data) // self.stored for _, data in self.maps])
        self.n = int(self.ends[-1]) if self.maps else 0
        if not self.n:
            raise BadInput(f"{path} holds no {split} row of {self.length - 1} tokens: "
                           "prepare more text, or use a smaller --length")

    def _check(self, ids, path):
        if len(ids) and ids.max() >= self.meta["vocab_size"]:
            raise BadInput(f"{path} holds token id {ids.max()}, but the vocabulary has {self.meta['vocab_size']}: "
                           "prepare the data again with the right tokenizer")

    def __len__(self):
        return self.n

    def rows(self, indices):
        out = np.full((len(indices), self.length), PAD, dtype=np.int64)
        out[:, 0] = self.meta["bos"]
        for row, i in zip(out, indices):
            f = int(np.searchsorted(self.ends, i, side="right"))
            path, data = self.maps[f]
            a = (i - (self.ends[f - 1] if f else 0)) * self.stored
            row[1:1 + self.stored] = data[a:a + self.stored]
            self._check(row, path)
        return out


def read_meta(path):
    """A dataset's meta.json and its files, sizes checked: (meta, [{name, path, split, tokens, offset, sha256}])."""
    if not os.path.isdir(path):
        name = os.path.basename(os.path.normpath(path))
        hint = "python data/prepare.py " + (name if name in ("maze", "maze_skewed", "openwebtext", "lm1b") else
                                            "text --files ... --out=" + path)
        raise BadInput(f"{path} is not a folder of shards: make it with `{hint}`")
    name = os.path.join(path, "meta.json")
    if os.path.exists(name):
        try:
            with open(name) as f:
                meta = json.load(f)
            files = [dict(name=f["name"], split=f["split"], tokens=int(f["tokens"]), sha256=f["sha256"],
                          path=os.path.join(path, f["name"]), offset=0) for f in meta.pop("files")]
            meta = {key: meta[key] for key in ("name", "tokenizer", "vocab_size", "bos", "predict_bos", "row_length")}
            if not 0 <= int(meta["bos"]) < int(meta["vocab_size"]) <= 1 << 16:
                raise ValueError(f"bos {meta['bos']} and vocab_size {meta['vocab_size']} do not fit")
            if meta["row_length"] and any(f["tokens"] % meta["row_length"] for f in files):
                raise ValueError(f"the files do not hold whole rows of {meta['row_length']} tokens")
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise BadInput(f"{name} is damaged ({type(e).__name__}: {e}): prepare the data again") from None
    else:
        meta = dict(name=os.path.basename(os.path.normpath(path)), tokenizer="gpt2", vocab_size=50257, bos=50256,
                    predict_bos=True, row_length=None)
        names = sorted(f for f in os.listdir(path) if f.endswith(".bin"))
        if not names:
            raise BadInput(f"{path} holds no .bin shards: make them with `python data/prepare.py`")
        files = [dict(name=f, path=os.path.join(path, f), split="val" if "val" in f else "train") for f in names]
        for f in files:
            _describe_foreign(f)
    for f in files:
        if not os.path.exists(f["path"]):
            raise BadInput(f"{f['path']} is missing, though meta.json lists it: prepare the data again")
        size, want = os.path.getsize(f["path"]), 2 * f["tokens"] + f["offset"]
        if size != want:
            raise BadInput(f"{f['path']} has {size} bytes and should have {want}: it is truncated or was changed, "
                           "prepare the data again")
    return meta, files


def _describe_foreign(f):
    """A shard without meta.json: llm.c / modded-nanogpt (header) or nanoGPT (none); sets offset and tokens."""
    size = os.path.getsize(f["path"])
    head = np.fromfile(f["path"], dtype="<i4", count=3)
    if size >= HEADER_BYTES and head[0] == HEADER_MAGIC:
        if head[1] != 1:
            raise BadInput(f"{f['path']} has version {head[1]} of llm.c's shard format: "
                           "only version 1 (uint16) is read")
        f.update(offset=HEADER_BYTES, tokens=int(head[2]))
    elif size % 2:
        raise BadInput(f"{f['path']} has {size} bytes, an odd number: not uint16 ids, or truncated")
    else:
        f.update(offset=0, tokens=size // 2)


def verify(path):
    """Check a whole dataset: sizes, sha256 of every file, every id. Prints a line per file; raises BadInput."""
    meta, files = read_meta(path)
    for f in files:
        sha, top = hashlib.sha256(), 0
        with open(f["path"], "rb") as file:
            file.seek(f["offset"])
            while block := file.read(1 << 24):
                sha.update(block)
                top = max(top, int(np.frombuffer(block, "<u2").max()))
        if f.get("sha256", sha.hexdigest()) != sha.hexdigest():
            raise BadInput(f"{f['path']} does not have the sha256 that meta.json names: prepare the data again")
        if top >= meta["vocab_size"]:
            raise BadInput(f"{f['path']} holds token id {top}, but the vocabulary has {meta['vocab_size']}")
        print(f"{f['path']}: {f['tokens']} tokens, ok")


def main():
    parser = Parser(description="Make, and check, datasets of token shards.")
    sub = parser.add_subparsers(dest="what", required=True, parser_class=Parser,
                                metavar="maze|maze_skewed|text|openwebtext|lm1b|zeroshot|verify")
    for name in ("maze", "maze_skewed"):
        p = sub.add_parser(name, help="the 2000 paths of the maze" + ", short ones favoured" * (name != "maze"))
        p.add_argument("--out", default=f"data/{name}", help="folder to write")
    kinds = "text, .jsonl, .parquet, .csv, .tar of these, .gz or .xz of these, or folders of these"
    for name, what in dict(text="any UTF-8 text", openwebtext="OpenWebText", lm1b="One Billion Words",
                           zeroshot="a zero-shot evaluation set").items():
        p = sub.add_parser(name, help=what)
        if name == "zeroshot":
            p.add_argument("name", choices=ZEROSHOT, help="which set")
        p.add_argument("--files", nargs="+", required=name == "text",
                       help=f"{kinds}, read in this order" + "; without it, streamed by `datasets`" * (name != "text"))
        p.add_argument("--tokenizer", default="gpt2", help="gpt2, bytes (no download, any file), hf:NAME"
                       + ", or chars (the characters of the text)" * (name == "text"))
        p.add_argument("--out", required=name == "text",
                       default=None if name in ("text", "zeroshot") else f"data/{name}",
                       help="folder to write" + "; default data/zeroshot-NAME" * (name == "zeroshot"))
        p.add_argument("--field", default=None if name == "zeroshot" else "text",
                       help="where .jsonl, .parquet and the hub keep a document's text")
        if name != "text":
            p.add_argument("--hub", help="Hugging Face dataset NAME[:CONFIG][@REVISION]")
        if name == "openwebtext":
            p.add_argument("--val_documents", type=number(int, 1), default=100_000,
                           help="the last so many are held out")
        if name == "text":
            p.add_argument("--separator", default="<|endoftext|>", type=unescape,
                           help="what stands between documents of a text file; a file's end always ends one")
            p.add_argument("--val_fraction", type=number(float, above=0, high=0.5), default=0.02,
                           help="fraction of the documents held out")
            p.add_argument("--seed", type=number(int, 0), default=0, help="which documents are held out")
    p = sub.add_parser("verify", help="check sizes, hashes and ids of a dataset")
    p.add_argument("path", help="its folder")
    args = parser.parse_args()
    if args.what == "zeroshot":
        args.out = args.out or f"data/zeroshot-{args.name}"
    if args.what == "verify":
        verify(args.path)
    elif args.what.startswith("maze"):
        make_maze(args.what, args.out)
    else:
        try:
            if args.tokenizer.startswith(("maze", "ids", "chars:")):
                raise BadInput(f"--tokenizer={args.tokenizer} is none for text: use gpt2, bytes, chars or hf:NAME")
            dict(text=make_text, openwebtext=make_openwebtext, lm1b=make_lm1b, zeroshot=make_zeroshot)[args.what](args)
        except BadInput:                                   # what has no committed part cannot be continued
            partial = os.path.normpath(args.out) + ".partial"
            if not os.path.exists(os.path.join(partial, "progress.json")):
                shutil.rmtree(partial, ignore_errors=True)
            raise


if __name__ == "__main__":
    run_main(main)
