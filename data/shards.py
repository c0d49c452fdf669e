"""Shards: how token ids lie on disk. Writes them, reads them, checks them.

A dataset is a folder of raw little-endian uint16 token ids, `train.bin` and `val.bin` (or `train_000.bin`, ...), and a
`meta.json` (tokenizer, vocab_size, bos, row_length, and per file: split, tokens, sha256). It is made in `OUT.partial`
and renamed when complete: an interrupted run leaves nothing that training would accept, and the same command continues
it. Without a meta.json, nanoGPT's .bin files are taken as GPT-2 ids, and llm.c's (256-int32 header) are read too. A
training row is [BOS] + the next L - 1 tokens; rows do not overlap.
"""
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np

from data.cli import BadInput
from data.maze import PAD


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
