"""The tests of data/: the maze, tokenizers, documents, shards, and the teacher's cache."""
import argparse
import gzip
import importlib.util
import io
import json
import lzma
import os
import shutil
import string
import tarfile

import numpy as np
import pytest
import torch

import evaluate
import sample
import train
from data import prepare, shards
from data.cli import BadInput
from data.documents import documents
from data.maze import PAD, draw_maze, maze_dataset, maze_paths, maze_valid
from data.shards import Shards, Writer, changed_meta, read_meta
from data.teacher_cache import TeacherCache, truncated_logits
from data.vocab import Tokenizer, add_fingerprint, same_tokenizer
from gumbel import posterior_times, sample_exponential
from teacher import AR, model_hash
from test_gumbel import (DOCS, LONG, SHARED, TINY, gen, interrupt_after, randomise, refused, same_dataset, tiny,
                         tiny_ar)
from test_gumbel import cli, runs, text_file, text_runs  # noqa: F401, the fixtures


@pytest.mark.parametrize("w", [1, 4])
def test_truncated_posterior_is_as_far_off_as_theory_says(w):
    """Known: the two likeliest tokens and w; the others share by frequency. All known: exact. Else the law is off by
    d / (1 + d) in total variation: the probability of noise that the other law does not know, either way."""
    p = torch.tensor([0.05, 0.4, 0.1, 0.02, 0.03, 0.4])
    frequency = torch.tensor([0.1, 0.2, 0.05, 0.3, 0.15, 0.2])
    n, logits, tokens = 200_000, p.log(), torch.tensor([w])
    e = sample_exponential((n, 6), gen(w))
    exact = posterior_times(logits.expand(n, 6), tokens.expand(n), e)

    def truncated(ids):
        logits = truncated_logits(p[ids].expand(n, -1), ids.expand(n, -1), p[tokens].expand(n, 1), frequency,
                                  tokens.expand(n))
        assert torch.allclose(logits.logsumexp(-1), torch.zeros(n), atol=1e-6)
        return posterior_times(logits, tokens.expand(n), e)
    for ids in (torch.arange(6), torch.tensor([5, 3, 1, 0, 2, 4])):
        assert torch.allclose(truncated(ids), exact, rtol=1e-5)
    T, known = truncated(torch.tensor([1, 5])), [1, 5, w]
    others = torch.tensor([j for j in range(6) if j not in known])
    share = p[others].sum() * frequency[others] / frequency[others].sum()
    assert torch.allclose(T[:, others], e[:, others] + share * e[:, [w]])
    assert torch.allclose(T[:, known], exact[:, known])
    d = (share - p[others]).clamp(min=0).sum().item()
    want = d / (1 + d)
    for draws, floor in ((exact, share), (T, p[others])):  # of the first law, where the second has no density
        e0 = draws[:, [w]] / p[w]
        rate = (draws[:, others] < floor * e0 * (1 - 1e-6)).any(1).double().mean().item()
        assert abs(rate - want) < 5 * (want / n) ** 0.5, (rate, want)


def test_truncated_logits_are_never_nan():
    """No mass left, by rounding even less than none: the others are impossible, the true token is not."""
    frequency = torch.tensor([0.5, 0.25, 0.125, 0.125])
    p = torch.tensor([[1.0, 1e-14], [0.7, 0.3001], [0.7, 0.2]])
    ids = torch.tensor([[2, 1], [0, 3], [0, 3]])
    p_w = torch.tensor([[1e-14], [0.3001], [0.1]])
    tokens = torch.tensor([1, 3, 2])
    q = truncated_logits(p, ids, p_w, frequency, tokens).softmax(-1)
    want = torch.tensor([[0, 1e-14, 1, 0], [0.7 / 1.0001, 0, 0, 0.3001 / 1.0001], [0.7, 0, 0.1, 0.2]])
    assert torch.allclose(q, want, atol=1e-6)
    assert (q.gather(1, tokens[:, None]) > 0).all()


def test_teacher_cache(text_runs, tmp_path, monkeypatch):
    """What the teacher said, to 1/4096 nat; loss and gradient with all tokens kept are those with the teacher, with
    few they are close; an interrupted pass continues to the same bytes; other data or a damaged file are refused."""
    shutil.copytree(text_runs / "data/mine", tmp_path / "mine")
    data, teacher = Shards(str(tmp_path / "mine"), "train", 24), sample.load_model(str(text_runs / "out/ar"))
    rows, x = [0, 3, len(data) - 1], torch.from_numpy(data.rows([0, 3, len(data) - 1]))
    masked = (torch.rand(x.shape, generator=gen()) < 0.5) & (torch.arange(24) > 0)
    model = tiny("gumbel", V=257, L=24)
    randomise(model)

    def loss(source):
        model.zero_grad()
        value = model.loss(x, torch.ones(3), source, z=x.masked_fill(masked, 257), generator=gen(1))[0]
        value.backward()
        return value.item(), model.noise_embed.weight.grad.clone()
    want, grad = loss(teacher)
    off = {}
    for k in (257, 300, 4):
        cache = TeacherCache(teacher, model_hash(teacher), data, k)
        cache.fill(teacher, data)
        assert cache.done.all() and os.path.getsize(f"{cache.folder}/topk.bin") == len(data) * 23 * (4 * cache.k + 2)
        logits = cache.for_rows(cache.load(rows)).posterior_logits(x, masked)
        counts = np.bincount(data.files[0]["ids"], minlength=257) + 1
        assert len(data.files) == 1 and np.allclose(cache.frequency, counts / counts.sum())
        logp, kept = teacher.log_probs(x)[:, :-1][masked[:, 1:]], logits(0, 10**6)
        assert logits(2, 5).dtype == torch.float32 and torch.equal(logits(2, 5), kept[2:5])
        top, ids = logp.topk(cache.k)
        assert (kept.gather(1, x[masked][:, None]) - logp.gather(1, x[masked][:, None])).abs().max() < 2.5e-4
        assert (kept.gather(1, ids) - top).abs().max() < 2.5e-4
        value, g = loss(cache.for_rows(cache.load(rows)))
        off[cache.k] = abs(value - want), (g - grad).abs().max() / grad.abs().max()
    assert off[257][0] < 1e-3 and off[257][1] < 1e-2, off
    assert off[4][0] < 0.1, off

    written = open(f"{cache.folder}/topk.bin", "rb").read()
    # interrupted after two chunks, continued by two processes
    shutil.rmtree(cache.folder)
    cache, chunks = TeacherCache(teacher, model_hash(teacher), data, 4), len(cache.done)
    with monkeypatch.context() as m:
        m.setattr(AR, "logits", lambda self, *a, logits=AR.logits: logits(self, *a) if cache.done.sum() < 2 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cache.fill(teacher, data)
    assert cache.done.sum() == 2 < chunks
    with monkeypatch.context() as m:
        m.setattr(os, "fsync", lambda f: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(BadInput, match="No space left on device"):
            cache.fill(teacher, data)
    assert cache.done.sum() == 2
    # its share, then what nobody else has done
    TeacherCache(teacher, model_hash(teacher), data, 4, master=False).fill(teacher, data, 1, 2)
    assert cache.done.all() and open(f"{cache.folder}/topk.bin", "rb").read() == written
    assert TeacherCache(tiny_ar(V=257, L=24), "other", data, 4).folder != cache.folder
    assert TeacherCache(teacher, model_hash(teacher), data, 4, dtype="bfloat16").folder != cache.folder
    with open(f"{cache.folder}/topk.bin", "ab") as f:
        f.truncate(100)
    with pytest.raises(BadInput, match="truncated"):
        TeacherCache(teacher, model_hash(teacher), data, 4)
    data.files[0]["sha256"] = "another"
    with pytest.raises(BadInput, match="of other data"):
        TeacherCache(teacher, model_hash(teacher), data, 257)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: argparse.Namespace(free=1000))
    with pytest.raises(BadInput, match="are free: choose a smaller --teacher_cache"):
        TeacherCache(teacher, model_hash(teacher), data, 5)


def test_training_from_the_cache(text_runs, cli, monkeypatch, tmp_path):
    """With all tokens kept, the run is that with the teacher; in blocks too; and it continues."""
    monkeypatch.chdir(text_runs)
    base = f"--gumbel --teacher=out/ar --data=mine --length=24 {TINY}"
    losses = {}
    for name, flags in (("online", ""), ("all", "--teacher_cache=257"), ("few", "--teacher_cache=8"),
                        ("blocks", "--teacher_cache=8 --model=bd3lm")):
        code, _, err = cli(train, f"{base} --steps=4 --out={tmp_path}/{name} {flags}")
        assert code == 0, err
        losses[name] = [r["loss"] for r in map(json.loads, open(tmp_path / name / "log.jsonl")) if "loss" in r]
    assert np.allclose(losses["all"], losses["online"], rtol=1e-3)
    assert np.allclose(losses["few"], losses["online"], rtol=0.1)
    code, _, err = cli(train, f"{base} --steps=6 --out={tmp_path}/few --teacher_cache=8")
    assert code == 0 and "continuing at step 4" in err and "teacher's pass" not in err
    refused(cli(train, f"{base} --steps=6 --out={tmp_path}/few --teacher_cache=9"), "other settings", "teacher_cache")


def test_maze_is_the_task(tmp_path, monkeypatch, cli):
    paths = maze_paths()
    lengths = (paths != PAD).sum(1)
    assert paths.shape == (2000, 10) and [int((lengths == k).sum()) for k in (5, 7, 9)] == [9, 146, 1845]
    assert (paths[:, 9] == PAD).all() and len(np.unique(paths, axis=0)) == 2000
    for row in paths[::50]:                                # an independent walk
        at, done = (2, 1), False
        for k in row:
            if done:
                assert k == 4
                continue
            at = {0: (at[0] - 1, at[1]), 1: (at[0] + 1, at[1]), 2: (at[0], at[1] - 1), 3: (at[0], at[1] + 1)}[int(k)]
            assert 0 <= at[0] < 6 and 0 <= at[1] < 6 and at not in {(2, 0), (2, 4), (5, 2)}
            done = at == (4, 4)
        assert done
    assert maze_valid(paths).all()
    bad = np.array([[4] * 10, [5] * 10, [6] * 10, [1, 1, 3, 3, 3, 4, 4, 4, 4, 0], [1, 1, 3, 3, 4, 4, 4, 4, 4, 4]])
    assert not maze_valid(bad).any()
    # total correlation of the uniform language, in bits: 4.86
    marginals = np.stack([(paths == k).mean(0) for k in range(5)])
    h = -(marginals * np.log2(np.where(marginals > 0, marginals, 1))).sum()
    assert abs(h - np.log2(2000) - 4.86) < 0.01
    skewed = maze_dataset("maze_skewed")
    count = np.unique(skewed, axis=0, return_counts=True)[1] / 2000
    assert 130 <= len(count) <= 150 and abs(-(count * np.log2(count)).sum() - 4.06) < 0.05
    monkeypatch.chdir(tmp_path)
    assert cli(prepare, "maze")[0] == 0 and cli(prepare, "verify data/maze")[:2] == (
        0, "data/maze/train.bin: 20000 tokens, ok\ndata/maze/val.bin: 20000 tokens, ok\n")
    data = Shards("data/maze", "train")
    assert len(data) == 2000 and data.length == 11 and (data.rows([0, 1999])[:, 1:] == paths[[0, 1999]]).all()
    assert (data.rows([5])[:, 0] == 5).all()
    refused(cli(prepare, "maze"), "data/maze exists already")
    assert ("leaves the free cells" in draw_maze([0] * 10)
            and "reaches T in 5 moves" in draw_maze(paths[0]))


def test_prepare_text_bytes(text_file, tmp_path, cli):
    out = tmp_path / "mine"
    code, _, err = cli(prepare, f"text --files {text_file} --tokenizer=bytes --out={out} --val_fraction=0.25")
    assert code == 0 and "4 documents (1 for validation)" in err
    got = {}
    for split in ("train", "val"):
        ids = np.fromfile(out / f"{split}.bin", dtype="<u2")
        assert ids[-1] == 256
        got[split] = [bytes(part.astype(np.uint8)).decode() for part in np.split(ids, np.flatnonzero(ids == 256) + 1)
                      for part in [part[part != 256]] if len(part)]
    assert len(got["val"]) == 1 and sorted(got["train"] + got["val"]) == sorted(DOCS)
    meta = json.loads((out / "meta.json").read_text())
    assert (meta["vocab_size"], meta["bos"], meta["row_length"], meta["tokenizer"]) == (257, 256, None, "bytes")
    assert cli(prepare, f"verify {out}")[0] == 0
    rows = Shards(str(out), "train", 9)
    flat = np.fromfile(out / "train.bin", dtype="<u2")
    assert len(rows) == len(flat) // 8 and (rows.rows([1])[0] == np.append([256], flat[8:16])).all()
    refused(cli(prepare, f"text --files {text_file} --tokenizer=bytes --out={out}"), "exists already", "--out")


def test_prepare_text_gpt2(text_file, tmp_path, cli, monkeypatch):
    cache = os.path.join(SHARED, "assets", "tiktoken_cache")
    if not os.path.isdir(cache):
        pytest.skip("GPT-2's BPE files are absent")
    shutil.copytree(cache, tmp_path / "cache", copy_function=shutil.copyfile)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    assert cli(prepare, f"text --files {text_file} --out={tmp_path / 'mine'}")[0] == 0
    tokenizer = Tokenizer("gpt2")
    ids = np.concatenate([np.fromfile(tmp_path / "mine" / f"{s}.bin", dtype="<u2") for s in ("train", "val")])
    assert sorted(tokenizer.decode(part) for part in np.split(ids, np.flatnonzero(ids == 50256) + 1)
                  for part in [part[part != 50256]] if len(part)) == sorted(DOCS)
    # cut into pieces, a document has the same tokens
    text = (DOCS[0] + "\n\n  " + DOCS[2] + " don't  stop\t\tnow 123 45.6\n") * 20
    (tmp_path / "b.txt").write_text(text)
    pieces = list(documents(open(tmp_path / "b.txt"), "<|endoftext|>", piece=40))
    assert len(pieces) > 20 and "".join(p for p, _ in pieces) == text.strip("\n")
    assert (np.concatenate(tokenizer.encode([p for p, _ in pieces])).tolist()
            == tokenizer.encode([text.strip("\n")])[0].tolist())


def test_documents_at_every_block_size(tmp_path):
    """The separator may straddle blocks anywhere; empty documents vanish; bytes that are not UTF-8 survive."""
    body = b"a b c\n<|endoftext|>\n\n<|endoftext|>d \xff e" + b" w" * 30 + b"<|endoftext|>f\n"
    for piece in range(1, 90):
        docs, current = [], ""
        text_file = io.TextIOWrapper(io.BytesIO(body), encoding="utf-8", errors="surrogateescape", newline="")
        for text, end in documents(text_file, "<|endoftext|>", piece=piece):
            current += text
            if end:
                docs.append(current.encode("utf-8", "surrogateescape"))
                current = ""
        assert docs == [b"a b c", b"d \xff e" + b" w" * 30, b"f"] and not current, piece


def test_prepare_bad_input(text_file, tmp_path, cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(cli(prepare, "text --files nowhere.txt --tokenizer=bytes --out=o"), "nowhere.txt", "not a file")
    refused(cli(prepare, f"text --files {text_file} --tokenizer=bpe --out=o"), "'bpe'", "gpt2", "bytes")
    refused(cli(prepare, f"text --files {text_file} --tokenizer=bytes --out=o --separator=@@@"),
            "1 document", "--separator")
    refused(cli(prepare, f"text --files {text_file} --tokenizer=bytes --out=o --val_fraction=0"),
            "--val_fraction", "above 0")
    refused(cli(prepare, "text --out=o"), "--files", "--hub")
    refused(cli(prepare, "imagenet"), "'imagenet'", "maze_skewed")
    refused(cli(prepare, "verify nowhere"), "nowhere", "not a folder")
    refused(cli(prepare, f"text --files {text_file} --tokenizer=bytes --out=o --seed=-1"), "--seed", "at least 0")
    refused(cli(prepare, f"text --files {text_file} --tokenizer=bytes --out=o --separator=\\"), "lone backslash")
    refused(cli(prepare, f"text --files {text_file} --tokenizer=bytes --out={text_file}"), "a.txt exists already")
    assert sorted(os.listdir(tmp_path)) == ["a.txt"]       # nothing half-made is left behind
    (tmp_path / "latin").write_bytes("caf\u00e9".encode("latin-1"))
    monkeypatch.setattr(prepare, "Tokenizer", lambda name: argparse.Namespace(
        name="gpt2", vocab_size=50257, bos=50256, chars=None, fingerprint=lambda: "0"))
    refused(cli(prepare, f"text --files latin {text_file} --out=o"), "not UTF-8", "--tokenizer=bytes")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "long").write_text("word " * 300_000 + "\u00a7" + "tail")
    assert cli(prepare, "text --files long --tokenizer=bytes --out=odd/ --separator=\u00a7")[0] == 0
    assert "2 documents" in cli(prepare, "text --files long long --tokenizer=bytes --out=p --separator=")[2]
    assert len(Shards("odd", "train", 5)) + len(Shards("odd", "val", 5)) > 1
    # an interruption leaves nothing that training accepts
    monkeypatch.setattr(Writer, "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt()))
    assert cli(prepare, f"text --files {text_file} --tokenizer=bytes --out=o")[0] == 130
    assert not os.path.exists("o") and os.path.exists("o.partial")
    with pytest.raises(BadInput, match="not a folder of shards"):
        Shards("o", "train", 5)


@pytest.mark.parametrize("what", ["text", "openwebtext"])
def test_prepare_continues_where_it_was_interrupted(tmp_path, cli, monkeypatch, what):
    """The same bytes as in one go; garbage after the last commit is dropped; other flags start over."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in LONG))
    extra = "--val_documents=7" if what == "openwebtext" else ""
    flags = f"{what} --files x.jsonl --tokenizer=bytes {extra}"
    real = prepare.write_text
    monkeypatch.setattr(prepare, "write_text", lambda *a, **kw: real(*a, **kw, batch_chars=9000))
    monkeypatch.setattr(Writer.__init__, "__defaults__", (None, 10_000))                   # small shards
    assert cli(prepare, f"{flags} --out=a")[0] == 0
    with monkeypatch.context() as m:
        interrupt_after(m, 5)
        assert cli(prepare, f"{flags} --out=b")[0] == 130
    last = sorted(f for f in os.listdir("b.partial") if f.endswith(".bin"))[-1]
    with open(f"b.partial/{last}", "ab") as f:
        f.write(b"garbage")
    assert json.load(open("b.partial/progress.json"))["done"] > 10
    code, _, err = cli(prepare, f"{flags} --out=b")
    assert code == 0 and "continuing after" in err and same_dataset("a", "b")
    with monkeypatch.context() as m:
        interrupt_after(m, 5)
        assert cli(prepare, f"{flags} --out=b2")[0] == 130
    with open("x.jsonl", "a") as f:                          # the input changed: nothing of it is reused
        f.write(json.dumps({"text": "one more"}) + "\n")
    code, _, err = cli(prepare, f"{flags} --out=b2")
    assert code == 0 and "continuing" not in err
    assert cli(prepare, "verify a")[0] == 0


def test_openwebtext_survives_its_last_steps(tmp_path, cli, monkeypatch):
    """Killed while it hashes, it encodes nothing again; too few documents to hold out are refused."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in LONG[:40]))
    flags = "openwebtext --files x.jsonl --tokenizer=bytes"
    monkeypatch.setattr(Writer.__init__, "__defaults__", (None, 2000))
    assert cli(prepare, f"{flags} --val_documents=9 --out=a")[0] == 0
    for n in (40, 100_000):
        refused(cli(prepare, f"{flags} --val_documents={n} --out=b"), "40 documents", "smaller --val_documents")
        assert not os.path.exists("b.partial")
    encoded, encode = [], Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, texts: encoded.extend(texts) or encode(self, texts))
    with monkeypatch.context() as m:
        m.setattr(shards.hashlib, "file_digest", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
        assert cli(prepare, f"{flags} --val_documents=9 --out=b")[0] == 130
    encoded.clear()
    assert cli(prepare, f"{flags} --val_documents=9 --out=b")[0] == 0
    assert not encoded and same_dataset("a", "b")


def test_chars_tokenizer(text_file, tmp_path, cli, monkeypatch):
    """The vocabulary is the characters of the text; the dataset and its checkpoints carry it along."""
    monkeypatch.chdir(tmp_path)
    assert cli(prepare, f"text --files {text_file} --tokenizer=chars --out=data/c")[0] == 0
    meta, files = read_meta("data/c")
    assert meta["tokenizer"] == "chars:" + "".join(sorted(set("".join(DOCS))))
    assert meta["vocab_size"] == meta["bos"] + 1 == len(set("".join(DOCS))) + 1
    tokenizer = Tokenizer(meta["tokenizer"])
    ids = np.concatenate([np.fromfile(f["path"], dtype="<u2") for f in files])
    parts = np.split(ids, np.flatnonzero(ids == meta["bos"]) + 1)[:-1]
    assert sorted(tokenizer.decode(p) for p in parts) == sorted(DOCS)
    assert cli(train, f"--model=ar --data=c --length=8 --steps=2 {TINY} --out=out/c")[0] == 0
    code, out, _ = cli(sample, f"--ckpt=out/c --n=1 --prompt={DOCS[0][0]}")
    assert code == 0 and out.splitlines()[1].startswith(DOCS[0][0])
    refused(cli(sample, "--ckpt=out/c --n=1 --prompt=\u2603"), "character '\u2603'")
    (tmp_path / "other.txt").write_text("\n<|endoftext|>\n".join(d.replace("e", "\u2603") for d in DOCS))
    assert cli(prepare, "text --files other.txt --tokenizer=chars --out=data/o")[0] == 0
    assert read_meta("data/o")[0]["vocab_size"] == meta["vocab_size"]
    refused(cli(train, f"--gumbel --teacher=out/c --data=o --length=8 --steps=2 {TINY} --out=out/x"), "characters")
    refused(cli(evaluate, "ppl --ckpt out/c --data=data/o"), "--data=data/o", "other characters")


def read_back(path, split):
    meta, files = read_meta(path)
    ids = np.concatenate([np.fromfile(f["path"], dtype="<u2") for f in files if f["split"] == split])
    assert ids[-1] == meta["bos"]
    return [bytes(p[p != 256].astype(np.uint8)).decode() for p in np.split(ids, np.flatnonzero(ids == 256) + 1)[:-1]]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "txt", "folder", "tar", "tar.xz", "owt", "hub"])
def test_openwebtext_from_any_file_and_the_last_documents_held_out(tmp_path, cli, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    docs = LONG[:40]
    lines = "".join(json.dumps({"text": d}) + "\n" for d in docs)
    os.mkdir("d")
    for i, d in enumerate(docs):
        (tmp_path / "d" / f"{i:03d}.txt").write_text(d)
    name, source = f"x.{kind}", ""
    if kind == "jsonl":
        (tmp_path / name).write_text(lines)
    elif kind == "jsonl.gz":
        (tmp_path / name).write_bytes(gzip.compress(lines.encode()))
    elif kind in ("parquet", "hub"):
        pa = pytest.importorskip("pyarrow", reason="pip install pyarrow")
        import pyarrow.parquet
        os.makedirs("hub", exist_ok=True)
        name = "hub/train.parquet"
        pyarrow.parquet.write_table(pa.table({"other": [1] * 40, "text": docs}), name, row_group_size=7)
        if kind == "hub":
            pytest.importorskip("datasets", reason="pip install datasets")
            source = "--hub=./hub"
    elif kind == "txt":
        (tmp_path / name).write_text("x")
        name = " ".join(f"d/{i:03d}.txt" for i in range(40))
    elif kind == "folder":
        name = "d"
    else:
        with tarfile.open("inner.tar", "w") as tar:
            for i in range(40):
                tar.add(f"d/{i:03d}.txt")
        packed = lzma.compress((tmp_path / "inner.tar").read_bytes())
        if kind == "tar":
            name = "inner.tar"
        elif kind == "tar.xz":
            (tmp_path / name).write_bytes(packed)
        else:                                              # OpenWebText's own: a tar of xz-packed tars
            (tmp_path / "urlsf_subset00_data.xz").write_bytes(packed)
            name = "openwebtext.tar"
            with tarfile.open(name, "w") as tar:
                tar.add("urlsf_subset00_data.xz")
    source = source or f"--files {name}"
    code, _, err = cli(prepare, f"openwebtext {source} --tokenizer=bytes --val_documents=3 --out=o")
    assert code == 0, err
    assert read_back("o", "train") == docs[:-3] and read_back("o", "val") == docs[-3:]
    assert cli(prepare, "verify o")[0] == 0
    if kind == "jsonl":
        refused(cli(prepare, f"openwebtext {source} --tokenizer=bytes --out=p"), "40 documents", "--val_documents")
        refused(cli(prepare, f"openwebtext {source} --tokenizer=bytes --out=p --field=body"), "x.jsonl", "KeyError")
        (tmp_path / "cut.parquet").write_bytes(b"PAR1")
        words = "be read" if importlib.util.find_spec("pyarrow") else "pip install pyarrow"
        refused(cli(prepare, "openwebtext --files cut.parquet --tokenizer=bytes --out=p"), "cut.parquet", words)
        for name, content in (("null.jsonl", b'{"text": null}'), ("array.jsonl", b'[{"text": "a"}]'),
                              ("cut.gz", gzip.compress(b"word " * 999)[:-9]), ("bad.xz", b"no xz"), ("n.json", b"{")):
            (tmp_path / name).write_bytes(content)
            refused(cli(prepare, f"openwebtext --files {name} --tokenizer=bytes --out=p"), name, "cannot be read")
        refused(cli(prepare, f"openwebtext {source} --tokenizer=ids --out=p"), "tokenizer")
        refused(cli(prepare, f"openwebtext {source} --tokenizer=bytes --out=x.jsonl/p"), "x.jsonl/p")
        (tmp_path / "cut.tar").write_bytes(b"no tar" * 200)
        refused(cli(prepare, "openwebtext --files cut.tar --tokenizer=bytes --out=p"), "cut.tar", "cannot be read")
        refused(cli(prepare, "openwebtext --hub=./nowhere --tokenizer=bytes --out=p"), "./nowhere", "--files")
        assert not os.path.exists("p") and not os.path.exists("p.partial")


def test_lm1b_is_detokenised_and_its_heldout_files_are_val(tmp_path, cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs("training")
    os.makedirs("heldout")
    (tmp_path / "training" / "news.en-00001-of-00100").write_text(
        "He said , \" it 's late \" .\nWho knows ?\n")
    (tmp_path / "heldout" / "news.en.heldout-00000-of-00050").write_text("( Reuters ) It cost $ 5 .\n")
    with tarfile.open("lm1b.tar.gz", "w:gz") as tar:
        tar.add("training")
        tar.add("heldout")
    for source in ("lm1b.tar.gz", "training heldout"):
        out = f"o{len(source)}"
        assert cli(prepare, f"lm1b --files {source} --tokenizer=bytes --out={out}")[0] == 0
        assert read_back(out, "train") == ['He said, "it\'s late" .', "Who knows?"]
        assert read_back(out, "val") == ["(Reuters) It cost $5."]


def write_hub(folder, train, validation=None):
    """A local folder that `datasets` streams like a dataset of the hub."""
    pa = pytest.importorskip("pyarrow", reason="pip install pyarrow")
    pytest.importorskip("datasets", reason="pip install datasets")
    import pyarrow.parquet
    os.makedirs(folder)
    for split, docs in (("train", train), ("validation", validation)):
        if docs is not None:
            pyarrow.parquet.write_table(pa.table({"story": docs}), f"{folder}/{split}.parquet", row_group_size=7)


def test_text_from_a_hub(tmp_path, cli, monkeypatch):
    """One pass over a hub's dataset: its own validation split, else the last documents."""
    monkeypatch.chdir(tmp_path)
    write_hub("whole", LONG[:40])
    write_hub("split", LONG[:30], LONG[30:40])
    flags = "--tokenizer=bytes --field=story"
    code, _, err = cli(prepare, f"text --hub=./whole {flags} --val_documents=3 --out=a")
    assert code == 0 and "the last 3 documents" in err, err
    assert read_back("a", "train") == LONG[:37] and read_back("a", "val") == LONG[37:40]
    code, _, err = cli(prepare, f"text --hub=./split {flags} --out=b")
    assert code == 0 and "its split validation" in err, err
    assert read_back("b", "train") == LONG[:30] and read_back("b", "val") == LONG[30:40]
    assert cli(prepare, "verify a")[0] == cli(prepare, "verify b")[0] == 0

    refused(cli(prepare, "text --tokenizer=bytes --out=c"), "--files", "--hub", "give one")
    refused(cli(prepare, f"text --hub=./whole --files a.txt {flags} --out=c"), "--files and --hub")
    refused(cli(prepare, f"openwebtext --hub=./whole --files a {flags} --out=c"), "--files and --hub")
    refused(cli(prepare, "text --hub=./whole --tokenizer=chars --out=c"), "--tokenizer=chars", "--hub")
    refused(cli(prepare, f"text --hub=./whole {flags} --seed=1 --out=c"), "--seed is not read with --hub")
    refused(cli(prepare, f"text --hub=./whole {flags} --out=c"), "40 documents", "smaller --val_documents")
    refused(cli(prepare, "text --hub=./whole --tokenizer=bytes --val_documents=3 --out=c"), "./whole", "'text'")
    refused(cli(prepare, f"text --hub=./nowhere {flags} --out=c"), "./nowhere", "--files")
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    refused(cli(prepare, "text --files x.jsonl --val_documents=3 --out=c"), "--val_documents is not read with --files")
    os.rename("split/train.parquet", "split/test.parquet")
    refused(cli(prepare, f"text --hub=./split {flags} --out=c"), "no split named train", "test")
    assert not os.path.exists("c") and not os.path.exists("c.partial")
    # a document that is no text
    write_hub("null", ["a", None, "b"])
    refused(cli(prepare, f"text --hub=./null {flags} --out=c"), "./null", "no text")


@pytest.mark.parametrize("own_split", [False, True])
def test_text_from_a_hub_continues_where_it_was_interrupted(tmp_path, cli, monkeypatch, own_split):
    monkeypatch.chdir(tmp_path)
    if own_split:
        write_hub("hub", LONG[:300], LONG[300:])
    else:
        write_hub("hub", LONG)
    flags = "text --hub=./hub --field=story --tokenizer=bytes --val_documents=7"
    real = prepare.write_text
    monkeypatch.setattr(prepare, "write_text", lambda *a, **kw: real(*a, **kw, batch_chars=9000))
    assert cli(prepare, f"{flags} --out=a")[0] == 0
    with monkeypatch.context() as m:
        interrupt_after(m, 5)
        assert cli(prepare, f"{flags} --out=b")[0] == 130
    assert json.load(open("b.partial/progress.json"))["done"] > 10
    code, _, err = cli(prepare, f"{flags} --out=b")
    assert code == 0 and "continuing after" in err and same_dataset("a", "b")
    assert read_back("b", "val") == (LONG[300:] if own_split else LONG[-7:])


def write_bpe(folder, texts):
    """A small BPE tokenizer of exactly 120 ids, trained on texts, as transformers keeps it."""
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    tokenizers = pytest.importorskip("tokenizers")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"]))
    assert bpe.get_vocab_size() == 120
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)


def test_fingerprint_tells_tokenizers_apart(tmp_path, cli, monkeypatch, text_file):
    """Two tokenizers of as many ids do not pass for each other; one tokenizer under two paths does."""
    monkeypatch.chdir(tmp_path)
    write_bpe("one", LONG[:50] + [string.ascii_lowercase])
    write_bpe("two", [d.replace("w", "k") for d in LONG[:50]] + [string.ascii_lowercase])
    shutil.copytree("one", "copy")
    metas = {}
    for name in ("one", "two", "copy"):
        assert cli(prepare, f"text --files {text_file} --tokenizer=hf:{name} --out=data/{name}")[0] == 0
        metas[name] = read_meta(f"data/{name}")[0]
        assert metas[name]["fingerprint"] == json.load(open(f"data/{name}/meta.json"))["fingerprint"]
    one, two, copy = metas["one"], metas["two"], metas["copy"]
    assert one["vocab_size"] == two["vocab_size"] == 120 and one["bos"] == two["bos"]
    assert same_tokenizer(one, two) is False
    assert one["tokenizer"] != copy["tokenizer"] and same_tokenizer(one, copy) is True

    # a model that names its tokenizer, and one whose tokenizer cannot be had
    model = dict(tokenizer="hf:copy", vocab_size=120)
    assert same_tokenizer(model, one) is None
    assert same_tokenizer(add_fingerprint(model), one) is True and same_tokenizer(add_fingerprint(model), two) is False
    for name in ("hf:nowhere", "ids"):
        foreign = dict(tokenizer=name, vocab_size=120)
        assert add_fingerprint(foreign) == foreign and same_tokenizer(foreign, one) is None
    assert add_fingerprint(one) is one


def test_fingerprints_of_the_other_tokenizers(tmp_path, cli, monkeypatch, text_file):
    """Every dataset has one; an old dataset has none, and its tokenizer's name decides where that says all."""
    monkeypatch.chdir(tmp_path)
    commands = {"bytes": "text --files {} --tokenizer=bytes", "chars": "text --files {} --tokenizer=chars",
                "maze": "maze", "lm1b": "lm1b --files {} --tokenizer=bytes",
                "zeroshot": "zeroshot ag_news --files {} --tokenizer=bytes"}
    found = {}
    for name, command in commands.items():
        assert cli(prepare, f"{command.format(text_file)} --out={name}")[0] == 0
        meta = read_meta(name)[0]
        found[name] = meta["fingerprint"]
        assert meta["fingerprint"] == Tokenizer(meta["tokenizer"]).fingerprint()
    assert found["bytes"] == found["lm1b"] == found["zeroshot"]
    assert len(set(found.values())) == 3
    assert Tokenizer("chars:ab").fingerprint() != Tokenizer("chars:ba").fingerprint()

    now = read_meta("bytes")[0]
    content = json.load(open("bytes/meta.json"))
    del content["fingerprint"]
    json.dump(content, open("bytes/meta.json", "w"))
    old = read_meta("bytes")[0]
    assert "fingerprint" not in old
    assert same_tokenizer(old, now) is same_tokenizer(now, old) is same_tokenizer(old, old) is True
    assert same_tokenizer(old, read_meta("maze")[0]) is None
    assert changed_meta(old, now) == changed_meta(now, old) == []
    assert changed_meta(now | {"bos": 1, "name": "x"}, now) == ["name", "bos"]
    assert changed_meta(now | {"fingerprint": "x"}, now) == ["fingerprint"]


def test_gpt2_has_one_fingerprint_through_tiktoken_and_transformers(tmp_path):
    pytest.importorskip("transformers", reason="pip install transformers")
    cache = os.path.join(SHARED, "assets", "tiktoken_cache")
    if not os.path.isdir(cache):
        pytest.skip("GPT-2's BPE files are absent")
    os.mkdir(tmp_path / "gpt2")
    for file in os.listdir(cache):                         # named by hashes: vocab.json is JSON, the other the merges
        with open(f"{cache}/{file}", "rb") as f:
            content = f.read()
        name = "vocab.json" if content.startswith(b"{") else "merges.txt"
        (tmp_path / "gpt2" / name).write_bytes(content)
    (tmp_path / "gpt2" / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    other = Tokenizer(f"hf:{tmp_path}/gpt2")
    ours = Tokenizer("gpt2")
    assert (other.vocab_size, other.bos) == (ours.vocab_size, ours.bos)
    assert other.fingerprint() == ours.fingerprint()


@pytest.mark.skipif(not os.path.isdir(os.path.join(SHARED, "assets", "zeroshot")),
                    reason="the evaluation sets are absent")
def test_zeroshot_sets(tmp_path, cli, monkeypatch):
    """Real files: all text survives but for the detokeniser; no EOS; one val split that evaluation can read."""
    monkeypatch.chdir(tmp_path)
    for name, file, words in (("ptb", "ptb.test.txt", "no it wasn't black monday"),
                              ("wikitext", "wikitext2.test.txt", "English film, television and theatre actor."),
                              ("ag_news", "ag_news_test.csv", "Fears for T N pension after talks Unions")):
        assert cli(prepare, f"zeroshot {name} --files {SHARED}/assets/zeroshot/{file} --tokenizer=bytes")[0] == 0
        ids = np.fromfile(f"data/zeroshot-{name}/val.bin", dtype="<u2")
        text = bytes(ids.astype(np.uint8)).decode()
        assert (ids < 256).all() and words in text and " n't" not in text * (name == "ptb")
        assert Shards(f"data/zeroshot-{name}", "val", 1024).rows([3]).shape == (1, 1024)
    (tmp_path / "empty.txt").write_text("\n\n")
    refused(cli(prepare, "zeroshot lambada --files empty.txt --tokenizer=bytes"), "lambada is empty")
    refused(cli(prepare, "zeroshot imdb --files empty.txt"), "'imdb'", "pubmed")


def test_shards_bad_input(tmp_path, cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli(prepare, "maze")
    good, meta = (tmp_path / "data/maze/train.bin").read_bytes(), json.loads(
        (tmp_path / "data/maze/meta.json").read_text())

    def opened(raw, words, **change):
        (tmp_path / "data/maze/train.bin").write_bytes(raw)
        (tmp_path / "data/maze/meta.json").write_text(json.dumps(meta | change))
        refused(cli(train, "--model=ar --data=maze"), *words)
    opened(good[:-7], ["train.bin", "truncated"])
    opened(good + good, ["train.bin", "should have 40000"])
    opened(np.array([9] * 20_000, "<u2").tobytes(), ["token id 9", "vocabulary has 6"])
    opened(good, ["meta.json", "damaged"], files=[{}])
    opened(good, ["meta.json", "bos 99"], bos=99)
    opened(good, ["meta.json", "whole rows of 7"], row_length=7)
    opened(good, ["maze/other.bin", "missing"], files=[dict(meta["files"][0], name="other.bin")])
    (tmp_path / "data/maze/meta.json").write_text("{")
    refused(cli(train, "--model=ar --data=maze"), "meta.json", "damaged")
    (tmp_path / "data/maze/meta.json").write_text(json.dumps(meta))
    refused(cli(train, "--model=ar --data=maze --length=13"), "--length=13", "--length=11")
    (tmp_path / "data/maze/train.bin").write_bytes(
        np.where(np.arange(20_000) == 7, 1, np.frombuffer(good, "<u2")).astype("<u2").tobytes())
    refused(cli(prepare, "verify data/maze"), "sha256")
    # an id that the check at the start does not see is found when its batch is read
    monkeypatch.setattr(Shards, "_check", lambda *a: None)
    (tmp_path / "data/maze/train.bin").write_bytes(
        np.where(np.arange(20_000) == 9_999, 8, np.frombuffer(good, "<u2")).astype("<u2").tobytes())
    data = Shards("data/maze", "train")
    monkeypatch.undo()
    data.rows([998])
    with pytest.raises(BadInput, match="token id 8"):
        data.rows([999])
    assert not os.path.exists(tmp_path / "out")


def test_foreign_shards(tmp_path):
    """nanoGPT's raw .bin and llm.c's with a header are read as GPT-2 ids without a meta.json; no row crosses files."""
    a, b = np.arange(100, dtype="<u2"), np.arange(1000, 1055, dtype="<u2")
    a.tofile(tmp_path / "train_000.bin")
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, 55
    (tmp_path / "train_001.bin").write_bytes(header.tobytes() + b.tobytes())
    a.tofile(tmp_path / "val.bin")
    data = Shards(str(tmp_path), "train", 11)
    assert (len(data) == 15 and data.rows([10])[0].tolist() == [50256, *range(1000, 1010)]
            and data.meta["vocab_size"] == 50257)
    header[2] = 56
    (tmp_path / "train_001.bin").write_bytes(header.tobytes() + b.tobytes())
    with pytest.raises(BadInput, match="truncated"):
        Shards(str(tmp_path), "train", 11)
    header[1] = 2
    (tmp_path / "train_001.bin").write_bytes(header.tobytes() + b.tobytes())
    with pytest.raises(BadInput, match="version 2"):
        Shards(str(tmp_path), "train", 11)
    (tmp_path / "train_001.bin").write_bytes(b"abc")
    with pytest.raises(BadInput, match="odd"):
        Shards(str(tmp_path), "train", 11)
