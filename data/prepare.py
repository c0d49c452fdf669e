"""Makes datasets, and checks them.

    python data/prepare.py maze                                            # 2000 paths, no download
    python data/prepare.py text --files a.txt b.txt --tokenizer=bytes --out=data/mine
    python data/prepare.py openwebtext                                     # or lm1b: streamed; or --files=..., local
    python data/prepare.py zeroshot ptb --files ptb.test.txt               # one of the paper's zero-shot sets
    python data/prepare.py verify data/mine                                # sizes, hashes and ids of every shard

What a dataset is: `data/shards.py`. Memory is flat, whatever the input's size.
"""
import collections
import functools
import itertools
import os
import re
import shutil
import sys

import numpy as np
from tqdm import tqdm

if __name__ == "__main__":                               # a script's folder is on the path: the project's instead
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
from data.cli import BadInput, Parser, number, run_main, unescape
from data.documents import expand, stream_files, stream_hub
from data.maze import MAZE_BOS, MAZE_LENGTH, maze_dataset
from data.shards import Writer, verify
from data.vocab import Tokenizer


def make_maze(name, out=None):
    out, rows = out or f"data/{name}", maze_dataset(name)
    writer = Writer(out, dict(name=name, tokenizer="maze", vocab_size=6, bos=MAZE_BOS, predict_bos=False,
                              row_length=MAZE_LENGTH))
    for split in ("train", "val"):                       # the language is finite: the same rows
        writer.write(split, rows.ravel())
    writer.finish()
    print(f"{out}: {len(rows)} paths, {len(np.unique(rows, axis=0))} distinct", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# text: documents -> shards

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
# the command line

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
