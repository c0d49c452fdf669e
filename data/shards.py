"""Shards: how token ids lie on disk. Writes them, reads them, checks them.

A dataset is a folder of raw little-endian token ids, `train.bin` and `val.bin` (or `train_000.bin`, ...), and a
`meta.json` (tokenizer, its fingerprint, vocab_size, bos, row_length, padded: a row is one document and EOS to its end,
and per file: split, tokens, sha256). Ids are uint16; of a vocabulary of more than 65,536 they are uint32, and meta.json
has a `dtype` that says so. It is made in `OUT.partial` and renamed when complete: an interrupted run leaves nothing
that training would accept, and the same command continues it. Without a meta.json, nanoGPT's .bin files are taken as
GPT-2 ids, and llm.c's (256-int32 header; GPT-2's ids or Llama 3's) are read too; other formats are refused, by their
content. A training row is [BOS] + the next L - 1 tokens; rows do not overlap.
"""
import hashlib
import json
import os
import re
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np

from data.cli import BadInput, say_once
from data.documents import kind_of_file
from data.files import (check_fields, check_folder, is_file_name, list_of, maybe, naming, read_json, sync_folder, whole,
                        write_json, writing)
from data.maze import PAD
from data.presets import EMBEDDED
from data.vocab import MOST_IDS, id_type, named_size

SPLITS = ("train", "val", "test")
MIB_OF_IDS = 1 << 19                                       # the uint16 in a MiB


# ---------------------------------------------------------------------------------------------------------------------
# writing

def sha256(path):
    """The hash of a file, as hex digits."""
    h = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):                    # (hashlib.file_digest is younger than Python 3.10)
            h.update(block)
    return h.hexdigest()


class Writer:
    """Writes a dataset into OUT.partial and renames it to OUT when it is complete.

    With a `key` (whatever decides the content, as JSON has it), a run that was interrupted goes on after the last
    `commit`: `self.done` says how many units of the input (documents, rows: the caller's choice) are written. Raises
    BadInput where OUT is there already, or cannot be made, or OUT.partial is another run's, or not ours.

    Used in a `with`: meanwhile no other process writes there; where it ends before the first commit, nothing is left.
    """
    # names of its files
    OWN = r"(train|val|test)(_\d{3,})?\.bin|progress\.json|meta\.json|lock|.+\.json\.\d+\.tmp"

    def __init__(self, out, meta, key=None, shard_tokens=100_000_000):
        self.out = os.path.normpath(out)
        self.partial = Path(self.out + ".partial")
        self.meta = meta
        self.key = json.loads(json.dumps(key))             # as it comes back from a file
        self.shard_tokens = shard_tokens                   # a file's size, but for the last of a split
        self.done = 0
        self.files = []                                    # as in meta.json: {name, split, tokens}
        if (meta.get("vocab_size") or 0) > MOST_IDS:
            raise BadInput(f"shards hold at most {MOST_IDS} ids, "
                           f"this vocabulary has {meta['vocab_size']}")
        self._check_out()
        self.lock = writing(self.partial, self.out)
        self.lock.__enter__()
        try:
            self._check_out()                              # another process may have made it until now
            if not self._resume():
                self._remove_own()
        except BaseException:
            self.__exit__(None)
            raise

    def __enter__(self):
        return self

    def __exit__(self, error, *more):
        if error and self.partial.exists() and not (self.partial / "progress.json").exists():
            self._remove_own()
        self.lock.__exit__(None, None, None)
        with suppress(OSError):                            # it holds more, or has its new name
            self.partial.rmdir()

    def _check_out(self):
        is_full_folder = os.path.isdir(self.out) and os.listdir(self.out)
        if os.path.isfile(self.out) or is_full_folder:
            raise BadInput(f"{self.out} exists already: choose another --out, or remove it")
        check_folder("--out", self.partial)

    def _remove_own(self):
        for name in os.listdir(self.partial):
            if re.fullmatch(self.OWN, name) and name != "lock":
                os.remove(self.partial / name)

    def _resume(self):
        """Go back to the last commit of a run with the same key. False: there is none; BadInput if it is another's."""
        for name in sorted(os.listdir(self.partial)):
            path = self.partial / name
            if not re.fullmatch(self.OWN, name) or not path.is_file() or path.is_symlink():
                raise BadInput(f"{path} is no file of an interrupted run: move it away, or choose another --out")
        file = self.partial / "progress.json"
        if not file.exists():
            return False
        try:
            last = read_json(file)
            check_fields(file, last, dict(done=whole(), files=list_of(dict), id_bytes=maybe(whole(2, 4))), "")
            for f in last["files"]:
                check_fields(file, f, dict(name=is_file_name, split=str, tokens=whole()), "")
            id_bytes = last.get("id_bytes") or 2
            sizes = {self.partial / f["name"]: id_bytes * f["tokens"] for f in last["files"]}
            whole_files = all(os.path.getsize(path) >= size for path, size in sizes.items())
        except (OSError, ValueError, BadInput):
            whole_files = False
        if not whole_files:
            raise BadInput(f"{self.partial} holds an interrupted run that is damaged: remove that folder")
        before = last.get("key")
        if before is None and self.key is None:            # nobody can tell whether it is the same work: anew
            return False
        if before != self.key:
            raise BadInput(f"{self.partial} holds an interrupted run with other settings "
                           f"({differences(before, self.key)}): repeat its command, remove that folder, or choose "
                           "another --out")
        for path, size in sizes.items():
            os.truncate(path, size)                        # drop what was written after that commit
        self.done = last["done"]
        self.files = last["files"]
        print(f"{self.partial}: continuing after {self.done} units", file=sys.stderr)
        return True

    @property
    def id_type(self):
        return id_type(self.meta.get("vocab_size"))

    def write(self, split, ids):
        """Append ids [n] to a split, in as many files as they need."""
        ids = np.ascontiguousarray(ids, dtype=self.id_type)
        while len(ids):
            last = self._last_file(split)
            part, ids = np.split(ids, [self.shard_tokens - last["tokens"]])
            # the first write to a file empties it: an interrupted run may have left something there
            mode = "ab" if last["tokens"] else "wb"
            with naming(self.partial / last["name"]), open(self.partial / last["name"], mode) as f:
                f.write(part)
            last["tokens"] += len(part)

    def _last_file(self, split):
        """The entry of the file that the next token of this split goes to: a new one where the last is full."""
        files = [f for f in self.files if f["split"] == split]
        if files and files[-1]["tokens"] < self.shard_tokens:
            return files[-1]
        new = dict(name=f"{split}_{len(files):03d}.bin", split=split, tokens=0)
        self.files.append(new)
        return new

    def commit(self, done):
        """Wait until everything written so far is on disk, and record that `done` units of the input are complete."""
        for entry in self.files:
            with open(self.partial / entry["name"], "rb") as f:
                os.fsync(f.fileno())
        self.done = done
        progress = dict(key=self.key, done=done, files=self.files, id_bytes=self.id_type.itemsize)
        write_json(self.partial / "progress.json", progress)

    def finish(self):
        """Hash the files, write meta.json, rename the folder to OUT. Returns {split: tokens}."""
        self.commit(self.done)                             # killed from here on, only hashing is done again
        for entry in self.files:
            entry["sha256"] = sha256(self.partial / entry["name"])
        tokens = {}
        for split in SPLITS:
            files = [f for f in self.files if f["split"] == split]
            if len(files) == 1:                            # the usual case: one file a split, with a plain name
                name = f"{split}.bin"
                os.rename(self.partial / files[0]["name"], self.partial / name)
                files[0]["name"] = name
            tokens[split] = sum(f["tokens"] for f in files)
        meta = self.meta | {"files": self.files}
        if self.id_type != np.uint16:
            meta["dtype"] = self.id_type.name
        write_json(self.partial / "meta.json", meta)
        os.rename(self.partial, self.out)                  # fails if someone filled OUT meanwhile
        sync_folder(os.path.dirname(self.out) or ".")
        for name in ("progress.json", "lock"):
            os.remove(os.path.join(self.out, name))
        return tokens


def differences(before, now):
    """How two keys differ, in words."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        return "of another kind"
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return "; ".join(f"{name} {before.get(name)!r:.60} there, {now.get(name)!r:.60} now" for name in changed)


# ---------------------------------------------------------------------------------------------------------------------
# reading

class Shards:
    """One split of a dataset, memmapped: `rows(indices)` -> int64 [n, length], each [BOS] + length - 1 tokens.

    On opening, sizes are checked against meta.json and ids in the first and last MiB of each file; every batch is
    checked as it is read. Raises BadInput. `length` None: the dataset's own row_length + 1 (+ 2 on the maze: a PAD).
    """

    def __init__(self, path, split, length=None, may_be_empty=False):
        self.path = path
        self.meta, files = read_meta(path)
        fixed = self.meta["row_length"]
        self._check_length(fixed, length)
        self.length = length or fixed + 1
        self.stored = fixed or self.length - 1             # tokens of a row in the file
        self.files = [f for f in files if f["split"] == split]
        for f in self.files:
            check_ids(f["ids"][:MIB_OF_IDS], f["path"], self.meta)
            check_ids(f["ids"][-MIB_OF_IDS:], f["path"], self.meta)
        # rows never cross files: the tail of a file that does not fill a row is left out
        rows_of_files = [f["tokens"] // self.stored for f in self.files]
        self.starts = np.cumsum([0] + rows_of_files)       # the number of each file's first row, and of all rows
        if not len(self) and not may_be_empty:
            raise BadInput(f"{path} holds no {split} row of {self.length - 1} tokens: "
                           "prepare more text, or use a smaller --length")

    def _check_length(self, fixed, length):
        """Refuse a length (BOS included) that rows cut to `fixed` tokens do not have; None is the dataset's own."""
        if not fixed and length is None:
            raise BadInput(f"{self.path} is text without a fixed row length: give --length")
        n_pads = int(self.meta["tokenizer"] == "maze")     # it may have one more, so that blocks of 4 divide it
        if fixed and length not in (None, fixed + 1, fixed + 1 + n_pads):
            raise BadInput(f"--length={length} does not fit {self.path}, whose rows are cut to {fixed} tokens: "
                           f"use --length={fixed + 1} (BOS included), or leave it out")

    def __len__(self):
        return int(self.starts[-1])

    def rows(self, indices):
        """The rows of these numbers, int64 [n, length], BOS first."""
        # PAD stays only where the maze's rows have a place more than the file
        out = np.full((len(indices), self.length), PAD, dtype=np.int64)
        out[:, 0] = self.meta["bos"]
        for row, i in zip(out, indices):
            k = np.searchsorted(self.starts, i, side="right") - 1      # the file that holds row i
            a = (i - self.starts[k]) * self.stored
            row[1:1 + self.stored] = self.files[k]["ids"][a:a + self.stored]
            check_ids(row, self.files[k]["path"], self.meta)
        return out

    def hashes(self):
        """What identifies each file: its sha256 in meta.json, or that of its first and last MiB where it has none."""
        return [f.get("sha256") or hash_of_ends(f) for f in self.files]

    def frequency(self):
        """How often each token occurs, each once more than counted, as fractions: float32 [vocab_size]."""
        V = self.meta["vocab_size"]
        counts = np.ones(V, dtype=np.int64)
        for f in self.files:
            n_parts = 1 + len(f["ids"]) // 10**8           # bincount makes 8 bytes of each id
            for part in np.array_split(f["ids"], n_parts):
                counts += np.bincount(part, minlength=V)
        return (counts / counts.sum()).astype(np.float32)


def check_ids(ids, path, meta):
    highest = ids.max(initial=0)
    if highest >= meta["vocab_size"]:
        raise BadInput(f"{path} holds token id {highest}, but the vocabulary has {meta['vocab_size']}: "
                       "prepare the data again with the right tokenizer")


def hash_of_ends(f):
    """A hash of a file's first and last MiB and of its size: for foreign shards, which no meta.json describes."""
    ends = f["ids"][:MIB_OF_IDS].tobytes() + f["ids"][-MIB_OF_IDS:].tobytes()
    return hashlib.sha256(ends + str(f["tokens"]).encode()).hexdigest()


# what is in meta.json beside `files`, and what of it may be there
META_FIELDS = dict(name=str, tokenizer=str, vocab_size=whole(1, MOST_IDS), bos=whole(), predict_bos=bool,
                   row_length=maybe(whole(1)), padded=maybe(bool), fingerprint=maybe(str), dtype=maybe(str))
FILE_FIELDS = dict(name=is_file_name, split=SPLITS.__contains__, tokens=whole(), sha256=str)


def check_meta(file, meta, remedy):
    """BadInput unless `meta`, which this file holds, describes a dataset; its tokenizer's name may tell its size."""
    check_fields(file, meta, META_FIELDS, remedy)
    size = (meta["vocab_size"], meta["bos"])
    fitting = None
    with suppress(BadInput):                               # there may be no such tokenizer
        fitting = named_size(meta["tokenizer"], size)
    if size != fitting or meta["bos"] >= meta["vocab_size"]:
        raise BadInput(f"{file} is damaged (vocab_size {size[0]} and bos {size[1]} do not fit its tokenizer "
                       f"{meta['tokenizer']:.40}): {remedy}")


def read_meta(path):
    """A dataset's meta and its files, sizes checked: (meta, [{path, split, tokens, sha256, ids (memmapped)}]).

    meta: what META_FIELDS names; datasets older than fingerprints have none. Raises BadInput.
    """
    name = os.path.basename(os.path.normpath(path))
    if not os.path.isdir(path):
        how = f"text --files ... --out={path}"
        if name in (*EMBEDDED, "openwebtext", "lm1b"):
            how = name
        raise BadInput(f"{path} is not a folder of shards: make it with `python data/prepare.py {how}`")
    if os.path.lexists(os.path.join(path, "meta.json")):
        meta, files = read_own(path)
    else:
        # nanoGPT's, llm.c's and modded-nanogpt's shards have none
        vocabulary, files = read_foreign(path)
        meta = dict(name=name, predict_bos=True, row_length=None) | vocabulary
    for f in files:
        f["ids"] = open_ids(f, id_type(meta["vocab_size"]))
    return meta, files


def read_own(path):
    """What meta.json says of a dataset that `Writer` has written: (meta, files), not yet opened."""
    file = os.path.join(path, "meta.json")
    remedy = "prepare the data again"
    try:
        content = read_json(file)
    except (OSError, ValueError) as e:                     # (it may be a folder)
        raise BadInput(f"{file} is damaged ({e}): {remedy}") from None
    check_meta(file, content, remedy)
    check_fields(file, content, dict(files=list_of(dict)), remedy)
    for entry in content["files"]:
        check_fields(f"{file}, in `files`,", entry, FILE_FIELDS, remedy)
    meta = {key: content[key] for key in META_FIELDS if key in content}
    if not content["files"] or "row_length" not in content:
        raise BadInput(f"{file} is damaged (it names no files, or no row_length): {remedy}")
    dtype = "uint16" if meta.get("dtype") is None else meta["dtype"]
    if dtype != id_type(meta["vocab_size"]).name:
        raise BadInput(f"{file} is damaged (its dtype is {dtype:.40}, its ids are of {meta['vocab_size']}): {remedy}")
    if meta["row_length"] and any(f["tokens"] % meta["row_length"] for f in content["files"]):
        raise BadInput(f"{file} is damaged (its files do not hold whole rows of {meta['row_length']} tokens): {remedy}")
    files = [entry | dict(path=os.path.join(path, entry["name"]), offset=0) for entry in content["files"]]
    return meta, files


# whose ids a shard without meta.json holds
GPT2_IDS = dict(tokenizer="gpt2", vocab_size=50257, bos=50256)
LLAMA3_IDS = dict(tokenizer="hf:meta-llama/Meta-Llama-3.1-8B", vocab_size=128256, bos=128000)
# by the magic number (a date) and the version with which llm.c's header begins
LLM_C = {(20240520, 1): GPT2_IDS, (20240801, 7): LLAMA3_IDS}


def read_foreign(path):
    """The files of a folder without meta.json: (whose ids they hold, files). What can be seen to hold anything else
    than the ids of GPT-2 or Llama 3 is refused.
    """
    names = sorted(os.listdir(path))
    if "meta.pkl" in names:                                # nanoGPT's characters
        raise BadInput(f"{path} holds meta.pkl, so its ids are not GPT-2's, and it is not opened: prepare the text "
                       "itself with `python data/prepare.py text --tokenizer=chars`")
    found = [foreign(os.path.join(path, name)) for name in names if name.endswith(".bin")]
    if not found:
        raise BadInput(f"{path} holds no .bin shards: make them with `python data/prepare.py`")
    vocabulary = found[0][0]
    if any(other != vocabulary for other, _ in found):
        raise BadInput(f"{path} holds shards of GPT-2's ids and of Llama 3's: give each a folder of its own")
    whose = "GPT-2's" if vocabulary == GPT2_IDS else "Llama 3's"
    say_once(f"{path} has no meta.json: its ids are taken for {whose}")
    return vocabulary, [f for _, f in found]


def foreign(path):
    """A shard without meta.json: (whose ids it holds, its entry). llm.c's and modded-nanogpt's begin with a header."""
    if not os.path.isfile(path):
        raise BadInput(f"{path} is no file: move it elsewhere")
    split = "val" if "val" in os.path.basename(path) else "train"
    f = dict(path=path, split=split, tokens=os.path.getsize(path) // 2, offset=0)
    head = np.fromfile(path, "<i4", 3).tolist() + [0, 0, 0]            # (it may be cut off)
    kind = kind_of_file(path)
    vocabulary = GPT2_IDS
    if 20240000 < head[0] < 20250000:
        # a header of 256 int32: a date as the magic number, the version, the tokens that follow, zeros
        vocabulary = LLM_C.get(tuple(head[:2]))
        if vocabulary is None:
            raise BadInput(f"{path} has a header of another format, {head[:2]}, and llm.c's shards have [20240520, 1] "
                           "(GPT-2's ids) or [20240801, 7] (Llama 3's): prepare the text itself")
        f |= dict(tokens=head[2], offset=1024)
    elif kind != "text":
        raise BadInput(f"{path} is {kind}, and no uint16 ids: unpack it, or move it elsewhere")
    if vocabulary == GPT2_IDS:
        # wider ids: their upper halves are 0 to 3 in every vocabulary, which as GPT-2's ids are ! " # $
        upper = open_ids(f, id_type(vocabulary["vocab_size"]))[1:MIB_OF_IDS:2]
        if len(upper) > 4 and upper.max() < 4:
            raise BadInput(f"{path} holds ids of int32 or int64, not uint16 (every second uint16 is below 4): "
                           "convert them")
    return vocabulary, f


def open_ids(f, dtype):
    """The ids of a file, memmapped: `dtype` [tokens]. BadInput where it has not the size that it should have."""
    size = os.path.getsize(f["path"]) if os.path.isfile(f["path"]) else 0
    expected = dtype.itemsize * f["tokens"] + f["offset"]
    if size != expected:
        what = "truncated or was changed" if size else "missing"
        raise BadInput(f"{f['path']} has {size} bytes and should have {expected}: it is {what}, "
                       "prepare the data again")
    if not f["tokens"]:                                    # numpy cannot map an empty file
        return np.zeros(0, dtype)
    return np.memmap(f["path"], dtype, "r", f["offset"])


def knows_success(meta):
    """Whether a sample of a model with this meta is right or wrong: the maze's, and rows of one document each."""
    return meta["tokenizer"] == "maze" or bool(meta.get("padded"))


def changed_meta(old, new):
    """The keys in which two metas differ, for a run that is continued on data with the meta `new`.

    A key that either lacks is left out: a checkpoint may be older than it (or, brought here, newer than the dataset).
    """
    return [key for key in old if key in new and old[key] != new[key]]


def verify(path):
    """Check a whole dataset: sizes, sha256 of every file, every id. Prints a line per file; raises BadInput."""
    meta, files = read_meta(path)
    for f in files:
        if "sha256" in f and sha256(f["path"]) != f["sha256"]:
            raise BadInput(f"{f['path']} does not have the sha256 that meta.json names: prepare the data again")
        check_ids(f["ids"], f["path"], meta)
        print(f"{f['path']}: {f['tokens']} tokens, ok")
