"""A fuzz of every door through which something enters: files, other people's files, answers, environment, flags.

    python -m pytest -q extra/test_fuzz.py                 # three minutes at most; FUZZ_SEED=1 draws other places

Each case takes valid files, changes one of them (type, length, sign, bit, truncation, link), runs one command in this
process, and has its verdict written beforehand. A case fails by a traceback, by another exit code than its verdict's,
by no end within 20 seconds, by a refusal that is not one sentence that names the culprit or that changes a file, or
where its `check` says so. A door's test lists all of its failures; the first line of the list counts them.

In this order: cases and how one is tried; the valid files; ways to change a file; the doors, one function each.
"""
import functools
import gzip
import http.server
import io
import json
import lzma
import math
import os
import random
import resource
import shutil
import signal
import struct
import tarfile
import threading
import time
import zipfile
from collections import namedtuple
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import sample
import train
from data import prepare
from data.cli import parse_number
from extra import judge
from extra.test_extra import KEY, RATINGS, Node, omegaconf
from test_gumbel import TINY, gen, interrupt_after, offline, run_in
from test_gumbel import cli  # noqa: F401, a fixture

SEED = int(os.environ.get("FUZZ_SEED", 0))
SECONDS = 20                                               # a command that takes longer hangs
MEMORY = 4 << 30                                           # bytes that a command may take beyond what is taken already

# verdicts: the exit codes that are right
REFUSED = (2,)
ACCEPTED = (0,)
EITHER = (0, 2)
UNANSWERED = (1, 2)                                        # by a judge
ANY = (0, 1, 2)                                            # all but a traceback


# ---------------------------------------------------------------------------------------------------------------------
# cases

# change(): makes the input, in a copy of the valid files. command: (module, flags). names: what a refusal must hold,
# one of several between bars. check(): None, or what is wrong afterwards
Case = namedtuple("Case", "name change command verdict names check env", defaults=["", None, {}])


class Hang(BaseException):
    """Raised in a command that takes too long: no `except Exception` catches it."""


def too_long(signum, frame):
    raise Hang


def files_in(folder):
    """All that lies in a folder: {path: a link's target, a file's bytes, None for a folder}."""
    found = {}
    for where, folders, files in os.walk(folder):
        for name in folders + files:
            path = os.path.join(where, name)
            if os.path.islink(path):
                found[path] = os.readlink(path)
            elif os.path.isfile(path):
                found[path] = Path(path).read_bytes()
            else:
                found[path] = None
    return found


def fault_of(case, cli):
    """What is wrong with how a command takes a case, in the folder that it is tried in; None: nothing."""
    case.change()
    before = files_in(".")
    signal.alarm(SECONDS)
    try:
        code, out, err = cli(*case.command)
    except Hang:
        return f"hangs: no end within {SECONDS} s"
    except Exception as e:
        return f"traceback: {type(e).__name__}: {e}"[:300]
    finally:
        signal.alarm(0)
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.strip()]
    if "Traceback" in out + err:
        return f"traceback, printed: {lines[-1]}"
    if code not in case.verdict:
        return f"exit code {code} instead of {case.verdict}: {lines[-1:]}"
    if code == 2:
        sentences = [line for line in lines if "error:" in line]
        if len(sentences) != 1 or out:
            return f"not one sentence: {sentences}, stdout {out!r:.200}"
        if not any(name in sentences[0] for name in case.names.split("|")):
            return f"the sentence does not name {case.names}: {sentences[0]}"
        after = files_in(".")
        # (a folder's value is None, so `get` alone would not see a new one)
        changed = [path for path in before | after
                   if (path in before, before.get(path)) != (path in after, after.get(path))]
        if changed:
            return f"refused, but changed {changed}"
    if case.check is not None:
        return case.check()
    return None


@pytest.fixture
def limits():
    """A time limit for each command, and a memory limit, so that what takes all of it fails here alone."""
    handler = signal.signal(signal.SIGALRM, too_long)
    old = resource.getrlimit(resource.RLIMIT_AS)
    taken = 0
    if os.path.exists("/proc/self/statm"):                 # Linux
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, old)
    signal.signal(signal.SIGALRM, handler)


# ---------------------------------------------------------------------------------------------------------------------
# valid files

TEXTS = [f"Document {i}: " + " ".join(f"w{i * k % 97}" for k in range(60)) for i in range(40)]
MODEL = f"--data=mine --length=24 {TINY}"
DRAW = "--n=1 --steps=1"
PLAIN = f"--ckpt=out/plain {DRAW}"
RESUME = f"{MODEL} --out=out/plain --steps=8"
NEW = f"{MODEL} --steps=1 --out=out/new"
CACHED = f"--gumbel --teacher=out/ar --teacher_cache=4 {NEW}"
KEPT = "genppl --judge=out/ar --ckpt out/plain --n=2 --nfe=2 --samples=kept.jsonl"
PART = "text --files x.jsonl --tokenizer=bytes --out=data/part"
JUDGED = "--samples texts.jsonl --model=m --out=judged.jsonl --timeout=0.3 --parallel=1"


def nothing():
    """The change of a case that is valid as it is."""


def jsonl(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def gpt2_state(V=21, L=24, D=16):
    """The weights of a GPT-2 of one layer, by its published names."""
    shapes = {"wte.weight": (V, D), "wpe.weight": (L, D), "ln_f.weight": (D,), "ln_f.bias": (D,)}
    layers = {"ln_1": (D,), "ln_2": (D,), "attn.c_attn": (D, 3 * D), "attn.c_proj": (D, D), "mlp.c_fc": (D, 4 * D),
              "mlp.c_proj": (4 * D, D)}
    for name, shape in layers.items():
        shapes |= {f"h.0.{name}.weight": shape, f"h.0.{name}.bias": shape[-1:]}
    return {name: 0.1 * torch.randn(shape, generator=gen()) for name, shape in shapes.items()}


def authors_state(V=21, D=16, C=8):
    """The weights of an MDLM of one layer and two heads, by the authors' names."""
    shapes = {"vocab_embed.embedding": (V + 1, D), "sigma_map.mlp.0.weight": (C, 256), "sigma_map.mlp.0.bias": (C,),
              "sigma_map.mlp.2.weight": (C, C), "sigma_map.mlp.2.bias": (C,), "rotary_emb.inv_freq": (D // 4,),
              "blocks.0.norm1.weight": (D,), "blocks.0.attn_qkv.weight": (3 * D, D),
              "blocks.0.attn_out.weight": (D, D), "blocks.0.norm2.weight": (D,), "blocks.0.mlp.0.weight": (4 * D, D),
              "blocks.0.mlp.0.bias": (4 * D,), "blocks.0.mlp.2.weight": (D, 4 * D), "blocks.0.mlp.2.bias": (D,),
              "blocks.0.adaLN_modulation.weight": (6 * D, C), "blocks.0.adaLN_modulation.bias": (6 * D,),
              "output_layer.norm_final.weight": (D,), "output_layer.linear.weight": (V + 1, D),
              "output_layer.linear.bias": (V + 1,), "output_layer.adaLN_modulation.weight": (2 * D, C),
              "output_layer.adaLN_modulation.bias": (2 * D,)}
    return {"backbone." + name: 0.1 * torch.randn(shape, generator=gen()) for name, shape in shapes.items()}


GPT2_CONFIG = dict(model_type="gpt2", vocab_size=21, n_positions=24, n_embd=16, n_layer=1, n_head=2, bos_token_id=20,
                   eos_token_id=20)
MDLM_CONFIG = dict(model_type="mdlm", model_length=24, n_heads=2, n_blocks=1, hidden_dim=16, cond_dim=8, dropout=0.1,
                   vocab_size=22, time_conditioning=False)
# of a Lightning checkpoint: what the authors' configuration says, as far as it matters to the network
AUTHORS = dict(
    mode="train", block_size="${model.length}",
    model=dict(name="tiny", type="ddit", hidden_size=16, cond_dim=8, length=24, n_blocks=1, n_heads=2, dropout=0.1,
               tie_word_embeddings=True, gumbel_inject_mode="replace"),
    algo=dict(name="mdlm", backbone="dit", parameterization="subs", time_conditioning=False, T=0,
              causal_attention=False, cross_attn=False),
    data=dict(train="lm1b", valid="lm1b", tokenizer_name_or_path="gpt2"))


def write_safetensors(path, header, data):
    """The format: the size of the header in 8 bytes, the header (an object, or its text), the data."""
    if not isinstance(header, bytes):
        header = json.dumps(header).encode()
    Path(path).write_bytes(struct.pack("<Q", len(header)) + header + data)


def save_safetensors(path, state):
    header = {}
    data = b""
    for name, w in state.items():
        end = len(data) + 4 * w.numel()
        header[name] = dict(dtype="F32", shape=list(w.shape), data_offsets=[len(data), end])
        data += w.numpy().tobytes()
    write_safetensors(path, header, data)


def lightning(config=AUTHORS):
    """What a .ckpt of the authors' code holds."""
    state = authors_state()
    shadow = [torch.nn.Parameter(w, False) for name, w in state.items() if "inv_freq" not in name]
    return dict(epoch=1, global_step=7, state_dict=state, loops={"x": Node(y=2)}, callbacks={},
                hyper_parameters=dict(config=omegaconf(config), tokenizer=Node(z=3)),
                ema=dict(decay=0.9999, num_updates=7, shadow_params=shadow))


@pytest.fixture(scope="session")
def valid(tmp_path_factory):
    """A folder with valid files for every door: models on 40 documents, foreign models, samples, a cache, texts."""
    root = tmp_path_factory.mktemp("valid")
    (root / "x.jsonl").write_text(jsonl(TEXTS))
    run = f"{MODEL} --steps=6"
    run_in(root, (prepare, "text --files x.jsonl --tokenizer=bytes --out=data/mine"),
           (train, f"--model=ar {run} --out=out/ar"),
           (train, f"{run} --out=out/plain"),
           (train, f"--gumbel --teacher=out/ar {run} --out=out/gumbel"),
           (train, f"--model=bd3lm {run} --out=out/blocks"),
           (train, "--model=medusa --teacher=out/ar --data=mine --length=24 --steps=1 --batch_size=4 --out=out/heads"),
           (train, f"--model=ar --data=maze --steps=1 {TINY} --out=out/maze-ar"),
           (train, CACHED),
           (evaluate, KEPT.replace("kept.jsonl", "kept")))
    shutil.rmtree(root / "out/new")
    (kept,) = (root / "kept").iterdir()
    kept.rename(root / "kept.jsonl")
    (root / "kept").rmdir()
    for name, state, config in (("gpt2", gpt2_state(), GPT2_CONFIG), ("mdlm", authors_state(), MDLM_CONFIG)):
        (root / name).mkdir()
        save_safetensors(root / name / "model.safetensors", state)
        (root / name / "config.json").write_text(json.dumps(config))
    torch.save(lightning(), root / "their.ckpt")
    (root / "texts.jsonl").write_text(jsonl(["once upon a time"]))
    (root / "judged.jsonl").touch()                        # a judge that refuses has been asked, and leaves this
    # a run of prepare that was interrupted, and what it makes when it is not
    with pytest.MonkeyPatch.context() as m:
        interrupt_after(m, 2)
        with pytest.raises(KeyboardInterrupt):
            # small batches, so that there is something to commit
            m.setattr(prepare, "take", partial(take_few, prepare.take))
            run_in(root, (prepare, PART))
    (root / "data/part.partial/lock").unlink(missing_ok=True)
    return root


def take_few(take, stream, chars):
    return take(stream, 2000)


@pytest.fixture
def work(valid, tmp_path, monkeypatch):
    """A function that makes the valid files anew, in the working folder."""
    folder = tmp_path / "work"

    def restore():
        monkeypatch.chdir(tmp_path)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(valid, folder)
        monkeypatch.chdir(folder)
    return restore


# ---------------------------------------------------------------------------------------------------------------------
# ways to change a file

DELETE = object()
DEEP = "[" * 100_000
WRONG = dict(null=None, number=7, text="x", list=[1], object={})           # one of these is always the wrong type


def put(tree, place, value):
    """Set, or DELETE, what stands at a place like "config/bos" of a tree of dicts and lists."""
    *path, last = [int(key) if key.isdigit() else key for key in place.split("/")]
    for key in path:
        tree = tree[key]
    if value is DELETE:
        del tree[last]
    elif isinstance(tree, list) and last == len(tree):
        tree.append(value)
    else:
        tree[last] = value


def edit_json(path, place, value):
    tree = json.loads(Path(path).read_text())
    put(tree, place, value)
    Path(path).write_text(json.dumps(tree))


def edit_line(path, number, place, value):
    """As `edit_json`, in one line of a .jsonl file."""
    lines = Path(path).read_text().splitlines()
    tree = json.loads(lines[number])
    put(tree, place, value)
    lines[number] = json.dumps(tree)
    Path(path).write_text("\n".join(lines) + "\n")


def edit_torch(path, place, value):
    tree = torch.load(path, weights_only=True)
    put(tree, place, value)
    torch.save(tree, path)


def fill(path, parts, value, only_first=False):
    """Put a number into weights of a torch file, into one of each or into all."""
    tree = torch.load(path, weights_only=True)
    for part in parts:
        for w in tree[part].values():
            w.view(-1)[:1 if only_first else None] = value
    torch.save(tree, path)


def convert(path, part, change):
    """Apply a function to all weights in a part of a torch file."""
    tree = torch.load(path, weights_only=True)
    tree[part] = {name: change(w) for name, w in tree[part].items()}
    torch.save(tree, path)


def write(path, content):
    if isinstance(content, str):
        content = content.encode("utf-8", "surrogatepass")
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    Path(path).write_bytes(content)


def truncate(path, share):
    """Keep this share of a file, or so many bytes: a negative number leaves off so many."""
    size = os.path.getsize(path)
    length = int(share * size)
    if share < 0:
        length = size + share
    os.truncate(path, length)


def append(path, content):
    with open(path, "ab") as f:
        f.write(content)


def flip(path, share):
    """Flip the bit that lies so far into a file."""
    content = bytearray(Path(path).read_bytes())
    bit = int(share * 8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    Path(path).write_bytes(content)


def overwrite(path, share, content):
    with open(path, "r+b") as f:
        f.seek(int(share * os.path.getsize(path)))
        f.write(content)


def flip_in_archive(path, share):
    """Flip a bit of what a zip archive holds, between the headers: the bytes that its CRCs are of."""
    places = []
    content = bytearray(Path(path).read_bytes())
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            name_size, extra_size = struct.unpack_from("<HH", content, info.header_offset + 26)
            first = info.header_offset + 30 + name_size + extra_size
            places += range(first, first + info.compress_size)
    bit = int(share * 8 * len(places))
    content[places[bit // 8]] ^= 1 << bit % 8
    Path(path).write_bytes(content)


def become(path, what):
    """Put something that is no file in a file's place."""
    os.remove(path)
    if what == "a folder":
        os.mkdir(path)
    elif what == "a loop of links":
        os.symlink(os.path.basename(path), path)
    elif what == "a link to nothing":
        os.symlink("nothing", path)


def both(*changes):
    for change in changes:
        change()


def no_file(path):
    """Something else in a file's place: {name: change}."""
    kinds = ("a folder", "a loop of links", "a link to nothing")
    return {kind: partial(become, path, kind) for kind in kinds}


def truncated(path, rng, n=4):
    """A file that is cut off: {name: change}."""
    shares = {"empty": 0.0, "one byte missing": -1}
    shares |= {f"{share:.3f} of it": share for share in (rng.random() for _ in range(n))}
    return {name: partial(truncate, path, share) for name, share in shares.items()}


def no_object(path):
    """JSON, or not, where an object is wanted: {name: change}."""
    texts = dict(a_list="[1, 2]", a_number="3", a_text='"x"', null="null", deep=DEEP, deep_objects='{"a":' * 100_000,
                 nan="NaN", no_json="{no json", nuls="\0" * 100, bytes=b"\xff\xfe\x00{", utf16="{}".encode("utf-16"))
    return {name: partial(write, path, text) for name, text in texts.items()}


def fields(edit, path, places):
    """Fields of wrong values: {name: change} of {place: values}."""
    changes = {}
    for place, values in places.items():
        for value in values:
            shown = "missing" if value is DELETE else f"{value!r:.40}"
            changes[f"{place} {shown}"] = partial(edit, path, place, value)
    return changes


def cases(command, verdict, changes, names="", prefix="", check=None):
    """Cases of one command and verdict, of {name: change}."""
    for name, change in changes.items():
        yield Case(prefix + name, change, command, verdict, names, check)


# ---------------------------------------------------------------------------------------------------------------------
# the doors: models

def checkpoint(rng):
    """ckpt.pt of a run, that is sampled from, and resumed."""
    path = "out/plain/ckpt.pt"
    draws = (sample, PLAIN)
    resumes = (train, RESUME)
    edit = partial(fields, edit_torch, path)
    wrong = [DELETE, *WRONG.values()]
    refused = {"ema": wrong, "args": wrong, "meta": wrong, "config": wrong,
               "args/model": [None, "zzz", "ar", ["mdlm"], 3],
               "meta/tokenizer": [None, 3, "", "zzz", "chars:ab", ["bytes"]],
               "meta/vocab_size": ["x", -1, None, 1.5],
               "meta/bos": ["x", None, 1.5],
               "config/bos": [-1, 257, 10**9, None, "x", 1.5],
               "config/length": [None, "x", 0, -1, 10**12, 1.5],
               "config/vocab_size": [-1, 0, "x", 10**9, 10**30],
               "config/n_head": [-1, 0, 3, "x", None],
               "config/n_layer": [10**9, -1, 0, "x", 2],
               "config/n_embd": [10**8, -16, "x", 10**30],
               "config/dropout": [2, math.nan, "x", -1, math.inf],
               "config/noise": ["zzz", 3, "gumbel"],
               "config/inject": ["zzz"],
               "config/zzz": [1],
               "ema/transformer.embed.weight": [DELETE, None, [1.0], torch.zeros(3), torch.tensor(0.0)],
               "ema/transformer.zzz": [torch.zeros(3)]}
    yield Case("as it is", nothing, draws, ACCEPTED)
    yield from cases(draws, REFUSED, edit(refused), "plain")
    harmless = {"step": ["x", -1], "git": [3], "clip": ["x"], "tokens_seen": ["x"], "zzz": [1]}
    yield from cases(draws, EITHER, edit(harmless))
    for value in (math.nan, math.inf, -math.inf):
        yield Case(f"EMA all {value}", partial(fill, path, ["ema"], value), draws, REFUSED, "plain")
        yield Case(f"EMA once {value}", partial(fill, path, ["ema"], value, True), draws, REFUSED, "plain")
        yield Case(f"raw weights {value}", partial(fill, path, ["model"], value), (sample, f"{PLAIN} --weights=raw"),
                   REFUSED, "plain")
    # where weights are read for another purpose
    teaches = (train, f"--gumbel --teacher=out/ar {NEW}")
    yield Case("teacher of nan", partial(fill, "out/ar/ckpt.pt", ["ema"], math.nan), teaches, REFUSED, "out/ar")
    yield Case("start from nan", partial(fill, path, ["ema", "model"], math.nan),
               (train, f"{NEW} --init_from=out/plain"), REFUSED, "plain")
    yield Case("judge of inf", partial(fill, "out/ar/ckpt.pt", ["ema"], math.inf),
               (evaluate, "genppl --judge=out/ar --ckpt out/plain --n=2 --nfe=1"), REFUSED, "out/ar")
    for dtype in (torch.complex64, torch.int64, torch.bool):
        yield Case(f"EMA {dtype}", partial(convert, path, "ema", partial(to_dtype, dtype)), draws, REFUSED, "plain")
    for dtype in (torch.float64, torch.float16):
        yield Case(f"EMA {dtype}", partial(convert, path, "ema", partial(to_dtype, dtype)), draws, EITHER)
    yield Case("EMA transposed", partial(convert, path, "ema", transposed), draws, REFUSED, "plain")

    # the file itself
    yield from cases(draws, REFUSED, truncated(path, rng) | no_file(path) | no_object(path), "plain")
    yield Case("a pickle", partial(write, path, b"cos\nsystem\n(S'touch executed'\ntR."), draws, REFUSED, "plain",
               partial(absent, "executed"))
    yield Case("weights alone", partial(edit_whole, path, "model"), draws, REFUSED, "plain")
    yield Case("appended", partial(append, path, b"x" * 100), draws, EITHER)
    yield Case("a link", partial(link_away, path), draws, ACCEPTED)
    for _ in range(12):
        yield Case("a bit of what it holds", partial(flip_in_archive, path, rng.random()), draws, REFUSED, "plain")
    for _ in range(4):
        yield Case("a bit", partial(flip, path, rng.random()), draws, EITHER)
    yield Case("64 bytes of zeros", partial(overwrite, path, 0.3, bytes(64)), draws, REFUSED, "plain")

    # at a resume
    yield Case("resumed", nothing, resumes, ACCEPTED)
    refused = {"model": wrong, "optimizer": wrong, "ema": [None, {}], "config": [None], "meta": [None, "x"],
               "args": [None, "x"],
               "rng": [DELETE, None, "x", 7, torch.zeros(3), torch.zeros(3, dtype=torch.uint8)],
               "step": [DELETE, None, "x", -1, 1.5, 10**30, True],
               "optimizer/state": [None, "x", {}, {0: {}}],
               # (too large: one that is too small would end this process, torch reads on behind it)
               "optimizer/state/0/exp_avg": [None, torch.zeros(10_000), "x", DELETE],
               "optimizer/param_groups": [None, [], "x"],
               "model/transformer.embed.weight": [DELETE, None, torch.zeros(3)]}
    yield from cases(resumes, REFUSED, edit(refused), "plain", "resumed: ")
    harmless = {"git": [3], "tokens_seen": ["x"], "clip": ["x"], "optimizer/state/0/step": [None, "x"]}
    yield from cases(resumes, EITHER, edit(harmless), prefix="resumed: ")
    yield Case("resumed: weights of nan", partial(fill, path, ["model"], math.nan), resumes, REFUSED, "plain")
    # finite loss, then weights of nan: refused, or ended as a streak is
    yield Case("resumed: moments of nan", partial(edit_moment, path, math.nan), resumes, UNANSWERED)
    yield Case("resumed: a bit", partial(flip_in_archive, path, rng.random()), resumes, REFUSED, "plain")

    # heads name the file of their backbone
    draws = (sample, "--ckpt=out/heads --n=1")
    edit = partial(fields, edit_torch, "out/heads/ckpt.pt")
    yield Case("heads", nothing, draws, ACCEPTED)
    refused = {"config/backbone": [None, 3, "", "nowhere", "../x", "/etc/passwd", ["x"], "out/plain"],
               "config/sha256": [None, "x", 3], "config/heads": [0, -1, "x", 10**9, 5]}
    yield from cases(draws, REFUSED, edit(refused), "heads", "heads: ")


def to_dtype(dtype, w):
    return w.to(dtype)


def transposed(w):
    return w.t().contiguous() if w.ndim == 2 else w


def edit_whole(path, part):
    """Only one part of a torch file."""
    torch.save(torch.load(path, weights_only=True)[part], path)


def edit_moment(path, value):
    tree = torch.load(path, weights_only=True)
    tree["optimizer"]["state"][0]["exp_avg"].fill_(value)
    torch.save(tree, path)


def link_away(path):
    os.rename(path, path + ".there")
    os.symlink(os.path.basename(path) + ".there", path)


def absent(path):
    """A check."""
    if os.path.exists(path):
        return f"{path} was made"
    return None


def config_json(rng):
    """config.json beside GPT-2's weights and beside the authors'."""
    draws = (sample, "--ckpt=gpt2 --n=1 --length=4")
    path = "gpt2/config.json"
    edit = partial(fields, edit_json, path)
    yield Case("as it is", nothing, draws, ACCEPTED)
    refused = {"bos_token_id": [10**9, -3, "x", [1, 2], 21, 1.5, {}],
               "n_head": [-1, 0, 3, "x", 10**9, 1.5, [2]],
               "n_layer": ["x", -1, 10**9], "n_embd": ["x", -16, 10**8], "n_positions": ["x", -1],
               "vocab_size": ["x", -1]}
    yield from cases(draws, REFUSED, edit(refused), "gpt2")
    # sizes that the weights have as well, or nothing that GPT-2 reads
    yield from cases(draws, EITHER, edit({"n_layer": [2], "n_embd": [32], "n_positions": [12], "vocab_size": [20],
                                          "bos_token_id": [None, True], "model_type": ["llama", 3], "zzz": [1]}))
    broken = no_object(path) | no_file(path) | truncated(path, rng)
    del broken["a link to nothing"]                        # as if it were not there
    yield from cases(draws, REFUSED, broken, "gpt2")
    yield Case("no config.json: no number of heads", partial(os.remove, path), draws, REFUSED, "gpt2")
    for _ in range(4):
        yield Case("a bit", partial(flip, path, rng.random()), draws, EITHER)

    draws = (sample, f"--ckpt=mdlm {DRAW} --length=4")
    path = "mdlm/config.json"
    edit = partial(fields, edit_json, path)
    yield Case("MDLM", nothing, draws, ACCEPTED)
    refused = {"time_conditioning": [True], "parameterization": ["sedd", "d3pm"], "model_type": ["duo", "sedd", "bert"],
               "n_heads": [-1, 0, 3, "x", 1.5], "model_length": ["x", -1, 0, 10**12, 1.5],
               "block_size": [5, 0, -1, "x", 10**12]}
    yield from cases(draws, REFUSED, edit(refused), "mdlm", "MDLM: ")
    with_blocks = partial(edit_json, path, "block_size", 4)
    yield Case("MDLM: block_size 4, of what is called an MDLM", with_blocks, draws, EITHER)
    yield Case("BD3-LM", partial(both, with_blocks, partial(edit_json, path, "model_type", "bd3lm")), draws, ACCEPTED)
    yield from cases(draws, EITHER, edit({"vocab_size": [30524], "hidden_dim": [32], "n_blocks": [2], "zzz": [1]}),
                     prefix="MDLM: ")
    yield from cases(draws, REFUSED, no_object(path), "mdlm", "MDLM: ")
    yield Case("no config.json: no length", partial(os.remove, path), draws, EITHER)


def edit_header(path, change):
    """Change a safetensors file by a function (header, data) -> (header, data)."""
    content = Path(path).read_bytes()
    start = 8 + struct.unpack("<Q", content[:8])[0]
    write_safetensors(path, *change(json.loads(content[8:start]), content[start:]))


def with_field(place, value, header, data):
    put(header, place, value)
    return header, data


def with_text(old, new, header, data):
    return json.dumps(header).replace(old, new).encode(), data


def without_rows(header, data):
    """An embedding of no rows; what it had stays, of no tensor."""
    header["wte.weight"] = dict(dtype="F32", shape=[0, 16], data_offsets=[0, 0])
    return header, data


def with_number(value, header, data):
    return header, data[:400] + struct.pack("<f", value) + data[404:]


def as_whole_numbers(header, data):
    for entry in header.values():
        entry["dtype"] = "I32"
    return header, data


def with_header(text, header, data):
    return text, data


def with_size(path, size):
    """The size that a safetensors file says its header has."""
    content = Path(path).read_bytes()
    Path(path).write_bytes(struct.pack("<Q", size) + content[8:])


def safetensors(rng):
    """model.safetensors of a folder, and named by itself."""
    draws = (sample, "--ckpt=gpt2 --n=1 --length=4")
    path = "gpt2/model.safetensors"
    first = "wte.weight"
    second = "wpe.weight"
    yield Case("as it is", nothing, draws, ACCEPTED)
    yield Case("the file itself", nothing, (sample, f"--ckpt={path} --n=1 --length=4"), ACCEPTED)
    yield Case("the file itself, without settings", partial(os.remove, "gpt2/config.json"),
               (sample, f"--ckpt={path} --n=1 --length=4"), REFUSED, "gpt2")
    values = {f"{first}/data_offsets": [[-256, 0], [-1344, 0], [0, 10**9], [1344, 0], [0, 1340], [4, 1348], [0], [],
                                        [0, 1344, 1344], "x", None, [0.0, 1344.0], ["0", "1344"], [0, 10**30], DELETE],
              f"{second}/data_offsets": [[0, 1536], [1340, 2876]],         # of another's
              f"{first}/shape": [[21, -16], [-1, 16], [10**9, 10**9], [], [336], "x", None, [21.0, 16], [16, 21],
                                 [10**30, 1], [21, 16, 0], DELETE],
              f"{first}/dtype": ["F8", "zzz", 3, None, DELETE, "F64", ["F32"]],
              first: [DELETE, None, 3, "x", []],
              "h.1000000000.ln_1.weight": [dict(dtype="F32", shape=[0], data_offsets=[0, 0])],
              "zzz": [dict(dtype="F32", shape=[0], data_offsets=[0, 0])]}
    for place, wrong in values.items():
        for value in wrong:
            # names hold dots and slashes separate: none of the names has one
            change = partial(edit_header, path, partial(with_field, place, value))
            shown = "missing" if value is DELETE else f"{value!r:.40}"
            yield Case(f"{place} {shown}", change, draws, REFUSED, "gpt2")
    yield Case("a name twice", partial(edit_header, path, partial(with_text, '"wpe.weight"', '"ln_f.bias"')), draws,
               REFUSED, "gpt2")
    yield Case("a name twice, alike", partial(edit_header, path, partial(
        with_text, "{", '{"ln_f.bias": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}, ')), draws, REFUSED,
        "gpt2")
    yield Case("an embedding of no rows", partial(edit_header, path, without_rows), draws, REFUSED, "gpt2")
    for value in (math.nan, math.inf, -math.inf):
        yield Case(f"{value}", partial(edit_header, path, partial(with_number, value)), draws, REFUSED, "gpt2")
    yield Case("whole numbers", partial(edit_header, path, as_whole_numbers), draws, EITHER)
    yield Case("__metadata__ of another type", partial(edit_header, path, partial(with_field, "__metadata__", 3)),
               draws, EITHER)
    for name, text in dict(list=b"[]", deep=DEEP.encode(), number=b"3", no_json=b"{", empty=b"", bytes=b"\xff" * 9,
                           no_tensor=b"{}").items():
        yield Case(f"header {name}", partial(edit_header, path, partial(with_header, text)), draws, REFUSED, "gpt2")
    for size in (0, 1, 2**63, 2**64 - 1, 10**6):
        yield Case(f"header of {size} bytes", partial(with_size, path, size), draws, REFUSED, "gpt2")
    yield from cases(draws, REFUSED, truncated(path, rng) | no_file(path), "gpt2")
    yield Case("appended", partial(append, path, b"x" * 64), draws, EITHER)
    yield Case("a link", partial(link_away, path), draws, ACCEPTED)
    for _ in range(8):
        yield Case("a bit", partial(flip, path, rng.random()), draws, EITHER)
    yield Case("a bit of the header", partial(flip, path, rng.random() * 0.01), draws, EITHER)
    # a torch file under the other name
    torch_file = "gpt2/pytorch_model.bin"
    for name, content in dict(list=[1], text="x", nan={k: w * math.nan for k, w in gpt2_state().items()}, none={},
                              no_tensors={"wte.weight": "x"}, numbers={1: torch.zeros(2)}).items():
        change = partial(both, partial(os.remove, path), partial(torch.save, content, torch_file))
        yield Case(f"pytorch_model.bin {name}", change, draws, REFUSED, "gpt2")


def write_ckpt(path, place, value):
    """A .ckpt of the authors' with another value in what it holds."""
    tree = lightning()
    put(tree, place, value)
    torch.save(tree, path)


def write_setting(path, place, value):
    """A .ckpt of the authors' with another value in its configuration."""
    config = json.loads(json.dumps(AUTHORS))
    put(config, place, value)
    write_whole(path, config)


def write_whole(path, config):
    torch.save(lightning(config), path)


def lightning_ckpt(rng):
    """A Lightning .ckpt of the authors' code."""
    path = "their.ckpt"
    draws = (sample, f"--ckpt={path} {DRAW} --length=4")
    yield Case("as it is", nothing, draws, ACCEPTED)
    settings = {"algo/time_conditioning": [True], "time_conditioning": [True],
                "algo/parameterization": ["sedd", "d3pm"], "parameterization": ["sedd"],
                "algo/name": ["duo", "sedd"], "algo/backbone": ["dimamba"],
                "data/tokenizer_name_or_path": ["bert-base-uncased"],
                "model/length": ["x", -1, 0, 10**12, 1.5, [24]],
                "model/n_heads": [-1, 0, 3, "x", 1.5],
                "model/gumbel_inject_mode": ["zzz", 3],
                "block_size": [5, 0, -1, "x", 1.5, 10**12]}
    yield from cases(draws, REFUSED, fields(write_setting, path, settings), path)
    yield Case("block_size 4, of what is called an MDLM", partial(write_setting, path, "block_size", 4), draws, EITHER)
    blocks = AUTHORS | dict(block_size=4, algo=AUTHORS["algo"] | dict(name="bd3lm", cross_attn=True))
    yield Case("BD3-LM", partial(write_whole, path, blocks), draws, ACCEPTED)
    references = {"block_size": ["${block_size}", "${nowhere}", "${", "${model.length.x}", None, DELETE],
                  "model": [None, 3, "x"], "algo": [None, 3]}
    yield from cases(draws, EITHER, fields(write_setting, path, references))
    first = "state_dict/backbone.vocab_embed.embedding"
    refused = {"state_dict": [DELETE, None, 3, "x", [], {}], first: [DELETE, None, torch.zeros(3), torch.zeros(0, 16)],
               "state_dict/backbone.blocks.0.norm1.weight": [torch.zeros(4), "x"],
               "ema/shadow_params": ["x", [torch.zeros(2)], [None], 3], "ema": ["x", 3, [1]]}
    yield from cases(draws, REFUSED, fields(write_ckpt, path, refused), path)
    yield Case("no EMA", partial(write_ckpt, path, "ema", DELETE), draws, ACCEPTED)
    # (EMA is read, where there is any)
    yield Case("raw weights of nan", partial(write_ckpt, path, first, torch.full((22, 16), math.nan)),
               (sample, f"--ckpt={path} {DRAW} --weights=raw"), REFUSED, path)
    yield Case("EMA of nan", partial(write_ckpt, path, "ema/shadow_params/0", torch.full((22, 16), math.nan)), draws,
               REFUSED, path)
    beside = partial(shutil.copy, "mdlm/config.json", "config.json")
    for name in ("hyper_parameters", "hyper_parameters/config"):
        change = partial(write_ckpt, path, name, DELETE)
        # no setting is guessed: a BD3-LM would look the same
        yield Case(f"{name} missing", change, draws, REFUSED, path)
        yield Case(f"{name} missing, config.json beside", partial(both, change, beside), draws, ACCEPTED)
    yield from cases(draws, EITHER, fields(write_ckpt, path, {"hyper_parameters": ["x", [1], 3],
                                                              "hyper_parameters/config": ["x", 3, [1]]}))
    yield from cases(draws, REFUSED, truncated(path, rng) | no_file(path) | no_object(path), path)
    for _ in range(6):
        yield Case("a bit", partial(flip, path, rng.random()), draws, EITHER)


# ---------------------------------------------------------------------------------------------------------------------
# the doors: data

def meta_json(rng):
    """meta.json of a dataset, verified and trained on."""
    path = "data/mine/meta.json"
    verifies = (prepare, "verify data/mine")
    trains = (train, NEW)
    edit = partial(fields, edit_json, path)
    yield Case("as it is", nothing, verifies, ACCEPTED)
    yield Case("trained on", nothing, trains, ACCEPTED)
    for command in (verifies, trains):
        who = command[0].__name__.split(".")[-1] + ": "
        refused = {"vocab_size": ["x", -1, 0, 1.5, 10**9, None, 256, 300, math.nan, True, DELETE],
                   "bos": [1.5, "x", -1, 257, None, DELETE],
                   "tokenizer": [None, 3, "", "zzz", "chars:ab", ["bytes"], "maze", "gpt2", DELETE],
                   "row_length": ["x", -1, 1.5, 10**30, [1], DELETE], "predict_bos": [DELETE], "name": [DELETE],
                   "files": [[], None, {}, "x", [3], [None], DELETE],
                   "files/0/name": ["../secret.bin", "/etc/passwd", "sub/x.bin", "", ".", "x\0", 3, None, "no.bin",
                                    DELETE],
                   "files/0/tokens": [-1, "x", 1.5, 10**30, 1, None, DELETE],
                   "files/0/split": [3, None, DELETE]}
        yield from cases(command, REFUSED, edit(refused), "data/mine", who)
    yield from cases(verifies, REFUSED, edit({"files/0/sha256": [3, None, "x", DELETE]}), "data/mine")
    yield from cases(verifies, EITHER, edit({"name": [3], "predict_bos": [3], "fingerprint": ["x", 3], "zzz": [1],
                                             "row_length": [0, True], "files/0/split": ["zzz"]}))
    broken = no_object(path) | truncated(path, rng) | no_file(path)
    del broken["a link to nothing"]                        # as if it were not there: nanoGPT's, of GPT-2's ids
    yield from cases(verifies, REFUSED, broken, "data/mine")
    yield Case("a link", partial(link_away, path), verifies, ACCEPTED)
    for _ in range(6):
        yield Case("a bit", partial(flip, path, rng.random()), verifies, EITHER)


def shards_bin(rng):
    """.bin files, ours and foreign ones."""
    path = "data/mine/train.bin"
    verifies = (prepare, "verify data/mine")
    trains = (train, NEW)
    broken = truncated(path, rng) | no_file(path) | {"missing": partial(os.remove, path)}
    broken |= {"two bytes more": partial(append, path, bytes(2)), "one byte more": partial(append, path, b"x"),
               "an id too large, first": partial(overwrite, path, 0.0, b"\xff\xff"),
               "an id too large, last": partial(both, partial(truncate, path, -2), partial(append, path, b"\x01\x01"))}
    yield from cases(verifies, REFUSED, broken, "data/mine", "verify: ")
    yield from cases(trains, REFUSED, broken, "data/mine", "train: ")
    for _ in range(8):
        yield Case("a bit", partial(flip, path, rng.random()), verifies, REFUSED, "data/mine")
    yield Case("a bit, trained on", partial(flip, path, rng.random()), trains, EITHER)
    yield Case("a link", partial(link_away, path), verifies, ACCEPTED)

    # without a meta.json
    verifies = (prepare, "verify foreign")
    ids = np.arange(2000) * 25
    words = ids.astype("<u2").tobytes()

    def header(magic, version, tokens):
        return np.array([magic, version, tokens] + [0] * 253, "<i4").tobytes()
    good = {"nanoGPT's": words, "llm.c's": header(20240520, 1, 2000) + words}
    bad = {"odd": words + b"x", "empty header": header(20240520, 1, 2000),
           "version 2": header(20240520, 2, 2000) + words,
           "llama 3's": header(20240801, 1, 2000) + words, "hellaswag's": header(20240522, 1, 2000) + words,
           "of too many tokens": header(20240520, 1, 2001) + words, "of -1 tokens": header(20240520, 1, -1) + words,
           "of too few tokens": header(20240520, 1, 10) + words,
           "half a header": header(20240520, 1, 2000)[:700], "whole numbers of 4 bytes": ids.astype("<i4").tobytes(),
           "whole numbers of 8 bytes": ids.astype("<i8").tobytes(), "ids too large": b"\xff\xff" + words}
    for verdict, contents in ((ACCEPTED, good), (REFUSED, bad)):
        for name, content in contents.items():
            yield Case(f"foreign: {name}", partial(write, "foreign/train.bin", content), verifies, verdict,
                       "foreign" if verdict == REFUSED else "")
    yield Case("foreign: characters of nanoGPT", partial(
        both, partial(write, "foreign/train.bin", words), partial(write, "foreign/meta.pkl", b"\x80\x04}.")), verifies,
        REFUSED, "foreign")
    yield Case("foreign: empty", partial(write, "foreign/train.bin", b""), verifies, EITHER)


WHOLE = {}                                                 # the ids that PART makes when it is not interrupted


def check_part():
    """What is somebody's stays, and what is made is right."""
    places = ("data/part/notes.txt", "data/part.partial/notes.txt", "elsewhere/notes.txt")
    if not any(os.path.exists(place) for place in places):
        return "somebody's file was deleted"
    found = {name: Path("data/part", name).read_bytes() for name in ("train.bin", "val.bin")
             if os.path.exists(f"data/part/{name}")}
    wanted = {name: Path("data/mine", name).read_bytes() for name in ("train.bin", "val.bin")}
    if found and found != wanted:
        return f"wrong: {[len(ids) for ids in found.values()]} bytes, {[len(ids) for ids in wanted.values()]} are right"
    return None


def with_notes(change):
    """Somebody's file beside, before a change."""
    write("data/part.partial/notes.txt", "mine")
    change()


def moved_away():
    """OUT.partial a link to a folder with somebody's file."""
    os.rename("data/part.partial", "elsewhere")
    os.symlink("../elsewhere", "data/part.partial")


def progress_json(rng):
    """progress.json of an interrupted prepare, and what else is in OUT.partial: refused, or continued to the right
    end; what is somebody's stays.
    """
    path = "data/part.partial/progress.json"
    command = (prepare, PART)
    edit = partial(fields, edit_json, path)
    changes = {"as it is": nothing, "missing": partial(os.remove, path)}
    changes |= edit({"key": [None, {}, [1], "x", DELETE], "done": [-1, "x", None, 1.5, 10**9, 10**30, DELETE],
                     "files": [None, {}, "x", [], [3], DELETE],
                     "files/0/name": ["../x", "/etc/passwd", "notes.txt", "", 3, None, DELETE],
                     "files/0/tokens": [-1, "x", 1.5, 10**9, None, DELETE], "files/0/split": ["zzz", 3, None, DELETE]})
    changes |= no_object(path) | truncated(path, rng) | no_file(path)
    changes["train_000.bin truncated"] = partial(truncate, "data/part.partial/train_000.bin", 0.5)
    changes["train_000.bin longer"] = partial(append, "data/part.partial/train_000.bin", b"x" * 99)
    changes["train_000.bin missing"] = partial(os.remove, "data/part.partial/train_000.bin")
    changes |= {f"train_000.bin {name}": change for name, change in no_file("data/part.partial/train_000.bin").items()}
    changes["OUT.partial a link"] = moved_away
    for _ in range(3):
        changes[f"a bit at {rng.random():.3f}"] = partial(flip, path, rng.random() * 0.1)
    for name, change in changes.items():
        yield Case(name, partial(with_notes, change), command, EITHER, check=check_part)
    # alone: nothing of it is anybody else's
    yield Case("continued", nothing, command, ACCEPTED)
    for flags in ("--val_fraction=0.1", "--seed=1", "--tokenizer=chars"):
        yield Case(f"other settings {flags}", nothing, (prepare, f"{PART} {flags}"), REFUSED, "data/part.partial")
    yield Case("another input", partial(append, "x.jsonl", jsonl(["more"]).encode()), command, REFUSED,
               "data/part.partial")


def log_jsonl(rng):
    """log.jsonl never stops a resume."""
    path = "out/plain/log.jsonl"
    resumes = (train, RESUME)
    middle = {"nuls": b"\0" * 200, "half a line": b'{"step": 3, "lo', "a number": b"3\n", "a list": b"[1]\n",
              "a text": b'"x"\n', "null": b"null\n", "bytes": b"\xff\xfe\xfa\n", "deep": DEEP.encode() + b"\n",
              "deep objects": b'{"a":' * 100_000 + b"\n", "blank": b"\n\n", "a step of text": b'{"step": "x"}\n',
              "a step of null": b'{"step": null}\n', "an endless step": b'{"step": 1e999}\n',
              "a step of nan": b'{"step": NaN}\n', "a long line": b"x" * 1_000_000 + b"\n",
              "a surrogate": b'"\\ud800"\n',
              "a huge number": b'{"step": ' + b"9" * 5000 + b"}\n", "returns": b'{"step": 1}\r\n'}
    changes = {"as it is": nothing, "missing": partial(os.remove, path), "empty": partial(write, path, "")}
    for name, content in middle.items():
        changes[f"{name} at the end"] = partial(append, path, content)
        changes[f"{name} in the middle"] = partial(insert_line, path, content)
    changes |= truncated(path, rng)
    changes["a link"] = partial(link_away, path)
    for i in range(4):
        changes[f"a bit, {i}"] = partial(flip, path, rng.random())
    yield from cases(resumes, ACCEPTED, changes, check=partial(check_log, path))
    yield from cases(resumes, EITHER, no_file(path))


def insert_line(path, content):
    first, *rest = Path(path).read_bytes().splitlines(keepends=True)
    Path(path).write_bytes(first + content + b"".join(rest))


def check_log(path):
    """The resumed run's last step is in the log."""
    *_, last = Path(path).read_bytes().splitlines()
    if json.loads(last).get("step") != 8:
        return f"the log ends with {last}"
    return None


def kept_samples(rng):
    """Samples that --samples=FILE.jsonl reads in place of drawing."""
    path = "kept.jsonl"
    reads = (evaluate, KEPT)
    yield Case("as it is", nothing, reads, ACCEPTED)
    edit = partial(fields, partial(edit_line_of, 1), path)
    refused = {"tokens": [None, "x", [], [1] * 22, [1] * 24, [257] * 23, [300] * 23, [-1] * 23, [1.5] * 23,
                          ["1"] * 23, [None] * 23, [[1]] * 23, [10**30] * 23, [True] * 23, 3, DELETE],
               "nfe": [None, "x", -1, math.nan, math.inf, [1], DELETE], "seconds": ["x", None, [1], math.nan, DELETE]}
    yield from cases(reads, REFUSED, edit(refused), path)
    yield from cases(reads, EITHER, edit({"text": [None, 3, DELETE], "seconds": [-1], "zzz": [1]}))
    edit = partial(fields, partial(edit_line_of, 0), path)
    refused = {"settings": [None, 3, "x", [], DELETE], "settings/n": [3], "settings/seed": [1], "settings/steps": [4],
               "settings/length": [20], "settings/model": ["other"], "settings/step": [7],
               "settings/decode": ["greedy"], "settings/start": ["x"]}
    yield from cases(reads, REFUSED, edit(refused), path)
    yield from cases(reads, EITHER, edit({"settings/path": ["x"], "settings/zzz": [1], "settings/seed": [DELETE]}))
    content = {"no header": lines_of(1, 2), "a line missing": lines_of(0, 1), "a line twice": lines_of(0, 1, 2, 2),
               "header only": lines_of(0), "header twice": lines_of(0, 0, 1)}
    for name, numbers in content.items():
        yield Case(name, partial(keep_lines, path, numbers), reads, REFUSED, path)
    yield Case("in another order", partial(keep_lines, path, [0, 2, 1]), reads, EITHER)
    for name, line in {"a list": "[]", "a number": "3", "null": "null", "deep": DEEP, "no JSON": "{"}.items():
        yield Case(f"a sample {name}", partial(both, partial(keep_lines, path, [0, 1]), partial(
            append, path, line.encode() + b"\n")), reads, REFUSED, path)
    cut_off = truncated(path, rng)
    yield Case("without the newline at the end", cut_off.pop("one byte missing"), reads, EITHER)
    yield from cases(reads, REFUSED, cut_off | no_object(path) | no_file(path), path)
    for _ in range(4):
        yield Case("a bit", partial(flip, path, rng.random()), reads, EITHER)


def edit_line_of(number, path, place, value):
    edit_line(path, number, place, value)


def lines_of(*numbers):
    return numbers


def keep_lines(path, numbers):
    lines = Path(path).read_text().splitlines()
    Path(path).write_text("".join(lines[i] + "\n" for i in numbers))


def in_cache(function, name, *args):
    """Change a file of the teacher's cache."""
    (folder,) = Path("data/mine").glob("teacher-*")
    function(str(folder / name), *args)


def save_array(path, array):
    np.save(path, array, allow_pickle=True)


def teacher_cache(rng):
    """The four files of a teacher's cache."""
    command = (train, CACHED)

    def changed(function, name, *args):
        return partial(in_cache, function, name, *args)
    yield Case("as it is", nothing, command, ACCEPTED)
    good = np.full(257, 1 / 257, np.float32)
    arrays = {"of no numbers": good[:0], "too short": good[:-1], "too long": np.append(good, good),
              "nan": good * np.nan,
              "inf": good * np.inf, "negative": -good, "of rank 2": good[None], "objects": np.array([print, 1]),
              "texts": np.array(["x"] * 257), "complex": good.astype(np.complex64)}
    for name, array in arrays.items():
        yield Case(f"frequency.npy {name}", changed(save_array, "frequency.npy", array), command, REFUSED, "teacher-")
    yield Case("frequency.npy float64", changed(save_array, "frequency.npy", good.astype(float)), command, EITHER)
    for file in ("frequency.npy", "topk.bin", "done.bin"):
        broken = {"empty": 0.0, "one byte missing": -1, "half": 0.5}
        for name, share in broken.items():
            yield Case(f"{file} {name}", changed(truncate, file, share), command, REFUSED, "teacher-")
        for kind in ("a folder", "a loop of links", "a link to nothing"):
            yield Case(f"{file} {kind}", changed(become, file, kind), command, REFUSED, "teacher-")
        yield Case(f"{file} missing", changed(os.remove, file), command, REFUSED, "teacher-")
        yield Case(f"{file} of text", changed(write, file, "x"), command, REFUSED, "teacher-")
    yield Case("topk.bin longer", changed(append, "topk.bin", bytes(18)), command, REFUSED, "teacher-")
    yield Case("done.bin longer", changed(append, "done.bin", b"\1"), command, REFUSED, "teacher-")
    yield Case("topk.bin of ids >= V", changed(overwrite, "topk.bin", 0.0, b"\xff\xff" * 4000), command, REFUSED,
               "teacher-")
    yield Case("topk.bin of zeros", changed(overwrite, "topk.bin", 0.0, bytes(8000)), command, EITHER)
    yield Case("nothing done yet", changed(overwrite, "done.bin", 0.0, bytes(3)), command, ACCEPTED)
    yield Case("done.bin of other bytes", changed(overwrite, "done.bin", 0.0, b"\7"), command, EITHER)
    for _ in range(4):
        yield Case("a bit of topk.bin", changed(flip, "topk.bin", rng.random()), command, EITHER)
    for place, values in {"teacher": [None, "x", 3], "dtype": ["x"], "length": [25, "x"], "k": [5, "x"], "rows": [3],
                          "shards": [None, [], ["x", "y"]]}.items():
        for value in values:
            yield Case(f"meta.json {place} {value!r}", changed(edit_json, "meta.json", place, value), command, REFUSED,
                       "teacher-")
    for name, text in dict(list="[]", number="3", deep=DEEP, no_json="{", empty="", nuls="\0\0", bytes=b"\xff").items():
        yield Case(f"meta.json {name}", changed(write, "meta.json", text), command, REFUSED, "teacher-")
    for kind in ("a folder", "a loop of links", "a link to nothing"):
        yield Case(f"meta.json {kind}", changed(become, "meta.json", kind), command, EITHER)
    yield Case("meta.json missing", changed(os.remove, "meta.json"), command, EITHER)


def archive(**members):
    """The bytes of a tar of these members: {name: bytes, or the type of a member without content, in a list}."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as f:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
                f.addfile(info, io.BytesIO(content))
            else:
                (info.type,) = content
                info.linkname = "/etc/passwd"
                f.addfile(info)
    return out.getvalue()


def zipped(**members):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as f:
        for name, content in members.items():
            f.writestr(name, content)
    return out.getvalue()


def cut(content, share):
    return content[:int(share * len(content))]


def spoiled(content, share):
    """With a byte changed."""
    place = int(share * len(content))
    return content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1:]


def parquet_tables():
    """Parquet files, where pyarrow is there to write them: {name: (verdict, bytes)}."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return {}

    def table(**columns):
        out = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table(columns), out)
        return out.getvalue()
    good = table(text=TEXTS)
    return {"a.parquet": (ACCEPTED, good), "other.parquet": (REFUSED, table(other=TEXTS)),
            "null.parquet": (REFUSED, table(text=["x", None, "y"])), "numbers.parquet": (REFUSED, table(text=[1, 2])),
            "lists.parquet": (REFUSED, table(text=[["x"], ["y"]])), "bytes.parquet": (EITHER, table(text=[b"x", b"y"])),
            "none.parquet": (REFUSED, table(text=[""][:0])), "cut.parquet": (REFUSED, cut(good, 0.6)),
            "empty.parquet": (REFUSED, b""), "no.parquet": (REFUSED, b"no parquet")}


def texts(rng):
    """Every kind of text: txt, jsonl, csv, parquet, tar, gz, xz, and what is none of them."""
    txt = "<|endoftext|>".join(TEXTS).encode()
    lines = jsonl(TEXTS).encode()
    csv = "label,text\n".encode() + b"".join(b'1,"%s"\n' % text.encode() for text in TEXTS)
    tar = archive(**{"a.txt": b"one", "b.txt": b"two"})
    gz = gzip.compress(lines)
    xz = lzma.compress(lines)
    two = b'{"text": "one"}\n{"text": "two"}\n'
    both_tokenizers = {                                    # with bytes and with characters
        "a.txt": (ACCEPTED, txt), "a.jsonl": (ACCEPTED, lines), "a.csv": (ACCEPTED, csv), "a.tar": (ACCEPTED, tar),
        "a.jsonl.gz": (ACCEPTED, gz), "a.jsonl.xz": (ACCEPTED, xz), "a.tar.gz": (ACCEPTED, gzip.compress(tar)),
        "a.tgz": (ACCEPTED, gzip.compress(tar)),
        "surrogate.jsonl": (ACCEPTED, two + b'{"text": "hello \\ud83d there"}\n'),
        "blank.jsonl": (ACCEPTED, b"\n" + two + b"\n\n"), "nuls.jsonl": (ACCEPTED, two + b'{"text": "a\\u0000b"}\n'),
        "long.csv": (ACCEPTED, b"label,text\n1,%s\n2,b\n3,c\n" % (b"w " * 80_000)),
        "empty.txt": (REFUSED, b""), "empty.jsonl": (REFUSED, b""), "one.txt": (REFUSED, b"one document"),
        "null.jsonl": (REFUSED, two + b'{"text": null}\n'), "number.jsonl": (REFUSED, two + b'{"text": 3}\n'),
        "list.jsonl": (REFUSED, two + b'{"text": ["x"]}\n'), "nan.jsonl": (REFUSED, two + b'{"text": NaN}\n'),
        "missing.jsonl": (REFUSED, two + b'{"txt": "x"}\n'), "lists.jsonl": (REFUSED, two + b"[1]\n"),
        "words.jsonl": (REFUSED, two + b'"x"\n'), "nulls.jsonl": (REFUSED, two + b"null\n"),
        "cut.jsonl": (REFUSED, two + b'{"text": "o'), "deep.jsonl": (REFUSED, two + DEEP.encode() + b"\n"),
        "deep2.jsonl": (REFUSED, two + b'{"text":' * 50_000 + b"\n"),
        "bytes.jsonl": (REFUSED, two + b'{"text": "\xff"}\n'),
        "utf16.txt": (REFUSED, txt.decode().encode("utf-16")),
        "utf16.jsonl": (REFUSED, lines.decode().encode("utf-16")),
        "none.csv": (REFUSED, b"label,words\n1,one\n2,two\n"), "rows.csv": (REFUSED, b"1,one\n2,two\n3,three\n"),
        "short.csv": (REFUSED, b"label,text\n1,one\n2\n3,three\n"), "empty.csv": (REFUSED, b""),
        "header.csv": (REFUSED, b"label,text\n"), "quote.csv": (EITHER, b'label,text\n1,"one\n2,two\n3,three\n'),
        "nul.csv": (EITHER, b"label,text\n1,a\0b\n2,two\n3,c\n"), "a.tsv": (EITHER, b"label\ttext\n1\tone\n2\ttwo\n"),
        "cut.tar": (REFUSED, cut(tar, 0.2)), "empty.tar": (REFUSED, b""), "no.tar": (REFUSED, b"no tar" * 200),
        "links.tar": (REFUSED, archive(a=[tarfile.SYMTYPE], b=[tarfile.FIFOTYPE], c=[tarfile.CHRTYPE])),
        "hard.tar": (EITHER, archive(a=b"one", b=[tarfile.LNKTYPE])),
        "up.tar": (EITHER, archive(**{"../../up.txt": b"one", "/tmp/abs.txt": b"two"})),
        "bad.tar": (REFUSED, archive(**{"a.jsonl": two, "b.jsonl": b"{"})),
        "cut.jsonl.gz": (REFUSED, cut(gz, rng.uniform(0.1, 0.9))), "crc.jsonl.gz": (REFUSED, spoiled(gz, 0.999)),
        "no.txt.gz": (REFUSED, b"no gzip"), "empty.txt.gz": (REFUSED, b""),
        "cut.jsonl.xz": (REFUSED, cut(xz, rng.uniform(0.1, 0.9))), "bad.jsonl.xz": (REFUSED, spoiled(xz, 0.5)),
        "no.txt.xz": (REFUSED, b"no xz"), "twice.jsonl.gz.gz": (ACCEPTED, gzip.compress(gz)),
        "a.zip": (REFUSED, zipped(**{"a.txt": txt})), "a.txt.zst": (REFUSED, b"\x28\xb5\x2f\xfd" + bytes(range(200))),
        "a.7z": (EITHER, b"7z\xbc\xaf\x27\x1c" + bytes(range(200))), "zip.txt": (EITHER, zipped(**{"a.txt": txt})),
        "mark.jsonl": (EITHER, b"\xef\xbb\xbf" + two)}
    both_tokenizers |= parquet_tables()
    for tokenizer in ("bytes", "chars"):
        for name, (verdict, content) in both_tokenizers.items():
            command = (prepare, f"text --files in/{name} --tokenizer={tokenizer} --out=data/new")
            yield Case(f"{name} {tokenizer}", partial(write, f"in/{name}", content), command, verdict)
    for share in [rng.random() for _ in range(6)]:
        yield Case("a byte of gz", partial(write, "in/b.jsonl.gz", spoiled(gz, share)),
                   (prepare, "text --files in/b.jsonl.gz --tokenizer=bytes --out=data/new"), EITHER)
    not_utf8 = b"one\xff<|endoftext|>two"
    for tokenizer, verdict in (("bytes", ACCEPTED), ("chars", REFUSED)):
        yield Case(f"not UTF-8 {tokenizer}", partial(write, "in/b.txt", not_utf8),
                   (prepare, f"text --files in/b.txt --tokenizer={tokenizer} --out=data/new"), verdict)
    command = (prepare, "text --files in/a.jsonl --tokenizer=bytes --out=data/new")
    yield from cases(command, REFUSED, {f"the file {kind}": partial(both, partial(write, "in/a.jsonl", lines), change)
                                        for kind, change in no_file("in/a.jsonl").items()})
    yield Case("no such file", nothing, command, REFUSED, "in/a.jsonl")
    for field, verdict in (("text", ACCEPTED), ("zzz", REFUSED)):
        for name, content in {"a.jsonl": lines, "a.csv": csv}.items():
            flags = f"text --files in/{name} --tokenizer=bytes --field={field} --out=data/new"
            yield Case(f"{name} --field={field}", partial(write, f"in/{name}", content), (prepare, flags), verdict)


# ---------------------------------------------------------------------------------------------------------------------
# the doors: a judge, and the environment

class Reply(http.server.BaseHTTPRequestHandler):
    """A server whose answer is `content`: the whole of it in bytes, or a function that writes it."""
    content = b""

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        try:
            if callable(Reply.content):
                Reply.content(self.wfile)
            else:
                self.wfile.write(Reply.content)
        except OSError:                                    # nobody listens any more
            pass

    def log_message(self, *args):
        pass


def http_answer(body, status="200 OK", headers=""):
    if isinstance(body, str):
        body = body.encode("utf-8", "surrogatepass")
    return f"HTTP/1.0 {status}\r\n{headers}\r\n".encode() + body


def chat(content):
    """An answer as a chat completion has it; `content` is what the judge says."""
    return http_answer(json.dumps({"choices": [{"message": {"content": content}}]}))


def drip(out):
    """An answer that never ends, a byte at a time."""
    out.write(b"HTTP/1.0 200 OK\r\n\r\n")
    for _ in range(220):
        out.write(b" ")
        out.flush()
        time.sleep(0.1)


def answers(content):
    """A change: what the server answers."""
    return partial(setattr, Reply, "content", content)


GOOD = json.dumps(RATINGS | {"justification": f"fine {KEY}"})


def judges_answers(rng):
    """What a judge's server says, and the file of earlier answers."""
    command = (judge, JUDGED)
    yield Case("as it is", answers(chat(GOOD)), command, ACCEPTED, check=key_is_kept)
    replies = {"no JSON": http_answer("{no json"), "empty": http_answer(""), "deep": http_answer(DEEP),
               "deep objects": http_answer('{"a":' * 100_000), "list": http_answer("[]"), "number": http_answer("3"),
               "null": http_answer("null"), "text": http_answer('"x"'), "bytes": http_answer(b"\xff\xfe\0\0"),
               "not there": b"", "no HTTP": b"hello\r\n\r\n", "half a header": b"HTTP/1.0 200", "nuls": b"\0" * 100,
               "too short": http_answer("{}", headers="Content-Length: 1000\r\n"),
               "a bad length": http_answer("{}", headers="Content-Length: x\r\n"),
               "a bad chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
               "a long header": http_answer("{}", headers="X: " + "x" * 100_000 + "\r\n"),
               "many headers": http_answer("{}", headers="X: x\r\n" * 1000),
               "gzip": http_answer(gzip.compress(b"{}"), headers="Content-Encoding: gzip\r\n"),
               "a charset": http_answer("{}", headers="Content-Type: application/json; charset=zzz\r\n"),
               "500": http_answer(KEY, "500 " + KEY), "401": http_answer(KEY, "401 " + KEY),
               "204": http_answer("", "204 No Content"), "999": http_answer("", "999 x"), "-1": http_answer("", "-1 x"),
               "a redirect": http_answer("", "302 Found", f"Location: http://127.0.0.1:9/{KEY}\r\n"),
               "a redirect to a file": http_answer("", "302 Found", "Location: file:///etc/passwd\r\n"),
               "a redirect in a circle": http_answer("", "307 x", "Location: /v1/chat/completions\r\n"),
               "without choices": http_answer("{}"), "no choices": http_answer('{"choices": []}'),
               "choices of null": http_answer('{"choices": null}'),
               "an object of choices": http_answer('{"choices": {}}'),
               "a message of null": http_answer('{"choices": [{"message": null}]}'), "drip": drip,
               "huge": http_answer(b" " * 50_000_000 + b"{}")}
    replies |= {f"content {value!r:.20}": chat(value) for value in (None, 3, [], {}, "", "no object", "{", "{}", "[1]")}
    replies["content of braces"] = chat("{" * 200_000)
    replies["content of deep objects"] = chat('{"a":' * 100_000)
    replies["content of deep lists"] = chat('{"clarity": ' + DEEP)
    for value in (0, 11, -1, 1e9, "x", None, True, [1], {}, math.nan, math.inf, "5", 10**400):
        replies[f"clarity {value!r:.20}"] = chat(json.dumps(RATINGS | {"clarity": value}))
    replies["a criterion missing"] = chat(json.dumps({name: 5 for name in list(RATINGS)[1:]}))
    for name, content in replies.items():
        yield Case(name, answers(content), command, UNANSWERED, check=key_is_kept)
    for value in (3, None, [1], {"a": 1}, "\ud800", "x" * 1_000_000):
        content = chat(json.dumps(RATINGS | {"justification": value}))
        yield Case(f"justification {value!r:.20}", answers(content), command, ANY)

    # earlier answers, as the first case writes them
    key = judge.question_key("m", "once upon a time")
    line = json.dumps(dict(key=key, model="m", text="once upon a time") | RATINGS | {"justification": "fine"}) + "\n"
    path = "judged.jsonl"

    def answered(content):
        return partial(both, answers(chat(GOOD)), partial(write, path, content))
    good = {"answered": line, "empty": "", "cut off": line[:-9], "cut off in the first bytes": line[:5],
            "an answer and half of one": line + line[:30]}
    for name, content in good.items():
        yield Case(f"answers: {name}", answered(content), command, ACCEPTED)
    bad = {"a list": "[]\n", "somebody's": '{"text": "x"}\n', "deep": DEEP + "\n", "no JSON": "{\n", "null": "null\n",
           "nuls": "\0\0\n", "bytes": b"\xff\n", "text": "my notes\n", "without a key": line.replace('"key"', '"kex"'),
           "half and half": line + "3\n"}
    for name, content in bad.items():
        yield Case(f"answers: {name}", answered(content), command, REFUSED, path)
    for value in ("x", None, [1], 99, math.nan):
        wrong = json.dumps(json.loads(line) | {"clarity": value}) + "\n"
        yield Case(f"answers: clarity {value!r}", answered(wrong), command, EITHER)
    yield Case("answers: no file", partial(both, answers(chat(GOOD)), partial(os.remove, path)), command, ACCEPTED)
    for kind, change in no_file(path).items():
        yield Case(f"answers: {kind}", partial(both, answered(line), change), command,
                   EITHER if kind == "a link to nothing" else REFUSED)
    # the samples
    ask = partial(both, answers(chat(GOOD)))
    for name, content in dict(list="[]\n", text="x\n", number='{"text": 3}\n', null='{"text": null}\n', none="{}\n",
                              deep=DEEP + "\n", bytes=b"\xff\n", empty="").items():
        yield Case(f"samples: {name}", partial(ask, partial(write, "texts.jsonl", content)), command, REFUSED,
                   "texts.jsonl")
    yield Case("samples: a surrogate", partial(ask, partial(write, "texts.jsonl", '{"text": "a\\ud800"}\n')), command,
               ANY)
    for kind, change in no_file("texts.jsonl").items():
        yield Case(f"samples: {kind}", partial(ask, change), command, REFUSED, "texts.jsonl")
    for flag in ("--timeout=inf", "--timeout=nan", "--timeout=1e30", "--timeout=0", "--timeout=-1", "--timeout=",
                 "--parallel=0", "--parallel=x", "--parallel=-1", "--n=0", "--n=inf", "--model=", "--out=", "--json=",
                 "--out=/proc/x", "--json=/proc/x", "--out=.", "--json=."):
        name = flag.partition("=")[0]
        yield Case(flag, answers(chat(GOOD)), (judge, f"{JUDGED} {flag}"), REFUSED, name)


def key_is_kept():
    """The key stands in no file."""
    if any(KEY.encode() in content for content in files_in(".").values() if isinstance(content, bytes)):
        return "the key was written"
    return None


def environment(rng):
    """What the environment says."""
    trains = (train, NEW)
    wrong = (sample, "--ckpt=nowhere")                     # refused, whatever the environment
    for env in (dict(WORLD_SIZE="1"), dict(RANK="0"), dict(LOCAL_RANK="0"),
                dict(WORLD_SIZE="1", RANK="0", LOCAL_RANK="0"), dict(MASTER_PORT="abc"), dict(COLUMNS="abc"),
                dict(TMPDIR="/nowhere"), dict(HOME="/nowhere")):
        yield Case(f"{env}", nothing, trains, ACCEPTED, env=env)
    for env in (dict(WORLD_SIZE="abc"), dict(WORLD_SIZE="0"), dict(WORLD_SIZE="-1"), dict(WORLD_SIZE="1.5"),
                dict(WORLD_SIZE="2"), dict(WORLD_SIZE="1e3"), dict(WORLD_SIZE=str(10**30)), dict(RANK="abc"),
                dict(RANK="-1"), dict(RANK="1"), dict(WORLD_SIZE="2", RANK="0"), dict(WORLD_SIZE="2", RANK="5"),
                dict(WORLD_SIZE="2", RANK="x"),
                dict(WORLD_SIZE="2", RANK="0", MASTER_ADDR="127.0.0.1"),
                dict(WORLD_SIZE="2", RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="abc"),
                dict(WORLD_SIZE="2", RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="-1")):
        name = list(env)[-1]
        if name == "MASTER_ADDR" or env.get("WORLD_SIZE") == "2" and name in ("WORLD_SIZE", "RANK"):
            name = ""                                      # any of several is missing or wrong
        yield Case(f"{env}", nothing, trains, REFUSED, name, env=env)
    for env in (dict(WORLD_SIZE=""), dict(RANK=""), dict(LOCAL_RANK="abc"), dict(LOCAL_RANK="-1")):
        yield Case(f"{env}", nothing, trains, EITHER, env=env)
    for env in (dict(LOCAL_RANK="abc"), dict(LOCAL_RANK=""), dict(WORLD_SIZE="abc"), dict(RANK="x")):
        yield Case(f"a wrong flag, {env}", nothing, wrong, REFUSED, env=env)
    for cache in ("x.jsonl", "/proc", "x.jsonl/y"):
        yield Case(f"GUMBEL_CACHE={cache}", nothing, (sample, f"--ckpt=gpt2-medium {DRAW}"), REFUSED, "gpt2-medium",
                   env=dict(GUMBEL_CACHE=cache))
    asks = (judge, JUDGED)
    for url in ("", "x", "ftp://127.0.0.1", "http://", "https://", "http://[", "http://[::1", "http:///v1",
                "file:///etc"):
        yield Case(f"OPENAI_BASE_URL={url}", nothing, asks, REFUSED, "OPENAI_BASE_URL", env=dict(OPENAI_BASE_URL=url))
    for url in ("http://127.0.0.1:9", "http://127.0.0.1:99999", "http://127.0.0.1:x", "http://127.0.0.1:-1",
                "http://127.0.0.1:9/a b", "http://\u00fc.invalid.", "http://127.0.0.1:9/\n",
                "http://" + "a" * 100 + "."):
        yield Case(f"OPENAI_BASE_URL={url!r:.40}", nothing, asks, UNANSWERED, env=dict(OPENAI_BASE_URL=url))
    for api_key in ("a\nb", "\u00fc", "a\tb", "\x7f"):
        yield Case(f"OPENAI_API_KEY={api_key!r}", nothing, asks, REFUSED, "OPENAI_API_KEY",
                   env=dict(OPENAI_API_KEY=api_key))


# ---------------------------------------------------------------------------------------------------------------------
# the doors: flags

NO_NUMBERS = ("inf", "-inf", "nan", "-1", "", "x", "1e999", "0x10", "1,2", "None")


def numbers(command, flags, names, verdict=REFUSED):
    """Each of these flags with each of NO_NUMBERS."""
    for flag in names:
        for value in NO_NUMBERS:
            yield Case(f"--{flag}={value}", nothing, (command, f"{flags} --{flag}={value}"), verdict, f"--{flag}")


def flagged(command, verdict, lines, flags=""):
    """Cases of one command, a line of flags each; a refusal must name the line's first flag, or a value as long as a
    path.
    """
    for line in lines:
        name, _, value = line.partition(" ")[0].partition("=")
        names = name if name.startswith("--") else ""
        if len(value) > 2 and names:
            names += "|" + value
        yield Case(f"{flags[:20]} {line}", nothing, (command, f"{flags} {line}"), verdict, names)


def flags_of_train(rng):
    yield Case("as it is", nothing, (train, NEW), ACCEPTED)
    numeric = []
    for group in train.FLAGS.values():
        for name, _, takes, _ in group:
            if isinstance(takes, functools.partial) and takes.func is parse_number:
                numeric.append(name)
    assert len(numeric) >= 15
    yield from numbers(train, NEW, numeric)
    large = [f"--n_layer={10**9}", "--n_layer=1001", f"--n_embd={10**8}", "--n_embd=65540", f"--n_embd={10**30}",
             f"--batch_size={10**12}", f"--batch_size={2**20 + 1}", f"--batch_size={10**30}", f"--length={10**9}",
             f"--length={10**30}", f"--seed={2**63}", f"--seed={10**30}", f"--n_head={10**9}",
             f"--block_size={10**9} --model=bd3lm", f"--micro_batch_size={10**9}", "--steps=1e3", "--dropout=1.1",
             "--ema=1", "--t_one=1.1", "--lr=0", "--clip_norm=0"]
    yield from flagged(train, REFUSED, large, NEW)
    yield from flagged(train, EITHER, [f"--{name}={10**30}" for name in ("log_every", "eval_every", "save_every",
                                                                       "eval_rows", "warmup")], NEW)
    yield from flagged(train, ANY, ["--lr=1e30", "--clip_norm=1e-300", "--lr=1e-300"], NEW)
    wrong = ["--out=", "--init_from=", "--model=", "--data=", "--size=", "--noise=", "--kd=", "--dtype=", "--schedule=",
             "--teacher= --gumbel", "--clip= --model=bd3lm", "--clip=nan,1 --model=bd3lm", "--clip=0,inf --model=bd3lm",
             "--clip=0.5 --model=bd3lm", "--clip=1,0 --model=bd3lm", "--clip=-1,1 --model=bd3lm",
             "--clip=x,y --model=bd3lm", "--teacher=nowhere --gumbel", "--init_from=nowhere", "--data=nowhere",
             "--data=./x.jsonl", "--out=/proc/x", "--out=x.jsonl", "--out=x.jsonl/y", "--model=gpt", "--zzz=1",
             "--gumbel=1", "--step=3"]
    yield from flagged(train, REFUSED, wrong, NEW)
    unread = ["--teacher=out/ar", "--teacher_cache=4", "--heads=2", "--clip=0.1,0.9", "--clip_search", "--block_size=4",
              "--inject=add", "--kd=token --gumbel --teacher=out/ar", "--noise=gumbel --model=ar",
              "--t_one=0.5 --model=ar", "--n_embd=32 --model=medusa --teacher=out/ar"]
    yield from flagged(train, REFUSED, unread, NEW)
    # where a refused run leaves nothing, a run that goes leaves what it should
    yield Case("a resume with other flags", nothing, (train, f"{RESUME} --seed=1"), REFUSED, "--seed")
    yield Case("a resume with other data", partial(flip_in_meta, "data/mine/meta.json"), (train, RESUME), REFUSED)


def flip_in_meta(path):
    """The same sizes, other content."""
    flip("data/mine/train.bin", 0.5)
    edit_json(path, "files/0/sha256", "0" * 64)
    edit_json(path, "files/1/sha256", "0" * 64)


def flags_of_sample(rng):
    yield Case("as it is", nothing, (sample, PLAIN), ACCEPTED)
    yield from numbers(sample, PLAIN, ["n", "batch_size", "steps", "length", "max_lookahead", "seed", "tau", "top_p",
                                       "remask", "apd_ratio", "epsilon", "delta"])
    large = [f"--steps={10**30}", f"--length={10**9}", f"--length={10**30}", f"--batch_size={10**12}",
             f"--batch_size={10**30}", f"--seed={10**30}", "--top_p=1.5", "--tau=0", "--remask=2 --sampler=remdm",
             "--apd_ratio=2", "--n=0", "--steps=0", "--length=1"]
    yield from flagged(sample, REFUSED, large, PLAIN)
    yield from flagged(sample, REFUSED, [f"--length={10**9}", f"--steps={10**30}"], f"--ckpt=out/blocks {DRAW}")
    empty = ["--out=", "--shards=", "--infill=", "--weights=", "--dtype=", "--sampler=", "--order=", "--accept=",
             "--verifier= --sampler=apd"]
    yield from flagged(sample, REFUSED, empty, PLAIN)
    for path in ("", "nowhere", "x.jsonl", "data/mine", ".", "/", "hf:", "gpt3", "/dev/null", "/proc/self/mem",
                 "a" * 300):
        yield Case(f"--ckpt={path:.30}", nothing, (sample, f"--ckpt={path} {DRAW}"), REFUSED, path[:30] or "--ckpt")
    # a text that has nothing to fill in
    yield from flagged(sample, REFUSED, ["--infill=hello", "--infill=" + "x" * 30 + "[MASK]",
                                         "--prompt=a --infill=[MASK]", "--prompt=" + "x" * 30, "--out=/proc/x",
                                         "--out=.", "--out=nowhere/x", "--out=x.jsonl", "--shards=data/mine"], PLAIN)
    yield from flagged(sample, ACCEPTED, ["--infill=a[MASK]b", "--prompt=", "--prompt=[MASK]", "--prompt=\ud800"[:9],
                                          "--out=new.jsonl", "--top_p=0.5"], PLAIN)
    # what no model reads
    unread = {"--ckpt=out/plain --n=1": ["--tau=0.3", "--accept=exact", "--epsilon=0.5", "--delta=0.5",
                                         "--resample_noise", "--top_p=0.5 --greedy", "--apd_ratio=0.3",
                                         "--max_lookahead=3", "--verifier=out/ar", "--order=left_to_right",
                                         "--draft=once", "--remask=0.1", "--stop_at_eos", "--no_cache",
                                         "--steps=3 --sampler=first_hitting",
                                         "--steps=3 --sampler=apd --verifier=out/ar"],
              "--ckpt=out/gumbel --n=1": ["--accept=exact", "--epsilon=0.5", "--steps=3 --sampler=first_hitting"],
              "--ckpt=out/ar --n=1": ["--steps=3", "--sampler=fixed", "--order=left_to_right --sampler=fixed",
                                      "--resample_noise", "--apd_ratio=0.3", "--accept=exact", "--top_p=0.5 --greedy",
                                      "--sampler=apd --verifier=out/ar", "--infill=a[MASK]", "--no_cache",
                                      "--stop_at_eos", "--max_lookahead=3"],
              "--ckpt=out/heads --n=1": ["--steps=3", "--epsilon=0.5 --accept=exact", "--sampler=fixed"],
              "--ckpt=out/ar --n=2 --shards=data/new": [
                  "--steps=3", "--sampler=fixed", "--sampler=apd --verifier=out/ar", "--accept=exact", "--tau=0.5",
                  "--top_p=0.5", "--greedy", "--prompt=x", "--out=new.jsonl", "--n=1",
                  "--order=left_to_right --sampler=fixed"],
              "--ckpt=out/plain --n=2 --shards=data/new": ["--batch_size=2"]}
    for flags, lines in unread.items():
        for line in lines:
            yield Case(f"{flags} {line}", nothing, (sample, f"{flags} {line}"), REFUSED)
    read = {"--ckpt=out/gumbel --n=1": ["--tau=0.3 --steps=3", "--resample_noise --steps=3", "--greedy --steps=2"],
            "--ckpt=out/ar --n=1": ["--tau=0.3", "--top_p=0.5", "--greedy"],
            "--ckpt=out/plain --n=1": ["--sampler=first_hitting", "--sampler=fixed --order=left_to_right --steps=3",
                                       "--sampler=apd --verifier=out/ar --apd_ratio=0.3"],
            "--ckpt=out/heads --n=1": ["--accept=exact", "--epsilon=0.5", "--no_cache"],
            "--ckpt=out/blocks --n=1": ["--stop_at_eos --steps=1", "--no_cache --steps=1", "--length=32 --steps=1"]}
    for flags, lines in read.items():
        yield from flagged(sample, ACCEPTED, lines, flags)
    # a checkpoint without a tokenizer: a prompt is made of ids
    for prompt, verdict in {"20": ACCEPTED, "21": REFUSED, "22": REFUSED, "-1": REFUSED, "x": REFUSED, "1.5": REFUSED,
                            str(10**30): REFUSED, "65536": REFUSED, "65537": REFUSED}.items():
        for model in ("gpt2", "mdlm"):
            if (model, prompt) != ("mdlm", "21"):          # [MASK], where there is one, may be given
                yield Case(f"{model} --prompt={prompt}", nothing, (sample, f"--ckpt={model} --n=1 --prompt={prompt}"),
                           verdict, "--prompt" if verdict == REFUSED else "")


def flags_of_evaluate(rng):
    genppl = "genppl --judge=out/ar --ckpt out/plain --n=2"
    yield Case("as it is", nothing, (evaluate, f"{genppl} --nfe=1"), ACCEPTED)
    yield from numbers(evaluate, genppl, ["n", "batch_size", "length", "seed", "tau", "top_p", "remask", "apd_ratio",
                                          "max_lookahead", "epsilon", "delta"])
    yield from numbers(evaluate, "ppl --ckpt out/plain", ["n", "batch_size", "length", "seed"])
    for value in ("0", "-1", "", "x", "inf", "nan", "1,x", "1,,2", "0,1", ",", "1.5", str(10**30)):
        yield Case(f"--nfe={value}", nothing, (evaluate, f"{genppl} --nfe={value}"), REFUSED, "--nfe")
    wrong = [f"--n={10**30}", f"--batch_size={10**12}", f"--length={10**9}", f"--length={10**30}", "--decode=",
             "--decode=x", "--decode=sample,x", "--accept=", "--sampler=", "--judge=", "--judge=nowhere",
             "--judge=out/plain", "--json=", "--json=.", "--json=/proc/x", "--json=nowhere/x", "--samples=",
             "--samples=no.jsonl", "--samples=/proc/x", "--data=", "--data=nowhere", "--weights=", "--zzz=1"]
    yield from flagged(evaluate, REFUSED, wrong, f"{genppl} --nfe=1")
    yield from flagged(evaluate, REFUSED, ["--plot=", "--plot=x.txt", "--plot=/proc/x.png", "--metric=", "--metric=x"],
                       "nfe --judge=out/ar --ckpt out/plain --n=2 --nfe=1")
    for path in ("", "nowhere", "x.jsonl", "data/mine"):
        yield Case(f"--ckpt {path}", nothing, (evaluate, f"ppl --n=2 --ckpt={path}"), REFUSED, path or "--ckpt")
    unread = {"genppl --judge=out/ar --ckpt out/plain --n=2 --nfe=1": [
                  "--tau=0.3", "--accept=exact", "--epsilon=0.5", "--delta=0.5", "--apd_ratio=0.3", "--max_lookahead=3",
                  "--verifier=out/ar", "--remask=0.1", "--order=left_to_right", "--decode=greedy --top_p=0.5",
                  "--sampler=first_hitting"],
              "genppl --judge=out/ar --ckpt out/ar --n=2": ["--nfe=4", "--sampler=fixed", "--accept=exact"],
              "infill --judge=out/ar --ckpt out/plain --n=2 --nfe=1 --masked=4": ["--tau=1", "--accept=exact"],
              "mauve --judge=out/ar --ckpt out/plain --n=2 --nfe=1": ["--tau=1"],
              "ppl --ckpt out/ar --n=4": ["--teacher=nowhere", "--teacher=out/ar"],
              "ppl --ckpt out/plain --n=4": ["--teacher=nowhere", "--teacher=out/ar"],
              "acceptance --ckpt out/heads --n=2": ["--accept=exact --epsilon=0.5", "--accept=greedy --delta=0.5"],
              "nfe --judge=out/ar --ckpt out/plain --n=2": ["--nfe=1,4 --sampler=first_hitting"]}
    for flags, lines in unread.items():
        for line in lines:
            yield Case(f"{flags} {line}", nothing, (evaluate, f"{flags} {line}"), REFUSED)
    read = {"genppl --judge=out/ar --n=2 --nfe=1": [
                "--ckpt out/gumbel --tau=0.3", "--ckpt out/gumbel out/plain --tau=0.3", "--ckpt out/plain --top_p=0.5",
                "--ckpt out/plain --json=new.json", "--ckpt out/plain --data=data/mine"],
            "ppl --n=4": ["--ckpt out/plain out/ar out/gumbel", "--ckpt out/gumbel --teacher=out/ar",
                          "--ckpt out/ar --batch_size=1"],
            "acceptance --ckpt out/heads --n=2": ["--accept=typical --epsilon=0.5"]}
    for flags, lines in read.items():
        yield from flagged(evaluate, ACCEPTED, lines, flags)


def flags_of_prepare(rng):
    yield from numbers(prepare, "text --files x.jsonl --tokenizer=bytes --out=data/new", ["val_fraction", "seed"])
    wrong = ["--val_fraction=0", "--val_fraction=1", "--val_fraction=0.6", "--tokenizer=", "--tokenizer=zzz",
             "--tokenizer=maze", "--tokenizer=ids", "--tokenizer=chars:ab", "--tokenizer=hf:", "--tokenizer=hf:nowhere",
             "--out=", "--out=/proc/x", "--out=x.jsonl", "--out=data/mine", "--out=x.jsonl/y", "--files", "--hub=x",
             "--val_documents=3", "--val_documents=0", "--separator=\\", "--zzz=1"]
    yield from flagged(prepare, REFUSED, wrong, "text --files x.jsonl --tokenizer=bytes --out=data/new")
    yield from flagged(prepare, REFUSED, ["verify nowhere", "verify x.jsonl", "verify .", "verify", "maze --out=", "",
                                          "maze --out=/proc/x", "maze --out=data/mine", "zeroshot zzz", "zzz"])
    yield from flagged(prepare, ACCEPTED, ["maze --out=data/new", "verify data/mine"])
    yield Case("OUT.partial of the maze has somebody's file", partial(write, "data/part.partial/notes.txt", "mine"),
               (prepare, "maze --out=data/part"), EITHER, check=check_notes)


def check_notes():
    if not any(os.path.exists(f"data/{name}/notes.txt") for name in ("part", "part.partial")):
        return "somebody's file was deleted"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# the test

DOORS = {"checkpoint": checkpoint, "config.json": config_json, "safetensors": safetensors, ".ckpt": lightning_ckpt,
         "meta.json": meta_json, ".bin": shards_bin, "progress.json": progress_json, "log.jsonl": log_jsonl,
         "kept samples": kept_samples, "teacher cache": teacher_cache, "texts": texts, "judge": judges_answers,
         "environment": environment, "flags of train": flags_of_train, "flags of sample": flags_of_sample,
         "flags of evaluate": flags_of_evaluate, "flags of prepare": flags_of_prepare}


@pytest.fixture
def server(monkeypatch):
    """A judge at OPENAI_BASE_URL, and no waiting between the three tries."""
    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Reply)
    threading.Thread(target=found.serve_forever, args=[0.01], daemon=True).start()
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{found.server_port}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(judge.judge, "__defaults__", (0.01, 3))
    yield found
    found.shutdown()
    found.server_close()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("door", DOORS)
def test_nothing_that_comes_through_this_door_breaks_a_command(door, work, cli, server, limits, tmp_path, monkeypatch):
    """Each case ends as its verdict says: no traceback, no wrong acceptance, no hang, and a refusal changes nothing."""
    offline(monkeypatch, tmp_path)
    tried = list(DOORS[door](random.Random(SEED)))
    assert len(tried) >= 20
    failures = []
    for case in tried:
        work()
        with monkeypatch.context() as m:
            for name, value in case.env.items():
                m.setenv(name, value)
            fault = fault_of(case, cli)
        if fault:
            failures.append(f"{case.name}: {fault}")
    assert not failures, "\n".join([f"{len(failures)} of {len(tried)} cases", *failures])
