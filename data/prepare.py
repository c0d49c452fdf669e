"""Makes datasets, and checks them.

    python data/prepare.py maze                                            # 2000 paths, no download
    python data/prepare.py molecules                                       # QM9's, from the package qm9pack
    python data/prepare.py words                                           # the system's list, or --files
    python data/prepare.py text --files a.txt b.txt --tokenizer=bytes --out=data/mine
    python data/prepare.py text --files lines.txt --rows=31 --tokenizer=chars --out=data/lines   # one line a row
    python data/prepare.py text --hub=roneneldan/TinyStories --out=data/stories              # streamed, one pass
    python data/prepare.py openwebtext                                     # or lm1b: streamed; or --files=..., local
    python data/prepare.py zeroshot ptb --files ptb.test.txt               # one of the paper's zero-shot sets
    python data/prepare.py verify data/mine                                # sizes, hashes and ids of every shard

What a dataset is: `data/shards.py`. What a document is: `data/documents.py`. Memory is flat, whatever the input's size.
"""
import collections
import functools
import itertools
import os
import sys
from contextlib import contextmanager

import numpy as np
from tqdm import tqdm

if __name__ == "__main__":
    # a script's own folder is on the path: here the project's must be in its place, where the package `data` is
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
from data import molecules, words
from data.cli import BadInput, Parser, number, refuse_unread, run_main, unescape
from data.detokenize import LAMBADA, LM1B, PTB, SCIENTIFIC, WIKITEXT, detokenize
from data.documents import expand, hub_splits, kind_of_file, stream_files, stream_hub
from data.maze import MAZE_LENGTH, maze_dataset
from data.presets import EMBEDDED
from data.shards import SPLITS, Writer, verify
from data.vocab import Tokenizer


def make_embedded(name, out=None, files=None):
    """A language that needs no download of text, by its name -> shards in `out`, or data/NAME."""
    out = out or f"data/{name}"
    if name in LISTS:
        LISTS[name](out, files)
    else:
        make_maze(name, out)


def make_missing(path):
    """Embedded data that are named, data/NAME, and not there yet."""
    name = os.path.basename(path)
    if name in EMBEDDED and path == os.path.join("data", name) and not os.path.exists(path):
        make_embedded(name)


def make_maze(name, out):
    """`maze` or `maze_skewed` -> shards in `out`."""
    rows = maze_dataset(name)
    meta = dict(name=name, row_length=MAZE_LENGTH, predict_bos=False)
    meta |= describe(Tokenizer("maze"))
    with Writer(out, meta) as writer:
        for split in ("train", "val"):                     # the language is finite: the same rows
            writer.write(split, rows.ravel())
        writer.finish()
    print(f"{out}: {len(rows)} paths, {len(np.unique(rows, axis=0))} distinct", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# lists: each entry a row, padded with EOS

HELD_OUT = 0.05                                            # of a list, for each of val and test


def make_words(out, files=None):
    """A list of words -> shards of one word a row."""
    make_list(out, words.read_words(files), Tokenizer(f"chars:{words.LETTERS}"), words.ROW)


def make_molecules(out, files=None):
    """SMILES strings -> shards of one molecule a row."""
    strings = molecules.read_molecules(files)
    tokens = sorted(set(itertools.chain(*map(molecules.smiles_tokens, strings))))
    make_list(out, strings, Tokenizer("smiles:" + " ".join(tokens)), molecules.ROW)


def make_list(out, texts, tokenizer, length, seed=0):
    """Distinct texts -> rows of `length` tokens in `out`, a twentieth of them each for val and test, at random."""
    rows = Rows(length, tokenizer.bos)
    ids = [row for row in map(rows.padded, tokenizer.encode(texts)) if len(row)]
    n = round(HELD_OUT * len(ids))
    if n < 1:
        raise BadInput(f"there are {len(ids)} rows of at most {length} tokens, too few to hold some out: give more "
                       "with --files")
    order = np.random.default_rng(seed).permutation(len(ids))
    parts = dict(val=order[:n], test=order[n:2 * n], train=order[2 * n:])
    meta = dict(name=os.path.basename(os.path.normpath(out)), predict_bos=True) | rows.meta() | describe(tokenizer)
    with Writer(out, meta) as writer:
        for split in SPLITS:
            writer.write(split, np.concatenate([ids[i] for i in parts[split]]))
        writer.finish()
    print(f"{out}: {len(ids)} rows of {length} tokens, {n} each for val and test, {rows.n_longer} longer ones left out",
          file=sys.stderr)


class Rows:
    """Documents as rows of one length: EOS from their end to that of the row, longer ones left out and counted."""

    def __init__(self, length, eos):
        self.length = length
        self.eos = eos
        self.n_longer = 0
        self.in_longer = False                             # within a document whose beginning was left out

    def meta(self):
        return dict(row_length=self.length, padded=True)

    def padded(self, ids, ends=True):
        """The tokens [n] of a document, or of a piece of one -> its row [length], or [0] where it is left out."""
        is_longer = self.in_longer or not ends or len(ids) > self.length
        self.in_longer = not ends
        if is_longer:
            self.n_longer += ends
            return ids[:0]
        row = np.full(self.length, self.eos, dtype=ids.dtype)
        row[:len(ids)] = ids
        return row


# ---------------------------------------------------------------------------------------------------------------------
# text: documents -> shards

COMMIT = 1 << 25                                           # tokens from one point of continuation to the next


@contextmanager
def begin(args, hub=None, splits=("train",), field="text", **how):
    """What all kinds of text begin with: yields (tokenizer, a function that streams the documents anew, writer).

    `hub`, its `splits` and `field`: what is read where the command line names neither files nor these. `how`: how
    documents are found in local files, see `documents.Reader`.
    """
    if args.tokenizer.startswith(("maze", "ids", "chars:")):
        raise BadInput(f"--tokenizer={args.tokenizer} is none for text: "
                       "use gpt2, bytes, chars or hf:NAME")
    if args.files and args.hub:
        raise BadInput("--files and --hub are both given: leave one of them out")
    tokenizer_name = args.tokenizer
    if args.what == "text" and tokenizer_name == "chars":
        tokenizer_name = "chars:"                          # which ones: known when the text has been read
    tokenizer = Tokenizer(tokenizer_name)

    # where the documents come from
    field = args.field or field
    paths = expand(args.files or [])
    if args.files:
        kinds = {kind_of_file(path) for path in paths}
        if kinds == {"text"}:
            refuse_unread(["field"], (), "on plain text")
        if kinds <= {"jsonl", "parquet", "csv", "tsv"}:
            refuse_unread(["separator"], (), "on files that say where a document ends")
        errors = "strict"
        if tokenizer_name == "bytes":                      # it takes what is not UTF-8 as it is
            errors = "surrogateescape"
        stream = functools.partial(stream_files, paths, field=field, errors=errors, **how)
    else:
        stream = functools.partial(stream_hub, args.hub or hub, splits, field)

    # where they go to
    name = os.path.basename(os.path.normpath(args.out))
    meta = dict(name=name, row_length=None, predict_bos=True)
    meta |= describe(tokenizer)
    # what decides the content: an interrupted run is continued only where none of it has changed
    key = vars(args) | {"sizes": [[path, os.path.getsize(path)] for path in paths]}
    with Writer(args.out, meta, key) as writer:
        yield tokenizer, stream, writer


def describe(tokenizer):
    """What meta.json says of a tokenizer."""
    return dict(tokenizer=tokenizer.name, fingerprint=tokenizer.fingerprint(),
                vocab_size=tokenizer.vocab_size, bos=int(tokenizer.bos))


def to_splits(documents, is_val, rules=()):
    """A stream (source, text, ends) -> (split, detokenised text, ends); `is_val(source)` says which are validation."""
    for source, text, ends in documents:
        split = "val" if is_val(source) else "train"
        yield split, detokenize(text, rules), ends


def write_text(writer, stream, tokenizer, eos=True, hold_out=0, rows=None, batch_chars=1 << 22):
    """Encode a stream of (split, text, whether it ends its document), EOS (= BOS) after each. -> {split: tokens}.

    A few MB are in flight, whatever the input's size. `hold_out`: so many of the last documents become the val split;
    a document waits in memory (as it will lie on disk) until as many have followed it. `rows`, a `Rows`: one document a
    row.
    """
    done = writer.done                                     # items of the stream that are written
    for _, _, ends in itertools.islice(stream, done):      # read again, but not encoded again
        if rows:
            rows.in_longer = not ends
    waiting = collections.deque()                          # encoded, and not yet written
    n_waiting = 0                                          # documents that end among them
    since_commit = 0
    with tqdm(unit="token", unit_scale=True, desc=writer.out, mininterval=1) as bar:
        while True:
            batch = take(stream, batch_chars)
            if not batch:
                break
            encoded = encode(batch, tokenizer, eos, rows)
            waiting.extend(encoded)
            n_waiting += sum(ends for _, _, ends in encoded)

            # what is followed by `hold_out` whole documents is not among the last ones: it can be written
            ready = collections.defaultdict(list)
            while waiting and (hold_out == 0 or n_waiting > hold_out):
                split, ids, ends = waiting.popleft()
                ready[split].append(ids)
                done += 1
                n_waiting -= ends
            for split, parts in ready.items():
                ids = np.concatenate(parts)
                writer.write(split, ids)
                bar.update(len(ids))
                since_commit += len(ids)
            if since_commit > COMMIT:                      # rarely: it waits for the disk
                writer.commit(done)
                since_commit = 0
    if hold_out and not done:
        raise BadInput(f"there are {n_waiting} documents, and the last {hold_out} should be held out: "
                       "set a smaller --val_documents")
    for _, ids, _ in waiting:                              # the last documents
        writer.write("val", ids)
    if not writer.files:
        raise BadInput(f"{writer.out} is empty: give files that hold text")
    writer.done = done + len(waiting)                      # killed while it hashes, it encodes nothing again
    tokens = writer.finish()
    print(f"{writer.out}: {tokens['train']} tokens for training, {tokens['val']} for validation",
          file=sys.stderr)
    if rows and rows.n_longer:
        print(f"{writer.out}: left out, of more than {rows.length} tokens: {rows.n_longer} documents", file=sys.stderr)
    return tokens


def take(stream, chars):
    """The next items (split, text, ends) of an iterator: as many as have `chars` characters, at least one."""
    batch = []
    for item in stream:
        batch.append(item)
        chars -= len(item[1])
        if chars < 0:
            break
    return batch


def encode(batch, tokenizer, eos, rows=None):
    """Items (split, text, ends) -> (split, ids, ends), with EOS where a document ends; with a `Rows`, its rows."""
    encoded = tokenizer.encode([text for _, text, _ in batch])
    items = []
    for (split, _, ends), ids in zip(batch, encoded):
        if rows:
            ids = rows.padded(ids, ends)
        elif ends and eos:
            ids = np.append(ids, ids.dtype.type(tokenizer.bos))    # (a plain int would make them int64)
        items.append((split, ids, ends))
    return items


# ---------------------------------------------------------------------------------------------------------------------
# any text

TEXT_DEFAULTS = dict(separator="<|endoftext|>", val_fraction=0.02, seed=0, val_documents=1000)
VAL_NAMES = ("validation", "valid", "val", "dev")          # what datasets call the split that models are chosen on


def make_text(args):
    """Any text: from local files, whole documents chosen for validation; or from a hub, streamed in one pass."""
    if not args.files and not args.hub:
        raise BadInput("text comes from --files or from --hub: give one of them")
    if args.files:
        refuse_unread(["val_documents"], (), "with --files")
        make_text_of_files(args)
    else:
        refuse_unread(["separator", "val_fraction", "seed"], (), "with --hub")
        make_text_of_hub(args)


def make_text_of_files(args):
    """Any UTF-8 text files (any files at all with `bytes`), read twice: counted, then written."""
    separator = args.separator
    if args.rows and "separator" not in Parser.given:
        separator = "\n"
    with begin(args, separator=separator) as (tokenizer, stream, writer):
        n, tokenizer = count_documents(stream, tokenizer)
        writer.meta |= describe(tokenizer)                 # of characters, the ones that the text has
        hold_out = max(1, round(args.val_fraction * n))
        rows = rows_of_text(args, tokenizer, writer)
        write_text(writer, choose_val(stream(), n, hold_out, args.seed), tokenizer, rows=rows)
    print(f"{args.out}: {n} documents ({hold_out} for validation)", file=sys.stderr)


def rows_of_text(args, tokenizer, writer):
    """What --rows asks for, a `Rows`, which meta.json says as well; None without it."""
    if not args.rows:
        return None
    if not any((args.rows + 1) % size == 0 for size in range(2, 17)):
        print(f"--rows={args.rows}: with BOS {args.rows + 1} tokens, which no block size from 2 to 16 divides",
              file=sys.stderr)
    rows = Rows(args.rows, tokenizer.bos)
    writer.meta |= rows.meta()
    return rows


def count_documents(stream, tokenizer):
    """A first pass: how many documents there are, and the tokenizer; if it is one of characters, of the text's."""
    n = 0
    chars = set()
    for _, text, ends in tqdm(stream(), desc="counting documents", unit="", mininterval=1):
        n += ends
        if tokenizer.chars is not None:
            chars.update(text)
    if n < 2:
        documents = "1 document" if n == 1 else f"{n} documents"
        raise BadInput(f"--files hold {documents}, and at least one must go to each of train and val: "
                       "set --separator to what stands between documents, or split the text")
    if tokenizer.chars is not None:                        # now they are known
        tokenizer = Tokenizer("chars:" + "".join(sorted(chars)))
    return n, tokenizer


def choose_val(documents, n, hold_out, seed):
    """A stream of n documents -> (split, text, ends): exactly `hold_out` of them, chosen at random, are validation.

    Each is drawn with the share that is still needed among those that still come: no list of documents is held.
    """
    draws = np.random.default_rng(seed)
    doc = 0
    held = 0
    is_val = draws.random() < hold_out / n
    for _, text, ends in documents:
        yield "val" if is_val else "train", text, ends
        if ends:
            doc += 1
            held += is_val
            # (past the last document there is none to draw for)
            is_val = doc < n and draws.random() < (hold_out - held) / (n - doc)


def make_text_of_hub(args):
    """A hub's dataset, streamed once: its own validation split, or else its last documents, are validation."""
    if args.tokenizer == "chars":
        raise BadInput("--tokenizer=chars reads the text twice, first for its characters, and --hub is "
                       "streamed once: use --tokenizer=bytes, or give local files with --files")
    found = hub_splits(args.hub)
    if "train" not in found:
        raise BadInput(f"--hub={args.hub} has no split named train, but {', '.join(found)}: "
                       "choose another dataset")
    splits = ["train"]
    hold_out = args.val_documents
    for name in VAL_NAMES:
        if name in found:
            splits.append(name)
            hold_out = 0                                   # its training split stays whole
            break
    with begin(args, splits=splits) as (tokenizer, stream, writer):
        items = to_splits(stream(), lambda source: not source.endswith(":train"))
        write_text(writer, items, tokenizer, hold_out=hold_out, rows=rows_of_text(args, tokenizer, writer))
    used = f"the last {hold_out} documents"
    if not hold_out:
        used = f"its split {splits[1]}"
    print(f"{args.out}: for validation, {used}", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# the paper's datasets

# name: (on the hub, the field of the text, whether a line of a local file is a document, detokeniser)
ZEROSHOT = dict(
    ptb=("ptb-text-only/ptb_text_only@refs/convert/parquet", "sentence", True, PTB),
    wikitext=("Salesforce/wikitext:wikitext-2-raw-v1", "text", True, WIKITEXT),
    lm1b=("billion-word-benchmark/lm1b@refs/convert/parquet", "text", True, LM1B),
    lambada=("EleutherAI/lambada_openai", "text", False, LAMBADA),
    ag_news=("fancyzhx/ag_news", "text", False, []),
    pubmed=("armanc/scientific_papers:pubmed@refs/convert/parquet", "article", False, SCIENTIFIC),
    arxiv=("armanc/scientific_papers:arxiv@refs/convert/parquet", "article", False, SCIENTIFIC))


def make_openwebtext(args):
    """OpenWebText, its last documents held out (Appendix C.1: 100,000), EOS after each document."""
    with begin(args, "Skylion007/openwebtext") as (tokenizer, stream, writer):
        items = to_splits(stream(), lambda source: False)
        write_text(writer, items, tokenizer, hold_out=args.val_documents)


def make_lm1b(args):
    """The One Billion Word benchmark, detokenised; val is its held-out part (files with `heldout` in their names)."""
    with begin(args, ZEROSHOT["lm1b"][0], ("train", "test"), by_line=True) as (tokenizer, stream, writer):
        items = to_splits(stream(), is_held_out_of_lm1b, LM1B)
        tokens = write_text(writer, items, tokenizer)
    if not tokens["val"]:
        print(f"{args.out}: no file has `heldout` in its name: there is no validation split, "
              "which training needs", file=sys.stderr)


def is_held_out_of_lm1b(source):
    return "heldout" in source or source.endswith(":test")         # the latter: the hub's name for it


def make_zeroshot(args):
    """A zero-shot set (Table 8): its test texts, detokenised, in one stream without EOS, as the paper wraps them."""
    hub, field, by_line, rules = ZEROSHOT[args.name]
    headless = args.name == "ag_news" and not args.field
    with begin(args, hub, ("test",), field, by_line=by_line, headless=headless) as (tokenizer, stream, writer):
        items = to_splits(stream(), lambda source: True, rules)
        write_text(writer, items, tokenizer, eos=False)


# ---------------------------------------------------------------------------------------------------------------------
# the command line

LISTS = dict(words=make_words, molecules=make_molecules)
TEXTS = dict(text=make_text, openwebtext=make_openwebtext, lm1b=make_lm1b, zeroshot=make_zeroshot)
HELP = dict(
    maze="the 2000 paths of the maze", maze_skewed="the same, short ones favoured",
    words="a list of words, one a row", molecules="QM9's molecules, one a row", text="any UTF-8 text",
    openwebtext="OpenWebText", lm1b="One Billion Words", zeroshot="a zero-shot evaluation set",
    verify="check sizes, hashes and ids of a dataset")


def parse(argv=None):
    """The flags: every command has its own."""
    parser = Parser(description="Make, and check, datasets of token shards.")
    commands = parser.add_subparsers(dest="what", required=True, parser_class=Parser)
    sub = {name: commands.add_parser(name, help=what) for name, what in HELP.items()}
    sub["verify"].add_argument("path", help="its folder")
    sub["zeroshot"].add_argument("name", choices=ZEROSHOT, help="which set")
    for name in (*EMBEDDED, *TEXTS):
        sub[name].add_argument("--out", required=name == "text",
                               help="folder to write; by default data/ and the name")
    sub["words"].add_argument("--files", nargs="+", help=f"words, one a line; by default {words.SYSTEM_LIST}")
    sub["molecules"].add_argument("--files", nargs="+",
                                  help="SMILES: .smi, a molecule a line, or .csv with a column SMILES; by default QM9, "
                                  "from the package qm9pack")
    for name in TEXTS:
        add = sub[name].add_argument
        add("--files", nargs="+",
            help="text, .jsonl, .parquet, .csv, .tsv, .tar of these, .gz, .xz or .bz2 of these, or folders of "
            "these, in this order; without, --hub")
        add("--hub",
            help="Hugging Face dataset NAME[:CONFIG][@REVISION], streamed by `datasets`; NAME may be a folder")
        add("--field",
            help="where .jsonl, .parquet, .csv, .tsv and the hub keep a document's text; by default text, or the "
            "zero-shot set's own")
        add("--tokenizer", default="gpt2",
            help="gpt2, bytes (no download, any file), hf:NAME; for `text` with --files also chars (the "
            "characters of the text)")
    add = sub["openwebtext"].add_argument
    add("--val_documents", default=100_000, type=number(int, 1), help="the last so many are held out")
    add = sub["text"].add_argument
    add("--val_documents", default=TEXT_DEFAULTS["val_documents"], type=number(int, 1),
        help="with --hub, where it has no validation split of its own: the last so many are held out")
    add("--separator", default=TEXT_DEFAULTS["separator"], type=unescape,
        help="what stands between documents of a text file; a file's end always ends one")
    add("--val_fraction", default=TEXT_DEFAULTS["val_fraction"], type=number(float, above=0, high=0.5),
        help="with --files: fraction of the documents held out")
    add("--seed", default=TEXT_DEFAULTS["seed"], type=number(int, 0),
        help="with --files: which documents are held out")
    add("--rows", type=number(int, 2, 2**20),
        help="one document a row, of so many tokens: padded with EOS, longer ones left out; a line of a text file is a "
        "document, if --separator says nothing else")
    return parser.parse_args(argv)


def main():
    args = parse()
    if args.what == "verify":
        verify(args.path)
        return
    if not args.out:
        args.out = f"data/{args.what}"
        if args.what == "zeroshot":
            args.out += f"-{args.name}"
    if args.what in TEXTS:
        TEXTS[args.what](args)
    else:
        make_embedded(args.what, args.out, vars(args).get("files"))


if __name__ == "__main__":
    run_main(main)
