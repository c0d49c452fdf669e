"""Datasets: makes shards, reads shards, checks shards; owns the maze.

    python data/prepare.py maze                                            # 2000 paths, no download
    python data/prepare.py text --files a.txt b.txt --tokenizer=bytes --out=data/mine
    python data/prepare.py verify data/mine                                # sizes, hashes and ids of every shard

A dataset is a folder of raw little-endian uint16 token ids, `train.bin` and `val.bin` (or `train_000.bin`, ...), and a
`meta.json` (tokenizer, vocab_size, bos, row_length, and per file: split, tokens, sha256). It is made in a folder named
`OUT.partial` and renamed when it is complete: an interrupted run leaves nothing that training would accept. Without a
meta.json, nanoGPT's .bin files are taken as GPT-2 ids, and llm.c's (256-int32 header) are read too.
A training row is [BOS] + the next L - 1 tokens; rows do not overlap.
"""
import argparse
import functools
import hashlib
import importlib
import json
import os
import shutil
import sys

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
        if int(os.environ.get("RANK", 0)) == 0:
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
    """Rows [N, 10] -> one integer each, for membership and counting; a token outside U D L R PAD gives -1."""
    rows = np.asarray(rows, dtype=np.int64)
    return np.where((rows < 5).all(1) & (rows >= 0).all(1), rows @ 5 ** np.arange(MAZE_LENGTH), -1)


def maze_valid(rows):
    """Rows [N, 10] (without BOS) -> [N] bool: membership in the 2000 valid sequences, the task's success."""
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
    """name: "gpt2" (tiktoken), "bytes" (ids 0..255, any file), "maze". encode(list of str) -> list of uint16 arrays."""

    def __init__(self, name):
        self.name = name
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
        else:
            raise BadInput(f"unknown tokenizer {name!r}: one of gpt2, bytes")

    def encode(self, texts):
        if self.name == "gpt2":                          # tiktoken releases the GIL: real threads, order kept
            return [np.array(t, dtype=np.uint16)
                    for t in self.bpe.encode_ordinary_batch(texts, num_threads=os.cpu_count())]
        return [np.frombuffer(t.encode("utf-8", "surrogateescape"), dtype=np.uint8).astype(np.uint16) for t in texts]

    def decode(self, ids):
        """Ids of one row, without BOS in front -> text."""
        if self.name == "gpt2":
            return self.bpe.decode([int(i) for i in ids if i < 50257])
        if self.name == "bytes":
            return bytes(int(i) for i in ids if i < 256).decode("utf-8", "replace")
        return "".join("UDLR.?"[min(int(i), 5)] for i in ids)


# ---------------------------------------------------------------------------------------------------------------------
# writing

class Writer:
    """Writes a dataset into OUT.partial and renames it to OUT when it is complete."""

    def __init__(self, out, meta, shard_tokens=100_000_000):
        out = os.path.normpath(out)
        self.out, self.partial, self.meta, self.shard_tokens = out, out + ".partial", meta, shard_tokens
        if os.path.isfile(out) or os.path.isdir(out) and os.listdir(out):
            raise BadInput(f"{out} exists already: choose another --out, or remove it")
        shutil.rmtree(self.partial, ignore_errors=True)
        os.makedirs(self.partial)
        self.open, self.files = {}, []

    def write(self, split, ids):
        ids = np.ascontiguousarray(ids, dtype="<u2")
        while len(ids):
            if split not in self.open:
                n = sum(f["split"] == split for f in self.files)
                entry = dict(name=f"{split}_{n:03d}.bin", split=split, tokens=0, sha256="")
                self.files.append(entry)
                self.open[split] = entry, open(os.path.join(self.partial, entry["name"]), "wb"), hashlib.sha256()
            entry, file, sha = self.open[split]
            part, ids = np.split(ids, [self.shard_tokens - entry["tokens"]])
            file.write(part.tobytes())
            sha.update(part.tobytes())
            entry["tokens"] += len(part)
            if entry["tokens"] == self.shard_tokens:
                self._close(split)

    def _close(self, split):
        entry, file, sha = self.open.pop(split)
        file.flush()
        os.fsync(file.fileno())
        file.close()
        entry["sha256"] = sha.hexdigest()

    def finish(self):
        for split in list(self.open):
            self._close(split)
        for split in ("train", "val"):                   # the usual case: one file a split, with a plain name
            files = [f for f in self.files if f["split"] == split]
            if len(files) == 1:
                os.rename(os.path.join(self.partial, files[0]["name"]), os.path.join(self.partial, split + ".bin"))
                files[0]["name"] = split + ".bin"
        with open(os.path.join(self.partial, "meta.json"), "w") as f:
            json.dump(self.meta | {"files": self.files}, f, indent=1)
            f.flush()
            os.fsync(f.fileno())
        os.rename(self.partial, self.out)                  # fails if someone filled OUT meanwhile


def make_maze(name, out=None):
    out = out or f"data/{name}"
    writer = Writer(out, dict(name=name, tokenizer="maze", vocab_size=6, bos=MAZE_BOS,
                              predict_bos=False, row_length=MAZE_LENGTH))
    rows = maze_dataset(name)
    for split in ("train", "val"):                       # the language is finite: the same rows
        writer.write(split, rows.ravel())
    writer.finish()
    print(f"{out}: {len(rows)} paths, {len(np.unique(rows, axis=0))} distinct", file=sys.stderr)


def documents(files, separator, piece=1 << 20, errors="surrogateescape", progress=None):
    """The documents of text files, in pieces of bounded size: yields (text, whether it ends its document).

    A long document is cut between a non-space and a space, where GPT-2's pre-tokenizer never joins: the tokens of the
    pieces are the tokens of the whole (but for a run of `piece` characters without such a place). A file's end ends a
    document. Empty documents are left out.
    """
    for path in files:
        empty, buffer = True, ""                         # nothing of the current document yielded yet
        with open(path, encoding="utf-8", errors=errors, newline="") as f:
            while True:
                block = f.read(piece)
                if progress is not None:
                    progress(len(block.encode("utf-8", errors)))
                *ended, buffer = (buffer + block).split(separator) if separator else [buffer + block]
                for text in ended + [buffer] * (not block):
                    text = text.strip("\r\n") if empty else text.rstrip("\r\n")
                    if text or not empty:
                        yield text, True
                    empty = True
                if not block:
                    break
                if len(buffer) > piece + len(separator):
                    cut = len(buffer) - max(1, len(separator))                  # the separator may have begun
                    while cut > 1 and not (buffer[cut].isspace() and not buffer[cut - 1].isspace()):
                        cut -= 1
                    cut = cut if cut > 1 else len(buffer) - max(1, len(separator))
                    yield (buffer[:cut].lstrip("\r\n") if empty else buffer[:cut]), False
                    empty, buffer = False, buffer[cut:]


def make_text(files, tokenizer, out, separator, val_fraction, seed):
    """Any UTF-8 text files (any files at all with `bytes`) -> shards; whole documents are held out for validation."""
    tokenizer = Tokenizer(tokenizer)
    for path in files:
        if not os.path.isfile(path):
            raise BadInput(f"--files: {path} is not a file")
    errors = "surrogateescape" if tokenizer.name == "bytes" else "strict"
    writer = Writer(out, dict(name=os.path.basename(os.path.normpath(out)), tokenizer=tokenizer.name, row_length=None,
                              vocab_size=tokenizer.vocab_size, bos=tokenizer.bos, predict_bos=True))
    batch, tokens, doc, draws = [], 0, 0, np.random.default_rng(seed)

    def flush():
        nonlocal tokens, doc, held, val
        for ids, (_, ends) in zip(tokenizer.encode([text for text, _ in batch]), batch):
            writer.write("val" if val else "train", np.append(ids, np.uint16(tokenizer.bos)) if ends else ids)
            tokens += len(ids) + ends
            if ends:                                     # the next document: in all `hold` of n, without a list of them
                held, doc = held + val, doc + 1
                val = doc < n and draws.random() < (hold - held) / (n - doc)
        batch.clear()
        bar.set_postfix(tokens=tokens)

    try:
        with tqdm(total=2 * sum(map(os.path.getsize, files)), unit="B", unit_scale=True, desc=out) as bar:
            n = sum(ends for _, ends in documents(files, separator, errors=errors, progress=bar.update))
            if n < 2:
                raise BadInput(f"--files hold {n} document{'s' * (n != 1)}, and at least one must go to each of train "
                               "and val: set --separator to what stands between documents, or split the text")
            hold, held = max(1, round(val_fraction * n)), 0
            val, pending = draws.random() < hold / n, 0
            for text, ends in documents(files, separator, errors=errors, progress=bar.update):
                batch.append((text, ends))
                pending += len(text)
                if pending > 1 << 22:                    # a few MB in flight, whatever the input's size
                    flush()
                    pending = 0
            flush()
        writer.finish()
    except UnicodeDecodeError as e:
        raise BadInput(f"--files hold bytes that are not UTF-8 ({e.reason} at byte {e.start} of a block): "
                       "convert them, or use --tokenizer=bytes") from None
    finally:
        shutil.rmtree(writer.partial, ignore_errors=True)
    print(f"{out}: {n} documents ({held} for validation), {tokens} tokens", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# reading

class Shards:
    """One split of a dataset, memmapped: `rows(indices)` -> int64 [n, length], each [BOS] + length - 1 tokens.

    On opening, sizes are checked against meta.json and ids in the first and last MiB of each file; every batch is
    checked as it is read. Raises BadInput. `length` None: the dataset's own row_length + 1.
    """

    def __init__(self, path, split, length=None):
        self.path, self.meta, files = path, *read_meta(path)
        fixed = self.meta["row_length"]
        if fixed and length not in (None, fixed + 1):
            raise BadInput(f"--length={length} does not fit {path}, whose rows are cut to {fixed} tokens: "
                           f"use --length={fixed + 1} (BOS included), or leave it out")
        if not fixed and length is None:
            raise BadInput(f"{path} is text without a fixed row length: give --length")
        self.length = length or fixed + 1
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
        self.ends = np.cumsum([len(data) // (self.length - 1) for _, data in self.maps])
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
        out = np.empty((len(indices), self.length), dtype=np.int64)
        out[:, 0] = self.meta["bos"]
        for row, i in zip(out, indices):
            f = int(np.searchsorted(self.ends, i, side="right"))
            path, data = self.maps[f]
            a = (i - (self.ends[f - 1] if f else 0)) * (self.length - 1)
            row[1:] = data[a:a + self.length - 1]
            self._check(row, path)
        return out


def read_meta(path):
    """A dataset's meta.json and its files, sizes checked: (meta, [{name, path, split, tokens, offset, sha256}])."""
    if not os.path.isdir(path):
        hint = f"python data/prepare.py {os.path.basename(path)}" if os.path.basename(path).startswith("maze") else \
            "python data/prepare.py text --files ... --out=" + path
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
    sub = parser.add_subparsers(dest="what", required=True, metavar="maze|maze_skewed|text|verify", parser_class=Parser)
    for name in ("maze", "maze_skewed"):
        p = sub.add_parser(name, help="the 2000 paths of the maze" + ", short ones favoured" * (name != "maze"))
        p.add_argument("--out", default=f"data/{name}", help="folder to write")
    p = sub.add_parser("text", help="any UTF-8 text files")
    p.add_argument("--files", nargs="+", required=True, help="text files, read in this order")
    p.add_argument("--tokenizer", default="gpt2", choices=["gpt2", "bytes"], help="bytes: no download, any file")
    p.add_argument("--out", required=True, help="folder to write")
    p.add_argument("--separator", default="<|endoftext|>", type=unescape,
                   help="what stands between documents; a file's end always ends one")
    p.add_argument("--val_fraction", type=number(float, above=0, high=0.5), default=0.02,
                   help="fraction of the documents held out")
    p.add_argument("--seed", type=number(int, 0), default=0, help="which documents are held out")
    p = sub.add_parser("verify", help="check sizes, hashes and ids of a dataset")
    p.add_argument("path", help="its folder")
    args = parser.parse_args()
    if args.what == "verify":
        verify(args.path)
    elif args.what == "text":
        make_text(args.files, args.tokenizer, args.out, args.separator, args.val_fraction, args.seed)
    else:
        make_maze(args.what, args.out)


if __name__ == "__main__":
    run_main(main)
