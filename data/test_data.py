"""The tests of data/: shards, tokenizers, documents and the datasets made of them, and the teacher's cache."""
import argparse
import bz2
import csv
import errno
import fcntl
import functools
import gzip
import importlib.util
import io
import json
import lzma
import os
import re
import shutil
import string
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import sample
import train
from data import files, prepare, shards
from data.cli import BadInput
from data.documents import documents
from data.files import replacing, write_json, writing
from data.maze import PAD, draw_maze, maze_dataset, maze_paths, maze_valid
from data.shards import Shards, Writer, changed_meta, read_meta
from data.teacher_cache import TeacherCache, truncated_logits
from data.vocab import Tokenizer, add_fingerprint, same_tokenizer, translate
from gumbel import posterior_times, sample_exponential
from teacher import AR, model_hash
from test_gumbel import (DOCS, LONG, SHARED, TINY, gen, interrupt_after, randomise, refused, run_in, same_dataset,
                         succeeded, tiny, tiny_ar)
from test_gumbel import cli, text_file, text_runs  # noqa: F401, the fixtures


def run(module, flags):
    """A command that succeeds, as from a shell: for fixtures that live longer than `cli`."""
    run_in(".", (module, flags))


def ids_of_documents(path, split):
    """The ids of each document of a dataset, without the EOS that must end it: a list of arrays."""
    meta, files = read_meta(str(path))
    ids = np.concatenate([np.fromfile(f["path"], dtype="<u2") for f in files if f["split"] == split])
    assert ids[-1] == meta["bos"]
    ends = np.flatnonzero(ids == meta["bos"])
    return [part[part != meta["bos"]] for part in np.split(ids, ends + 1)[:-1]]


def read_back(path, split):
    """The documents of a dataset of bytes, decoded without the project's tokenizer."""
    return [bytes(ids.astype(np.uint8)).decode() for ids in ids_of_documents(path, split)]


# ---------------------------------------------------------------------------------------------------------------------
# shards.py

MAZE_IDS = maze_paths().ravel()                            # what data/maze/train.bin holds: 20,000 ids


@pytest.fixture
def maze(tmp_path, cli, monkeypatch):
    """The folder data/maze, in a working folder of its own."""
    monkeypatch.chdir(tmp_path)
    assert cli(prepare, "maze")[0] == 0
    return tmp_path / "data/maze"


def shard_of(content):
    """A damage: these bytes in place of the shard."""
    return lambda folder: (folder / "train.bin").write_bytes(content)


def meta_with(**change):
    """A damage: other values in meta.json."""
    def damage(folder):
        meta = json.loads((folder / "meta.json").read_text())
        (folder / "meta.json").write_text(json.dumps(meta | change))
    return damage


def with_id(place, value):
    """A damage: one id of the shard is another."""
    ids = MAZE_IDS.copy()
    ids[place] = value
    return shard_of(ids.tobytes())


DAMAGED = [                                                # (damage, what the sentence names)
    pytest.param(shard_of(MAZE_IDS.tobytes()[:-7]), ["train.bin", "39993", "40000"], id="truncated"),
    pytest.param(shard_of(2 * MAZE_IDS.tobytes()), ["train.bin", "80000", "40000"], id="too long"),
    pytest.param(shard_of(np.full(20_000, 9, "<u2").tobytes()), ["train.bin", "9", "6"], id="ids of no vocabulary"),
    pytest.param(meta_with(files=[{}]), ["meta.json"], id="files without names"),
    pytest.param(meta_with(bos=99), ["meta.json", "99"], id="BOS outside the vocabulary"),
    pytest.param(meta_with(row_length=7), ["meta.json", "7"], id="rows that do not fill the file"),
    pytest.param(lambda folder: (folder / "train.bin").unlink(), ["maze/train.bin"], id="missing file"),
    pytest.param(lambda folder: (folder / "meta.json").write_text("{"), ["meta.json"], id="meta.json cut off"),
]


def entry_with(**change):
    """Other values in the first entry of `files`."""
    return dict(files=[dict(name="train.bin", split="train", tokens=20_000, sha256="0" * 64) | change])


META = [                                                   # (values in the maze's meta.json, what the sentence names)
    *((dict(name=v), ["name"]) for v in (None, 3)),
    *((dict(tokenizer=v), ["tokenizer"]) for v in (None, 3, [], "", "zzz", "gpt2", "bytes", "chars:ab")),
    *((dict(vocab_size=v), ["vocab_size"]) for v in (None, 0, -6, 6.0, "6", True, 7, 65_537, 10**30)),
    *((dict(bos=v), ["bos"]) for v in (None, 1.5, -1, "5", [5], True, 4, 6)),
    *((dict(predict_bos=v), ["predict_bos"]) for v in (None, 0, "no")),
    *((dict(row_length=v), ["row_length"]) for v in (0, -10, 10.0, "10", True)),
    *((dict(fingerprint=v), ["fingerprint"]) for v in (3, [])),
    *((dict(dtype=v), ["dtype"]) for v in (3, "uint32", "int16", "")),
    *((dict(files=v), ["files"]) for v in (None, {}, [], [None], "train.bin")),
    *((entry_with(name=v), ["name"]) for v in (None, "", ".", "..", "../secret.bin", "/etc/passwd", "a/b", "a\0", 3)),
    *((entry_with(split=v), ["split"]) for v in (None, "dev", 0, [])),
    *((entry_with(tokens=v), ["tokens"]) for v in (None, -10, 2.5, "20000", True)),
    *((entry_with(sha256=v), ["sha256"]) for v in (None, "", "0" * 63, "g" * 64, 0)),
]


@pytest.mark.parametrize("change, names", META, ids=[str(change)[:60] for change, _ in META])
def test_every_field_of_meta_json_is_checked(maze, cli, change, names):
    meta_with(**change)(maze)
    refused(cli(prepare, "verify data/maze"), "meta.json", *names)


def test_a_meta_json_that_is_no_object_is_refused(maze, cli):
    for content in (b"", b"[]", b"null", b"[" * 100_000, b"\xff", b'{"files": ' * 5000):
        (maze / "meta.json").write_bytes(content)
        refused(cli(prepare, "verify data/maze"), "meta.json")
    os.unlink(maze / "meta.json")
    os.mkdir(maze / "meta.json")
    refused(cli(prepare, "verify data/maze"), "meta.json")
    os.rmdir(maze / "meta.json")
    os.symlink("nowhere", maze / "meta.json")              # (its ids would else be taken for GPT-2's)
    refused(cli(prepare, "verify data/maze"), "meta.json")


def test_a_shard_that_is_a_folder_is_refused(maze, cli):
    os.unlink(maze / "train.bin")
    os.mkdir(maze / "train.bin")
    refused(cli(prepare, "verify data/maze"), "train.bin")
    os.unlink(maze / "meta.json")
    refused(cli(prepare, "verify data/maze"), "train.bin")


@pytest.mark.parametrize("damage, names", DAMAGED)
def test_training_refuses_a_damaged_dataset(maze, cli, damage, names):
    damage(maze)
    refused(cli(train, "--model=ar --data=maze"), *names)
    assert not os.path.exists("out")


def test_verify_finds_one_changed_id(maze, cli):
    with_id(7, 1)(maze)
    refused(cli(prepare, "verify data/maze"), "train.bin", "sha256")


def test_a_bad_id_far_from_the_ends_is_found_when_its_batch_is_read(maze, monkeypatch):
    """On opening, the first and last MiB are checked: here 100 ids each, of 20,000. Row 999 is ids 9990 to 9999."""
    with_id(9999, 8)(maze)
    monkeypatch.setattr(shards, "MIB_OF_IDS", 100)
    data = Shards("data/maze", "train")
    data.rows([998])
    with pytest.raises(BadInput, match=r"train\.bin.* 8\b"):
        data.rows([999])


def test_a_row_of_text_is_bos_and_the_next_tokens(text_file, tmp_path, cli):
    out = tmp_path / "mine"
    assert cli(prepare, f"text --files {text_file} --tokenizer=bytes --out={out}")[0] == 0
    ids = np.fromfile(out / "train.bin", dtype="<u2")
    data = Shards(str(out), "train", 9)
    assert len(data) == len(ids) // 8
    assert data.rows([1])[0].tolist() == [256, *ids[8:16]]


def llm_c(version=1, tokens=55, magic=20240520, first=1000, dtype="<u2"):
    """A shard of 55 tokens, counted from `first`, behind llm.c's header: a magic number, version, tokens, zeros."""
    header = np.zeros(256, "<i4")
    header[:3] = [magic, version, tokens]
    return header.tobytes() + np.arange(first, first + 55, dtype=dtype).tobytes()


def llama3(**how):
    """As `llm_c`, of Llama 3's ids."""
    return llm_c(**dict(version=7, magic=20240801, first=100_000, dtype="<u4") | how)


def test_foreign_shards_are_read_as_gpt2_ids_and_no_row_crosses_files(tmp_path):
    """nanoGPT's raw ids and llm.c's, without a meta.json. Rows of 10 tokens: 10 of the first file, 5 of the second,
    whose other 5 tokens fill no row."""
    for name in ("train_000.bin", "val.bin"):
        np.arange(100, dtype="<u2").tofile(tmp_path / name)
    (tmp_path / "train_001.bin").write_bytes(llm_c())
    data = Shards(str(tmp_path), "train", 11)
    assert len(data) == 15 and data.meta["vocab_size"] == 50257
    assert data.rows([10])[0].tolist() == [50256, *range(1000, 1010)]


def test_foreign_shards_are_said_to_be_taken_for_gpt2s_once_and_by_one_process(tmp_path, capsys, monkeypatch):
    np.arange(100, dtype="<u2").tofile(tmp_path / "train.bin")
    os.symlink(tmp_path, tmp_path / "other")
    for path in (tmp_path, tmp_path, tmp_path / "other"):
        read_meta(str(path))
        monkeypatch.setenv("LOCAL_RANK", "1")
    assert capsys.readouterr().err == f"{tmp_path} has no meta.json: its ids are taken for GPT-2's\n"


IDS = np.arange(1000, 1100)
FOREIGN = {                                                # (the content of a .bin, what the sentence names)
    "truncated": (llm_c(tokens=56), "1136"),               # bytes there should be: 1024 + 2 * 56
    "too few": (llm_c(tokens=54), "1132"), "a negative number of tokens": (llm_c(tokens=-1), "1134"),
    "cut within the header": (llm_c()[:1000], "1000"), "cut after a number": (llm_c()[:4], "header"),
    "unknown version": (llm_c(version=2), "2"), "version 7 of GPT-2's": (llm_c(version=7), "7"),
    "Llama 3's as uint16": (llama3(first=0, dtype="<u2"), "1244"), "Llama 3's, truncated": (llama3()[:-2], "1242"),
    "ids that Llama 3 has not": (llama3(first=128_250), "128256"),
    "hellaswag": (llm_c(magic=20240522), "20240522"),
    "a model of llm.c": (llm_c(magic=20240326, version=3), "20240326"),
    "odd number of bytes": (b"abc", "3"),
    "int32": (IDS.astype("<i4").tobytes(), "int32"), "int64": (IDS.astype("<i8").tobytes(), "int64"),
    "uint32 of a large vocabulary": ((100 * IDS).astype("<u4").tobytes(), "int32"),
    "gzip": (gzip.compress(IDS.tobytes()), "gz"), "xz": (lzma.compress(IDS.tobytes()), "xz"),
    "a model of torch": (b"PK\3\4" + bytes(100), "zip"), "ids of another vocabulary": (b"\xff\xf0" * 100, "61695")}


@pytest.mark.parametrize("content, word", FOREIGN.values(), ids=FOREIGN)
def test_foreign_files_that_are_no_ids_of_gpt2_are_refused(tmp_path, cli, content, word):
    (tmp_path / "train_000.bin").write_bytes(content)
    refused(cli(prepare, f"verify {tmp_path}"), "train_000.bin", word)
    with pytest.raises(BadInput, match=rf"train_000\.bin.*\b{word}\b"):
        Shards(str(tmp_path), "train", 11)


def test_shards_of_llm_c_may_hold_the_ids_of_llama_3(tmp_path, capsys, cli):
    (tmp_path / "train_000.bin").write_bytes(llama3())
    (tmp_path / "val.bin").write_bytes(llama3(first=0))
    data = Shards(str(tmp_path), "train", 11)
    assert (data.meta["vocab_size"], data.meta["bos"]) == (128256, 128000)
    assert data.meta["tokenizer"].startswith("hf:meta-llama/")
    assert data.rows([1])[0].tolist() == [128000, *range(100_010, 100_020)]
    assert Shards(str(tmp_path), "val", 11).rows([0])[0].tolist() == [128000, *range(10)]
    assert "Llama 3's" in capsys.readouterr().err
    (tmp_path / "train_001.bin").write_bytes(llm_c())
    refused(cli(prepare, f"verify {tmp_path}"), str(tmp_path), "GPT-2", "Llama 3")


def test_shards_beside_a_vocabulary_are_not_taken_for_gpt2s(tmp_path, cli):
    """nanoGPT's characters. A pickle is code: it is not read."""
    np.arange(60, dtype="<u2").tofile(tmp_path / "train.bin")
    (tmp_path / "meta.pkl").write_bytes(b"\x80\x04.")
    refused(cli(prepare, f"verify {tmp_path}"), "meta.pkl", "--tokenizer=chars")


@pytest.mark.parametrize("V, size", [(65_536, 2), (65_537, 4)])
def test_ids_are_wider_exactly_where_the_vocabulary_asks_for_it(tmp_path, V, size):
    """65,536 ids fit into a uint16; one more needs a uint32, which meta.json names. An interrupted run goes on."""
    meta = dict(name="wide", tokenizer="ids", vocab_size=V, bos=0, predict_bos=True, row_length=None)
    ids = np.arange(V - 100, V)
    for out, stop in (("whole", None), ("halves", 30)):
        with Writer(tmp_path / out, meta, key="mine", shard_tokens=64) as writer:
            writer.write("train", ids[:stop])
            writer.commit(1)
            if stop:
                writer.write("train", ids[:7])             # lost: not committed
        if stop:
            writer = Writer(tmp_path / out, meta, key="mine", shard_tokens=64)
            assert writer.done == 1
            with writer:
                writer.write("train", ids[stop:])
                writer.finish()
        else:
            with Writer(tmp_path / out, meta, key="mine", shard_tokens=64) as writer:
                writer.finish()
        assert (tmp_path / out / "train_000.bin").read_bytes() == ids[:64].astype(f"<u{size}").tobytes()
        assert (tmp_path / out / "train_001.bin").read_bytes() == ids[64:].astype(f"<u{size}").tobytes()
    found, _ = read_meta(str(tmp_path / "halves"))
    assert found == (meta if size == 2 else meta | dict(dtype="uint32"))
    data = Shards(str(tmp_path / "halves"), "train", 11)
    assert data.rows([5])[0].tolist() == [0, *range(V - 50, V - 40)]
    assert np.allclose(data.frequency()[-101:] * (V + 100), [1] + 100 * [2])


def many_words(folder, V):
    """A tokenizer of V ids as transformers keeps it: the words w0, w1, .., <s> and </s>."""
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"w{i}": i for i in range(V - 2)} | {"<s>": V - 2, "</s>": V - 1}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)


def test_a_vocabulary_of_more_than_65536_goes_all_the_way(tmp_path, cli, monkeypatch):
    """Prepared, verified, taught, cached, written by the teacher, learnt and sampled from."""
    monkeypatch.chdir(tmp_path)
    V = 70_000
    many_words("words", V)
    rng = np.random.default_rng(0)
    texts = [rng.integers(65_000, V - 2, rng.integers(5, 9)) for _ in range(60)]
    Path("text.txt").write_text("\n".join(" ".join(f"w{i}" for i in text) for text in texts))
    succeeded(cli(prepare, r"text --files text.txt --separator=\n --tokenizer=hf:words --out=data/mine"))
    succeeded(cli(prepare, "verify data/mine"))
    meta, files = read_meta("data/mine")
    assert (meta["vocab_size"], meta["bos"], meta["dtype"]) == (V, V - 2, "uint32")
    for f in files:
        assert os.path.getsize(f["path"]) == 4 * f["tokens"]
    found = np.concatenate([f["ids"] for f in files])
    assert sorted(found[found < V - 2]) == sorted(np.concatenate(texts))

    flags = f"--data=mine --length=8 --steps=2 {TINY} --batch_size=4"
    succeeded(cli(train, f"--model=ar --out=out/ar {flags}"))
    succeeded(cli(train, f"--gumbel --teacher=out/ar --teacher_cache=3 --out=out/student {flags}"))
    succeeded(cli(sample, "--ckpt=out/ar --n=20 --shards=data/written"))
    succeeded(cli(prepare, "verify data/written"))
    assert read_meta("data/written")[0]["dtype"] == "uint32"
    succeeded(cli(train, f"--gumbel --teacher=out/ar --out=out/other {flags} --data=written"))
    assert "sample 0" in succeeded(cli(sample, "--ckpt=out/student --n=1 --steps=2 --prompt=w69000"))[0]

    # what is cut off, or said to be of another type
    path = Path("data/mine/train.bin")
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])
    refused(cli(prepare, "verify data/mine"), "train.bin", str(len(whole)))
    path.write_bytes(whole)
    for dtype in ("uint16", None):
        meta_with(dtype=dtype)(Path("data/mine"))
        refused(cli(prepare, "verify data/mine"), "meta.json", "dtype")


# ---------------------------------------------------------------------------------------------------------------------
# vocab.py

@pytest.fixture
def gpt2_files(tmp_path, monkeypatch):
    """A copy of GPT-2's BPE files, which tiktoken finds: it may write beside them."""
    files = os.path.join(SHARED, "assets", "tiktoken_cache")
    if not os.path.isdir(files):
        pytest.skip("GPT-2's BPE files are absent")
    copy = tmp_path / "tiktoken"
    shutil.copytree(files, copy, copy_function=shutil.copyfile)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(copy))
    return copy


def test_text_comes_back_from_the_ids_of_gpt2(gpt2_files, text_file, tmp_path, cli):
    out = tmp_path / "mine"
    assert cli(prepare, f"text --files {text_file} --out={out}")[0] == 0
    ids = ids_of_documents(out, "train") + ids_of_documents(out, "val")
    assert read_meta(str(out))[0]["bos"] == 50256
    assert sorted(map(Tokenizer("gpt2").decode, ids)) == sorted(DOCS)


def test_the_pieces_of_a_document_have_the_tokens_of_the_whole(gpt2_files, tmp_path):
    text = 20 * (DOCS[0] + "\n\n  " + DOCS[2] + " don't  stop\t\tnow 123 45.6\n")
    (tmp_path / "b.txt").write_text(text)
    with open(tmp_path / "b.txt") as f:
        pieces = [piece for piece, _ in documents(f, "<|endoftext|>", piece=40)]
    whole = text.strip("\n")
    assert len(pieces) > 20 and "".join(pieces) == whole
    tokenizer = Tokenizer("gpt2")
    assert np.concatenate(tokenizer.encode(pieces)).tolist() == tokenizer.encode([whole])[0].tolist()


@pytest.mark.slow
def test_gpt2_has_one_fingerprint_through_tiktoken_and_transformers(gpt2_files, tmp_path):
    pytest.importorskip("transformers", reason="pip install transformers")
    os.mkdir(tmp_path / "gpt2")
    for file in gpt2_files.iterdir():                      # named by hashes: one is JSON, the other the merges
        content = file.read_bytes()
        name = "vocab.json" if content.startswith(b"{") else "merges.txt"
        (tmp_path / "gpt2" / name).write_bytes(content)
    (tmp_path / "gpt2" / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    theirs = Tokenizer(f"hf:{tmp_path}/gpt2")
    ours = Tokenizer("gpt2")
    assert (theirs.vocab_size, theirs.bos) == (ours.vocab_size, ours.bos)
    assert theirs.fingerprint() == ours.fingerprint()


def test_the_fingerprint_of_gpt2_stays_what_datasets_hold(gpt2_files):
    assert Tokenizer("gpt2").fingerprint() == "d8d083704e53b296"


def test_the_vocabulary_of_chars_is_the_characters_of_the_text(text_file, tmp_path, cli):
    out = tmp_path / "c"
    assert cli(prepare, f"text --files {text_file} --tokenizer=chars --out={out}")[0] == 0
    meta, _ = read_meta(str(out))
    chars = sorted(set("".join(DOCS)))
    assert meta["tokenizer"] == "chars:" + "".join(chars)
    assert meta["vocab_size"] == meta["bos"] + 1 == len(chars) + 1
    ids = ids_of_documents(out, "train") + ids_of_documents(out, "val")
    assert sorted(map(Tokenizer(meta["tokenizer"]).decode, ids)) == sorted(DOCS)


def write_bpe(folder, texts):
    """A small BPE tokenizer of exactly 120 ids, trained on texts, as transformers keeps it."""
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    tokenizers = pytest.importorskip("tokenizers")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"])
    bpe.train_from_iterator(texts, trainer)
    assert bpe.get_vocab_size() == 120
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)


@pytest.fixture
def bpe_metas(tmp_path, cli, monkeypatch, text_file):
    """The metas of three datasets, in their working folder: of the tokenizers one, two (of other words), copy (of one).
    """
    monkeypatch.chdir(tmp_path)
    write_bpe("one", LONG[:50] + [string.ascii_lowercase])
    write_bpe("two", [d.replace("w", "k") for d in LONG[:50]] + [string.ascii_lowercase])
    shutil.copytree("one", "copy")
    metas = {}
    for name in ("one", "two", "copy"):
        assert cli(prepare, f"text --files a.txt --tokenizer=hf:{name} --out=data/{name}")[0] == 0
        metas[name], _ = read_meta(f"data/{name}")
    return metas


def test_a_tokenizer_passes_for_itself_under_another_path_and_not_for_one_of_as_many_ids(bpe_metas):
    one, two, copy = bpe_metas.values()
    assert one["vocab_size"] == two["vocab_size"] == 120 and one["bos"] == two["bos"]
    assert same_tokenizer(one, two) is False
    assert one["tokenizer"] != copy["tokenizer"] and same_tokenizer(one, copy) is True


def test_a_model_gets_the_fingerprint_of_the_tokenizer_that_it_names_where_this_can_be_had(bpe_metas):
    one, two, _ = bpe_metas.values()
    assert add_fingerprint(one) is one                     # it has one
    model = dict(tokenizer="hf:copy", vocab_size=120)
    assert same_tokenizer(model, one) is None
    assert same_tokenizer(add_fingerprint(model), one) is True
    assert same_tokenizer(add_fingerprint(model), two) is False
    for name in ("hf:nowhere", "ids"):
        model = dict(tokenizer=name, vocab_size=120)
        assert add_fingerprint(model) == model and same_tokenizer(model, one) is None


def test_every_dataset_holds_the_fingerprint_of_its_tokenizer(tmp_path, cli, monkeypatch, text_file):
    monkeypatch.chdir(tmp_path)
    found = {}
    for name, flags in {"bytes": "text --files a.txt --tokenizer=bytes",
                        "chars": "text --files a.txt --tokenizer=chars",
                        "maze": "maze",
                        "lm1b": "lm1b --files a.txt --tokenizer=bytes",
                        "zeroshot": "zeroshot ag_news --files a.txt --tokenizer=bytes"}.items():
        assert cli(prepare, f"{flags} --out={name}")[0] == 0
        meta, _ = read_meta(name)
        found[name] = meta["fingerprint"]
        assert found[name] == Tokenizer(meta["tokenizer"]).fingerprint()
        assert found[name] == json.loads(Path(name, "meta.json").read_text())["fingerprint"]
    assert found["bytes"] == found["lm1b"] == found["zeroshot"]
    assert len({found["bytes"], found["chars"], found["maze"]}) == 3
    assert Tokenizer("chars:ab").fingerprint() != Tokenizer("chars:ba").fingerprint()      # ids are places


CONTROL = "price <s>old</s> <|endoftext|></s>"             # in plain text, these are characters


def hf_tokenizers(folder):
    """Names of small tokenizers of every model that `tokenizers` trains, on words among which control tokens are."""
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    tokenizers = pytest.importorskip("tokenizers")
    models = tokenizers.models
    trainers = tokenizers.trainers
    before = tokenizers.pre_tokenizers
    how = dict(vocab_size=130, special_tokens=["<unk>", "<s>", "</s>"])
    kinds = {
        "BPE": (models.BPE(unk_token="<unk>"), trainers.BpeTrainer(**how), before.Metaspace()),
        "Unigram": (models.Unigram(), trainers.UnigramTrainer(**how, unk_token="<unk>"), before.Metaspace()),
        "WordLevel": (models.WordLevel(unk_token="<unk>"), trainers.WordLevelTrainer(**how), before.WhitespaceSplit())}
    words = [f"x {CONTROL} <s> </s> y"] * 20 + [string.ascii_letters + string.punctuation]
    for name, (model, trainer, splitter) in kinds.items():
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.pre_tokenizer = splitter
        tokenizer.decoder = tokenizers.decoders.Metaspace()
        tokenizer.train_from_iterator(words, trainer)
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>",
                                                    eos_token="</s>")
        fast.save_pretrained(f"{folder}/{name}")
    write_bpe(f"{folder}/ByteLevel", words + LONG[:50])
    return [f"hf:{folder}/{name}" for name in (*kinds, "ByteLevel")]


@pytest.fixture(params=["gpt2", "others"])
def tokenizers(request, tmp_path):
    """Names of tokenizers: GPT-2's, where its files are, and all others (bytes come last)."""
    if request.param == "gpt2":
        request.getfixturevalue("gpt2_files")
        return ["gpt2", "bytes"]
    return [*hf_tokenizers(tmp_path), "chars:" + "".join(sorted(set(CONTROL + "The union are"))), "bytes"]


def test_control_tokens_pass_through_text_in_neither_direction(tokenizers):
    """Not from a text into ids, though some models know "<s>" as a word of theirs; and not from ids into a text."""
    for name in tokenizers:
        tokenizer = Tokenizer(name)
        ids = tokenizer.encode([CONTROL, "price"])[0].tolist()
        assert not tokenizer.ends & set(ids), name
        if "WordLevel" not in name:                        # it knows words only
            assert tokenizer.decode(ids) == CONTROL, name
        ends = list(tokenizer.ends)
        assert tokenizer.decode([*ends, *ids, *ends]) == tokenizer.decode(ids), name
        assert tokenizer.decode(ends) == "", name
        assert len(ends) == (2 if name.startswith("hf:") else 1)


def test_a_row_goes_to_another_tokenizer_with_an_eos_for_an_eos(tokenizers):
    for a in map(Tokenizer, [name for name in tokenizers if "WordLevel" not in name]):
        one, two = [ids.tolist() for ids in a.encode(["The union", "are"])]
        row = [a.bos, *one, a.bos, a.bos, *two, max(a.ends)]
        for b in map(Tokenizer, tokenizers):
            want_one, want_two = [ids.tolist() for ids in b.encode([a.decode(one), a.decode(two)])]
            want = [b.bos, *want_one, b.bos, b.bos, *want_two, b.bos]
            assert translate(row, a, b) == translate(torch.tensor(row), a, b) == want, (a.name, b.name)
            assert translate([a.bos] * 3, a, b) == translate([], a, b) == [b.bos]
            assert translate(one, a, b) == want_one


@pytest.mark.parametrize("file, content, word", [
    ("tokenizer_config.json", {"bos_token": ["<s>"]}, "hf:one"), ("tokenizer_config.json", [], "hf:one"),
    ("tokenizer.json", {"model": 3}, "hf:one"), ("tokenizer.json", {}, "hf:one")])
def test_a_damaged_tokenizer_of_hugging_face_is_refused(tmp_path, monkeypatch, file, content, word):
    monkeypatch.chdir(tmp_path)
    write_bpe("one", LONG[:50])
    old = json.loads(Path("one", file).read_text())
    Path("one", file).write_text(json.dumps(old | content if content else content))
    with pytest.raises(BadInput, match=word):
        Tokenizer("hf:one")


def test_the_bos_of_a_tokenizer_is_one_of_its_ids(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    write_bpe(f"{tmp_path}/one", LONG[:50] + [string.ascii_lowercase])
    for bos in (-1, 120, [1, 2], 1.0, None):
        for name in ("bos_token_id", "eos_token_id"):
            monkeypatch.setattr(transformers.PreTrainedTokenizerFast, name, bos, raising=False)
        with pytest.raises(BadInput, match=re.escape(f"{tmp_path}/one has the BOS (or EOS) {bos}")):
            Tokenizer(f"hf:{tmp_path}/one")


BYTES_META = dict(name="mine", tokenizer="bytes", vocab_size=257, bos=256, fingerprint="5f")


def test_a_dataset_older_than_fingerprints_is_known_by_the_name_of_its_tokenizer(maze):
    """And by nothing where the names differ: bytes and maze may be the same, for all that is known."""
    meta_of_maze, _ = read_meta("data/maze")
    content = json.loads((maze / "meta.json").read_text())
    del content["fingerprint"]
    (maze / "meta.json").write_text(json.dumps(content))
    old, _ = read_meta("data/maze")
    assert "fingerprint" not in old
    assert same_tokenizer(old, meta_of_maze) is True
    assert same_tokenizer(meta_of_maze, old) is True
    assert same_tokenizer(old, old) is True
    assert same_tokenizer(old, BYTES_META) is None
    assert changed_meta(old, meta_of_maze) == changed_meta(meta_of_maze, old) == []


@pytest.mark.parametrize("change", [{"name": "x", "bos": 1}, {"fingerprint": "x"}])
def test_changed_meta_names_the_keys_that_differ(change):
    assert changed_meta(BYTES_META | change, BYTES_META) == list(change)


# ---------------------------------------------------------------------------------------------------------------------
# documents.py and prepare.py: the maze

def test_the_maze_has_2000_distinct_paths_of_5_7_or_9_moves():
    paths = maze_paths()
    assert paths.shape == (2000, 10) and len(np.unique(paths, axis=0)) == 2000
    lengths = (paths != PAD).sum(1)
    assert [int((lengths == k).sum()) for k in (5, 7, 9)] == [9, 146, 1845]
    assert (paths[:, 9] == PAD).all()


def test_every_path_walks_over_free_cells_until_it_first_reaches_the_target():
    """An independent walk: rows and columns from 0 to 5, S in (2, 1), T in (4, 4), walls where MAZE has #."""
    moves = {0: (-1, 0), 1: (1, 0), 2: (0, -1), 3: (0, 1)}             # U D L R
    for path in maze_paths().tolist():
        r, c = 2, 1
        while path[0] != 4:
            assert (r, c) != (4, 4)
            dr, dc = moves[path.pop(0)]
            r += dr
            c += dc
            assert 0 <= r < 6 and 0 <= c < 6 and (r, c) not in {(2, 0), (2, 4), (5, 2)}
        assert (r, c) == (4, 4) and set(path) == {4}


def test_only_the_paths_are_valid():
    """Not: all PAD, all BOS, an id of no token, a move after the target, a path that ends one cell before it."""
    assert maze_valid(maze_paths()).all()
    bad = np.array([[4] * 10, [5] * 10, [6] * 10, [1, 1, 3, 3, 3, 4, 4, 4, 4, 0], [1, 1, 3, 3, 4, 4, 4, 4, 4, 4]])
    assert not maze_valid(bad).any()


def test_the_maze_has_a_total_correlation_of_4_86_bits():
    """The sum of the entropies of the ten places, less the entropy of the 2000 equally likely paths."""
    marginals = np.stack([(maze_paths() == k).mean(0) for k in range(5)])
    entropies = -marginals * np.log2(np.where(marginals > 0, marginals, 1))
    assert abs(entropies.sum() - np.log2(2000) - 4.86) < 0.01


def test_the_skewed_maze_has_about_140_paths_and_4_06_bits():
    _, count = np.unique(maze_dataset("maze_skewed"), axis=0, return_counts=True)
    p = count / 2000
    assert 130 <= len(count) <= 150 and abs(-(p * np.log2(p)).sum() - 4.06) < 0.05


def test_prepare_maze_writes_the_paths(maze, cli):
    data = Shards("data/maze", "train")
    assert len(data) == 2000 and data.length == 11
    rows = data.rows([0, 5, 1999])
    assert (rows[:, 0] == 5).all()
    assert (rows[:, 1:] == maze_paths()[[0, 5, 1999]]).all()
    code, out, _ = cli(prepare, "verify data/maze")
    assert code == 0
    assert out == "data/maze/train.bin: 20000 tokens, ok\ndata/maze/val.bin: 20000 tokens, ok\n"


def test_a_drawn_path_says_how_it_ends():
    assert "leaves the free cells" in draw_maze([0] * 10)
    assert "reaches T in 5 moves" in draw_maze(maze_paths()[0])


# ---------------------------------------------------------------------------------------------------------------------
# documents.py and prepare.py: any text

FORTY = [f"d/{i:03d}.txt" for i in range(40)]             # a text file for each document


def write_jsonl(path, docs):
    Path(path).write_text("".join(json.dumps({"text": d}) + "\n" for d in docs))


def write_tar(path, names, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name in names:
            tar.add(name)


def write_hub(folder, field="story", **splits):
    """A local folder that `datasets` streams like a dataset of the hub: a column beside the text, many row groups."""
    pa = pytest.importorskip("pyarrow", reason="pip install pyarrow")
    import pyarrow.parquet
    os.mkdir(folder)
    for split, docs in splits.items():
        table = pa.table({"other": [1] * len(docs), field: docs})
        pyarrow.parquet.write_table(table, f"{folder}/{split}.parquet", row_group_size=7)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A working folder with every kind of input, whole and damaged, and a tiny run out/c on the characters of data/c.
    """
    folder = tmp_path_factory.mktemp("inputs")
    separator = "\n<|endoftext|>\n"
    others = [doc.replace("e", "\u2603") for doc in DOCS]
    contents = {"a.txt": separator.join(DOCS).encode(), "o.txt": separator.join(others).encode(),
                "latin": "caf\u00e9".encode("latin-1"), "empty.txt": b"\n\n", "null.jsonl": b'{"text": null}',
                "array.jsonl": b'[{"text": "a"}]', "n.json": b"{", "cut.gz": gzip.compress(b"word " * 999)[:-9],
                "bad.xz": b"no xz", "cut.tar": b"no tar" * 200, "cut.parquet": b"PAR1"}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    with pytest.MonkeyPatch.context() as m:
        m.chdir(folder)
        # the same forty documents in all the ways in which text may come
        write_jsonl("x.jsonl", LONG[:40])
        Path("x.jsonl.gz").write_bytes(gzip.compress(Path("x.jsonl").read_bytes()))
        os.mkdir("d")
        for name, doc in zip(FORTY, LONG):
            Path(name).write_text(doc)
        write_tar("x.tar", FORTY)
        with tarfile.open("x.tar") as tar:
            _, second, *_ = tar.getmembers()
        Path("header.tar").write_bytes(Path("x.tar").read_bytes()[:second.offset + 100])       # of a header's 512 bytes
        packed = lzma.compress(Path("x.tar").read_bytes())
        for name in ("x.tar.xz", "urlsf_subset00_data.xz"):
            Path(name).write_bytes(packed)
        write_tar("openwebtext.tar", ["urlsf_subset00_data.xz"])       # as OpenWebText comes: a tar of packed tars
        if importlib.util.find_spec("pyarrow"):
            write_hub("hub", "text", train=LONG[:40])
            write_hub("whole", train=LONG[:40])
            write_hub("test_only", test=LONG[:30], validation=LONG[30:40])
            write_hub("null", train=["a", None, "b"])
        run(prepare, "maze")
        run(prepare, "text --files a.txt --tokenizer=chars --out=data/c")
        run(prepare, "text --files o.txt --tokenizer=chars --out=data/o")
        run(train, f"--model=ar --data=c --length=8 --steps=2 --out=out/c {TINY}")
        # so that nothing but the characters tells them apart
        assert read_meta("data/c")[0]["vocab_size"] == read_meta("data/o")[0]["vocab_size"]
    return folder


def test_text_comes_back_from_bytes(text_file, tmp_path, cli):
    """A quarter of four documents is held out: one."""
    out = tmp_path / "mine"
    code, _, err = cli(prepare, f"text --files {text_file} --tokenizer=bytes --out={out} --val_fraction=0.25")
    assert code == 0 and "4 documents (1 for validation)" in err
    val = read_back(out, "val")
    assert len(val) == 1 and sorted(read_back(out, "train") + val) == sorted(DOCS)
    meta = json.loads((out / "meta.json").read_text())
    assert (meta["vocab_size"], meta["bos"], meta["row_length"], meta["tokenizer"]) == (257, 256, None, "bytes")
    assert cli(prepare, f"verify {out}")[0] == 0


def test_documents_are_the_same_at_every_block_size():
    """The separator may straddle blocks anywhere; empty documents vanish; bytes that are not UTF-8 survive."""
    body = b"a b c\n<|endoftext|>\n\n<|endoftext|>d \xff e" + b" w" * 30 + b"<|endoftext|>f\n"
    for piece in range(1, 90):
        docs = []
        current = ""
        f = io.TextIOWrapper(io.BytesIO(body), encoding="utf-8", errors="surrogateescape", newline="")
        for text, ends in documents(f, "<|endoftext|>", piece=piece):
            current += text
            if ends:
                docs.append(current.encode("utf-8", "surrogateescape"))
                current = ""
        assert docs == [b"a b c", b"d \xff e" + b" w" * 30, b"f"] and not current, piece


def test_a_file_longer_than_a_block_is_cut_at_its_separator_alone(tmp_path, cli, monkeypatch):
    """1.5 MB, read in blocks of 1 MiB; the separator has two bytes, the folder's name a slash."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "long").write_text("word " * 300_000 + "\u00a7" + "tail", encoding="utf-8")
    assert cli(prepare, "text --files long --tokenizer=bytes --out=odd/ --separator=\u00a7")[0] == 0
    assert sorted(read_back("odd", "train") + read_back("odd", "val")) == ["tail", "word " * 300_000]
    code, _, err = cli(prepare, "text --files long long --tokenizer=bytes --out=p --separator=")
    assert code == 0 and "2 documents" in err              # no separator: each file is one


def test_an_interrupted_run_leaves_nothing_that_training_accepts(text_file, tmp_path, cli, monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Writer, "finish", interrupted)
    assert cli(prepare, "text --files a.txt --tokenizer=bytes --out=o")[0] == 130
    assert not os.path.exists("o") and not os.path.exists("o.partial")      # nothing was committed
    with pytest.raises(BadInput, match=r"--out=o\b"):
        Shards("o", "train", 5)


# ---------------------------------------------------------------------------------------------------------------------
# documents.py and prepare.py: interrupted and continued

@pytest.fixture
def in_parts(tmp_path, monkeypatch):
    """Batches of 9000 characters and shards of 10,000 tokens: LONG, 100,000 characters, has many of them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare, "write_text", functools.partial(prepare.write_text, batch_chars=9000))
    monkeypatch.setattr(Writer.__init__, "__defaults__", (None, 10_000))
    write_jsonl("x.jsonl", LONG)


def interrupted(cli, monkeypatch, flags):
    """Run a command that is interrupted after its fifth commit."""
    with monkeypatch.context() as m:
        interrupt_after(m, 5)
        assert cli(prepare, flags)[0] == 130


INTERRUPTED = [                                            # (flags, so many of the last are validation, what is said)
    ("text --files x.jsonl", None, "400 documents (8 for validation)"),    # None: chosen at random
    ("openwebtext --files x.jsonl --val_documents=7", 7, ""),
    ("text --hub=./whole --field=story --val_documents=7", 7, "the last 7 documents"),
    ("text --hub=./split --field=story", 100, "its split validation")]


@pytest.mark.parametrize("flags, n_val, said", INTERRUPTED, ids=["text", "openwebtext", "hub", "hub with validation"])
def test_an_interrupted_run_continues_to_the_same_bytes(in_parts, cli, monkeypatch, flags, n_val, said):
    """What was written after the last commit is dropped. Compared with one go, and with the documents that came in."""
    if "--hub" in flags:
        pytest.importorskip("datasets", reason="pip install datasets")
        write_hub("whole", train=LONG)
        write_hub("split", train=LONG[:300], validation=LONG[300:])
    flags += " --tokenizer=bytes"
    assert cli(prepare, f"{flags} --out=a")[0] == 0
    interrupted(cli, monkeypatch, f"{flags} --out=b")
    assert json.loads(Path("b.partial/progress.json").read_text())["done"] > 10
    last = sorted(Path("b.partial").glob("*.bin"))[-1]
    with open(last, "ab") as f:
        f.write(b"garbage")
    code, _, err = cli(prepare, f"{flags} --out=b")
    assert code == 0 and "continuing" in err and said in err
    assert same_dataset("a", "b") and cli(prepare, "verify b")[0] == 0
    train_docs = read_back("b", "train")
    val_docs = read_back("b", "val")
    if n_val is None:
        assert len(val_docs) == 8 and sorted(train_docs + val_docs) == sorted(LONG)
    else:
        assert train_docs == LONG[:-n_val] and val_docs == LONG[-n_val:]


@pytest.mark.parametrize("what", ["text", "openwebtext --val_documents=7"])
def test_a_run_on_other_input_is_refused(in_parts, cli, monkeypatch, what):
    """What an interrupted run has written is not thrown away without a word: `sizes` are the files'."""
    flags = f"{what} --files x.jsonl --tokenizer=bytes --out=b"
    interrupted(cli, monkeypatch, flags)
    with open("x.jsonl", "a") as f:
        f.write(json.dumps({"text": "one more"}) + "\n")
    before = sorted(os.listdir("b.partial"))
    refused(cli(prepare, flags), "b.partial", "sizes")
    assert sorted(os.listdir("b.partial")) == before


def test_a_run_that_was_killed_while_it_hashed_encodes_nothing_again(tmp_path, cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Writer.__init__, "__defaults__", (None, 2000))     # tokens of a shard
    write_jsonl("x.jsonl", LONG[:40])
    flags = "openwebtext --files x.jsonl --tokenizer=bytes --val_documents=9"
    assert cli(prepare, f"{flags} --out=a")[0] == 0

    def killed(*args):
        raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(shards, "sha256", killed)
        assert cli(prepare, f"{flags} --out=b")[0] == 130

    def encode(self, texts):
        raise AssertionError(f"{len(texts)} texts are encoded again")
    monkeypatch.setattr(Tokenizer, "encode", encode)
    assert cli(prepare, f"{flags} --out=b")[0] == 0
    assert same_dataset("a", "b")


# ---------------------------------------------------------------------------------------------------------------------
# documents.py and prepare.py: the paper's datasets

KINDS = ["--files x.jsonl", "--files x.jsonl.gz", "--files hub/train.parquet", "--files d", "--files x.tar",
         "--files x.tar.xz", "--files openwebtext.tar", "--hub=./hub", "--files " + " ".join(FORTY)]


@pytest.mark.parametrize("source", KINDS, ids=[source[:25] for source in KINDS])
def test_openwebtext_from_any_kind_of_input_has_its_last_documents_held_out(inputs, tmp_path, cli, monkeypatch, source):
    if "hub" in source:
        pytest.importorskip("pyarrow", reason="pip install pyarrow")
    if "--hub" in source:
        pytest.importorskip("datasets", reason="pip install datasets")
    monkeypatch.chdir(inputs)
    out = tmp_path / "o"
    code, _, err = cli(prepare, f"openwebtext {source} --tokenizer=bytes --val_documents=3 --out={out}")
    assert code == 0, err
    assert read_back(out, "train") == LONG[:37] and read_back(out, "val") == LONG[37:40]
    assert cli(prepare, f"verify {out}")[0] == 0


def packed(name, content, kind="w"):
    """The bytes of a tar of one file."""
    f = io.BytesIO()
    with tarfile.open(fileobj=f, mode=kind) as tar:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    return f.getvalue()


def table(delimiter, *rows):
    f = io.StringIO(newline="")
    csv.writer(f, delimiter=delimiter).writerows(rows)
    return f.getvalue().encode()


TWO = ["Once, \"upon\"\na time.", "The end."]             # two documents, which every file below holds
TEXT = "<|endoftext|>".join(TWO).encode()
JSONL = "".join(json.dumps({"text": doc, "label": 0}) + "\n" for doc in TWO).encode()
CSV = table(",", ["text"], *[[doc] for doc in TWO])
TWO_COLUMNS = table(",", ["label", "text"], *[["3", doc] for doc in TWO])
SAME = {                                                   # name: (content, flags)
    "a.txt": (TEXT, ""), "mark.txt": (b"\xef\xbb\xbf" + TEXT, ""),
    "a.jsonl": (JSONL, ""), "mark.json": (b"\xef\xbb\xbf" + JSONL, ""),
    "gap.jsonl": (JSONL.replace(b"\n", b"\n\n"), ""),
    "body.jsonl": (JSONL.replace(b"text", b"body"), "--field=body"),
    # tables
    "one.csv": (CSV, ""), "two.csv": (TWO_COLUMNS, ""), "given.csv": (TWO_COLUMNS, "--field=text"),
    "body.CSV": (table(",", ["a", "body"], *[["", doc] for doc in TWO]), "--field=body"),
    "mark.csv": (b"\xef\xbb\xbf" + CSV, ""),
    "gap.csv": (b"\r\n" + CSV.replace(b"The end", b"\r\nThe end"), ""),
    "a.tsv": (table("\t", ["text", "label"], *[[doc, "3"] for doc in TWO]), ""), "a.tsv.gz": (gzip.compress(CSV), ""),
    # packed, and named so
    "a.txt.gz": (gzip.compress(TEXT), ""), "a.txt.xz": (lzma.compress(TEXT), ""), "a.txt.bz2": (bz2.compress(TEXT), ""),
    "a.csv.bz2": (bz2.compress(TWO_COLUMNS), ""), "a.tar": (packed("a.csv", CSV), ""),
    "a.tgz": (gzip.compress(packed("a.jsonl", JSONL)), ""), "a.tar.bz2": (bz2.compress(packed("a.txt", TEXT)), ""),
    "a.tbz2": (bz2.compress(packed("a.tsv", CSV)), ""), "a.txz": (lzma.compress(packed("a.txt", TEXT)), ""),
    "in.tar": (packed("a.gz", gzip.compress(TEXT)), ""),
    # packed, and named otherwise
    "gz": (gzip.compress(TEXT), ""), "gz.txt": (gzip.compress(TEXT), ""), "gz.jsonl": (gzip.compress(JSONL), ""),
    "gz.xz": (gzip.compress(TEXT), ""), "xz.csv": (lzma.compress(CSV), ""), "bz2.txt": (bz2.compress(TEXT), ""),
    "tar.txt": (packed("a.txt", TEXT), ""), "tar.gz": (packed("a.txt", TEXT), ""),
    "tar": (gzip.compress(packed("a", TEXT)), "")}


@pytest.mark.parametrize("tokenizer", ["bytes", "chars"])
@pytest.mark.parametrize("name", SAME)
def test_every_kind_of_file_holds_the_same_documents(tmp_path, cli, monkeypatch, name, tokenizer):
    """Known by what it holds, with the header of a table dropped, and --field read."""
    monkeypatch.chdir(tmp_path)
    content, flags = SAME[name]
    Path(name).write_bytes(content)
    code, _, err = cli(prepare, f"text --files {name} {flags} --tokenizer={tokenizer} --out=o")
    assert code == 0, err
    decode = Tokenizer(read_meta("o")[0]["tokenizer"]).decode
    ids = ids_of_documents("o", "train") + ids_of_documents("o", "val")
    assert sorted(map(decode, ids)) == sorted(TWO)


def test_parquet_is_known_by_its_content(tmp_path, cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_hub("hub", "body", train=TWO)
    os.rename("hub/train.parquet", "parquet.txt")
    assert cli(prepare, "text --files parquet.txt --field=body --tokenizer=bytes --out=o")[0] == 0
    assert sorted(read_back("o", "train") + read_back("o", "val")) == sorted(TWO)
    refused(cli(prepare, "text --files parquet.txt --tokenizer=bytes --out=p"), "parquet.txt", "--field", "other, body")


HALVES = ["a \ud83d b", "a \udcff b", "\ude00\ud83d", "\ud83d\ude00", "plain"]
REPAIRED = ["a \ufffd b", "a \ufffd b", "\ufffd\ufffd", "\U0001f600", "plain"]


@pytest.mark.parametrize("tokenizer", ["bytes", "chars", "gpt2"])
def test_half_a_surrogate_pair_is_repaired_at_the_door(tmp_path, cli, monkeypatch, request, tokenizer):
    if tokenizer == "gpt2":
        request.getfixturevalue("gpt2_files")
    monkeypatch.chdir(tmp_path)
    write_jsonl("x.jsonl", HALVES)
    assert cli(prepare, f"text --files x.jsonl --tokenizer={tokenizer} --out=o")[0] == 0
    decode = Tokenizer(read_meta("o")[0]["tokenizer"]).decode
    ids = ids_of_documents("o", "train") + ids_of_documents("o", "val")
    assert sorted(map(decode, ids)) == sorted(REPAIRED)


def fake_hub(monkeypatch, rows):
    """A hub's dataset of these rows, in the place of the package."""
    fake = argparse.Namespace(get_dataset_split_names=lambda *args, **kw: ["train"],
                              load_dataset=lambda *args, **kw: rows)
    monkeypatch.setitem(sys.modules, "datasets", fake)


def test_a_hub_has_the_same_door(tmp_path, cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = "text --hub=a/b --tokenizer=bytes --val_documents=1 --out=o"
    for rows, word in (([{"text": None}], "None"), ([{"body": "a"}], "'text'"), ([{"text": ["a"]}], "['a']")):
        fake_hub(monkeypatch, rows)
        refused(cli(prepare, flags), "--hub=a/b", "--field", word)
    fake_hub(monkeypatch, [{"text": half} for half in HALVES])
    assert cli(prepare, flags)[0] == 0
    assert read_back("o", "train") + read_back("o", "val") == REPAIRED


def test_bytes_that_are_not_utf8_come_back_from_plain_files(tmp_path, cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a").write_bytes(b"a \xff\xed\xa0\xbd b<|endoftext|>c \x80")
    assert cli(prepare, "text --files a --tokenizer=bytes --out=o")[0] == 0
    ids = ids_of_documents("o", "train") + ids_of_documents("o", "val")
    assert sorted(bytes(part.astype(np.uint8)) for part in ids) == [b"a \xff\xed\xa0\xbd b", b"c \x80"]


def test_a_field_of_a_table_may_be_long(tmp_path, cli, monkeypatch):
    """Longer than Python's own limit of 131,072 characters."""
    monkeypatch.chdir(tmp_path)
    Path("x.csv").write_bytes(table(",", ["text"], ["word " * 100_000], ["b"]))
    assert cli(prepare, "text --files x.csv --tokenizer=bytes --out=o")[0] == 0
    assert sorted(read_back("o", "train") + read_back("o", "val")) == ["b", "word " * 100_000]


AG_NEWS = [["3", "Title", "Body, of it."], ["4", "Another", "one"]]


@pytest.mark.parametrize("content, words", [
    (table(",", *AG_NEWS), "Title Body, of it.Another one"),           # as published
    (table(",", ["Class Index", "Title", "Description"], *AG_NEWS), "Title Body, of it.Another one"),
    (table(",", ["label", "text"], ["2", "a"], ["1", "b"]), "ab")])
def test_ag_news_comes_with_and_without_names_of_columns(tmp_path, cli, monkeypatch, content, words):
    monkeypatch.chdir(tmp_path)
    Path("x.csv").write_bytes(content)
    assert cli(prepare, "zeroshot ag_news --files x.csv --tokenizer=bytes --out=o")[0] == 0
    assert Tokenizer("bytes").decode(np.fromfile("o/val.bin", dtype="<u2")) == words
    refused(cli(prepare, "zeroshot ag_news --files x.csv --field=body --tokenizer=bytes --out=p"), "x.csv", "'body'")


@pytest.mark.parametrize("source", ["lm1b.tar.gz", "training heldout"])
def test_lm1b_is_detokenised_and_its_heldout_files_are_val(tmp_path, cli, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    os.mkdir("training")
    os.mkdir("heldout")
    Path("training/news.en-00001-of-00100").write_text("He said , \" it 's late \" .\nWho knows ?\n")
    Path("heldout/news.en.heldout-00000-of-00050").write_text("( Reuters ) It cost $ 5 .\n")
    write_tar("lm1b.tar.gz", ["training", "heldout"], "w:gz")
    assert cli(prepare, f"lm1b --files {source} --tokenizer=bytes --out=o")[0] == 0
    assert read_back("o", "train") == ['He said, "it\'s late" .', "Who knows?"]
    assert read_back("o", "val") == ["(Reuters) It cost $5."]


@pytest.mark.skipif(not os.path.isdir(os.path.join(SHARED, "assets", "zeroshot")),
                    reason="the evaluation sets are absent")
@pytest.mark.parametrize("name, file, words", [
    ("ptb", "ptb.test.txt", "no it wasn't black monday"),
    ("wikitext", "wikitext2.test.txt", "English film, television and theatre actor."),
    ("ag_news", "ag_news_test.csv", "Fears for T N pension after talks Unions")])
def test_a_zeroshot_set_is_one_detokenised_stream_without_eos(tmp_path, cli, monkeypatch, name, file, words):
    """Real files; `words` are there as the detokeniser leaves them; evaluation reads rows of its val split."""
    monkeypatch.chdir(tmp_path)
    assert cli(prepare, f"zeroshot {name} --files {SHARED}/assets/zeroshot/{file} --tokenizer=bytes")[0] == 0
    ids = np.fromfile(f"data/zeroshot-{name}/val.bin", dtype="<u2")
    assert (ids < 256).all()
    text = bytes(ids.astype(np.uint8)).decode()
    assert words in text
    if name == "ptb":
        assert " n't" not in text
    assert Shards(f"data/zeroshot-{name}", "val", 1024).rows([3]).shape == (1, 1024)


# ---------------------------------------------------------------------------------------------------------------------
# documents.py and prepare.py: what is refused

BYTES = "text --files a.txt --tokenizer=bytes"
OWT = "openwebtext --tokenizer=bytes --out=p"
HUB = "text --hub=./whole --out=c"
STORY = "--tokenizer=bytes --field=story"

REFUSED = [                                                # (command, flags, what the sentence names)
    (prepare, "imagenet", ["imagenet", "maze_skewed"]),
    (prepare, "maze", ["data/maze", "--out"]),
    (prepare, "verify nowhere", ["nowhere"]),
    # text
    (prepare, "text --files nowhere.txt --tokenizer=bytes --out=o", ["--files", "nowhere.txt"]),
    (prepare, "text --files a.txt --tokenizer=bpe --out=o", ["'bpe'", "gpt2", "bytes"]),
    (prepare, "text --files latin a.txt --tokenizer=chars --out=o", ["latin", "UTF-8", "--tokenizer=bytes"]),
    (prepare, "text --files x.jsonl --val_documents=3 --out=o", ["--val_documents", "--files"]),
    (prepare, "text --tokenizer=bytes --out=o", ["--files", "--hub"]),
    (prepare, f"{BYTES} --out=o --separator=@@@", ["--files", "1", "--separator"]),
    (prepare, f"{BYTES} --out=o --separator=\\", ["--separator", r"'\\'"]),
    (prepare, f"{BYTES} --out=o --val_fraction=0", ["--val_fraction", "0.5"]),
    (prepare, f"{BYTES} --out=o --seed=-1", ["--seed", "-1", "0"]),
    (prepare, f"{BYTES} --out=a.txt", ["a.txt", "--out"]),
    (prepare, f"{BYTES} --out=data/maze", ["data/maze", "--out"]),
    # openwebtext, of 40 documents
    (prepare, f"{OWT} --files x.jsonl", ["40", "100000", "--val_documents"]),
    (prepare, f"{OWT} --files x.jsonl --val_documents=40", ["40", "--val_documents"]),
    (prepare, f"{OWT} --files x.jsonl --field=body", ["x.jsonl", "'body'"]),
    (prepare, f"{OWT} --files cut.parquet", ["cut.parquet"]),
    (prepare, f"{OWT} --files null.jsonl", ["null.jsonl"]),
    (prepare, f"{OWT} --files array.jsonl", ["array.jsonl"]),
    (prepare, f"{OWT} --files cut.gz", ["cut.gz"]),
    (prepare, f"{OWT} --files bad.xz", ["bad.xz"]),
    (prepare, f"{OWT} --files n.json", ["n.json"]),
    (prepare, f"{OWT} --files cut.tar", ["cut.tar"]),
    (prepare, f"{OWT} --files header.tar", ["header.tar"]),
    (prepare, "openwebtext --files x.jsonl --tokenizer=ids --out=p", ["--tokenizer=ids"]),
    (prepare, "openwebtext --files x.jsonl --tokenizer=bytes --out=x.jsonl/p", ["x.jsonl/p", "--out"]),
    # the hub
    (prepare, f"{OWT} --hub=./nowhere", ["./nowhere", "--files"]),
    (prepare, f"{OWT} --hub=./whole --files a", ["--files", "--hub"]),
    (prepare, f"{HUB} {STORY} --files a.txt", ["--files", "--hub"]),
    (prepare, f"{HUB} {STORY} --seed=1", ["--seed", "--hub"]),
    (prepare, f"{HUB} {STORY}", ["40", "1000", "--val_documents"]),
    (prepare, f"{HUB} --tokenizer=chars", ["--tokenizer=chars", "--hub"]),
    (prepare, f"{HUB} --tokenizer=bytes --val_documents=3", ["./whole", "'text'"]),
    (prepare, f"text --hub=./nowhere {STORY} --out=c", ["./nowhere", "--files"]),
    (prepare, f"text --hub=./test_only {STORY} --out=c", ["--hub=./test_only", "train", "test"]),
    (prepare, f"text --hub=./null {STORY} --out=c", ["./null", "None"]),
    # zero-shot sets
    (prepare, "zeroshot lambada --files empty.txt --tokenizer=bytes", ["data/zeroshot-lambada"]),
    (prepare, "zeroshot imdb --files empty.txt", ["'imdb'", "pubmed"]),
    # datasets that do not fit: out/c was trained on data/c; data/o has as many characters, one of them another
    (train, "--model=ar --data=maze --length=13", ["--length=13", "--length=11"]),
    (train, "--gumbel --teacher=out/c --data=o --length=8 --out=out/x", ["--teacher=out/c"]),
    (evaluate, "ppl --ckpt out/c --data=data/o", ["--data=data/o"]),
    (sample, "--ckpt=out/c --n=1 --prompt=\u2603", ["'\u2603'"]),
]


UNFIT = {                                                  # name: (content, what the sentence names)
    # tables
    "headless.csv": (table(",", *AG_NEWS), ["--field", "'text'", "3, Title"]),
    "header.csv": (table(",", ["label", "body"], ["1", "a"], ["2", "b"]), ["--field", "'text'", "label, body"]),
    "lines.csv": (table(",", ["a\nb", "c"], ["1", "a"], ["2", "b"]), [r"a\nb, c"]),
    "short.csv": (table(",", ["label", "text"], ["1", "a"], ["2"]), ["--field", "'text'"]),
    "quote.csv": (b'text\n"open\na\nb\n', ["unexpected end of data"]),
    "stray.csv": (b'text\n"a" b,c\n', ["expected after"]),
    "header.tsv": (b"label\tbody\n1\ta\n2\tb\n", ["--field", "'text'", "label, body"]),
    "commas.tsv": (b"label,text\n1,a\n2,b\n", ["--field", "'text'"]),
    "latin.csv": (b"text\ncaf\xe9\nb\n", ["UTF-8", "where it is plain text"]),
    "header.csv.gz": (gzip.compress(b"a,b\n1,2\n"), ["a, b"]),
    # JSON
    "deep.jsonl": (b"[" * 100_000, ["line 1", "RecursionError"]),
    "deeper.jsonl": (JSONL + b'{"text":' * 99_999, ["line 3"]),
    "list.jsonl": (b'[{"text": "a"}]', ["object"]), "string.jsonl": (b'"text"', ["object"]),
    "null.jsonl": (b"null", ["object"]),
    "lines.json": (b'[\n{"text": "a"},\n{"text": "b"}\n]', ["line 1", "object"]),
    "object.json": (b'{\n"text": "a"\n}', ["line 1", "object"]),
    "field.jsonl": (b'{"body": 1, "b": 2}', ["'text'", "body, b"]),
    "value.jsonl": (b'{"text": null}', ["None", "--field"]), "number.jsonl": (b'{"text": 3}', ["3", "--field"]),
    "values.jsonl": (b'{"text": ["a"]}', ["['a']", "--field"]), "latin.jsonl": (b'{"text": "caf\xe9"}', ["line 1"]),
    "digits.jsonl": (b'{"text": ' + b"1" * 9999 + b"}", ["line 1"]),
    # kinds that are not read, whatever their names
    "a.zip": (b"PK\3\4" + bytes(60), ["zip", "unpack"]), "zip.txt": (b"PK\3\4" + bytes(60), ["zip", "unpack"]),
    "empty.zip": (b"PK\5\6" + bytes(18), ["zip"]), "a.zst": (b"\x28\xb5\x2f\xfd" + bytes(60), ["zst", "unpack"]),
    "zst.jsonl": (b"\x28\xb5\x2f\xfd" + bytes(60), ["zst", "unpack"]),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(60), ["7z"]), "named.zip": (b"plain text", ["zip"]),
    "in.tar": (packed("a.txt", b"PK\3\4" + bytes(60)), ["zip"]),
    "in.gz": (gzip.compress(b"PK\3\4" + bytes(60)), ["zip"]),
    "utf16.txt": ("\ufeffabc".encode("utf-16-le"), ["UTF-16", "convert"]),
    "be": ("\ufeffabc".encode("utf-16-be"), ["UTF-16"]),
    "utf16.csv": ("text\na\nb\n".encode("utf-16"), ["UTF-16"]), "utf32.txt": ("abc".encode("utf-32"), ["UTF-32"]),
    "utf32be": ("\ufeffabc".encode("utf-32-be"), ["UTF-32"]),
    # not what the name says, or damaged
    "no.gz": (b"plain", ["BadGzipFile"]), "no.xz": (b"plain", ["LZMAError"]), "no.bz2": (b"plain", ["OSError"]),
    "no.tar": (b"plain " * 200, ["ReadError"]), "no.parquet": (b"plain", ["no.parquet"]),
    "cut.bz2": (bz2.compress(TEXT)[:-9], ["EOFError"]), "cut": (gzip.compress(TEXT)[:-9], ["EOFError"]),
    "parquet": (b"PAR1\x15" + bytes(60), ["parquet"])}


@pytest.mark.parametrize("name", UNFIT)
@pytest.mark.parametrize("flags", ["text --tokenizer=chars", "openwebtext --tokenizer=bytes --val_documents=1"])
def test_what_holds_no_text_is_refused_by_name(tmp_path, cli, monkeypatch, name, flags):
    """With --tokenizer=bytes, too, an archive is not trained on."""
    if "parquet" in name:
        pytest.importorskip("pyarrow", reason="pip install pyarrow")
    monkeypatch.chdir(tmp_path)
    content, words = UNFIT[name]
    Path(name).write_bytes(content)
    refused(cli(prepare, f"{flags} --files {name} --out=p"), name, *words)
    assert os.listdir() == [name]


@pytest.mark.parametrize("command", ["text", "openwebtext", "lm1b", "zeroshot lambada"])
def test_a_field_that_no_file_has_is_a_flag_that_nothing_reads(tmp_path, cli, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b"):
        Path(name).write_bytes(TEXT)
    flags = f"{command} --field=body --tokenizer=bytes --out=o"
    refused(cli(prepare, f"{flags} --files a.txt b"), "--field")
    Path("x.jsonl").write_bytes(JSONL.replace(b"text", b"body"))
    assert cli(prepare, f"{flags.replace('--out', '--val_documents=1 --out') if 'web' in command else flags} "
                        "--files a.txt x.jsonl")[0] == 0


def files_in(folder):
    return {path: (path.is_dir() or path.read_bytes()) for path in folder.rglob("*")}


@pytest.mark.parametrize("command, flags, names", REFUSED,
                         ids=[f"{command.__name__} {flags}" for command, flags, _ in REFUSED])
def test_bad_input_is_refused_in_one_sentence_and_nothing_is_written(inputs, cli, monkeypatch, command, flags, names):
    if "--hub" in flags:
        pytest.importorskip("datasets", reason="pip install datasets")
    monkeypatch.chdir(inputs)
    before = files_in(inputs)
    refused(cli(command, flags), *names)
    assert files_in(inputs) == before


def test_parquet_without_pyarrow_names_the_package(inputs, cli, monkeypatch):
    monkeypatch.chdir(inputs)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)          # as if it were not installed
    refused(cli(prepare, f"{OWT} --files cut.parquet"), "cut.parquet", "pip install pyarrow")


def test_a_checkpoint_reads_and_writes_the_characters_of_its_dataset(inputs, cli, monkeypatch):
    monkeypatch.chdir(inputs)
    first = DOCS[0][0]
    code, out, _ = cli(sample, f"--ckpt=out/c --n=1 --prompt={first}")
    assert code == 0 and out.splitlines()[1].startswith(first)


# ---------------------------------------------------------------------------------------------------------------------
# teacher_cache.py: the distribution that is left

P = torch.tensor([0.05, 0.4, 0.1, 0.02, 0.03, 0.4])        # the teacher's, and how often the text has each token
FREQUENCY = torch.tensor([0.1, 0.2, 0.05, 0.3, 0.15, 0.2])


def times_from_cache(ids, w, e):
    """Arrival times [n, 6] given the token w, from what a cache of the tokens ids holds; e [n, 6] ~ Exp(1)."""
    n = len(e)
    tokens = torch.full((n,), w)
    logits = truncated_logits(P[ids].expand(n, -1), ids.expand(n, -1), P[tokens, None], FREQUENCY, tokens)
    assert torch.allclose(logits.logsumexp(-1), torch.zeros(n), atol=1e-6)
    return posterior_times(logits, tokens, e)


@pytest.mark.parametrize("w", [1, 4])
@pytest.mark.parametrize("ids", [[0, 1, 2, 3, 4, 5], [5, 3, 1, 0, 2, 4]])
def test_noise_from_a_cache_of_all_tokens_is_the_teachers(w, ids):
    e = sample_exponential((200_000, 6), gen(w))
    exact = posterior_times(P.log().expand(200_000, 6), torch.full((200_000,), w), e)
    assert torch.allclose(times_from_cache(torch.tensor(ids), w, e), exact, rtol=1e-5)


@pytest.mark.parametrize("w", [1, 4])
def test_noise_from_a_cache_of_few_tokens_is_as_far_off_as_theory_says(w):
    """Known: the two likeliest tokens and w; the others share by frequency. The law is off by d / (1 + d) in total
    variation: the probability of noise, under either law, for which the other has no density."""
    n = 200_000
    e = sample_exponential((n, 6), gen(w))
    exact = posterior_times(P.log().expand(n, 6), torch.full((n,), w), e)
    cached = times_from_cache(torch.tensor([1, 5]), w, e)
    known = [1, 5, w]
    others = torch.tensor([j for j in range(6) if j not in known])
    share = P[others].sum() * FREQUENCY[others] / FREQUENCY[others].sum()
    assert torch.allclose(cached[:, known], exact[:, known])
    assert torch.allclose(cached[:, others], e[:, others] + share * e[:, [w]])
    d = (share - P[others]).clamp(min=0).sum().item()
    want = d / (1 + d)
    for times, least in ((exact, share), (cached, P[others])):
        # T_j = E_j + p_j E_0 is at least p_j E_0, where E_0 = T_w / p_w: earlier times the other law never has
        e0 = times[:, [w]] / P[w]
        impossible = (times[:, others] < least * e0 * (1 - 1e-6)).any(1)
        rate = impossible.double().mean().item()
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


# ---------------------------------------------------------------------------------------------------------------------
# teacher_cache.py: the files

def text_of_bytes(folder):
    """The training rows, 24 ids each, of a small text."""
    folder.mkdir(exist_ok=True)
    write_jsonl(folder / "x.jsonl", LONG[:40])
    run(prepare, f"text --files {folder}/x.jsonl --tokenizer=bytes --out={folder}/mine")
    return Shards(str(folder / "mine"), "train", 24)


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """A teacher, its hash, a text, and there the caches of its 257 best tokens (all of them) and of its 4 best."""
    data = text_of_bytes(tmp_path_factory.mktemp("cached"))
    teacher = tiny_ar(V=257, L=24)
    sha256 = model_hash(teacher)
    for k in (257, 4):
        TeacherCache(teacher, sha256, data, k).fill(teacher, data)
    return argparse.Namespace(teacher=teacher, sha256=sha256, data=data)


def batch_of(data):
    """-> (row numbers [3], the rows [3, 24], which tokens are masked: about half [3, 24])."""
    rows = [0, 3, len(data) - 1]
    x = torch.from_numpy(data.rows(rows))
    masked = torch.rand(x.shape, generator=gen()) < 0.5
    return rows, x, masked & (torch.arange(24) > 0)


@pytest.mark.parametrize("k, k_kept", [(257, 257), (300, 257), (4, 4)])
def test_a_cache_holds_the_teachers_best_to_a_4096th_of_a_nat(cached, k, k_kept):
    """Of the k best tokens and of the true one, stored in steps of 1/2048: compared with the teacher's own."""
    teacher = cached.teacher
    cache = TeacherCache(teacher, cached.sha256, cached.data, k)
    assert cache.k == k_kept and cache.done.all()
    assert os.path.getsize(cache.path("topk.bin")) == len(cached.data) * 23 * (4 * k_kept + 2)
    rows, x, masked = batch_of(cached.data)
    logits = cache.for_rows(cache.load(rows)).posterior_logits(x, masked)
    found = logits(0, 10**6)
    assert found.dtype == torch.float32 and torch.equal(logits(2, 5), found[2:5])
    logp = teacher.log_probs(x)[:, :-1][masked[:, 1:]]
    true = x[masked][:, None]
    assert (found.gather(1, true) - logp.gather(1, true)).abs().max() < 2.5e-4
    top, ids = logp.topk(k_kept)
    assert (found.gather(1, ids) - top).abs().max() < 2.5e-4


def test_a_cache_of_a_large_vocabulary_keeps_its_ids_in_a_file_of_their_own(tmp_path):
    """Of V = 70,000: 4 bytes an id, 2 a value; what it says of the masked tokens is the teacher's, as above."""
    V = 70_000
    ids = np.random.default_rng(0).integers(V, size=70 * 23)
    with Writer(tmp_path / "mine", dict(name="mine", tokenizer="ids", vocab_size=V, bos=0, predict_bos=True,
                                        row_length=None)) as writer:
        writer.write("train", ids)
        writer.finish()
    data = Shards(str(tmp_path / "mine"), "train", 24)
    teacher = tiny_ar(V=V, L=24)
    cache = TeacherCache(teacher, "hash", data, 4)
    cache.fill(teacher, data)
    assert os.path.getsize(cache.path("ids.bin")) == 70 * 23 * 4 * 4
    assert os.path.getsize(cache.path("topk.bin")) == 70 * 23 * 2 * 5
    rows, x, masked = batch_of(data)
    cache = TeacherCache(teacher, "hash", data, 4)         # as another run opens it
    found = cache.for_rows(cache.load(rows)).posterior_logits(x, masked)(0, 10**6)
    logp = teacher.log_probs(x)[:, :-1][masked[:, 1:]]
    true = x[masked][:, None]
    assert true.max() > 1 << 16
    assert (found.gather(1, true) - logp.gather(1, true)).abs().max() < 2.5e-4
    top, best = logp.topk(4)
    assert best.max() > 1 << 16
    assert (found.gather(1, best) - top).abs().max() < 2.5e-4
    Path(cache.path("ids.bin")).write_bytes(np.full(70 * 23 * 4, V, "<u4").tobytes())
    with pytest.raises(BadInput, match="damaged"):
        TeacherCache(teacher, "hash", data, 4)


def test_a_cache_knows_how_often_the_text_has_each_token(cached):
    """Each counted once more than it is there."""
    cache = TeacherCache(cached.teacher, cached.sha256, cached.data, 4)
    [file] = cached.data.files
    counts = np.bincount(file["ids"], minlength=257) + 1
    assert np.allclose(cache.frequency, counts / counts.sum())


def test_the_loss_from_a_cache_is_that_with_the_teacher(cached):
    """And its gradient, with all tokens kept; with four of 257, the loss is close."""
    rows, x, masked = batch_of(cached.data)
    model = tiny("gumbel", V=257, L=24)
    randomise(model)

    def loss(source):
        model.zero_grad()
        value, *_ = model.loss(x, torch.ones(3), source, z=x.masked_fill(masked, 257), generator=gen(1))
        value.backward()
        return value.item(), model.noise_embed.weight.grad.clone()

    def loss_from_cache(k):
        cache = TeacherCache(cached.teacher, cached.sha256, cached.data, k)
        return loss(cache.for_rows(cache.load(rows)))
    want, want_grad = loss(cached.teacher)
    of_all, grad = loss_from_cache(257)
    of_four, _ = loss_from_cache(4)
    assert abs(of_all - want) < 1e-3 and abs(of_four - want) < 0.1
    assert (grad - want_grad).abs().max() < 1e-2 * want_grad.abs().max()


def test_an_interrupted_pass_is_continued_by_other_processes_to_the_same_bytes(cached, tmp_path, monkeypatch):
    """By process 1 of 2 alone: first its share, then what nobody else has done. A disk that is full in between does no
    harm."""
    teacher = cached.teacher
    data = text_of_bytes(tmp_path)
    cache = TeacherCache(teacher, cached.sha256, data, 4)
    logits = AR.logits

    def logits_of_two_chunks(self, *args):
        if cache.done.sum() == 2:
            raise KeyboardInterrupt
        return logits(self, *args)
    with monkeypatch.context() as m:
        m.setattr(AR, "logits", logits_of_two_chunks)
        with pytest.raises(KeyboardInterrupt):
            cache.fill(teacher, data)
    assert cache.done.sum() == 2 < len(cache.done)

    def full(f):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as m:
        m.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="topk.bin"):       # `run_main` makes a sentence of it
            cache.fill(teacher, data)
    assert cache.done.sum() == 2

    TeacherCache(teacher, cached.sha256, data, 4).fill(teacher, data, rank=1, size=2)
    assert cache.done.all()
    want = TeacherCache(teacher, cached.sha256, cached.data, 4).path("topk.bin")
    assert Path(cache.path("topk.bin")).read_bytes() == Path(want).read_bytes()


def test_a_caches_frequencies_are_whole_or_not_there(cached, tmp_path, monkeypatch):
    """Another machine may read them while they are written."""
    data = text_of_bytes(tmp_path)

    def interrupted(f, array):
        f.write(b"half")
        raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(np, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            TeacherCache(cached.teacher, cached.sha256, data, 4)
    assert not list(Path(data.path).rglob("frequency.npy*"))
    TeacherCache(cached.teacher, cached.sha256, data, 4)


def test_another_teacher_and_another_precision_have_caches_of_their_own(cached, tmp_path):
    data = text_of_bytes(tmp_path)
    teacher = cached.teacher
    caches = [TeacherCache(teacher, cached.sha256, data, 4),
              TeacherCache(teacher, cached.sha256, data, 4, dtype="bfloat16"),
              TeacherCache(tiny_ar(V=257, L=24), "other", data, 4)]
    assert len({cache.folder for cache in caches}) == 3


def test_a_cache_of_other_data_or_a_truncated_one_is_refused(cached, tmp_path):
    data = text_of_bytes(tmp_path)
    folder = TeacherCache(cached.teacher, cached.sha256, data, 4).folder
    sha256 = data.files[0]["sha256"]
    data.files[0]["sha256"] = "another"
    with pytest.raises(BadInput, match=re.escape(folder)):
        TeacherCache(cached.teacher, cached.sha256, data, 4)
    data.files[0]["sha256"] = sha256
    TeacherCache(cached.teacher, cached.sha256, data, 4)
    os.truncate(f"{folder}/topk.bin", 100)
    with pytest.raises(BadInput, match=re.escape(folder)):
        TeacherCache(cached.teacher, cached.sha256, data, 4)


def test_a_cache_that_the_disk_has_no_room_for_is_refused(cached, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: argparse.Namespace(free=1000))
    with pytest.raises(BadInput, match="--teacher_cache"):
        TeacherCache(cached.teacher, cached.sha256, cached.data, 5)


# ---------------------------------------------------------------------------------------------------------------------
# teacher_cache.py: training

@pytest.fixture(scope="module")
def trained(text_runs, tmp_path_factory):
    """Students of four steps, with the teacher or from its cache -> (flags, their folder, {run: losses})."""
    folder = tmp_path_factory.mktemp("trained")
    base = f"--gumbel --teacher=out/ar --data=mine --length=24 {TINY}"
    losses = {}
    with pytest.MonkeyPatch.context() as m:
        m.chdir(text_runs)
        for name, flags in {"online": "", "all": "--teacher_cache=257", "few": "--teacher_cache=8",
                            "blocks": "--teacher_cache=8 --model=bd3lm"}.items():
            run(train, f"{base} --steps=4 --out={folder}/{name} {flags}")
            log = [json.loads(line) for line in (folder / name / "log.jsonl").read_text().splitlines()]
            losses[name] = [entry["loss"] for entry in log if "loss" in entry]
    return base, folder, losses


@pytest.mark.slow
def test_training_from_the_cache_is_that_with_the_teacher(trained):
    """With all tokens kept almost the same, with 8 of 257 close; in blocks it trains."""
    _, _, losses = trained
    assert np.allclose(losses["all"], losses["online"], rtol=1e-3)
    assert np.allclose(losses["few"], losses["online"], rtol=0.1)
    assert len(losses["online"]) == len(losses["blocks"]) == 4 and np.isfinite(losses["blocks"]).all()


@pytest.mark.slow
def test_a_run_from_the_cache_continues_with_the_same_cache_only(trained, text_runs, cli, monkeypatch):
    base, folder, _ = trained
    monkeypatch.chdir(text_runs)
    flags = f"{base} --steps=6 --out={folder}/few"
    code, _, err = cli(train, f"{flags} --teacher_cache=8")
    assert code == 0 and "continuing at step 4" in err and "teacher's pass" not in err
    refused(cli(train, f"{flags} --teacher_cache=9"), "teacher_cache")


# ---------------------------------------------------------------------------------------------------------------------
# files.py

def test_a_file_is_there_whole_or_not_at_all(tmp_path):
    """What is not written to its end leaves the old file; what killed processes left goes, what another holds stays."""
    path = tmp_path / "x.json"
    path.write_text("old")
    (tmp_path / "x.json.99999999.tmp").write_text("left over")
    (tmp_path / "notes.7.tmp").write_text("someone's")
    held = tmp_path / "x.json.88888888.tmp"
    with open(held, "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        with pytest.raises(KeyError), replacing(str(path)) as out:
            out.write("new")
            raise KeyError
        assert path.read_text() == "old"
        with replacing(str(path)) as out:
            out.write("new")
        assert path.read_text() == "new"
        assert sorted(os.listdir(tmp_path)) == ["notes.7.tmp", "x.json", held.name]


def test_a_planted_link_leads_nowhere(tmp_path):
    """Neither the temporary file nor the lock is opened through a link."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / f"x.json.{os.getpid()}.tmp").symlink_to(victim)
    with replacing(str(tmp_path / "x.json")) as f:
        f.write("new")
    (tmp_path / "lock").symlink_to(victim)
    with pytest.raises(OSError), writing(tmp_path):
        pass
    assert victim.read_text() == "mine" and (tmp_path / "x.json").read_text() == "new"


def test_results_go_to_a_device_as_they_are():
    write_json("/dev/null", [1])
    assert not os.path.isfile("/dev/null")


@pytest.mark.parametrize("why", [errno.ENOLCK, errno.EOPNOTSUPP, None])
def test_where_files_cannot_be_locked_a_warning_is_all(tmp_path, monkeypatch, capsys, why):
    """As on some network disks (the system says no), and on Windows (there is no fcntl)."""
    def refuse(*args):
        raise OSError(why, os.strerror(why))
    if why is None:
        monkeypatch.setattr(files, "fcntl", None)
    else:
        monkeypatch.setattr(fcntl, "flock", refuse)
    with writing(tmp_path / "run"), writing(tmp_path / "run"):
        pass
    assert capsys.readouterr().err.count("cannot be locked") == 2
    write_json(tmp_path / "x.json", [1])


def test_the_second_writer_is_told_who_the_first_is(tmp_path):
    with writing(tmp_path / "run"):
        told = f"pid {os.getpid()} on .* is writing out/run"
        with pytest.raises(BadInput, match=told), writing(tmp_path / "run", "out/run"):
            pass
    with writing(tmp_path / "run"):                        # the first has ended
        pass
    assert os.listdir(tmp_path / "run") == []


@pytest.mark.parametrize("flags,name", [
    ("--files a.txt --field=body", "--field=body"), ("--files x.jsonl --separator=x", "--separator=x"),
    ("--files a.txt --val_documents=5", "--val_documents=5")])
def test_a_flag_that_these_files_do_not_read_is_refused(text_file, cli, monkeypatch, flags, name):
    monkeypatch.chdir(text_file.parent)
    write_jsonl("x.jsonl", ["one", "two", "three"])
    refused(cli(prepare, f"text {flags} --tokenizer=bytes --out=o"), name)
