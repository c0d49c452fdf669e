"""The tests: every formula against theory, brute force or an independent implementation.

    python -m pytest -q test_gumbel.py                     # everything; -s also prints the two-token toy
    python -m pytest -q test_gumbel.py -m "not slow"       # the minute that matters

In this order: what the tests share; the toy; gumbel.py (the posterior, the noise embedding); mdlm.py (the network, the
loss, samplers); bd3lm.py; medusa.py; teacher.py; the authors' tensors; the commands train.py, sample.py, evaluate.py.

Statistical tests have fixed seeds, and pass at p > 1e-4 (1e-5 where many are made at once), or within four or five
standard errors: what fails is wrong, not unlucky.

Tests against the authors' tensors, and those that need GPT-2's BPE files, skip where these are absent: the folder is
taken from GUMBEL_SHARED, and is ../shared by default.
"""
import argparse
import copy
import functools
import gc
import importlib.util
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
import zipfile
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")           # no test reaches a hub; read when its library is imported

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import bd3lm
import data.run
import evaluate
import gumbel
import mdlm
import medusa
import sample
import train
from bd3lm import BD3LM, clipped_mask, training_mask
from data import prepare
from data.batches import rows_of_step
from data.cli import BadInput, run_main, say_once
from data.maze import PAD, ExactDenoiser, maze_dataset, maze_paths, maze_statistics, maze_valid, validity_mass
from data.report import report
from data.run import CHECKPOINT
from data.shards import Shards, Writer, read_meta, sha256
from data.teacher_cache import TeacherLogits
from extra import published, scores
from extra.acceptance import acceptance_row, perfect_heads
from extra.confidence import unmask_by_confidence
from extra.init_from import initial_weights
from extra.remdm import remasked_path
from extra.theory import theory_rows
from gumbel import (GumbelEmbedding, draw_tokens, gumbel_max, nucleus, posterior_gumbel, sample_exponential,
                    sample_gumbel)
from mdlm import (MDLM, Denoiser, close_gaps, load_published, reveal_steps, revealing_path,
                  stratified_t, unmask)
from medusa import Medusa
from teacher import AR, GPT2, GPT2_SIZES, KVCache, extract_parallel, extract_sequential
from teacher import load_published as load_published_ar

HERE = os.path.dirname(os.path.abspath(__file__))
SHARED = os.environ.get("GUMBEL_SHARED", os.path.join(HERE, "..", "shared"))
needs_shared = pytest.mark.skipif(not os.path.isdir(os.path.join(SHARED, "golden")),
                                  reason="the golden tensors are absent")
slow = pytest.mark.slow
with_and_without_noise = pytest.mark.parametrize("noise", [None, "gumbel"])


# ---------------------------------------------------------------------------------------------------------------------
# what the tests share: draws and laws

def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def golden(name):
    return torch.load(os.path.join(SHARED, "golden", name + ".pt"), weights_only=True)


def fits(counts, p):
    """Whether these counts can be draws from the distribution p: a chi-squared test."""
    counts = np.asarray(counts, dtype=float)
    p = np.asarray(p, dtype=float)
    return stats.chisquare(counts, p / p.sum() * counts.sum()).pvalue > 1e-4


def same_law(a, b, level=1e-5):
    """Whether two samples of numbers can be from one law: a Kolmogorov-Smirnov test."""
    return stats.ks_2samp(a.numpy(), b.numpy()).pvalue > level


def numbered(rows, base):
    """Rows of digits [N, L] -> one number each, [N]: the first digit counts least."""
    return (rows * base ** torch.arange(rows.shape[1])).sum(1)


# ---------------------------------------------------------------------------------------------------------------------
# what the tests share: small models with random weights, and small languages

def randomise(model, seed=0, std=0.3):
    """Untrained networks start as the identity: give every parameter something to say."""
    g = gen(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += std * torch.randn(p.shape, generator=g) / math.sqrt(p.shape[-1])
    return model.eval()


def tiny(noise=None, V=7, L=6, seed=0, predict_bos=True, **kw):
    torch.manual_seed(seed)
    return randomise(MDLM(V, L, V - 1, n_layer=2, n_embd=32, n_head=2, dropout=0.0, noise=noise,
                          predict_bos=predict_bos, **kw), seed)


def tiny_ar(V=7, L=6, seed=0, **kw):
    torch.manual_seed(seed)
    return randomise(AR(V, L, V - 1, n_layer=2, n_embd=32, n_head=2, dropout=0.0, **kw), seed, std=1.0)


def tiny_blocks(noise=None, V=7, L=8, block_size=2, seed=0, **kw):
    torch.manual_seed(seed)
    return randomise(BD3LM(V, L, V - 1, block_size=block_size, n_layer=2, n_embd=32, n_head=2, dropout=0.0,
                           noise=noise, **kw), seed)


def tiny_heads(noise=None, V=7, L=12, seed=0, heads=3, std=0.3, **kw):
    """Random heads on a random backbone."""
    torch.manual_seed(seed)
    ar = tiny_ar(V, L, seed)
    model = randomise(Medusa(V, L, V - 1, 32, heads, noise=noise, bias=True, **kw), seed, std=std)
    return model.attach(ar)


def rows_of(n, V=7, L=6, seed=0):
    """Random rows that begin with BOS, the last id."""
    x = torch.randint(V - 1, (n, L), generator=gen(seed))
    x[:, 0] = V - 1
    return x


def all_masked(n, T, V=7):
    """BOS and [MASK]s."""
    x = torch.full((n, T), V)
    x[:, 0] = V - 1
    return x


def partly_masked(x, share, seed=1, mask_id=7):
    """Rows with about this share of [MASK]s, BOS never."""
    masked = torch.rand(x.shape, generator=gen(seed)) < share
    masked[:, 0] = False
    return x.masked_fill(masked, mask_id)


def blocks_to_fill():
    """12 rows of 19 tokens in blocks of 4: prompts in every second, text between [MASK]s in one."""
    start = all_masked(12, 19)
    start[::2, 1:7] = rows_of(6, L=7)[:, 1:]
    start[3, 8:12] = 1
    return start


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def optimise(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def rows_from_bos(V, L, ids):
    """All rows of BOS (V - 1) and L - 1 of these ids."""
    rest = torch.tensor(list(itertools.product(range(ids), repeat=L - 1)))
    return torch.cat([torch.full((len(rest), 1), V - 1), rest], 1)


def log_likelihood(model, rows):
    """log p of rows under an AR model, from its own log_probs: the chain rule."""
    logp = model.log_probs(rows[:, :-1])
    return logp.gather(-1, rows[:, 1:, None]).sum((1, 2))


def counted_calls(model):
    """A list that grows by the number of rows of each network call."""
    calls = []
    model.transformer.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    return calls


def weight_of_masks(k, n):
    """E_t (1/t) P(a set of k of n tokens is masked) = the integral of t^(k-1) (1-t)^(n-k) = B(k, n - k + 1)."""
    return math.exp(math.lgamma(k) + math.lgamma(n - k + 1) - math.lgamma(n + 1))


# eight rows, one of them twice: no position is independent of the others, one is rarer than the rest
LANGUAGE = np.array([[0, 0, 1, 2], [0, 1, 1, 0], [1, 0, 0, 2], [1, 0, 0, 2],
                     [2, 2, 2, 1], [2, 1, 0, 0], [1, 1, 1, 1], [1, 0, 2, 2]])


def is_the_language(x):
    """Whether rows x [N, 4] can be draws from LANGUAGE: none other, and each as often as it should be."""
    rows, times = numbered(torch.tensor(LANGUAGE), 3).unique(return_counts=True)
    drawn = numbered(x, 3)
    counts = [int((drawn == row).sum()) for row in rows]
    return sum(counts) == len(drawn) and fits(counts, times)


def save_gpt2(folder, V=301, L=40, spelling="plain", config=True, safetensors=True):
    """A randomly initialised GPT-2 of `transformers`, saved in `folder` -> the transformers model."""
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    torch.manual_seed(0)
    lm = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_layer=2, n_embd=128, n_head=2, vocab_size=V, n_positions=L, bos_token_id=V - 1, eos_token_id=V - 1)).eval()
    for name, p in lm.named_parameters():
        is_scale = "ln_" in name and "weight" in name
        torch.nn.init.normal_(p, mean=1.0 if is_scale else 0.0, std=0.15)
    os.makedirs(folder, exist_ok=True)
    state = dict(lm.state_dict())
    if spelling == "plain":                               # as the openai-community files: no prefix, no head, buffers
        state = {k.removeprefix("transformer."): v for k, v in state.items() if k != "lm_head.weight"}
        state |= {f"h.{i}.attn.bias": torch.ones(1, 1, L, L).tril() for i in range(2)}
    else:
        state |= {f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    if safetensors:
        library = pytest.importorskip("safetensors.torch")
        library.save_file({k: v.clone() for k, v in state.items()}, f"{folder}/model.safetensors", {"format": "pt"})
    else:
        torch.save(state, f"{folder}/pytorch_model.bin")
    if config:
        lm.config.save_pretrained(folder)
    return lm


# ---------------------------------------------------------------------------------------------------------------------
# what the tests share: commands, run in this process unless a signal or several processes are what is tested

TINY = ("--n_layer=1 --n_embd=16 --n_head=2 --batch_size=16 --warmup=2 "
        "--log_every=1 --eval_every=4 --eval_rows=40 --report=0")
# what trains on the text of `text_runs`, with the teacher that it has
TEXT = f"--data=mine --length=24 --save_every=2 {TINY}"
NOISY = "--gumbel --teacher=out/ar"
BLOCKS = f"--model=bd3lm {TEXT}"
# Medusa has no network of its own to be made tiny
HEADS = "--batch_size=16 --warmup=2 --log_every=1 --eval_every=4 --eval_rows=40 --report=0"
MEDUSA = f"--model=medusa --teacher=out/ar --data=mine --length=24 --schedule=constant {HEADS}"


@pytest.fixture
def cli(capsys, monkeypatch):
    """cli(module, "flags") -> (exit code, stdout, stderr), as from a shell."""
    def run(module, flags):
        monkeypatch.setattr(sys, "argv", [module.__name__.split(".")[-1] + ".py", *flags.split()])
        capsys.readouterr()
        say_once.cache_clear()
        sample.load_backbone.cache_clear()
        try:
            run_main(module.main)
            code = 0
        except SystemExit as e:
            code = e.code
        out = capsys.readouterr()
        return code, out.out, out.err
    return run


def refused(result, *words):
    """Exit code 2, one sentence on stderr that holds these words, nothing on stdout, no traceback."""
    code, out, err = result
    assert code == 2 and out == "" and "Traceback" not in err, result
    lines = [line for line in err.replace("\r", "\n").splitlines() if "error:" in line]
    assert len(lines) == 1 and all(w in lines[0] for w in words), (words, err)


def succeeded(result):
    """The command's stdout and stderr; it ended well."""
    code, out, err = result
    assert code == 0, err
    return out, err


def evaluated(cli, flags, file):
    """evaluate.py with these flags -> (the rows that it wrote to `file`, stdout, stderr)."""
    out, err = succeeded(cli(evaluate, f"{flags} --json={file}"))
    with open(file) as f:
        rows = json.load(f)["rows"]
    return rows, out, err


def jsonl(path):
    with open(path) as f:
        return [json.loads(line) for line in f]


def offline(monkeypatch, folder):
    """No GPT-2 in the cache, and no way to get one."""
    def no_route(*args, **kw):
        raise OSError("offline")
    monkeypatch.setenv("GUMBEL_CACHE", str(folder))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_route)
    monkeypatch.setattr(published, "server_sha256", lambda url: None)


def run_in(folder, *commands):
    """Run commands, (module, flags), in a folder."""
    with pytest.MonkeyPatch.context() as m:
        m.chdir(folder)
        for module, flags in commands:
            m.setattr(sys, "argv", [module.__name__.split(".")[-1] + ".py", *flags.split()])
            module.main()


@functools.cache                                         # once, whichever files the tests lie in
def maze_runs(root):
    root.mkdir()
    flags = f"--data=maze --steps=6 --save_every=3 {TINY}"
    run_in(root, (train, f"--model=ar {flags}"), (train, f"--model=mdlm --gumbel {flags}"),
           (train, f"--model=mdlm {flags}"))
    return root


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A folder with the maze, and with tiny runs on it: out/maze-ar, out/maze-mdlm-gumbel, out/maze-mdlm."""
    return maze_runs(tmp_path_factory.getbasetemp() / "maze_runs")


LONG = [f"Document {i}: " + " ".join(f"w{i * k % 97}" for k in range(60)) for i in range(400)]


@functools.cache
def bytes_runs(root):
    root.mkdir()
    (root / "x.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in LONG))
    flags = f"--data=mine --length=24 --steps=6 {TINY}"
    run_in(root, (prepare, "text --files x.jsonl --tokenizer=bytes --out=data/mine"),
           (train, f"--model=ar {flags} --out=out/ar"),
           (train, f"{NOISY} {flags} --out=out/gumbel"),
           (train, f"{flags} --out=out/plain"))
    return root


@pytest.fixture(scope="session")
def text_runs(tmp_path_factory):
    """A folder with bytes of English-like text, a tiny teacher out/ar, students out/gumbel and out/plain."""
    return bytes_runs(tmp_path_factory.getbasetemp() / "bytes_runs")


@pytest.fixture(scope="session")
def block_runs(text_runs):
    """`text_runs` with BD3-LM beside: out/blocks (of 4 tokens), out/blocks-1 (of one, with noise), out/blocks-clip."""
    run_in(text_runs, (train, f"{BLOCKS} --steps=4 --out=out/blocks"),
           (train, f"{BLOCKS} {NOISY} --block_size=1 --steps=4 --out=out/blocks-1"),
           (train, f"{BLOCKS} {NOISY} --clip=0.6,1 --steps=4 --out=out/blocks-clip"))
    return text_runs


@pytest.fixture(scope="session")
def medusa_runs(text_runs):
    """`text_runs` with Medusa heads beside: out/heads, out/heads-gumbel (two of them); another backbone, out/ar-s1."""
    run_in(text_runs, (train, f"{MEDUSA} --steps=6 --out=out/heads"),
           (train, f"{MEDUSA} --gumbel --heads=2 --steps=6 --out=out/heads-gumbel"),
           (train, f"--model=ar {TEXT} --steps=1 --seed=1 --out=out/ar-s1"))
    return text_runs


def folder_of(runs):
    """A fixture: the test runs in the folder of these runs."""
    @pytest.fixture
    def enter(request, monkeypatch):
        monkeypatch.chdir(request.getfixturevalue(runs))
    return enter


in_maze_runs = folder_of("runs")
in_text_runs = folder_of("text_runs")
in_block_runs = folder_of("block_runs")
in_medusa_runs = folder_of("medusa_runs")

DOCS = ["First document.\nIt has two lines.", "Zwölf Boxkämpfer jagen Viktor — quer über den Sylter Deich.",
        "x" * 50 + " y\n\n  z", "fourth"]


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n<|endoftext|>\n".join(DOCS) + "\n", encoding="utf-8")
    return path


def same_dataset(a, b):
    """Whether two folders of shards, called a and b, hold the same bytes but for their names."""
    def contents(folder):
        return {path.name: path.read_bytes().replace(b'"a"', b'"b"') for path in Path(folder).iterdir()}
    return contents(a) == contents(b)


def interrupt_after(monkeypatch, commits):
    """Make the writer's commit raise after it has done its work so many times."""
    commit = Writer.commit
    count = []

    def stop(self, done):
        commit(self, done)
        count.append(done)
        if len(count) == commits:
            raise KeyboardInterrupt
    monkeypatch.setattr(Writer, "commit", stop)
    monkeypatch.setattr(prepare, "COMMIT", 1)


# ---------------------------------------------------------------------------------------------------------------------
# the toy: two tokens, always equal, written in one network call

def distance_from_equal_pairs(x, K):
    """Total variation between pairs x [N, 2] and two equal tokens, uniform on K values: collapse shows here, too."""
    joint = torch.bincount(x[:, 0] * K + x[:, 1], minlength=K * K).double() / len(x)
    return 0.5 * float((joint - torch.eye(K).flatten() / K).abs().sum())


class EqualPairs:
    """The exact teacher: x1 is uniform on K values, x2 = x1. Tokens are BOS (K), x1, x2."""

    def __init__(self, K):
        self.K = K

    def posterior_logits(self, tokens, masked):
        logits = torch.zeros(*tokens.shape, self.K + 1)    # of each position's token, given those before it
        logits[:, 2] = torch.where(torch.arange(self.K + 1) == tokens[:, 1:2], 0.0, -math.inf)
        logits[..., self.K] = -math.inf                    # BOS
        rows = logits[masked]
        return lambda a, b: rows[a:b]

    def rows(self, n, generator):
        x1 = torch.randint(self.K, (n, 1), generator=generator)
        return torch.cat([torch.full((n, 1), self.K), x1, x1], 1)


@slow
def test_the_method_on_one_screen():
    """`python gumbel.py`: the student that reads the noise has the teacher's joint law, the blind one the product of
    its marginals. Total variation, so that collapse onto one pair cannot pass for success."""
    done = subprocess.run([sys.executable, "gumbel.py"], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.rsplit(maxsplit=2) for line in done.stdout.splitlines()[1:]]
    (reads, blind, of_teacher, independent) = [(float(equal), float(distance)) for _, equal, distance in rows]
    assert reads[0] > 0.97 and reads[1] < 0.03
    assert 0.11 < blind[0] < 0.14 and 0.86 < blind[1] < 0.89                   # theory: 1/8 and 7/8
    assert of_teacher == (1, 0)
    assert independent == (0.125, 0.875)


def test_perfect_denoiser_without_noise_writes_two_independent_tokens():
    """x1 = x2 uniform on K values: at NFE 1 it is 1 - 1/K in total variation from the truth; at NFE 2 it is right."""
    K = 8
    x = torch.full((20_000, 2), K)
    exact = ExactDenoiser(np.stack([np.arange(K)] * 2, 1), K)
    for steps, want in ((1, 1 - 1 / K), (2, 0.0)):
        path = revealing_path(reveal_steps(x == K, steps, "fixed", generator=gen()))
        written, _ = unmask(x, path, K, exact, generator=gen(1))
        assert abs(distance_from_equal_pairs(written, K) - want) < 0.02


@pytest.mark.parametrize("K,steps", [(3, 80), pytest.param(8, 1000, marks=slow)])
def test_two_token_toy_through_mdlm(K, steps):
    """The Gumbel student, trained here in seconds, has the teacher's joint law in one network call; a perfect plain
    denoiser is 1 - 1/K in total variation from it."""
    teacher = EqualPairs(K)
    torch.manual_seed(0)
    model = MDLM(K + 1, 3, K, n_layer=2, n_embd=64, n_head=2, dropout=0.0, noise="gumbel", predict_bos=False)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.0)
    g = gen(2)
    for step in range(steps):
        tokens = teacher.rows(256, g)
        loss, _ = model.loss(tokens, stratified_t(256, np.random.default_rng(step)), teacher, generator=g)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        warmup = min(1, (step + 1) / 50)
        optimizer.param_groups[0]["lr"] = 3e-3 * warmup * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.step()
    start = torch.tensor([[K, K + 1, K + 1]]).expand(20_000, 3)
    x, nfe = model.generate(start, 1, greedy=True, generator=gen(3))
    student = distance_from_equal_pairs(x[:, 1:], K)
    print(f"\ntwo equal tokens, uniform on {K} values, one network call; total variation from the truth:\n"
          f"  perfect plain denoiser   {1 - 1 / K:.3f}\n  trained Gumbel student   {student:.3f}")
    assert (nfe == 1).all()
    assert student < 0.05


# ---------------------------------------------------------------------------------------------------------------------
# the posterior (gumbel.py): draws of Gumbel noise

def test_gumbel_noise_has_its_moments_and_law():
    """Mean 0.57722 (Euler), variance pi^2 / 6; the mean within five standard errors."""
    x = sample_gumbel((1_000_000,), gen()).double()
    assert abs(x.mean() - 0.57722) < 5 * (math.pi / 6**0.5) / 1000
    assert abs(x.var() - math.pi**2 / 6) < 0.02
    assert stats.kstest(x[:100_000].numpy(), "gumbel_r").pvalue > 1e-4
    assert torch.equal(sample_gumbel((5, 7), gen(3)), sample_gumbel((5, 7), gen(3)))


@pytest.mark.parametrize("draws,tail,levels", [(1, 10, (10, 12)), pytest.param(25, 12, (12, 14, 16), marks=slow)])
def test_tail_has_the_right_frequency_and_is_not_quantised(draws, tail, levels):
    """P(noise > a) = 1 - exp(-exp(-a)); float32 rand would give none above 16.6 and ties on a grid of 2^-24 below."""
    n = 0
    top = []
    for i in range(draws):
        x = sample_gumbel((8_000_000,), gen(i))
        n += x.numel()
        top.append(x[x > tail])
    top = torch.cat(top)
    for a in levels:
        count = int((top > a).sum())
        want = n * math.exp(-a)
        assert abs(count - want) < 5 * math.sqrt(want), (a, count, want)
    # in exponential time the tail must be uniform on (0, e^-tail), at full resolution: ties would show a grid
    T = torch.exp(-top.double())
    assert stats.kstest((T / math.exp(-tail)).numpy(), "uniform").pvalue > 1e-4
    grid = torch.round(T * 2**24)
    assert (T * 2**24 - grid).abs().mean() > 0.2           # a quarter where there is no grid, 0 on it
    assert len(top.unique()) > 0.98 * len(top)
    assert sample_exponential((1_000_000,), gen()).min() > 0


def test_gumbel_max_draws_from_the_softmax():
    logits = torch.randn(6, generator=gen())
    x = gumbel_max(logits.expand(200_000, 6), sample_gumbel((200_000, 6), gen(1)))
    assert fits(torch.bincount(x, minlength=6), logits.double().softmax(-1))


# --- Theorem 4.1, Algorithm 1

def posterior_pairs(p, n, seed):
    """(w, noise) with w ~ p and noise from the posterior; and the forward construction (argmax, noise)."""
    logits = p.log().float().expand(n, len(p))
    w = torch.multinomial(p.expand(n, len(p)), 1, generator=gen(seed)).squeeze(1)
    forward = sample_gumbel((n, len(p)), gen(seed + 1))
    return (w, posterior_gumbel(logits, w, gen(seed + 2))), (gumbel_max(logits, forward), forward)


@pytest.mark.parametrize("V,rows,scale", [
    (20, 200_000, 3.0), pytest.param(1000, 20_000, 8.0, marks=slow), (50257, 32, 3.0),
    pytest.param(50257, 512, 3.0, marks=slow), pytest.param(50257, 512, 20.0, marks=slow)])
def test_posterior_argmax_is_the_token(V, rows, scale):
    """With certainty, whether the token was drawn from p or is a surprise; inputs are not modified; no inf, no nan."""
    g = gen(1)
    step = max(1, 20_000_000 // V)
    for a in range(0, rows, step):
        n = min(step, rows - a)
        logits = scale * torch.randn(n, V, generator=g) - 80
        w = gumbel_max(logits, sample_gumbel((n, V), g))
        w[::2] = torch.randint(V, (len(w[::2]),), generator=g)
        before = logits.clone()
        w_before = w.clone()
        noise = posterior_gumbel(logits, w, g)
        assert noise.dtype == torch.float32 and noise.isfinite().all()
        assert (gumbel_max(logits, noise) == w).all()
        assert torch.equal(logits, before) and torch.equal(w, w_before)


def test_posterior_argmax_repair():
    """A surprise of 10^4 nats: float32's noise_w has steps of 2^-10, so rounding alone loses some rows. Repaired, none;
    and no other entry of the noise is touched, nor noise_w where it wins anyway."""
    logits = torch.tensor([[0.0, -1e4]]).expand(100_000, 2)
    w = torch.ones(100_000, dtype=torch.long)
    noise = posterior_gumbel(logits, w, gen(1))
    # Algorithm 1 without the repair, from the same draws (they are made in chunks)
    g = gen(1)
    e = torch.cat([sample_exponential((len(part), 2), g) for part in logits.split(gumbel.DEVICE.chunk // 2)])
    plain_loser = -(e[:, 0] + logits[:, 0].exp() * e[:, 1]).log()
    plain_winner = -e[:, 1].log() + 1e4
    lost = gumbel_max(logits, torch.stack([plain_loser, plain_winner], 1)) != 1
    assert 0 < lost.sum() < 200
    assert (gumbel_max(logits, noise) == 1).all()
    assert torch.allclose(noise[:, 0], plain_loser, atol=1e-5)
    assert torch.equal(noise[~lost, 1], plain_winner[~lost])
    assert (noise[lost, 1] - plain_winner[lost]).abs().max() < 0.01


def test_posterior_of_extreme_rows_is_finite_and_right():
    """Impossible tokens, a token whose probability underflows, logits down to -7e4; any leading shape."""
    V = 8
    logits = torch.zeros(4, V)
    logits[0, 3:] = -math.inf                              # p_k = 0 gives noise_k = -log E_k
    logits[1] = torch.tensor([0.0] + [-300.0] * (V - 1))   # w's probability underflows
    logits[2] = -1e4 * torch.arange(V)
    w = torch.tensor([1, 5, 7, 0])
    noise = posterior_gumbel(logits, w, gen())
    assert noise.isfinite().all()
    assert (gumbel_max(logits, noise) == w).all()
    assert 295 < noise[1, 5] < 320                         # -log E_0 - log p_w, not clipped by float32's smallest value
    features = gumbel.noise_features(gumbel.posterior_times(logits, w, sample_exponential((4, V), gen())))
    assert features.isfinite().all()
    assert torch.allclose(features.sum(-1), torch.ones(4))
    assert features[1, 5] > 0.999999                       # all the softmax's mass is on so large a noise
    assert posterior_gumbel(torch.zeros(2, 3, V), torch.zeros(2, 3, dtype=torch.long)).shape == (2, 3, V)


def test_tokens_that_cannot_be_have_no_posterior():
    """An impossible token, logits that are nan, an id out of range. Training's own function has no check: it gives nan,
    which stops a run."""
    impossible = torch.zeros(1, 8)
    impossible[0, 3:] = -math.inf
    token = torch.tensor([5])
    with pytest.raises(ValueError, match="-inf"):
        posterior_gumbel(impossible, token)
    with pytest.raises(ValueError, match="nan"):
        posterior_gumbel(torch.full((1, 8), math.nan), token)
    with pytest.raises(ValueError, match=r"0\.\.8"):
        posterior_gumbel(torch.zeros(4, 8), torch.tensor([0, 1, 2, 8]))
    assert gumbel.posterior_times(impossible, token, sample_exponential((1, 8), gen())).isnan().any()


@pytest.mark.parametrize("gap", [95, 200, 10_000])
def test_posterior_is_exact_where_p_underflows(gap):
    """noise_w + log p_w is standard Gumbel however unlikely w is: p_w underflows in float32 from 88 nats on. A repair
    that merely lifts noise_w above the runner-up would give another law."""
    n = 20_000
    logits = torch.tensor([0.0, -1.0, -2.0, -gap])
    noise = posterior_gumbel(logits.expand(n, 4), torch.full((n,), 3), gen(gap)).double()
    logp = logits.double().log_softmax(-1)
    winning = noise[:, 3] + logp[3]
    assert stats.kstest(winning.numpy(), "gumbel_r").pvalue > 1e-3
    # the losers: T_k = E_k + p_k E_0, with the same E_0
    e_0 = torch.exp(-winning)
    for k in range(3):
        e_k = torch.exp(-noise[:, k]) - logp[k].exp() * e_0
        assert stats.kstest(e_k.numpy(), "expon").pvalue > 1e-3, k


def test_posterior_noise_is_iid_gumbel():
    """Theorem 4.1, for w ~ p: the marginals; then independence, by correlations of several functions of the noise, and
    by the 120 orders of five values, each of which must be equally likely."""
    p = torch.tensor([0.6, 0.2, 0.1, 0.07, 0.03], dtype=torch.float64)
    n = 200_000
    (_, noise), _ = posterior_pairs(p, n, 0)
    for k in range(5):
        assert stats.kstest(noise[:, k].numpy(), "gumbel_r").pvalue > 1e-4, k
    x = noise.double().T
    for f in (x, torch.exp(-x), (x > 1).double(), (x > 3).double()):
        correlation = torch.corrcoef(f) - torch.eye(5)
        assert correlation.abs().max() < 5 / math.sqrt(n)
    orders, counts = numbered(noise.argsort(-1), 5).unique(return_counts=True)
    assert len(orders) == 120
    assert fits(counts, np.ones(120))


def test_posterior_joint_law_equals_forward_construction():
    """(w, noise) with w ~ p has the law of (argmax, noise): compared given each w, in the marginals, in the maximum of
    log p + noise, and in its distance to the second."""
    p = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    (w, a), (x, b) = posterior_pairs(p, 200_000, 5)
    logp = p.log().float()
    for v in range(4):
        ours = a[w == v]
        forward = b[x == v]
        for k in range(4):
            assert same_law(ours[:, k], forward[:, k]), (v, k)
        best_two_ours = (ours + logp).topk(2, -1).values
        best_two_forward = (forward + logp).topk(2, -1).values
        assert same_law(best_two_ours[:, 0], best_two_forward[:, 0])
        assert same_law(best_two_ours.diff(dim=-1)[:, 0], best_two_forward.diff(dim=-1)[:, 0])


def test_posterior_agrees_with_rejection():
    """Conditioning by brute force: prior noise kept if its argmax is w. A test of the 6 x 6 histograms of each two
    entries of the noise, cut at the sextiles."""
    logits = torch.tensor([1.0, 0.0, -1.0, -2.0])
    prior = sample_gumbel((2_000_000, 4), gen())
    kept = prior[gumbel_max(logits.expand_as(prior), prior) == 2]
    ours = posterior_gumbel(logits.expand(len(kept), 4), torch.full((len(kept),), 2), gen(1))
    edges = [np.quantile(kept[:, k].numpy(), np.linspace(0, 1, 7)[1:-1]) for k in range(4)]
    for i, j in itertools.combinations(range(4), 2):
        table = []
        for x in (kept, ours):
            row = np.digitize(x[:, i].numpy(), edges[i])
            column = np.digitize(x[:, j].numpy(), edges[j])
            table.append(np.bincount(6 * row + column, minlength=36))
        table = np.stack(table)
        assert stats.chi2_contingency(table[:, table.sum(0) > 20]).pvalue > 1e-4, (i, j)


# ---------------------------------------------------------------------------------------------------------------------
# the noise embedding (gumbel.py)

def test_transforms_have_the_right_law_and_can_be_inverted():
    """Uniform exp(-T) and Gaussian, of noise = -log T; back from the Gaussian through scipy: T = -log Phi(z), whose
    log Phi is accurate in both tails."""
    noise = torch.linspace(-2.5, 15, 2001, dtype=torch.float64)
    T = torch.exp(-noise)
    u = gumbel.to_uniform(T)
    z = gumbel.to_gaussian(T)
    assert (-(-u.log()).log() - noise).abs().max() < 1e-8
    assert np.abs(-np.log(-stats.norm.logcdf(z.numpy())) - noise.numpy()).max() < 1e-8
    assert torch.all(z.diff() > 0) and torch.all(u.diff() > 0)
    e = sample_exponential((100_000,), gen())
    assert stats.kstest(gumbel.to_uniform(e).numpy(), "uniform").pvalue > 1e-4
    assert stats.kstest(gumbel.to_gaussian(e).numpy(), "norm").pvalue > 1e-4
    assert gumbel.to_gaussian(torch.tensor([0.0, 1e-37, 1e-20, 1.0, 40.0, 700.0, 1e30])).isfinite().all()


@pytest.mark.parametrize("tau", [1.0, 0.85, 2.0])
def test_noise_features_are_the_softmax_of_the_noise(tau):
    """softmax(tau * noise), of noise = -log E, or of its uniform; the embedding is W times that."""
    e = sample_exponential((1000, 300), gen())
    want = (-tau * e.double().log()).softmax(-1)
    want_uniform = (tau * torch.exp(-e.double())).softmax(-1)
    assert torch.allclose(gumbel.noise_features(e.clone(), "gumbel", tau).double(), want, rtol=1e-5, atol=1e-9)
    assert torch.allclose(gumbel.noise_features(e.clone(), "uniform", tau).double(), want_uniform, rtol=1e-5)
    assert torch.allclose(gumbel.noise_features(e.clone(), "log", tau).double(), want.log(), atol=1e-5)
    emb = GumbelEmbedding(300, 16)
    assert torch.allclose(emb(-e.log(), tau), want.float() @ emb.weight.T, rtol=1e-4, atol=1e-6)


def test_embedding_from_posterior_equals_the_plain_formula(monkeypatch):
    """softmax(posterior_gumbel(...)) W^T, value and gradient, from the same draws in many chunks; two calls of one
    generator draw different noise."""
    V, D, n = 37, 16, 50
    monkeypatch.setattr(gumbel.DEVICE, "chunk", 7 * V)            # 8 chunks, the last one short
    logits = 3 * torch.randn(n, V, generator=gen())
    w = torch.randint(V, (n,), generator=gen(1))
    up = torch.randn(n, D, generator=gen(2))
    emb = GumbelEmbedding(V, D)
    g = gen(3)
    out = emb.from_posterior(lambda a, b: logits[a:b], w, g)
    again = emb.from_posterior(lambda a, b: logits[a:b], w, g)
    (out * up).sum().backward()
    grad = emb.weight.grad
    emb.weight.grad = None
    want = posterior_gumbel(logits, w, gen(3)).softmax(-1) @ emb.weight.T
    (want * up).sum().backward()
    assert torch.allclose(out, want, atol=1e-6)
    assert torch.allclose(grad, emb.weight.grad, atol=1e-5)
    assert not torch.allclose(out, again)
    assert emb.from_posterior(lambda a, b: logits[a:b], w[:0], g).shape == (0, D)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """What the code decides by device is as on a GPU; what it computes with stays a CPU."""
    monkeypatch.setattr(gumbel.DEVICE, "planned", True)


def embedding_gradients(emb, logits, w, twice=False, autocast=False, chunk=7):
    """(g, the gradient of W) of noise drawn in so many rows at once; `twice`: of two backward passes over one graph."""
    gumbel.DEVICE.chunk = chunk * logits.shape[1]
    emb.weight.grad = None
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        g = emb.from_posterior(lambda a, b: logits[a:b], w, gen(3))
    loss = (g * torch.randn(g.shape, generator=gen(2))).sum()
    loss.backward(retain_graph=twice)
    if twice:
        loss.backward()
    return g.detach(), emb.weight.grad


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_features_that_are_kept_and_padded_give_the_same_gradient(monkeypatch, autocast, padded):
    """As on a GPU, where a product's rows are of 16 bytes: also after a second backward pass over a retained graph."""
    V, n = 37, 50
    monkeypatch.setattr(gumbel.DEVICE, "chunk", 1)         # (put back afterwards)
    monkeypatch.setattr(gumbel.DEVICE, "planned", padded)
    emb = GumbelEmbedding(V, 16)
    logits = 3 * torch.randn(n, V, generator=gen())
    w = torch.randint(V, (n,), generator=gen(1))
    want, want_grad = embedding_gradients(emb, logits, w)
    draws = []
    plain = emb.draw
    emb.draw = lambda *args: draws.append(1) or plain(*args)
    for keep, twice, drawn in ((0, False, 16), (n * V - 1, False, 16), (n * V, False, 8), (n * V, True, 8)):
        monkeypatch.setattr(gumbel.DEVICE, "keep", keep)
        draws.clear()
        got, grad = embedding_gradients(emb, logits, w, twice, autocast)
        assert len(draws) == drawn                         # 8 chunks, again in the backward pass unless they are kept
        tolerance = 2e-2 if autocast else 1e-5
        assert (got - want).abs().max() < tolerance * want.abs().max()
        assert (grad - (1 + twice) * want_grad).abs().max() < tolerance * grad.abs().max()


def test_vocabulary_products_are_padded_on_a_gpu_in_training_only(as_on_a_gpu, monkeypatch):
    """To 64 rows of a weight, in bf16: loss and gradients are those without; weights and float32 stay as they are."""
    shapes = []
    linear = F.linear

    def spy(x, weight, bias=None):
        shapes.append(tuple(weight.shape))
        return linear(x, weight, bias)
    monkeypatch.setattr(F, "linear", spy)
    model, x, t, z, noise = loss_problem()
    model.train()
    found = []
    for planned, autocast in ((False, True), (True, True), (True, False)):
        monkeypatch.setattr(gumbel.DEVICE, "planned", planned)
        model.zero_grad()
        shapes.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model.loss(x, t, z=z, noise=noise)[0].backward()
        assert ((64, 32) in shapes) == (planned and autocast)
        found.append(gradient(model))
    assert (found[0] - found[1]).abs().max() < 1e-2 * found[0].abs().max()
    assert (found[0] - found[2]).abs().max() < 5e-2 * found[0].abs().max()
    model.eval()
    shapes.clear()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model.log_probs(z, noise)
    assert (64, 32) not in shapes and (7, 32) in shapes


def test_a_heads_product_is_exact_outside_training():
    """Under bf16 autocast too: a student's, the heads', an AR model's."""
    heads = tiny_heads()
    ar = tiny_ar()
    models = [(tiny(), MDLM.logits, lambda m: m.transformer.head),
              (ar, lambda m, h: m.losses(rows_of(2)), lambda m: m.output_layer()),
              (heads, lambda m, h: m.logits(1, h), lambda m: m.heads[0].out)]
    h = torch.randn(5, 32, generator=gen())
    for model, run, layer in models:
        seen = []
        layer(model).register_forward_pre_hook(
            lambda m, args: seen.append((args[0].dtype, torch.is_autocast_enabled("cpu"))))
        for training in (False, True):
            model.train(training)
            with torch.autocast("cpu", torch.bfloat16):
                run(model, h)
            assert (seen[-1] == (torch.float32, False)) != training, type(model)
    exact = h @ models[0][0].transformer.head.weight.T + models[0][0].transformer.head.bias
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(models[0][0].eval().logits(h), exact)


def test_the_teachers_head_is_tf32_in_training_in_bf16_only(as_on_a_gpu, monkeypatch):
    """Also where the backward pass draws again; not in validation or float32; always restored."""
    monkeypatch.setattr(gumbel.DEVICE, "keep", 0)
    seen = []
    teacher = tiny_ar()
    head = teacher.transformer.head
    monkeypatch.setattr(head, "forward", lambda h: seen.append(torch.get_float32_matmul_precision())
                        or F.linear(h, head.weight, head.bias))
    model = tiny("gumbel")
    x = rows_of(8)
    t = torch.full((8,), 0.5)
    for grad, autocast, want in ((True, True, "high"), (True, False, "highest"), (False, True, "highest")):
        seen.clear()
        with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, _ = model.loss(x, t, teacher=teacher, generator=gen())
        if grad:
            loss.backward()
        assert seen == [want] * (1 + grad)                 # once more in the backward pass
        assert torch.get_float32_matmul_precision() == "highest"
    with pytest.raises(ZeroDivisionError), gumbel.tf32(True):
        1 / 0
    assert torch.get_float32_matmul_precision() == "highest"


def cut_mantissa(x, bits):
    """float32 with so many bits of mantissa, the others dropped: worse than to round."""
    return (x.view(torch.int32) >> 23 - bits << 23 - bits).view(torch.float32)


def test_what_tf32_moves_is_bounded():
    """Its stand-in: inputs of 10 mantissa bits, at GPT-2's size: states of norm 250, logits of -85 with a standard
    deviation of 5. bf16's 7 bits move ten times as much.
    """
    D, V, n = 1280, 20_000, 64
    common = torch.randn(D, generator=gen()).div(D ** 0.5)               # a direction that all states share
    h = 200 * common + 150 * torch.randn(n, D, generator=gen(1)) / D ** 0.5
    weight = -85 / 200 * common + 5 / 250 * torch.randn(V, D, generator=gen(2))
    exact = h.double() @ weight.double().T
    assert abs(exact.mean() + 85) < 5 and 4 < exact.std() < 7 and h.norm(dim=1).mean() > 240
    w = torch.distributions.Categorical(logits=exact.float()).sample()
    e = sample_exponential((n, V), gen(3))
    features = gumbel.noise_features(gumbel.posterior_times(exact.float(), w, e.clone()))
    moved = {}
    for bits in (10, 7):
        fast = cut_mantissa(h, bits).double() @ cut_mantissa(weight, bits).double().T
        nats = (exact.log_softmax(-1) - fast.log_softmax(-1)).gather(1, w[:, None]).abs()
        mass = 0.5 * (features - gumbel.noise_features(gumbel.posterior_times(fast.float(), w, e.clone()))).abs().sum(1)
        moved[bits] = nats.max().item(), nats.mean().item(), mass.max().item()
    assert all(a < bound for a, bound in zip(moved[10], (0.02, 0.005, 0.005))), moved
    assert all(b > 4 * a for a, b in zip(moved[10], moved[7])), moved


@slow
def test_the_draw_compiles_once_for_all_numbers_of_rows(monkeypatch):
    """In one graph, with inductor; from the backward pass, which has a thread of its own on a GPU, the same; nothing is
    compiled any more after the second number of rows."""
    V = 37
    torch._dynamo.reset()
    monkeypatch.setattr(gumbel.DEVICE, "chunk", 1)
    monkeypatch.setattr(gumbel.DEVICE, "keep", 0)
    emb = GumbelEmbedding(V, 16)
    logits = 3 * torch.randn(60, V, generator=gen())
    w = torch.randint(V, (60,), generator=gen(1))
    want = {n: embedding_gradients(emb, logits[:n], w[:n], chunk=100) for n in (50, 43, 60, 17)}
    emb.compile(fullgraph=True)
    counted = torch._dynamo.utils.counters["stats"]
    graphs = []
    for n, (g, grad) in want.items():
        got = embedding_gradients(emb, logits[:n], w[:n], chunk=100)
        assert torch.allclose(got[0], g, atol=1e-6) and torch.allclose(got[1], grad, atol=1e-5)
        graphs.append(counted["unique_graphs"])
    found = []
    thread = threading.Thread(target=lambda: found.append(embedding_gradients(emb, logits, w, chunk=100)))
    thread.start()
    thread.join()
    assert torch.allclose(found[0][1], want[60][1], atol=1e-5)
    assert graphs[1] == graphs[-1] == counted["unique_graphs"] <= 2


def test_embedding_from_the_prior_reads_fresh_noise():
    """tau * Gumbel(0, 1); what is "unpaired" reads it in training as well; its scale is a token embedding's."""
    V, n = 37, 50
    emb = GumbelEmbedding(V, 16)
    want = (0.85 * sample_gumbel((n, V), gen(4))).softmax(-1) @ emb.weight.T
    assert torch.allclose(emb.from_prior(n, 0.85, gen(4)), want, atol=1e-6)
    control = GumbelEmbedding(V, 16, "unpaired")
    w = torch.randint(V, (n,), generator=gen(1))
    assert torch.equal(control.from_posterior(None, w, gen(5)), control.from_prior(n, generator=gen(5)))
    assert 0.015 < GumbelEmbedding(2000, 64).from_prior(500, generator=gen()).std() < 0.025  # 0.02 is a token's
    with pytest.raises(ValueError, match="'gauss'.*gaussian"):
        GumbelEmbedding(V, 16, "gauss")


@slow
def test_embedding_memory():
    """4096 rows, GPT-2's vocabulary, D = 768: the peak above parameters and W's gradient stays under 400 MB, where the
    noise alone would take 800."""
    script = """
import torch
from gumbel import GumbelEmbedding
def peak(field):
    return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1]) / 1024
V, D, N = 50257, 768, 4096
emb = GumbelEmbedding(V, D); head = torch.randn(V, 64) / 8; h = torch.randn(N, 64); w = torch.randint(V, (N,))
open("/proc/self/clear_refs", "w").write("5")              # reset the high-water mark
before = peak("VmRSS")
emb.from_posterior(lambda a, b: h[a:b] @ head.T, w, torch.Generator()).square().sum().backward()
print(peak("VmHWM") - before - emb.weight.grad.numel() * 4 / 2**20)
"""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this system cannot reset a process's memory high-water mark")
    out = subprocess.run([sys.executable, "-c", script], cwd=HERE, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert float(out.stdout) < 400, out.stdout


# ---------------------------------------------------------------------------------------------------------------------
# the network (mdlm.py)

def test_untrained_network_is_uniform():
    """At masked positions; a revealed token is certain (SUBS); [MASK] is never predicted."""
    model = MDLM(11, 6, 10, n_layer=2, n_embd=32, n_head=2, dropout=0.0)
    logp = model.log_probs(torch.tensor([[10, 11, 11, 3, 11, 11]]))
    assert torch.allclose(logp[0, 1, :11], torch.full((11,), -math.log(11)))
    assert logp[0, 1, 11] == -math.inf
    assert logp[0, 3, 3] == 0
    assert (logp[0, 3, [0, 1, 2, 4]] == -math.inf).all()


def test_bos_is_never_predicted_where_it_never_occurs():
    assert (tiny(predict_bos=False).log_probs(torch.full((1, 6), 7))[..., 6] == -math.inf).all()
    x, _ = tiny_ar(predict_bos=False).generate(torch.full((200, 1), 6), generator=gen())
    assert (x[:, 1:] != 6).all()


def test_ar_model_sees_no_later_token():
    model = tiny_ar()
    x = rows_of(3)
    changed = x.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 6
    logp = model.log_probs(x)
    other = model.log_probs(changed)
    assert torch.equal(other[:, :4], logp[:, :4])
    assert not torch.allclose(other[:, 4], logp[:, 4])


def test_kv_cache_changes_no_logits():
    """One token or several at a time, against the full pass."""
    model = tiny_ar()
    x = rows_of(3)
    for parts in ([1] * 6, [2, 3, 1], [4, 2]):
        cache = KVCache(model.transformer, 3, 6)
        got = torch.cat([model.logits(model.hidden(part, cache)) for part in x.split(parts, 1)], 1)
        assert torch.allclose(got.log_softmax(-1), model.log_probs(x), atol=1e-5), parts


def test_positions_matter_and_only_relatively():
    """RoPE: where all inputs are alike there is nothing to tell positions by; BOS anchors them."""
    model = tiny()
    x = torch.full((1, 6), 7)
    h = model.hidden(x)
    assert torch.allclose(h[0, 1], h[0, 4], atol=1e-5)
    x[0, 0] = 6
    h = model.hidden(x)
    assert (h[0, 1] - h[0, 4]).abs().max() > 1e-3


def test_student_reads_noise_at_masked_positions_only():
    model = tiny("gumbel")
    z = rows_of(2)
    z[:, [2, 4]] = 7
    noise = sample_gumbel((2, 6, 7), gen())
    elsewhere = noise.clone()
    elsewhere[:, [0, 1, 3, 5]] = 5.0
    there = noise.clone()
    there[:, 2] = 5.0 * torch.eye(7)[0]
    assert torch.equal(model.log_probs(z, noise), model.log_probs(z, elsewhere))
    assert not torch.allclose(model.log_probs(z, noise), model.log_probs(z, there))


def test_noise_is_given_to_models_that_read_it_and_to_no_other():
    x = rows_of(2)
    with pytest.raises(ValueError, match="noise"):
        tiny("gumbel").log_probs(x)
    with pytest.raises(ValueError, match="noise"):
        tiny().hidden(x, torch.zeros(2, 6, 32))
    with pytest.raises(ValueError, match="noise"):
        tiny().log_probs(x, sample_gumbel((2, 6, 7), gen()))
    with pytest.raises(ValueError, match="teacher"):
        tiny("gumbel").loss(x, torch.ones(2))


@pytest.mark.parametrize("shift", [False, True])
def test_states_where_they_are_wanted_are_those_of_the_full_pass(shift):
    model = tiny(shift=shift)
    z = rows_of(8).masked_fill(torch.arange(6) % 3 > 0, 7)
    wanted = torch.rand(8, 6, generator=gen()) < 0.4
    wanted[:, 0] = False
    full = model.hidden(z)[wanted]
    assert full.std() > 0.1
    assert (model.hidden(z, wanted=wanted) - full).abs().max() < 1e-5
    blocks = tiny_blocks(shift=shift, L=6)
    wanted = wanted.roll(1, 0)
    assert torch.equal(blocks.hidden(z, None, rows_of(8), wanted), blocks.hidden(z, None, rows_of(8))[wanted])


@slow
@pytest.mark.parametrize("model", ["mdlm", "bd3lm", "ar"])
def test_compiles_without_graph_breaks(model):
    """The whole transformer is one graph: same output and gradient, any graph break would raise."""
    make = dict(mdlm=tiny, bd3lm=tiny_blocks, ar=tiny_ar)[model]
    net = make().transformer
    randomise(net)
    h = torch.randn(2, 12, net.embed.weight.shape[1], generator=gen())
    mask = training_mask(6, 2, torch.device("cpu")) if model == "bd3lm" else None
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    grads = []
    for f in (net, compiled):
        net.zero_grad()
        f(h, mask=mask).square().sum().backward()
        grads.append(gradient(net.blocks))
    assert torch.allclose(*grads, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", gumbel.KINDS)
@pytest.mark.parametrize("inject", ["replace", "add"])
def test_every_noise_trains_and_samples(kind, inject):
    """Loss, gradient to W, sampling; under bf16 autocast too, where the loss must stay near the float32 one."""
    model = tiny(kind, inject=inject)
    teacher = tiny_ar()
    x = rows_of(32)
    t = torch.ones(32)
    loss, _ = model.loss(x, t, teacher, generator=gen())
    loss.backward()
    assert loss.isfinite()
    assert model.noise_embed.weight.grad.abs().max() > 0
    with torch.autocast("cpu", torch.bfloat16):
        low, _ = model.loss(x, t, teacher, generator=gen())
        low.backward()
        assert (model.generate(all_masked(32, 6), 2, generator=gen())[0] != 7).all()
        assert teacher.generate(x[:, :2], generator=gen())[0].shape == (32, 6)
    assert abs(loss - low) < 0.05 * loss


# ---------------------------------------------------------------------------------------------------------------------
# the loss (mdlm.py)

def subset_nelbo(model, x, noise=None):
    """The NELBO of one row by enumeration of its masks, and -log p of the random-order sampler. x [L] -> two floats."""
    n = len(x) - 1
    nelbo = 0.0
    masks = torch.tensor([(False, *mask) for mask in itertools.product([False, True], repeat=n)])
    z = x.masked_fill(masks, model.mask_id)                                     # (2^n, L)
    logp_of_x = model.log_probs(z, noise).double().gather(-1, x.expand_as(z)[:, :, None]).squeeze(-1)
    logp = {}
    for mask, lp in zip(masks, logp_of_x):
        logp[tuple(mask[1:].tolist())] = lp[1:].tolist()
        k = int(mask.sum())
        if k:
            nelbo -= weight_of_masks(k, n) * float(lp[mask].sum())

    @functools.cache
    def p(mask):                                           # reveal the masked positions in a uniformly random order
        masked = [i for i in range(n) if mask[i]]
        if not masked:
            return 1.0
        total = 0.0
        for i in masked:
            total += math.exp(logp[mask][i]) * p(mask[:i] + (False,) + mask[i + 1:])
        return total / len(masked)
    return nelbo, -math.log(p((True,) * n))


def loss_problem():
    """A student, rows, noise levels, noised rows and noise: all that a loss needs, without a draw."""
    x = rows_of(8)
    t = stratified_t(8, np.random.default_rng(0))
    return tiny("gumbel"), x, t, partly_masked(x, 0.6), sample_gumbel((8, 6, 7), gen())


def ddp_worker(rank, world, port, path):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    model, x, t, z, noise = loss_problem()
    ddp = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    mine = slice(rank * 4, rank * 4 + 4)
    ddp(x[mine], t[mine], z=z[mine], noise=noise[mine])[0].backward()
    if rank == 0:
        torch.save([p.grad for p in model.parameters()], path)
    torch.distributed.destroy_process_group()


def test_noise_levels_are_stratified():
    t = torch.stack([stratified_t(64, np.random.default_rng(i)) for i in range(500)])
    assert t.min() >= 1e-3 and t.max() <= 1
    uniform = ((t - 1e-3) / (1 - 1e-3)).double().sort(-1).values
    stratum = (uniform * 64).floor()
    assert (stratum == torch.arange(64)).float().mean() > 0.98                  # one in each (but for the wrap)
    assert (t.mean(0) - 0.5005).abs().max() < 5 * 0.289 / math.sqrt(500)        # no row gets systematically more noise
    assert (stratified_t(8, np.random.default_rng(0), 0.5) == 1).sum() >= 4     # --t_one=0.5


@pytest.mark.parametrize("row", [0, pytest.param(1, marks=slow), pytest.param(2, marks=slow)])
def test_loss_is_the_nelbo_and_bounds_the_likelihood(row):
    """The mean over 40,000 draws of t and masks, times the row's 3 tokens, against the enumeration of all masks; 3 % is
    about four standard errors."""
    model = tiny(V=4, L=4)
    x = rows_of(3, V=4, L=4)[row]
    n = 40_000
    with torch.no_grad():
        nelbo, nll = subset_nelbo(model, x)
        t = stratified_t(n, np.random.default_rng(0))
        loss, info = model.loss(x.expand(n, -1), t, generator=gen())
    assert nelbo >= nll - 1e-6
    assert abs(loss * 3 - nelbo) < 0.03 * nelbo, (loss * 3, nelbo)
    assert info["nll_masked"] > 0


def test_likelihood_of_the_random_order_sampler_is_a_distribution():
    model = tiny(V=4, L=4)
    with torch.no_grad():
        total = sum(math.exp(-subset_nelbo(model, x)[1]) for x in rows_from_bos(4, 4, 4))
    assert abs(total - 1) < 1e-6


def test_loss_is_tight_for_the_exact_denoiser():
    """On an enumerable language, the NELBO of the true conditionals averages to the entropy (mask by mask, exactly)."""
    rows = torch.tensor([[0, 0, 1], [0, 1, 1], [1, 0, 0], [1, 0, 0]])
    exact = ExactDenoiser(rows.numpy(), 2)
    total = 0.0
    for x in rows:
        for mask in itertools.product([False, True], repeat=3):
            k = sum(mask)
            if k:
                masked = torch.tensor(mask)
                logp = exact.hidden(x.masked_fill(masked, 2)[None])[0].gather(-1, x[:, None]).squeeze(1)
                total -= weight_of_masks(k, 3) * float(logp[masked].sum()) / 4
    assert abs(total - 1.5 * math.log(2)) < 1e-5


def test_loss_is_its_formula():
    """mean over rows of (1/t) sum_{masked i} -log p(x_i | z, noise) / (L - 1): BOS is not counted, t is not clamped."""
    model, x, t, z, noise = loss_problem()
    logp = model.log_probs(z, noise).gather(-1, x[:, :, None]).squeeze(-1)      # 0 where nothing is masked
    want = (-logp.sum(1) / t).mean() / 5
    loss, info = model.loss(x, t, z=z, noise=noise)
    assert abs(loss - want) < 1e-5 * want
    assert abs(info["nll_masked"] + logp.sum() / (z == 7).sum()) < 1e-5


def test_loss_does_not_depend_on_chunks_or_micro_batches(monkeypatch):
    model, x, t, z, noise = loss_problem()

    def grads(rows):
        model.zero_grad()
        for i in torch.arange(8).split(rows):
            loss, _ = model.loss(x[i], t[i], z=z[i], noise=noise[i])
            (loss * len(i) / 8).backward()
        return gradient(model)
    whole = grads(8)
    assert torch.allclose(grads(2), whole, atol=1e-6)
    monkeypatch.setattr(mdlm.DEVICE, "chunk", 7)           # 4 rows of logits at a time, recomputed in the backward pass
    assert torch.allclose(grads(8), whole, atol=1e-6)


@slow
def test_ddp_gives_the_gradients_of_one_process(tmp_path):
    """Two gloo processes with half the batch each: the gradients of one process with all of it."""
    torch.multiprocessing.spawn(ddp_worker, (2, 29900 + os.getpid() % 90, str(tmp_path / "g.pt")), nprocs=2)
    model, x, t, z, noise = loss_problem()
    model.loss(x, t, z=z, noise=noise)[0].backward()
    for got, p in zip(torch.load(tmp_path / "g.pt", weights_only=True), model.parameters()):
        assert torch.allclose(got, p.grad, atol=1e-6)


def test_loss_with_a_teacher_equals_loss_with_its_extracted_noise():
    """Training's chunked path draws what extract_parallel draws, where everything is masked: rows in the same order."""
    teacher = tiny_ar()
    model = tiny("gumbel")
    x = rows_of(1)
    z = x.clone()
    z[:, 1:] = 7
    noise = extract_parallel(teacher, x, gen(1))
    with torch.no_grad():
        drawn = model.loss(x, torch.ones(1), teacher=teacher, z=z, generator=gen(1))[0]
        given = model.loss(x, torch.ones(1), noise=noise, z=z)[0]
    assert abs(drawn - given) < 1e-5


def test_answers_of_a_teacher_kept_for_all_rows_are_its_own():
    class Data:
        def rows(self, i):
            return rows_of(5).numpy()[list(i)]

        def __len__(self):
            return 5
    teacher = tiny_ar()
    masked = torch.rand(5, 6, generator=gen()) < 0.5
    masked[:, 0] = False
    table = TeacherLogits(teacher, Data(), batch=2)
    table.for_rows(table.load([0, 1, 2, 3, 4]))
    want = teacher.posterior_logits(rows_of(5), masked)(0, 99)
    assert torch.allclose(table.posterior_logits(rows_of(5), masked)(0, 99), want, atol=1e-5)


def test_bound_is_tight_for_a_perfect_student():
    """E_q[-log p(x | noise)] of a student that runs the teacher's Gumbel-max itself on the noise is 0 (Theorem 4.1):
    it writes x again, whatever noise the posterior draws."""
    teacher = tiny_ar(V=4, L=3, seed=2)
    rows = rows_from_bos(4, 3, 4)
    for seed in range(20):
        noise = extract_parallel(teacher, rows, gen(seed))
        again, _ = teacher.generate(rows[:, :1], 3, noise=noise)
        assert torch.equal(again, rows)


@pytest.mark.parametrize("n,every", [pytest.param(60_000, 1, marks=slow), (10_000, 4)])
def test_bound_with_noise_is_valid_for_any_student(n, every):
    """-log p_student(x) <= E_q[-log p(x | noise)] - log p_teacher(x), for each text (or every fourth) of two tokens.

    The student writes both tokens in one step: p(x) = E_prior prod_i p(x_i | noise), by Monte Carlo with n draws; 0.02
    nats are its error and that of the 4000 draws from the posterior.
    """
    teacher = tiny_ar(V=4, L=3, seed=2)
    student = tiny("gumbel", V=4, L=3, seed=5)
    rows = rows_from_bos(4, 3, 4)
    start = torch.tensor([[3, 4, 4]])
    total = 0.0
    with torch.no_grad():
        teacher_logp = log_likelihood(teacher, rows)
        prior = sample_gumbel((n, 3, 4), gen(1))
        logp = student.log_probs(start.expand(n, -1), prior)[:, 1:, :4].double()
        for x, teacher_logp_x in zip(rows[::every], teacher_logp[::every]):
            p_of_draws = logp.gather(-1, x[None, 1:, None].expand(n, -1, 1)).sum((1, 2)).exp()
            many = x.expand(4000, -1)
            q = extract_parallel(teacher, many, gen(2))
            given_noise = student.log_probs(start.expand(4000, -1), q)[:, 1:].gather(-1, many[:, 1:, None])
            first = -given_noise.sum((1, 2)).mean()
            assert first - teacher_logp_x >= -p_of_draws.mean().log() - 0.02, x
            total += float((teacher_logp_x - first).exp())
    # exp(-bound) is at most p(x), so these sum to at most one: exactly one for a perfect student, whose first term is 0
    assert total <= 1.01
    assert abs(float(teacher_logp.exp().sum()) - 1) < 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# samplers (gumbel.py's draws, mdlm.py)

def test_nucleus_keeps_the_token_that_crosses_top_p():
    logp = torch.tensor([[0.35, 0.5, 0.05, 0.1]]).log()
    assert (nucleus(logp, 0.9) > -math.inf).tolist() == [[True, True, False, True]]
    assert (nucleus(logp, 0.3) > -math.inf).tolist() == [[False, True, False, False]]
    x = draw_tokens(logp.expand(100_000, 4), top_p=0.9, generator=gen())
    assert fits(torch.bincount(x, minlength=4)[[0, 1, 3]], [0.35, 0.5, 0.1])
    assert not (x == 2).any()
    assert draw_tokens(logp, greedy=True).tolist() == [1]


@pytest.mark.parametrize("top_p", [0.2, pytest.param(0.55, marks=slow), 0.9, 1.0])
def test_draws_without_sorting_have_the_law_of_the_sorted_nucleus(top_p):
    """Rows of several kinds: with tied tokens, of which the nucleus holds a part (it is free which); with impossible
    ones."""
    n = 30_000
    tied = torch.zeros(7)
    for logits in (torch.randn(300, generator=gen()) * 2, tied, torch.tensor([0, -math.inf, 1, 1, -math.inf, 0.5])):
        x = draw_tokens(logits.expand(n, -1), top_p, generator=gen(1))
        want = nucleus(logits[None].double(), top_p).softmax(-1)[0]
        count = torch.bincount(x, minlength=len(logits)).double()
        if logits is tied:
            count = count.sort().values
            want = want.sort().values
        assert not count[want == 0].any()
        often = want * n > 5                               # cells that are large enough for the test
        assert often.sum() == 1 or fits(count[often], want[often])


@slow
def test_an_improbable_token_comes_as_often_as_it_should():
    """By inversion in float64: float32's cumulative sum would have lost it. Within five standard errors."""
    n = 10_000_000
    x = draw_tokens(torch.tensor([0.0, -12.0]).expand(n, 2), generator=gen(2))
    want = n * math.exp(-12)
    assert abs(x.sum().item() - want) < 5 * want**0.5


@pytest.mark.parametrize("sampler,order,steps", [("ancestral", "random", 5), ("fixed", "random", 5),
                                                 ("fixed", "left_to_right", 6), ("fixed", "random", 100),
                                                 ("first_hitting", "random", 3)])
def test_reveal_steps_cut_the_masked_tokens_evenly(sampler, order, steps):
    """Every masked place has a step, no other has; but for ancestral, steps are 1, 2 .. without gaps, and of equal size
    but for one; left to right they ascend."""
    masked = torch.rand(50, 20, generator=gen()) < 0.7
    step = reveal_steps(masked, steps, sampler, order, gen())
    assert ((step > 0) == masked).all()
    for row, places in zip(step, masked):
        sizes = torch.bincount(row[places])[1:]
        if sampler != "ancestral":
            n = int(places.sum())
            assert len(sizes) == (n if sampler == "first_hitting" else min(n, steps))
            assert sizes.min() > 0 and sizes.max() - sizes.min() <= 1
        if order == "left_to_right":
            assert (row[places].diff() >= 0).all()


def test_ancestral_steps_are_uniform_and_independent():
    step = reveal_steps(torch.ones(20_000, 4, dtype=torch.bool), 3, generator=gen())
    assert fits(torch.bincount(numbered(step - 1, 3), minlength=81), np.ones(81))


def test_gaps_between_steps_are_closed():
    assert close_gaps(torch.tensor([[0, 7, 3, 7], [2, 9, 4, 5], [0, 0, 0, 0]])).tolist() == [
        [0, 2, 1, 2], [1, 4, 2, 3], [0, 0, 0, 0]]


def test_confidence_reveals_the_most_probable_first():
    z = torch.tensor([[[4.0, 0], [9.0, 0], [1.0, 0], [6.0, 0]]])
    seen = []

    class Fake:
        def hidden(self, x, rows, wanted):
            seen.append(x.clone())
            return z[rows][wanted]

        def logits(self, h):
            return h
    x = torch.full((1, 4), 2)
    unmask_by_confidence(x, reveal_steps(x == 2, 4, "fixed", generator=gen()), 2, Fake(), greedy=True)
    assert [(s != 2).nonzero()[:, 1].tolist() for s in seen] == [[], [1], [1, 3], [0, 1, 3]]


# --- what any sampler must keep to

def rows_to_fill():
    """40 rows with [MASK]s; the fourth has nothing to do."""
    start = partly_masked(rows_of(40), 0.6, seed=5)
    start[3] = rows_of(1)[0]
    return start


SAMPLING = [dict(sampler="ancestral"), dict(sampler="fixed"), dict(sampler="fixed", order="left_to_right"),
            dict(sampler="fixed", order="confidence"), dict(sampler="first_hitting"), dict(sampler="remdm", remask=0.5)]
each_sampler = pytest.mark.parametrize("kw", SAMPLING, ids=lambda kw: "-".join(map(str, kw.values())))


@with_and_without_noise
@pytest.mark.parametrize("in_blocks", [False, True])
@each_sampler
def test_sampler_fills_the_masks_alone_and_a_seed_reproduces_it(noise, in_blocks, kw):
    model = tiny_blocks(noise, block_size=4) if in_blocks else tiny(noise)
    start = blocks_to_fill() if in_blocks else rows_to_fill()
    options = [dict(steps=1), dict(steps=8), dict(steps=3)]
    if noise:
        options.append(dict(steps=3, resample_noise=True, tau=0.5, top_p=0.9))
    for more in options:
        x, _ = model.generate(start, generator=gen(9), **kw, **more)
        assert (x != 7).all()
        assert torch.equal(x[start != 7], start[start != 7])
        if more["steps"] == 3:
            assert torch.equal(model.generate(start, generator=gen(9), **kw, **more)[0], x)
            assert not torch.equal(model.generate(start, generator=gen(10), **kw, **more)[0], x)


@with_and_without_noise
@each_sampler
def test_nfe_is_the_network_calls_of_each_row(noise, kw):
    """Calls of finished rows are spared; no row has more than its steps, nor, but for ReMDM, its tokens; "fixed" has
    just as many."""
    model = tiny(noise)
    start = rows_to_fill()
    n_masked = (start == 7).sum(1)
    calls = counted_calls(model)
    for steps in (1, 3, 50):
        calls.clear()
        _, nfe = model.generate(start, steps, generator=gen(9), **kw)
        assert sum(calls) == nfe.sum() and nfe[3] == 0
        if kw["sampler"] == "remdm":                       # a row is not called where it reveals nothing
            assert len(calls) >= nfe.max() and (nfe <= steps).all()
            continue
        assert len(calls) == nfe.max()
        assert (nfe <= n_masked).all()
        if kw["sampler"] == "first_hitting":
            assert (nfe == n_masked).all()
        elif kw["sampler"] == "fixed":
            assert (nfe == n_masked.clamp(max=steps)).all()
        else:
            assert (nfe <= steps).all()


@with_and_without_noise
def test_batch_equals_single_rows(noise, monkeypatch):
    """... and neither depends on how many rows the output layer takes at once."""
    model = tiny(noise)
    monkeypatch.setattr(mdlm.DEVICE, "chunk", 5 * 7)
    start = all_masked(16, 6)
    start[::3, 2] = 1
    xi = sample_gumbel((16, 6, 7), gen()) if noise else None
    reveal = reveal_steps(start == 7, 3, generator=gen(1))

    def fill(rows):
        denoiser = Denoiser(model, start[rows] == 7, noise=None if xi is None else xi[rows])
        return unmask(start[rows], revealing_path(reveal[rows]), 7, denoiser, greedy=True)
    together, nfe = fill(slice(None))
    for i in range(16):
        alone, n = fill(slice(i, i + 1))
        assert torch.equal(alone[0], together[i]) and n[0] == nfe[i]


@pytest.mark.parametrize("argument,kw", [
    ("steps", dict(steps=0)), ("tau", dict(tau=0)), ("top_p", dict(top_p=0)), ("sampler 'x'", dict(sampler="x")),
    ("order 'left_to_right'", dict(order="left_to_right")), ("remask.*1.5", dict(sampler="remdm", remask=1.5)),
    ("'first_hitting'", dict(sampler="first_hitting", order="confidence")),
    ("'remdm'", dict(sampler="remdm", order="left_to_right")), ("steps", dict(sampler="remdm", steps=0)),
    ("resample_noise", dict(noise=sample_gumbel((2, 6, 7), gen()), resample_noise=True))])
def test_sampler_refuses_bad_arguments(argument, kw):
    for model in (tiny("gumbel"), tiny_blocks("gumbel")):
        with pytest.raises(ValueError, match=argument):
            model.generate(all_masked(2, 6), **(dict(steps=2) | kw))


def test_sampler_refuses_rows_without_bos():
    with pytest.raises(ValueError, match="BOS.*6"):
        tiny().generate(torch.full((2, 6), 7), 1)
    with pytest.raises(ValueError, match="BOS.*6"):
        tiny_blocks().generate(torch.full((1, 8), 7), 1)
    with pytest.raises(ValueError, match="steps"):
        reveal_steps(torch.ones(2, 6, dtype=torch.bool), 0)


# --- ReMDM

@pytest.mark.parametrize("eta", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("steps", [4, 16])
def test_remasking_keeps_the_share_of_masks(steps, eta):
    """After step k, 1 - k / steps of the places are masked, within four errors; at eta > 0 some are drawn twice; given
    ones never. Rows of very many places: every row reveals something at every step, so that calls are steps."""
    B, L = 4, 50_000
    masked = torch.rand(B, L, generator=gen(1)) < 0.9
    calls = list(remasked_path(masked, steps, eta, generator=gen(2)))
    assert len(calls) == steps
    assert torch.equal(calls[0][0], masked)
    n = int(masked.sum())
    drawn = torch.zeros(B, L, dtype=torch.long)
    for k, (before, now) in enumerate(calls):
        share = 1 - k / steps
        assert abs(int(before.sum()) - share * n) <= 4 * (share * (1 - share) * n) ** 0.5, k
        assert not (now & ~before).any()                   # only what is masked is revealed,
        assert not (before & ~masked).any()                # and what was given is not masked
        drawn += now
        left = before & ~now
        if k + 1 < steps:                                  # masked again: not after this call, but before the next
            after = calls[k + 1][0]
            assert not (left & ~after).any()
            assert (after & ~left).any() == (eta > 0 and k > 0)
    assert not left.any()
    assert ((drawn >= 1) == masked).all()
    assert (drawn.max() > 1) == (eta > 0)


def test_without_remasking_it_is_ancestral_sampling():
    """eta = 0: each place's step is uniform and independent of the others'."""
    masked = torch.ones(20_000, 3, dtype=torch.bool)
    steps = 4
    step = torch.zeros(20_000, 3, dtype=torch.long)
    for k, (before, now) in enumerate(remasked_path(masked, steps, 0.0, generator=gen(1))):
        step[now] = k + 1
    assert (step > 0).all()
    assert fits(torch.bincount(numbered(step - 1, steps), minlength=64), np.ones(64))


@pytest.mark.parametrize("block_size", [None, 128])
def test_remasking_keeps_the_share_of_masks_of_what_the_network_sees(block_size, monkeypatch):
    """The same through `generate`, for MDLM and in each block: rows so long that each reveals some at each step."""
    B, L, steps = 24, 256, 8
    K = block_size or L
    model = tiny_blocks(L=L, block_size=K) if block_size else tiny(L=L)
    seen = []
    embed = model.embed
    monkeypatch.setattr(model, "embed", lambda z, g=None: seen.append(z == 7) or embed(z, g))
    model.generate(all_masked(B, L), steps, "remdm", remask=0.3, generator=gen(1))
    assert len(seen) == steps * L // K
    for k, masked in enumerate(seen):
        n = B * (K - (k < steps))                          # BOS, in the first block, is given
        share = 1 - k % steps / steps
        assert abs(int(masked.sum()) - share * n) <= 4 * (share * (1 - share) * n) ** 0.5, k


# --- with the exact denoiser: the sampler without a network's errors

@pytest.mark.parametrize("sampler,steps", [("first_hitting", 1), ("ancestral", 40_000), ("fixed", 4)])
def test_exact_denoiser_gives_the_true_joint_one_token_at_a_time(sampler, steps):
    """40,000 ancestral steps: two tokens at once in 1 of 7,000 rows, which are left out."""
    x = torch.full((40_000, 4), 3)
    path = revealing_path(reveal_steps(x == 3, steps, sampler, generator=gen(0)))
    x, nfe = unmask(x, path, 3, ExactDenoiser(LANGUAGE, 3), generator=gen(1))
    assert (nfe == 4).float().mean() > 0.999
    assert is_the_language(x[nfe == 4])


@pytest.mark.parametrize("name,want", [pytest.param("maze", [4.63, 20.2, 44.0, 67.3, 81.4], marks=slow),
                                       ("maze", [4.63]), ("maze_skewed", [23.1])])
def test_perfect_mdlm_reaches_the_known_figures(name, want):
    """Success in per cent at 1, 2, 4, 8, 16 steps, within 2 points; at one step, the product of the marginals."""
    # the 2000 draws of maze_skewed depend on the order in which the paths are enumerated: 23.4 here
    for steps, percent in zip([1, 2, 4, 8, 16], want):
        rows, calls = theory_rows(ExactDenoiser(maze_dataset(name), PAD + 1), 10_000, steps, seed=1)
        assert abs(100 * maze_valid(rows).mean() - percent) < 2.0, steps
        assert calls == 1 if steps == 1 else calls < steps
    rows = maze_dataset(name)
    marginals = np.stack([(rows == k).mean(0) for k in range(5)], 1)
    p_of_paths = marginals[np.arange(10), maze_paths()].prod(1)
    assert abs(100 * p_of_paths.sum() - want[0]) < (0.05 if name == "maze" else 0.5)


@pytest.mark.parametrize("steps,eta", [pytest.param(64, 0.003, marks=slow), pytest.param(256, 0.001, marks=slow)])
def test_remasking_does_not_lower_the_success_of_the_exact_denoiser(steps, eta):
    """Not below ancestral's on the maze, with about one token in ten masked again. (An exact denoiser has no errors to
    take back but those of tokens drawn together, of which more remasking makes more.)"""
    n = 2000
    exact = ExactDenoiser(maze_dataset("maze").astype(np.int64), 5)
    x = torch.full((n, 10), 5)
    path = revealing_path(reveal_steps(x == 5, steps, generator=gen()))
    plain, calls = unmask(x, path, 5, exact, generator=gen(1))
    path = remasked_path(x == 5, steps, eta, generator=gen())
    remasked, more = unmask(x, path, 5, exact, generator=gen(1))
    a = maze_valid(plain.numpy()).mean()
    b = maze_valid(remasked.numpy()).mean()
    error = (a * (1 - a) / n + b * (1 - b) / n) ** 0.5
    assert b > a - 3 * error
    assert (more <= steps).all()
    assert 0.5 < (more - calls).double().mean() < 2


# ---------------------------------------------------------------------------------------------------------------------
# blocks (bd3lm.py): the training pass

def ar_in_blocks(ar, block_size):
    model = BD3LM(7, 8, 6, block_size=block_size, n_layer=2, n_embd=32, n_head=2, dropout=0.0, shift=True).eval()
    initial_weights(model, ar, "ar")
    return model


@pytest.mark.parametrize("L,K", [(8, 2), (6, 6), (5, 1)])
def test_training_mask_is_its_definition(L, K):
    """Of queries and keys, noised rows first, clean ones behind them."""
    want = torch.zeros(2 * L, 2 * L, dtype=torch.bool)
    for q, k in itertools.product(range(2 * L), repeat=2):
        block_of_q = q % L // K
        block_of_k = k % L // K
        if q >= L:                                         # clean: itself and earlier ones, clean
            want[q, k] = k >= L and block_of_k <= block_of_q
        elif k < L:                                        # noised: its own block, noised,
            want[q, k] = block_of_k == block_of_q
        else:                                              # and earlier ones, clean
            want[q, k] = block_of_k < block_of_q
    assert torch.equal(training_mask(L, K, torch.device("cpu")), want)


@slow
def test_flex_attention_computes_the_same(monkeypatch):
    """The rule as flex_attention takes it on CUDA, here uncompiled (no backward on a CPU), against the boolean mask;
    by itself, and through the network, where a BlockMask is recognised."""
    L, K = 512, 16
    mask = create_block_mask(bd3lm.training_rule(L, K), None, None, 2 * L, 2 * L, "cpu")
    assert mask.sparsity() > 50                            # of 128 x 128 tiles: what a GPU skips
    qkv = torch.randn(3, 1, 2, 2 * L, 8, generator=gen())
    model = tiny_blocks(L=L, block_size=K)
    x = rows_of(2, L=L)
    z = partly_masked(x, 0.5)
    with torch.no_grad():
        dense = F.scaled_dot_product_attention(*qkv, attn_mask=training_mask(L, K, torch.device("cpu")))
        assert (flex_attention(*qkv, block_mask=mask) - dense).abs().max() < 1e-5
        want = model.log_probs(z, x)
        monkeypatch.setattr(mdlm, "compiled_flex", lambda: flex_attention)
        monkeypatch.setattr(bd3lm, "training_mask", lambda *a: mask)
        assert torch.allclose(model.log_probs(z, x), want, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("n_head,dtype,tolerance", [(2, torch.float32, 1e-4), (1, torch.bfloat16, 2e-2)])
def test_flex_attention_on_a_gpu(monkeypatch, n_head, dtype, tolerance):
    """Compiled, forward and backward, through the network, heads of 32 and 64: gradients of the boolean mask."""
    torch.manual_seed(0)
    model = randomise(BD3LM(7, 256, 6, block_size=16, n_layer=2, n_embd=64, n_head=n_head, dropout=0.0), 0).cuda()
    x = rows_of(4, L=256).cuda()
    t = torch.full((4, 16), 0.5, device="cuda")
    grads = []
    for rule in (training_mask, lambda L, K, device, sparse: training_mask(L, K, device)):
        monkeypatch.setattr(bd3lm, "training_mask", rule)
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss, _ = model.loss(x, t, generator=torch.Generator("cuda").manual_seed(0))
        loss.backward()
        grads.append(gradient(model))
    assert (grads[0] - grads[1]).norm() < tolerance * grads[1].norm()


@pytest.mark.parametrize("noise,shift", [(None, False), ("gumbel", False), ("gumbel", True)])
def test_one_block_is_mdlm(noise, shift):
    """Block size L: the same loss, the same samples, with the weights of an MDLM."""
    plain = tiny(noise, L=8, shift=shift)
    model = tiny_blocks(noise, block_size=8, shift=shift)
    model.load_state_dict(plain.state_dict())
    teacher = tiny_ar(L=8) if noise else None
    x = rows_of(16, L=8)
    t = stratified_t(16, np.random.default_rng(0))
    with torch.no_grad():
        want, want_parts = plain.loss(x, t, teacher=teacher, generator=gen(1))
        got, parts = model.loss(x, t[:, None], teacher=teacher, generator=gen(1))
    assert abs(got - want) < 1e-5
    assert abs(parts["nll_masked"] - want_parts["nll_masked"]) < 1e-5
    for kw in (dict(steps=3), dict(steps=4, sampler="fixed", order="confidence"), dict(steps=1, greedy=True)):
        x, nfe = plain.generate(all_masked(16, 8), generator=gen(2), **kw)
        y, nfe_of_blocks = model.generate(all_masked(16, 8), generator=gen(2), **kw)
        assert torch.equal(x, y) and torch.equal(nfe, nfe_of_blocks)


@with_and_without_noise
def test_blocks_of_one_token_are_the_chain_rule(noise):
    """At t = 1 and block size 1 the loss is -log p(x), token by token through the sampler's cached calls."""
    model = tiny_blocks(noise, block_size=1)
    x = rows_of(5, L=8)
    xi = sample_gumbel((5, 8, 7), gen()) if noise else None
    total = 0.0
    with torch.no_grad():
        loss, _ = model.loss(x, torch.ones(5, 8), noise=xi)
        cache = model.new_cache(5, 8)
        for i in range(1, 8):
            g = None if xi is None else model.noise_embed(xi[:, i:i + 1])
            h = model.block_hidden(cache, x[:, i - 1:i], torch.full((5, 1), 7), g)
            total -= model.logits(h[:, 0]).log_softmax(-1).gather(-1, x[:, i:i + 1]).mean() / 7
    assert abs(loss - total) < 1e-5


def test_block_loss_is_the_nelbo_of_each_block():
    """Against the enumeration of every block's masks, clean context given; 3 % is about four standard errors."""
    model = tiny_blocks(V=4, L=6, block_size=3)
    x = rows_of(1, V=4, L=6)[0]
    n = 20_000
    want = 0.0
    with torch.no_grad():
        for places in ([1, 2], [3, 4, 5]):                 # BOS is given
            for k in range(1, len(places) + 1):
                for some in itertools.combinations(places, k):
                    masked = list(some)
                    z = x.clone()
                    z[masked] = 4
                    logp = model.log_probs(z[None], x[None])[0, masked].gather(-1, x[masked, None]).sum()
                    want -= weight_of_masks(k, len(places)) * float(logp)
        t = stratified_t(2 * n, np.random.default_rng(0)).view(n, 2)
        loss, _ = model.loss(x.expand(n, -1), t, generator=gen())
    assert abs(loss * 5 - want) < 0.03 * want, (loss * 5, want)


def test_blocks_of_one_token_with_the_weights_of_an_ar_model_are_that_model():
    """With `shift`: in the training pass and in the sampler."""
    ar = tiny_ar(L=8)
    model = ar_in_blocks(ar, 1)
    x = rows_of(3, L=8)
    logp = model.log_probs(all_masked(3, 8), x)
    assert torch.allclose(logp[:, 1:, :7], ar.log_probs(x)[:, :-1], atol=1e-5)
    for cached in (True, False):
        written, _ = model.generate(all_masked(3, 8), 1, greedy=True, cached=cached)
        assert torch.equal(written, ar.generate(torch.full((3, 1), 6), greedy=True)[0])


def test_first_token_of_a_shifted_block_depends_on_the_text_before_the_block_alone():
    model = ar_in_blocks(tiny_ar(L=8), 4)
    x = rows_of(3, L=8)
    later = x.clone()
    later[:, 5:] = (later[:, 5:] + 1) % 6
    first = [model.log_probs(all_masked(3, 8), clean)[:, 4] for clean in (x, later, x.flip(1))]
    assert torch.equal(first[1], first[0])
    assert not torch.equal(first[2], first[0])


# --- clipped noise levels

@pytest.mark.parametrize("K,clip", [(4, (0.3, 0.8)), (4, (0.6, 1.0)), (8, (1e-3, 0.5)), (3, (0.45, 0.55)),
                                    (1, (1.0, 1.0))])
def test_clipped_masks_have_the_law_of_redrawing(K, clip):
    """Against the ancestors' loop: redraw a block until its masked fraction lies in the window (BOS not counted)."""
    n = 20_000
    low, high = clip
    t = torch.full((n, 2), min(0.7, high) if K > 1 else 1.0)
    ours = clipped_mask(t, 2 * K, clip, gen(1)).view(n, 2, K)
    assert not ours[:, 0, 0].any()
    low = 0 if low <= 1e-3 else low
    g = gen(2)
    for block, size in enumerate((K - 1, K)):              # BOS is the first of the first block
        redrawn = torch.zeros(n, K, dtype=torch.bool)
        possible = size > 0 and any(low <= m / size <= high for m in range(size + 1))
        todo = torch.ones(n, dtype=torch.bool)             # (once, where no fraction lies in the window)
        while todo.any():
            new = torch.rand(n, K, generator=g) < t[:, :1]
            new[:, :K - size] = False
            redrawn[todo] = new[todo]
            share = redrawn.sum(1) / max(1, size)
            todo = ((share < low - 1e-6) | (share > high + 1e-6)) & possible
        counts = torch.stack([torch.bincount(numbered(m.long(), 2), minlength=2 ** K)
                              for m in (ours[:, block], redrawn)])
        seen = counts.sum(0) > 0
        if seen.sum() > 1:
            assert stats.chi2_contingency(counts[:, seen].numpy()).pvalue > 1e-4
        else:
            assert torch.equal(counts[0], counts[1])


def test_windows_and_levels_of_a_clipped_schedule():
    """64 of them: all levels; and widths of 50 to 90 per cent. Levels are stratified within their window."""
    windows = bd3lm.clip_windows(4)
    assert len(windows) == 64 == len(set(windows))
    assert windows[0] == (1e-3, 1.0) and (0.45, 0.95) in windows
    assert {round(b - a, 3) for a, b in windows[1:] if a > 1e-3} == {w / 100 for w in range(50, 95, 5)}
    assert bd3lm.clip_windows(1) == [(1e-3, 1.0), (1.0, 1.0)]
    assert train.parse_clip("0,0.5") == (1e-3, 0.5)
    assert train.parse_clip("1,1") == (1.0, 1.0)
    t = stratified_t(1000, np.random.default_rng(0), 0.0, 0.3, 0.8).sort()[0]
    assert 0.3 <= t[0] and t[-1] <= 0.8
    assert (t.diff() - 0.0005).abs().max() < 1e-6


def test_blocks_get_the_same_noise_levels_on_average():
    """Stratified over batch x blocks in a random order: no position gets systematically more noise."""
    t = torch.stack([stratified_t(8, np.random.default_rng([0, i])).view(2, 4) for i in range(4000)])
    assert (t.mean((0, 1)) - 0.5).abs().max() < 0.02       # four standard errors: 0.289 / sqrt(8000) times 6


# --- the sampler

class ExactBlocks(BD3LM):
    """A block sampler whose network is the true conditional of LANGUAGE given the clean blocks and the block."""

    exact = ExactDenoiser(np.concatenate([np.full((8, 1), 2), LANGUAGE, np.zeros((8, 1), int)], 1), 3)

    def block_hidden(self, cache, clean, z, g=None):
        x = torch.cat([clean, z], 1)
        n = x.shape[1]
        rows = F.pad(x, (0, 6 - n), value=3)
        return self.exact.hidden(rows)[:, n - z.shape[1]:n]

    def logits(self, h):
        return h


def recorded_calls(model, monkeypatch, **kw):
    """generate's tokens and nfe, and the hidden states of its network calls."""
    calls = []
    call = BD3LM.block_hidden

    def record(self, cache, clean, z, g=None):
        h = call(self, cache, clean, z, g)
        calls.append(h)
        return h
    with monkeypatch.context() as m:
        m.setattr(BD3LM, "block_hidden", record)
        x, nfe = model.generate(**kw)
    return x, nfe, calls


@pytest.mark.parametrize("block_size", [2, 3])
def test_right_denoiser_gives_the_true_joint_through_the_block_sampler(block_size):
    """BOS (here 2), LANGUAGE's four tokens and a 0, in blocks, one token at a time."""
    model = ExactBlocks(3, 6, 2, block_size=block_size, n_layer=1, n_embd=4, n_head=1)
    x, nfe = model.generate(all_masked(40_000, 6, 3), 1, "first_hitting", cached=False, generator=gen())
    assert (x[:, 5] == 0).all() and (nfe == 5).all()
    assert is_the_language(x[:, 1:5])


@pytest.mark.parametrize("noise,shift", [(None, False), ("gumbel", False), ("gumbel", True)])
@pytest.mark.parametrize("T", [8, 21, pytest.param(50, marks=slow)])
def test_cached_equals_uncached(noise, shift, T, monkeypatch):
    """Same tokens, same calls, hidden states to 1e-5: within the training length (8) and far beyond it, prompts that
    end within a block, rows of different pace."""
    model = tiny_blocks(noise, shift=shift, block_size=4 if T == 50 else 2)
    start = all_masked(6, T)
    start[:, 1:5] = rows_of(6, L=5)[:, 1:]
    start[:3, 5] = 2
    start[1, 7] = 3
    differences = []
    for kw in (dict(steps=2), dict(steps=1, greedy=True), dict(steps=4, sampler="fixed", order="left_to_right"),
               dict(steps=4, sampler="remdm", remask=0.5)):
        (x, nfe, calls), (y, nfe_y, calls_y) = [
            recorded_calls(model, monkeypatch, tokens=start, cached=cached, generator=gen(3), **kw)
            for cached in (True, False)]
        assert torch.equal(x, y) and torch.equal(nfe, nfe_y) and len(calls) == len(calls_y)
        # the first call for a block runs all rows with the cache: compare those calls in which all rows took part
        differences += [float((h - k).abs().max()) for h, k in zip(calls, calls_y) if h.shape == k.shape]
        assert (x != 7).all() and torch.equal(x[start != 7], start[start != 7])
    assert len(differences) > 4 and max(differences) < 1e-5
    if noise:
        xi = sample_gumbel((6, T, 7), gen())
        x, y = [model.generate(start, 2, greedy=True, noise=xi, cached=cached, generator=gen())[0]
                for cached in (True, False)]
        assert torch.equal(x, y)


def test_sampler_sees_what_the_training_pass_sees():
    """Within the training length, its hidden states are those of the training pass."""
    model = tiny_blocks()
    x = rows_of(3, L=8)
    z = x.clone()
    z[:, 5:8] = 7
    with torch.no_grad():
        want = model.hidden(z, None, x)[:, 6:]
        got = model.block_hidden(model.new_cache(3, 8), x[:, :6], z[:, 6:])
    assert (got - want).abs().max() < 1e-5


def test_window_beyond_the_training_length_is_the_last_tokens():
    """A block sees L - K = 6 clean tokens, and what these saw. RoPE is relative: with one layer nothing outside the
    window can matter, whether the cache has seen it or not."""
    model = tiny_blocks()
    model.transformer.blocks = model.transformer.blocks[:1]
    text = rows_of(3, L=20, seed=1)

    def hidden(clean):
        with torch.no_grad():
            return model.block_hidden(model.new_cache(3, clean.shape[1] + 2), clean, torch.full((3, 2), 7))
    want = hidden(text)
    changed_inside = text.clone()
    changed_inside[:, 14] = (text[:, 14] + 1) % 6
    changed_outside = text.clone()
    changed_outside[:, 13] = (text[:, 13] + 1) % 6
    assert (hidden(text[:, 14:]) - want).abs().max() < 1e-5
    assert (hidden(changed_inside) - want).abs().max() > 1e-3
    assert (hidden(changed_outside) - want).abs().max() < 1e-5


@with_and_without_noise
def test_nfe_of_blocks_is_what_was_spent(noise):
    """The cache costs no call. The last block is drawn whole: it has one token beyond the sample."""
    model = tiny_blocks(noise, block_size=4)
    start = blocks_to_fill()
    masked = F.pad(start == 7, (0, 1), value=True)
    calls = counted_calls(model)
    _, nfe = model.generate(start, 1, "first_hitting", generator=gen(1))        # one token a call
    assert torch.equal(nfe, masked.sum(1))
    assert len(calls) == 3 + 4 * 4
    _, nfe = model.generate(start, 2, "fixed", generator=gen(1))
    assert torch.equal(nfe, masked.view(12, 5, 4).sum(2).clamp(max=2).sum(1))
    calls.clear()
    _, nfe = model.generate(start, 8, "remdm", remask=0.5, generator=gen(1))
    assert len(calls) >= nfe.max()


@with_and_without_noise
def test_batch_of_blocks_equals_its_rows(noise):
    model = tiny_blocks(noise, block_size=4)
    start = F.pad(blocks_to_fill(), (0, 1), value=7)
    xi = sample_gumbel((12, 20, 7), gen()) if noise else None
    kw = dict(steps=3, sampler="fixed", order="left_to_right", greedy=True)
    together, nfe = model.generate(start, noise=xi, **kw)
    for i in range(12):
        alone, n = model.generate(start[i:i + 1], noise=None if xi is None else xi[i:i + 1], **kw)
        assert torch.equal(alone[0], together[i]) and n[0] == nfe[i]


@pytest.mark.parametrize("first,end", [(1, 9), (5, 14)])
def test_text_given_to_blocks_must_fit_into_the_window(first, end):
    """A prompt, and text between masks, in one row of the batch: the window has 8; with one token less it does. Where
    nothing is drawn after it, it may have any length, and costs no call."""
    model = tiny_blocks(block_size=4)
    start = all_masked(3, 19)
    start[1, first:end] = 1
    with pytest.raises(ValueError, match=" 8 "):
        model.generate(start, 1)
    start[1, end - 1] = 7
    model.generate(start, 1)
    start = all_masked(3, 19)
    start[:, 3:] = 1
    assert (model.generate(start, 1, generator=gen())[1] == 1).all()


def test_blocks_refuse_what_is_no_whole_number_of_them():
    with pytest.raises(ValueError, match="block_size 3.* 8"):
        BD3LM(7, 8, 6, block_size=3)
    with pytest.raises(ValueError, match="clean.* 4 "):    # the noised rows alone
        MDLM.log_probs(tiny_blocks(block_size=4), all_masked(3, 8))


@with_and_without_noise
@pytest.mark.parametrize("cached", [True, False])
def test_rows_end_at_eos(noise, cached):
    """Up to its first EOS a row is what it is without stopping, after it all is EOS, and costs nothing."""
    model = tiny_blocks(noise, L=8, block_size=2)
    start = all_masked(60, 40)
    kw = dict(steps=1, greedy=True, cached=cached)
    if noise:
        model.transformer.head.bias.data[6] -= 0.3         # so that some rows get far
        kw["noise"] = sample_gumbel((60, 40, 7), gen())
    else:                                                  # greedy rows would all be the same: vary the prompt
        start[:, 1:4] = rows_of(60, L=4)[:, 1:]
    free, nfe_of_free = model.generate(start, **kw)
    x, nfe = model.generate(start, **kw, stop_at_eos=True)
    assert torch.equal(free[start != 7], start[start != 7])
    in_the_middle = 0
    for i in range(60):
        eos = ((free[i] == 6) & (start[i] == 7)).nonzero().flatten().tolist()
        end = eos[0] if eos else 40
        in_the_middle += 10 < end < 38
        assert torch.equal(x[i, :end], free[i, :end])
        assert (x[i, end:] == 6).all()
        spared = 19 - end // 2 if eos else 0               # blocks of two tokens after that of the EOS
        assert nfe[i] == nfe_of_free[i] - spared
    assert in_the_middle > 5 or noise is None


# ---------------------------------------------------------------------------------------------------------------------
# Medusa (medusa.py): heads

@with_and_without_noise
def test_heads_start_as_the_backbone(noise):
    model = Medusa(7, 12, 6, 32, noise=noise, bias=True).attach(tiny_ar(7, 12), start=True)
    x = rows_of(3, L=12)
    logp = model.log_probs(x, sample_gumbel((3, 16, 7), gen()) if noise else None)
    assert logp.shape == (3, 12, 4, 7)
    assert torch.allclose(logp, model.backbone.log_probs(x)[:, :, None].expand_as(logp), atol=1e-5)
    assert not any("backbone" in name for name in model.state_dict())


@pytest.mark.parametrize("rows", [1, 5, 1000])
def test_attention_over_noise_is_split_by_rows_and_the_same(monkeypatch, rows):
    """FlashAttention's backward pads a row to 128 places and counts in 32 bits: 2^30 numbers a call at most."""
    model = tiny_heads("gumbel")
    x = rows_of(3, L=12)
    batches = []
    attention = F.scaled_dot_product_attention

    def spy(q, *args, **kw):
        if q.shape[2] == 4:                                # of the accumulator, not of the backbone
            batches.append(len(q))
        return attention(q, *args, **kw)
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    found = []
    for most in (2**30, rows * 128 * 32):
        monkeypatch.setattr(medusa.Accumulator, "MOST_NUMBERS", most)
        model.zero_grad()
        batches.clear()
        loss, _ = model.loss(x, generator=gen())
        loss.backward()
        assert sum(batches) == 33 and max(batches) <= most // (128 * 32)
        found.append((loss.item(), gradient(model)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-6)
    assert 64 * 511 * 128 * 768 > 2**31 > 2**30 // (128 * 768) * 128 * 768         # the paper's, unsplit and split


def test_heads_are_their_formula():
    """Each (j, k) by itself: the transformer run on e_{j+1} .. e_{j+1+k} alone, then a + SiLU(U a + b), then W."""
    model = tiny_heads("gumbel")
    x = rows_of(2, L=12)
    xi = sample_gumbel((2, 16, 7), gen(1))
    h = model.backbone.hidden(x)
    e = xi.softmax(-1) @ model.noise_embed.weight.t()
    got = model.log_probs(x, xi)
    for j in (0, 4, 11):
        assert torch.allclose(got[:, j, 0], model.backbone.log_probs(x)[:, j], atol=1e-5)
        for k in (1, 2, 3):
            a = h[:, j] + model.accumulator(e[:, j + 1:j + 2 + k])[:, -1]
            fc = model.heads[k - 1].fc
            out = model.heads[k - 1].out
            u = a @ fc.weight.t() + fc.bias
            z = (a + u * torch.sigmoid(u)) @ out.weight.t() + out.bias
            assert torch.allclose(got[:, j, k], z.log_softmax(-1), atol=1e-5), (j, k)
    plain = tiny_heads()
    a = plain.backbone.hidden(x)[:, 3]
    z = plain.heads[1].out(a + F.silu(plain.heads[1].fc(a)))
    assert torch.allclose(plain.log_probs(x)[:, 3, 2], z.log_softmax(-1), atol=1e-5)


def test_heads_read_the_noise_of_their_own_positions_only():
    """Head k at j: the noise of j + 1 .. j + 1 + k, no later one, none of the past, and no token after j."""
    model = tiny_heads("gumbel")
    x = rows_of(1, L=12)
    xi = sample_gumbel((1, 16, 7), gen(1))
    full = model.log_probs(x, xi)
    for i in range(16):
        other = xi.clone()
        other[:, i] = sample_gumbel((7,), gen(2))
        changed = (model.log_probs(x, other) != full).any(-1)[0]                # (L, K + 1)
        for j, k in itertools.product(range(12), range(4)):
            assert bool(changed[j, k]) == (k > 0 and j + 1 <= i <= j + 1 + k), (i, j, k)
    y = x.clone()
    y[0, 7] = (y[0, 7] + 1) % 6
    changed = (model.log_probs(y, xi) != full).any(-1)[0]
    assert not changed[:7].any() and changed[7:].all()


@with_and_without_noise
def test_heads_loss_is_the_cross_entropy_at_their_offsets(noise, monkeypatch):
    """Against log_probs, position by position; with noise drawn by the loss and with the same noise extracted before;
    whatever the chunks, gradients included."""
    model = tiny_heads(noise)
    x = rows_of(4, L=12)
    xi = extract_parallel(model.backbone, x, gen(5)) if noise else None
    logp = model.log_probs(x, xi).detach()
    want = []
    for k in (1, 2, 3):
        nats = [-logp[range(4), j, k, x[:, j + 1 + k]] for j in range(12 - 1 - k)]
        want.append(torch.stack(nats).mean())
    grads = []
    for chunk, loss_args in ((gumbel.DEVICE.chunk, dict(generator=gen(5))), (50, dict(noise=xi))):
        monkeypatch.setattr(gumbel.DEVICE, "chunk", chunk)
        loss, parts = model.loss(x, **loss_args)
        assert torch.allclose(loss, sum(want) / 3, atol=1e-5)
        assert list(parts) == ["nll_head1", "nll_head2", "nll_head3"]
        assert np.allclose(list(parts.values()), want, rtol=0, atol=5e-5)
        model.zero_grad()
        loss.backward()
        grads.append(gradient(model))
    assert torch.allclose(*grads, atol=1e-5)
    assert (grads[0] != 0).float().mean() > 0.5
    assert all(p.grad is None for p in model.backbone.parameters())


def test_each_head_learns_its_own_offset():
    """A row of independent tokens, but x_7 = x_5, x_13 = x_10, x_20 = x_16, on a backbone that sees one token: only
    head 1 at 5, head 2 at 10 and head 3 at 16 can know better than chance. (In this family the first head has been left
    untrained, and the last ignored, more than once.)"""
    torch.manual_seed(0)
    V, L = 6, 22
    pairs = {(5, 1): 7, (10, 2): 13, (16, 3): 20}

    def rows(n, seed):
        x = rows_of(n, V, L, seed)
        for (j, _), i in pairs.items():
            x[:, i] = x[:, j]
        return x
    ar = AR(V, L, V - 1, n_layer=1, n_embd=32, n_head=1, dropout=0.0)          # untrained: blocks are the identity
    ar.transformer.positions = torch.nn.Embedding(L, 32)                       # each position known, so that it differs
    torch.nn.init.normal_(ar.transformer.positions.weight)
    torch.nn.init.normal_(ar.transformer.embed.weight)
    model = Medusa(V, L, V - 1, 32, bias=True).attach(ar, start=True)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.0)
    for step in range(250):
        optimise(optimizer, model.loss(rows(64, step))[0])
    x = rows(400, 1000)
    logp = model.log_probs(x)
    chance = math.log(V - 1)
    for k in (1, 2, 3):
        for j in range(L - 1 - k):
            nll = -logp[range(400), j, k, x[:, j + 1 + k]].mean()
            if (j, k) in pairs:
                assert nll < 0.3, (j, k, nll)
            else:
                assert nll > chance - 0.1, (j, k, nll)


# --- decoding

def llama_backbone(folder, L):
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    from extra.hf import HF
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=7, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=6, initializer_range=0.5, max_position_embeddings=L)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return HF(str(folder))


def nucleus_by_hand(z, tau, top_p):
    """softmax(z / tau), cut to the likeliest tokens that hold top_p, as numpy sorts them."""
    p = (z / tau).double().softmax(-1).numpy()
    inside = np.zeros(len(p), dtype=bool)
    mass = 0.0
    for i in np.argsort(-p, kind="stable"):
        if mass < top_p:
            inside[i] = True
            mass += p[i]
    return p * inside / p[inside].sum()


def choose_by_hand(z, noise, tau, top_p, accept):
    """The backbone's own token: its argmax, or Gumbel-max over its nucleus."""
    if accept == "greedy":
        return int(z.argmax())
    p = nucleus_by_hand(z, tau, top_p)
    possible = np.flatnonzero(p > 0)
    return int(possible[np.argmax(np.log(p[possible]) + noise.double().numpy()[possible])])


def proposals_by_hand(model, h, p, T, tau, xi):
    """The heads' candidates for positions p + 1 .. p + K, from the state h before p; beyond the row noise is zero."""
    candidates = []
    for k, head in enumerate(model.heads, start=1):
        a = h
        if model.noise_embed is not None:
            noise = [xi[i] if i < T else torch.zeros(xi.shape[1]) for i in range(p, p + 1 + k)]
            e = (tau * torch.stack(noise)).softmax(-1) @ model.noise_embed.weight.t()
            a = a + model.accumulator(e[None])[0, -1]
        z = head.out(a + F.silu(head.fc(a)))
        allowed = z if model.config.predict_bos else z[:-1]                     # BOS is the last id
        candidates.append(int(allowed.argmax()))
    return candidates


def decode_by_hand(model, x, T, tau, top_p, accept, epsilon, delta, xi):
    """One row, no cache: prompt x (list), noise xi [T, V] -> (tokens, nfe, verified, accepted). Only drafts that fit
    into the row as a whole are counted."""
    backbone = model.backbone
    K = len(model.heads)
    x = list(x)
    verified = [0] * K
    accepted = [0] * K
    h = backbone.hidden(torch.tensor([x]))[0, -1]
    nfe = 1
    while len(x) < T:
        p = len(x)
        candidates = proposals_by_hand(model, h, p, T, tau, xi)
        x.append(choose_by_hand(backbone.logits(h), xi[p], tau, top_p, accept))
        if len(x) == T:
            break
        states = backbone.hidden(torch.tensor([(x + candidates)[:T]]))[0]
        nfe += 1
        for k, candidate in enumerate(candidates):
            if p + 1 + k == T:
                break
            z = backbone.logits(states[p + k])
            if accept == "typical":
                q = nucleus_by_hand(z, tau, top_p)
                entropy = -sum(v * math.log(v) for v in q if v > 0)
                is_taken = q[candidate] > min(epsilon, delta * math.exp(-entropy))
            else:
                is_taken = candidate == choose_by_hand(z, xi[p + 1 + k], tau, top_p, accept)
            verified[k] += p + K < T
            if not is_taken:
                break
            accepted[k] += p + K < T
            x.append(candidate)
        h = states[len(x) - 1]
    return x, nfe, verified, accepted


@pytest.mark.parametrize("kind", ["ar", "gpt2", pytest.param("hf", marks=slow)])
@with_and_without_noise
def test_exact_acceptance_is_the_backbone_alone(noise, kind, tmp_path):
    """With heads that know nothing: token for token what the backbone draws with the same noise, and its argmax under
    greedy acceptance; with and without cache, in a batch and row by row; up to the last position the backbone has."""
    L = 12
    model = tiny_heads(noise)
    if kind == "gpt2":
        model.attach(randomise(GPT2(7, L, 6, 2, 32, 2, 0.0), std=1.0).requires_grad_(False))
    elif kind == "hf":
        model.attach(llama_backbone(tmp_path, L))
    start = rows_of(9, L=3)
    xi = sample_gumbel((9, L, 7), gen(1))
    paces = set()
    for kw in (dict(), dict(tau=0.7, top_p=0.8)):
        want, _ = model.backbone.generate(start, L, noise=xi, **kw)
        for cached in (True, False):
            batch = model.decode(start, L, accept="exact", noise=xi, cached=cached, **kw)
            assert torch.equal(batch[0], want), cached
        alone = [model.decode(start[i:i + 1], L, accept="exact", noise=xi[i:i + 1], **kw) for i in range(9)]
        for together, parts in zip(batch, zip(*alone)):
            assert torch.equal(together, torch.cat(parts))
        _, nfe, verified, accepted = batch
        paces |= set(nfe.tolist())
        assert (verified[:, 0] > 0).all() and (accepted <= verified).all()
        assert (verified[:, 1:] == accepted[:, :-1]).all()                      # a head is asked if those before it fit
    assert len(paces) > 1 and max(paces) <= L - 3                               # some candidates were right, by chance
    greedy, _ = model.backbone.generate(start, L, greedy=True)
    assert torch.equal(model.decode(start, L, accept="greedy")[0], greedy)
    for length in (3, 4, 5):                                # nothing to write, one token, two
        x, nfe, *_ = model.decode(start, length, accept="exact", noise=xi)
        assert torch.equal(x, model.backbone.generate(start, length, noise=xi)[0])
        assert (nfe == min(length - 3, 2)).all()


@pytest.mark.parametrize("n", [5000, pytest.param(30_000, marks=slow)])
def test_noise_of_undecided_positions_is_kept(n):
    """Fresh noise, exact acceptance: the joint law of the text is the backbone's, whatever the heads propose; it would
    not be if a rejected candidate's position drew new noise (it would then avoid the candidate)."""
    V, L = 4, 5
    model = tiny_heads("gumbel", V, L, std=1.0)
    x, nfe = model.generate(torch.full((n, 1), V - 1), accept="exact", generator=gen(1))
    assert len(nfe.unique()) > 1
    rows = rows_from_bos(V, L, V)
    with torch.no_grad():
        p = log_likelihood(model.backbone, rows).exp().double()
    assert abs(p.sum() - 1) < 1e-4
    # rows_from_bos counts up from the last digit on
    count = torch.bincount(numbered(x[:, 1:].flip(1), V), minlength=len(rows))
    order = p.argsort()
    cells = [order[i::32] for i in range(32)]               # large enough for a chi-squared test
    assert fits([count[i].sum() for i in cells], [p[i].sum() for i in cells])
    likeliest = order[-8:]
    assert fits(count[likeliest], p[likeliest])


@pytest.mark.parametrize("accept", ["typical", "exact", "greedy"])
@with_and_without_noise
def test_decoding_is_its_definition(noise, accept):
    """Against one row at a time, without cache: tokens, calls and counts, for rows of every pace, with temperature and
    nucleus, with a noise strong enough to move every proposal."""
    counts = np.zeros((2, 3), dtype=int)
    for seed, (tau, top_p, P, T, predict_bos) in enumerate([(1.0, 1.0, 1, 14, True), (0.6, 1.0, 2, 14, False),
                                                            (1.5, 0.7, 5, 13, True), (1.0, 0.8, 11, 14, True)]):
        model = tiny_heads(noise, L=14, seed=seed, predict_bos=predict_bos).requires_grad_(False)
        model.backbone.requires_grad_(False).predict_bos = predict_bos
        if noise:
            model.noise_embed.weight.mul_(40)
            model.accumulator.out.weight.mul_(5)
        start = rows_of(6, L=P, seed=seed)
        xi = sample_gumbel((6, T, 7), gen(seed))
        if accept == "greedy":
            xi = torch.zeros_like(xi)
        kw = dict(tau=tau, top_p=top_p, accept=accept, epsilon=0.2, delta=0.6)
        want = [decode_by_hand(model, row, T, xi=noise_of_row, **kw) for row, noise_of_row in zip(start.tolist(), xi)]
        for cached in (True, False):
            got = [values.tolist() for values in model.decode(start, T, noise=xi, cached=cached, **kw)]
            assert list(zip(*got)) == want, (seed, cached)
        if accept == "greedy":                              # no noise is as good as noise of zero
            assert [values.tolist() for values in model.decode(start, T, **kw)] == got
        counts += np.array(got[2:]).sum(1)
    assert (0 < counts[1, :2]).all() and (counts[1] < counts[0]).all(), counts


def test_typical_acceptance_in_its_limits():
    """Everything is accepted; nothing is, and the text is then the backbone's own."""
    model = tiny_heads("gumbel")
    start = rows_of(5, L=2)
    xi = sample_gumbel((5, 12, 7), gen(1))
    x, nfe, verified, accepted = model.decode(start, 12, epsilon=0.0, noise=xi)
    assert torch.equal(verified, accepted)
    assert (nfe == 4).all()                                                     # prompt, 4 + 4 tokens, 1 + 1
    x, nfe, verified, accepted = model.decode(start, 12, epsilon=1.0, delta=1e9, noise=xi)
    assert accepted.sum() == 0
    assert (nfe == 10).all()
    assert torch.equal(x, model.backbone.generate(start, 12, noise=xi)[0])
    assert acceptance_row(verified.numpy(), accepted.numpy())["head2"] is None


@pytest.mark.parametrize("argument,kw", [
    ("accept 'always'", dict(accept="always")), ("tau", dict(tau=0)), ("top_p", dict(top_p=0)),
    ("13.* 12", dict(length=13)), ("prompt.* 3 .* 2", dict(length=2))])
def test_decoding_refuses_bad_arguments(argument, kw):
    with pytest.raises(ValueError, match=argument):
        tiny_heads().generate(rows_of(2, L=3), **kw)


def test_heads_refuse_what_does_not_fit_them():
    model = tiny_heads()
    with pytest.raises(ValueError, match=" 4 .* 3 heads"):                      # rows of 4 tokens
        Medusa(7, 4, 6, 32, heads=3)
    with pytest.raises(ValueError, match="width 32.* 16"):
        model.attach(AR(7, 12, 6, n_layer=1, n_embd=16, n_head=1))
    with pytest.raises(ValueError, match="noise"):
        model.log_probs(rows_of(2, L=3), sample_gumbel((2, 3, 7)))


@slow
def test_what_the_noise_buys():
    """A language small enough to enumerate: under exact acceptance, heads without noise reach what the true marginals
    give them (head 1: max_x q(x)) and no more, heads with noise pass it on their way to 1."""
    V, L, K = 4, 8, 2
    torch.manual_seed(0)
    ar = randomise(AR(V, L, V - 1, n_layer=2, n_embd=32, n_head=2, dropout=0.0, predict_bos=False), std=1.0)
    ar.requires_grad_(False)
    rows = rows_from_bos(V, L, V - 1)
    p = log_likelihood(ar, rows).exp().double()
    verified, accepted = perfect_heads(rows[:, 1:].numpy(), K, weights=p.numpy())
    best = (p.numpy() @ accepted) / (p.numpy() @ verified)
    # head 1 after BOS alone, from its definition: q(x) = sum_y p(y) p(x | y), accepted with probability max q
    q = torch.stack([p[rows[:, 2] == x].sum() for x in range(V - 1)])
    first = rows[:, 2] == q.argmax()
    assert abs(float(p @ first.double()) - q.max()) < 1e-9
    got = {}
    for noise in (None, "gumbel"):
        torch.manual_seed(0)
        model = Medusa(V, L, V - 1, 32, K, noise=noise, bias=True, predict_bos=False).attach(ar, start=True)
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.0)
        for step in range(400):
            x = rows[torch.multinomial(p, 64, replacement=True, generator=gen(step))]
            optimise(optimizer, model.loss(x, generator=gen(step))[0])
            optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / 400)
        _, _, v, a = model.eval().decode(torch.full((4000, 1), V - 1), accept="exact", generator=gen(1))
        got[noise] = acceptance_row(v.numpy(), a.numpy())
    print(f"\nacceptance of heads 1, 2 under exact acceptance: best without noise {best.round(3)}, "
          f"trained without {got[None]}, with {got['gumbel']}")
    for k in (1, 2):
        error = 4 * got[None][f"head{k}_stderr"]
        assert got[None][f"head{k}"] < best[k - 1] + error
        assert got["gumbel"][f"head{k}"] > best[k - 1] + error


def test_perfect_heads_are_counted_as_a_decoder_would():
    """The enumeration against a decoder, row by row, whose heads are the true marginals of what fits so far."""
    rows = np.random.default_rng(0).integers(0, 3, (60, 7))
    for row, verified, accepted in zip(rows, *perfect_heads(rows, 2, start=1)):
        p = 1
        seen = [0, 0]
        taken = [0, 0]
        while p + 2 < 7:
            fitting = [r for r in rows if list(r[:p]) == list(row[:p])]
            step = 1
            for k in (1, 2):
                seen[k - 1] += 1
                counts = [sum(r[p + k] == x for r in fitting) for x in range(3)]
                if counts.index(max(counts)) != row[p + k]:
                    break
                taken[k - 1] += 1
                step += 1
            p += step
        assert list(verified) == seen and list(accepted) == taken


def test_error_of_a_ratio_is_that_of_a_bootstrap():
    rng = np.random.default_rng(0)
    b = rng.integers(1, 20, 400)
    a = rng.binomial(b, 0.3 + 0.4 * (b > 10))               # a long prompt accepts more
    ratio, error = scores.ratio_with_error(a, b)
    draws = [a[i].sum() / b[i].sum() for i in rng.integers(0, 400, (2000, 400))]
    assert ratio == a.sum() / b.sum()
    assert abs(error / np.std(draws) - 1) < 0.1


# ---------------------------------------------------------------------------------------------------------------------
# teachers (teacher.py): sampling, and stage 1, the noise behind a text

class CountingTeacher:
    """The exact AR model of a language of rows: next-token probabilities by counting prefixes."""

    def __init__(self, rows, vocab_size):
        """Ids of the rows are below vocab_size - 1, which is BOS."""
        self.exact = ExactDenoiser(rows.astype(np.int64), vocab_size)
        self.vocab_size = vocab_size
        self.bos = vocab_size - 1
        self.length = rows.shape[1] + 1

    def after(self, tokens, i):
        """log p of the token that follows tokens 0 .. i: [B, V]."""
        x = torch.full((len(tokens), self.length - 1), self.vocab_size)
        x[:, :i] = tokens[:, 1:i + 1]
        return self.exact.hidden(x)[:, min(i, self.length - 2)]

    def hidden(self, tokens, cache=None):
        return torch.stack([self.after(tokens, i) for i in range(tokens.shape[1])], 1)

    def logits(self, h):
        return h

    def log_probs(self, tokens):
        return self.hidden(tokens)


def test_ar_samples_follow_its_probabilities():
    """All 16 texts of two tokens, against the product of the model's own conditionals."""
    model = tiny_ar(V=4, L=3)
    x, nfe = model.generate(torch.full((60_000, 1), 3), generator=gen())
    assert (nfe == 2).all() and (x[:, 0] == 3).all()
    p = log_likelihood(model, rows_from_bos(4, 3, 4)).double().exp().detach()
    assert abs(p.sum() - 1) < 1e-6
    assert fits(torch.bincount(x[:, 1] * 4 + x[:, 2], minlength=16), p)


def test_ar_sampling_continues_a_prompt():
    model = tiny_ar(V=4, L=3)
    prompt = torch.tensor([[3, 1]]).expand(50, 2)
    x, nfe = model.generate(prompt, generator=gen())
    assert (x[:, 1] == 1).all() and (nfe == 1).all()
    cold, _ = model.generate(prompt, tau=1e-3, generator=gen())
    assert torch.equal(cold, model.generate(prompt, greedy=True)[0])
    with pytest.raises(ValueError, match="prompt.* 4 .* 3"):
        model.generate(torch.full((1, 4), 3))
    with pytest.raises(ValueError, match="tau"):
        model.generate(prompt, tau=0)


def test_sequential_extraction_is_reproduced_by_its_noise():
    """Gumbel-max over the teacher's logits, position i from row i - 1; a cache and a full pass round differently."""
    teacher = tiny_ar()
    x, noise = extract_sequential(teacher, 500, generator=gen())
    assert (noise[:, 0] == 0).all()
    logits = teacher.log_probs(x[:, :-1])
    assert (gumbel_max(logits, noise[:, 1:]) == x[:, 1:]).float().mean() > 0.999


def test_parallel_extraction_is_reproduced_by_its_noise():
    teacher = tiny_ar()
    x = rows_of(50)
    noise = extract_parallel(teacher, x, gen(1))
    assert (noise[:, 0] == 0).all()
    assert torch.equal(gumbel_max(teacher.log_probs(x)[:, :-1], noise[:, 1:]), x[:, 1:])


@pytest.mark.parametrize("rows,vocab_size,n,positions", [
    (LANGUAGE, 4, 20_000, (1, 2, 3, 4)), pytest.param(maze_paths(), 6, 20_000, (1, 3, 6, 8, 10), marks=slow)])
def test_parallel_on_teacher_text_equals_sequential_extraction(rows, vocab_size, n, positions):
    """The same joint law of (text, noise), with the exact teacher of a language (the maze's: 2000 paths): two-sample
    tests given each token; and independent across positions in both."""
    teacher = CountingTeacher(rows, vocab_size)
    # sequential: ancestral sampling, noise recorded (the loop of `AR.generate`, without a cache)
    x = torch.full((n, 1), teacher.bos)
    noise = sample_gumbel((n, teacher.length, vocab_size), gen())
    for i in range(1, teacher.length):
        x = torch.cat([x, gumbel_max(teacher.after(x, i - 1), noise[:, i])[:, None]], 1)
    noise[:, 0] = 0
    paths, times = np.unique(rows, axis=0, return_counts=True)
    drawn, counts = np.unique(x[:, 1:].numpy(), axis=0, return_counts=True)
    in_language = {tuple(path): i for i, path in enumerate(paths.tolist())}
    counts_of_paths = np.zeros(len(paths))
    for path, count in zip(drawn.tolist(), counts):
        counts_of_paths[in_language[tuple(path)]] = count                       # KeyError: it is not one of them
    assert len(drawn) > 0.995 * len(paths) and fits(counts_of_paths, times)

    again = extract_parallel(teacher, x, gen(1))           # the noise redrawn, given the text
    for i in positions:
        for token in range(vocab_size - 1):
            given = x[:, i] == token
            if given.sum() >= 200:
                for k in range(vocab_size):
                    assert same_law(noise[given, i, k], again[given, i, k]), (i, token, k)
    winners = []                                           # the noise of what was written, but for the last position's
    for xi in (noise, again):
        flat = xi[:, 1:].reshape(n, -1)
        assert (torch.corrcoef(flat.T) - torch.eye(flat.shape[1])).abs().max() < 6 / math.sqrt(n)
        winners.append(torch.corrcoef(xi.gather(-1, x[:, :, None]).squeeze(-1)[:, 1:-2].T))
    assert (winners[0] - winners[1]).abs().max() < 0.05    # (they do depend on each other: a likely text is not all)


def test_exact_teacher_has_all_its_mass_on_valid_paths():
    """evaluate.py's validity mass, sum of p(x) over the maze's 2000 paths."""
    assert abs(validity_mass(CountingTeacher(maze_paths(), 6), "cpu") - 1) < 1e-4


# --- its precision

def test_evaluation_of_an_ar_model_has_a_float32_head():
    ar = tiny_ar()
    rows = rows_of(64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        h = ar.hidden(rows[:, :-1]).float()
        want = F.cross_entropy(ar.logits(h).flatten(0, 1), rows[:, 1:].flatten())
        assert torch.equal(ar.eval().loss(rows)[0], want)
        assert not torch.equal(ar.train().loss(rows)[0], want)


def test_teacher_body_in_bfloat16_keeps_a_float32_head(tmp_path):
    save_gpt2(tmp_path)
    model = GPT2.from_pretrained(str(tmp_path))
    x = torch.randint(301, (2, 20), generator=gen())
    masked = torch.ones_like(x, dtype=torch.bool)
    masked[:, 0] = False
    want = model.log_probs(x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        data.run.body_to_bfloat16(model)
        h = model.hidden(x)
        assert model.posterior_logits(x, masked)(0, 5).dtype == torch.float32
        got = model.logits(h)
    assert model.transformer.embed.weight.dtype == torch.float32 == model.transformer.head.weight.dtype
    assert model.transformer.blocks[0].fc.weight.dtype == torch.bfloat16
    # the head is exact on the h it gets; the bf16 body costs a few per cent of the logits' scale
    assert torch.allclose(got, h.float() @ model.transformer.embed.weight.T, atol=1e-5)
    assert 0 < (got.log_softmax(-1) - want).abs().mean() < 0.05 * want.std()


# --- GPT-2

@pytest.mark.parametrize("spelling,config,safetensors", [("plain", True, True), ("plain", False, False),
                                                         ("prefixed", True, False), ("prefixed", False, True)])
def test_gpt2_equals_transformers(tmp_path, spelling, config, safetensors):
    """Its logits, in one pass and through the cache, however its names are spelt and its weights are saved."""
    lm = save_gpt2(tmp_path, spelling=spelling, config=config, safetensors=safetensors)
    model = GPT2.from_pretrained(str(tmp_path))
    x = torch.randint(301, (3, 40), generator=gen())
    with torch.no_grad():
        want = lm(x).logits
    assert want.std() > 1 and (model(x) - want).abs().max() < 1e-4
    cache = model.new_cache(3, 40)
    parts = [model.logits(model.hidden(part, cache)) for part in x.split([7, 1, 1, 20, 11], 1)]
    assert (torch.cat(parts, 1) - want).abs().max() < 1e-4
    assert (model.log_probs(x) - want.log_softmax(-1)).abs().max() < 1e-4
    assert model.config.n_head == 2 and (model.vocab_size, model.length, model.bos) == (301, 40, 300)
    assert not any(p.requires_grad for p in model.parameters())


def test_gpt2_has_its_four_published_sizes():
    """Millions of weights in the blocks: 12 n d^2."""
    millions = {name: round(12 * n * d * d / 1e6) for name, (n, d, _) in GPT2_SIZES.items()}
    assert millions == {"gpt2": 85, "gpt2-medium": 302, "gpt2-large": 708, "gpt2-xl": 1475}


def test_gpt2_is_downloaded_once(tmp_path, monkeypatch):
    """By its name, to the folder that the variable names."""
    save_gpt2(tmp_path / "source")
    calls = []

    def download(url, dst, hash_prefix):
        assert hash_prefix == f"of {url}"
        calls.append(url)
        time.sleep(0.3)
        shutil.copy(tmp_path / "source" / "model.safetensors", dst)
    monkeypatch.setenv("GUMBEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setattr(published, "server_sha256", lambda url: f"of {url}")
    sizes = []
    threads = [threading.Thread(target=lambda: sizes.append(GPT2.from_pretrained("gpt2-large").vocab_size))
               for _ in range(4)]                          # as the processes of a machine: one fetches, the others wait
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sizes == [301] * 4 and GPT2.from_pretrained("gpt2-large").vocab_size == 301
    assert len(calls) == 1 and "gpt2-large" in calls[0] and calls[0].startswith("https://")
    offline(monkeypatch, tmp_path / "cache")
    with pytest.raises(OSError, match="gpt2-xl.*offline"):
        GPT2.from_pretrained("gpt2-xl")


def test_damaged_safetensors_are_no_gpt2(tmp_path):
    """Cut off, empty, of another header, length, type or shape: each names the folder."""
    save_gpt2(tmp_path)
    path = tmp_path / "model.safetensors"
    good = path.read_bytes()
    end = 8 + int.from_bytes(good[:8], "little")           # of the header
    other_key = good[8:end].replace(b"data_offsets", b"data_offse**")
    for bad in (good[:-5], good[:100], b"", good[:8] + b"x" + good[9:], (1 << 60).to_bytes(8, "little") + good[8:],
                good.replace(b'"F32"', b'"F99"', 1), good.replace(b"[301,128]", b"[128,301]", 1),
                b"\x02" + bytes(7) + b"[]", good[:8] + other_key):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
            GPT2.from_pretrained(str(tmp_path))


def test_folder_without_weights_is_no_gpt2(tmp_path):
    with pytest.raises(ValueError, match=r"model\.safetensors.*pytorch_model\.bin"):
        GPT2.from_pretrained(str(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"no torch file")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "pytorch_model.bin"))):
        GPT2.from_pretrained(str(tmp_path))


def test_other_weights_are_no_gpt2(tmp_path):
    state = dict(save_gpt2(tmp_path).state_dict())
    without_one = {k: v for k, v in state.items() if k != "transformer.h.0.attn.c_attn.weight"}
    with_one_more = state | {"transformer.h.0.extra.weight": torch.zeros(2)}
    of_another_shape = state | {"transformer.ln_f.weight": torch.zeros(3)}
    for bad, name in ((without_one, "blocks.0."), (with_one_more, "h.0.extra"), (of_another_shape, r"\[3\]")):
        with pytest.raises(ValueError, match=name):
            GPT2.from_state(bad, {})
    with pytest.raises(ValueError, match="activation_function.*relu"):
        GPT2.from_state(state, {"activation_function": "relu"})


# --- token-level distillation (the baseline of Table 4)

@pytest.mark.parametrize("predict_bos", [True, False])
def test_token_kd_is_its_formula(monkeypatch, predict_bos):
    """loss = NELBO + kd * (1/t) sum KL(teacher(x_i | x_<i) || student(x_i | z)); in chunks too; finite gradients."""
    student = tiny(predict_bos=predict_bos)
    teacher = tiny_ar(predict_bos=predict_bos)
    rows = rows_of(5)
    t = torch.tensor([0.2, 0.5, 0.7, 0.9, 1.0])
    z = partly_masked(rows, 0.6)
    log_p = student.log_probs(z)[..., :7]
    log_q = teacher.log_probs(rows)
    kl = torch.tensor(0.0)
    for b, i in (z == 7).nonzero().tolist():
        for k in range(7):
            if log_q[b, i - 1, k] > -math.inf:             # row i - 1 of the teacher is about token i
                difference = log_q[b, i - 1, k] - log_p[b, i, k]
                kl += log_q[b, i - 1, k].exp() * difference / t[b] / (5 * 5)
    plain = student.loss(rows, t, z=z)[0]
    grads = []
    for chunk in (1 << 22, 7):
        monkeypatch.setattr(mdlm.DEVICE, "chunk", chunk)
        loss, parts = student.loss(rows, t, teacher, z=z, kd=0.7)
        assert torch.allclose(loss, plain + 0.7 * kl, atol=1e-5)
        assert kl > 0.1 and parts["kl_masked"] > 0
        student.zero_grad()
        loss.backward()
        grads.append(gradient(student))
        assert grads[-1].isfinite().all()
    assert torch.allclose(*grads, atol=1e-5)


# --- --init_from: a student that starts as an AR model

@with_and_without_noise
def test_student_from_an_ar_model_computes_what_it_did(noise):
    """Made causal again, the student's row i is the AR model's row i - 1; the embedding of [MASK] is its own."""
    ar = tiny_ar()
    config = {k: v for k, v in vars(ar.config).items() if k != "predict_bos"}
    student = MDLM(**config, noise=noise, shift=True)
    mask_before = student.transformer.embed.weight[-1].clone()
    initial_weights(student, ar, "x")
    assert torch.equal(student.transformer.embed.weight[:-1], ar.transformer.embed.weight)
    assert torch.equal(student.transformer.embed.weight[-1], mask_before)
    student.eval().transformer.causal = True
    rows = rows_of(4)
    g = torch.zeros(4, 6, 32) if noise else None
    got = student.logits(student.hidden(rows, g)).log_softmax(-1)
    assert torch.allclose(got[:, 1:], ar.log_probs(rows)[:, :-1], atol=1e-5)


def test_weights_start_from_any_that_fit():
    """The noise embedding is left out where there is no noise; another shape is refused."""
    plain = tiny(seed=1)
    noisy = tiny("gumbel")
    initial_weights(plain, noisy, "x")
    assert torch.equal(plain.transformer.head.weight, noisy.transformer.head.weight)
    with pytest.raises(BadInput, match=r"--init_from=x.*transformer\.embed"):
        initial_weights(tiny(V=8), tiny_ar(), "x")


# ---------------------------------------------------------------------------------------------------------------------
# the authors' networks: their tensors, to 1e-5

def close(a, b):
    return (a - b).abs().max() < 1e-5


def close_where_possible(logp, want):
    """Theirs says -1e6 where ours says -inf."""
    possible = want > -1e5
    return logp.shape == want.shape and close(logp[possible], want[possible]) and (logp[~possible] == -math.inf).all()


@needs_shared
@pytest.mark.parametrize("name", ["mdlm", "mdlm_gumbel"])
def test_golden_mdlm(name):
    """Logits, log-probabilities, loss; with noise at another temperature, and added to [MASK]."""
    d = golden(name)
    z = d["inputs"]["indices"]
    model = load_published(d["state_dict"])
    noise = None
    if "gumbel" in d["inputs"]:
        noise = F.pad(d["inputs"]["gumbel"], (0, 0, 1, 0))
    with torch.no_grad():
        g = None if noise is None else model.noise_embed(noise)
        assert close(model.logits(model.hidden(z, g)), d["backbone_out"][..., :100])
        assert close_where_possible(model.log_probs(z, noise), d["log_probs"])
        loss, _ = model.loss(d["loss"]["x0"], d["loss"]["t"][:, 0], z=d["loss"]["xt"], noise=noise)
        assert close(loss, d["loss"]["loss_eval_mode"])
        if noise is not None:
            logits = model.logits(model.hidden(z, model.noise_embed(noise, 0.85)))
            assert close(logits, d["extra"]["backbone_out_gumbel_temperature_0.85"][..., :100])
            state = {"backbone." + k: v for k, v in d["state_dict"].items()}
            adding = load_published(state, n_heads=4, inject="add")
            assert close(adding.logits(adding.hidden(z, g)), d["extra"]["backbone_out_inject_add"][..., :100])


@needs_shared
@pytest.mark.parametrize("name", ["bd3lm", "bd3lm_gumbel"])
def test_golden_bd3lm(name):
    """Training pass, sampling pass (one call, and block by block through the cache), both losses."""
    d = golden(name)
    i = d["inputs"]
    model = bd3lm.load_published(d["state_dict"], 4, bos=99)
    noise = None
    g = None
    with torch.no_grad():
        if "gumbel" in i:
            noise = F.pad(i["gumbel"], (0, 0, 1, 0))
            g = model.noise_embed(F.pad(i["sample_gumbel"], (0, 0, 1, 0)))[:, 8:]
        assert torch.equal(training_mask(32, 4, torch.device("cpu")), i["block_diff_mask"])
        assert close_where_possible(model.log_probs(i["xt"], i["x0"], noise), d["log_probs"])
        z = i["sample_indices"]
        want = d["sample_backbone_out"][:, 8:, :100]
        assert close(model.logits(model.block_hidden(model.new_cache(3, 12), z[:, :8], z[:, 8:], g)), want)
        cache = model.new_cache(3, 12)
        model.block_hidden(cache, z[:, :4], z[:, 4:8], g)  # a call for the second block
        assert close(model.logits(model.block_hidden(cache, z[:, 4:8], z[:, 8:], g)), want)
        for key, clip in (("loss", None), ("loss_clip_0.6_to_1", (0.6, 1.0))):
            x = d[key]
            loss, _ = model.loss(x["x0"], x["t"].view(3, 8, 4)[:, :, 0], z=x["xt"], noise=noise, clip=clip)
            assert close(loss, x["loss_eval_mode"])


@needs_shared
def test_golden_ar():
    d = golden("ar")
    model = load_published_ar(d["state_dict"], bos=0)
    with torch.no_grad():
        assert close(model.log_probs(d["inputs"]["indices"]), d["log_probs"][..., :100])
        assert close(model.loss(d["inputs"]["x0"])[0], d["loss"]["loss"])


# ---------------------------------------------------------------------------------------------------------------------
# what the commands refuse: one sentence, exit code 2, before any work, and nothing written

@pytest.fixture(scope="session")
def all_runs(runs, block_runs, medusa_runs, tmp_path_factory):
    """A folder with all that the other folders of runs hold, by links."""
    root = tmp_path_factory.mktemp("all_runs")
    for source in (runs, medusa_runs):
        for path in [*source.glob("data/*"), *source.glob("out/*")]:
            link = root / path.relative_to(source)
            link.parent.mkdir(exist_ok=True)
            if not link.exists():
                link.symlink_to(path)
    return root


NEW = "--out=out/new"
ROW_OF_A = "a" * 30
# a command, its flags, the flags, files and values that its sentence must name
REFUSED = [
    # flags by themselves
    ("train", "--model=gpt", "--model 'gpt' mdlm"),
    ("train", "--data=maze --size=huge", "--size 'huge' tiny"),
    ("train", "--noise=gauss", "--noise 'gauss' gaussian"),
    ("train", "--kd=sequence", "--kd 'sequence' token"),
    ("train", "--batch 3", "--batch"),
    ("train", "--lr=0 --data=maze", "--lr 0"),
    ("train", "--lr=fast", "--lr 'fast'"),
    ("train", "--steps=0", "--steps 1"),
    ("train", "--steps=1.5", "--steps '1.5'"),
    ("train", "--batch_size=0", "--batch_size 1"),
    ("train", "--seed=-1", "--seed -1"),
    ("train", "--dropout=2", "--dropout 2 1"),
    ("train", "--data=maze --gumbel --teacher_cache=0", "--teacher_cache 1"),
    ("train", "--model=medusa --heads=0", "--heads 1"),
    ("train", f"{BLOCKS} --clip=0.8,0.3", "--clip=0.8,0.3"),
    ("train", f"{BLOCKS} --clip=0.5", "--clip=0.5"),
    ("train", f"{BLOCKS} --clip=0,2", "--clip 2"),
    # flags that do not go together, or that nothing would read
    ("train", "--model=ar --gumbel", "--gumbel"),
    ("train", "--inject=add", "--inject --gumbel"),
    ("train", "--noise=unpaired --teacher=x", "--teacher --noise=unpaired"),
    ("train", "--teacher=x", "--teacher --gumbel"),
    ("train", "--teacher_cache=8", "--teacher_cache"),
    ("train", "--model=medusa --gumbel --teacher_cache=8", "--teacher_cache"),
    ("train", "--n_embd=30 --n_head=4", "--n_embd=30 --n_head 8"),
    ("train", "--kd=token --gumbel", "--kd"),
    ("train", "--kd=token --model=ar", "--kd"),
    ("train", "--kd=token --model=medusa", "--kd"),
    ("train", "--heads=2", "--heads --model=medusa"),
    ("train", "--model=medusa --n_layer=2", "--n_layer --gumbel"),
    ("train", "--model=medusa --n_embd=64", "--n_embd"),
    ("train", "--model=medusa --t_one=0.5", "--t_one"),
    ("train", "--model=medusa --gumbel --inject=add", "--inject"),
    ("train", "--data=mine --block_size=4", "--block_size --model=bd3lm"),
    ("train", f"{BLOCKS} --block_size=5", "--block_size=5 --length=24"),
    ("train", f"{BLOCKS} --clip=0.1,0.7 --clip_search", "--clip --clip_search"),
    ("train", f"--data=maze --micro_batch_size=7 {NEW}", "--micro_batch_size=7 128"),
    # the data
    ("train", "--data=nowhere --model=ar", "data/nowhere prepare.py"),
    ("train", "--data=openwebtext", "data/openwebtext prepare.py openwebtext"),
    ("train", f"--data=mine --length=900000 {NEW}", "data/mine train 899999 --length"),
    ("train", f"--model=ar --data=maze --length=10 {NEW}", "--length=10 data/maze --length=11"),
    # the teacher, the backbone, the weights to start from
    ("train", f"--data=maze --gumbel --teacher=nowhere {NEW}", "nowhere"),
    ("train", f"--data=maze --gumbel --teacher=out/maze-mdlm {NEW}", "--teacher=out/maze-mdlm --model=ar"),
    ("train", f"--data=mine --length=24 --gumbel {NEW}", "--teacher --model=ar --data=data/mine"),
    ("train", f"--data=mine --length=24 --kd=token {NEW}", "--teacher --model=ar"),
    ("train", f"--data=mine --length=24 --model=medusa {NEW}", "--teacher --model=ar"),
    ("train", f"--data=mine --length=24 --gumbel --teacher=out/maze-ar {NEW}", "--teacher=out/maze-ar 6 257"),
    ("train", f"--data=mine --length=24 --model=medusa --teacher=out/maze-mdlm {NEW}", "out/maze-mdlm --model=ar"),
    ("train", f"{TEXT} --gumbel --teacher=out/heads {NEW}", "--teacher=out/heads --model=ar"),
    ("train", f"--data=maze --init_from=nowhere {NEW}", "nowhere"),
    ("train", f"--data=maze --init_from=out/maze-ar {NEW}", "--init_from=out/maze-ar"),
    ("train", f"{MEDUSA} --init_from=out/ar {NEW}", "--init_from=out/ar"),
    ("train", f"{MEDUSA.replace('out/ar', 'out/ar-s1')} --init_from=out/heads {NEW}", "out/heads out/ar-s1"),
    # a run directory that is none, or another run's
    ("train", "--data=maze --model=ar --out=out/maze-ar/ckpt.pt", "--out=out/maze-ar/ckpt.pt"),
    ("train", "--data=maze --model=ar --n_layer=2", "out/maze-ar --n_layer --out"),
    ("train", "--data=maze --model=ar --out=out/maze-mdlm", "out/maze-mdlm --model"),
    ("train", f"{TEXT} --kd=token --teacher=out/ar --steps=9 --out=out/plain", "out/plain --kd token"),
    ("train", f"{BLOCKS} {NOISY} --steps=9 --out=out/blocks-clip", "out/blocks-clip --clip"),

    ("sample", "--ckpt=nowhere", "nowhere"),
    ("sample", "--ckpt=out/maze-mdlm --tau=0", "--tau 0"),
    ("sample", "--ckpt=out/maze-mdlm --top_p=1.5", "--top_p 1.5 1"),
    ("sample", "--ckpt=out/maze-mdlm --steps=0", "--steps 1"),
    ("sample", "--ckpt=out/maze-mdlm --batch_size=0", "--batch_size"),
    ("sample", "--ckpt=out/maze-mdlm --seed=-1", "--seed -1"),
    ("sample", "--ckpt=out/maze-mdlm --length=40", "--length=40 11"),
    ("sample", "--ckpt=out/maze-mdlm --out=no/such/file", "--out no/such/file"),
    ("sample", "--ckpt=out/maze-mdlm --out=out/maze-mdlm/log.jsonl", "--out out/maze-mdlm/log.jsonl"),
    # what is given
    ("sample", "--ckpt=out/maze-mdlm --prompt=DDRRRUUUUUU", "--prompt 11 10"),
    ("sample", "--ckpt=out/maze-mdlm --prompt=xyz", "'x' D"),
    ("sample", "--ckpt=out/maze-mdlm --prompt=D --infill=D[MASK]", "--prompt --infill"),
    ("sample", "--ckpt=out/maze-ar --infill=D[MASK]", "--infill --prompt"),
    ("sample", "--ckpt=out/heads --infill=a[MASK]", "--infill --prompt"),
    ("sample", f"--ckpt=out/heads --prompt={'x' * 24}", "--prompt 24 23"),
    ("sample", f"--ckpt=out/blocks --length=60 --prompt={ROW_OF_A}", "--prompt 30 24"),
    ("sample", f"--ckpt=out/blocks --length=20 --prompt={ROW_OF_A}", "--prompt 30 19"),
    ("sample", "--ckpt=out/plain --stop_at_eos", "--stop_at_eos"),
    # samplers
    ("sample", "--ckpt=out/maze-mdlm --sampler=magic", "--sampler 'magic' ancestral"),
    ("sample", "--ckpt=out/maze-mdlm --order=left_to_right", "--order=left_to_right --sampler=fixed"),
    ("sample", "--ckpt=out/maze-mdlm --remask=0.1", "--remask --sampler=remdm"),
    ("sample", "--ckpt=out/maze-mdlm --sampler=remdm", "--sampler=remdm --remask"),
    ("sample", "--ckpt=out/maze-mdlm --sampler=remdm --remask=2", "--remask 2 1"),
    ("sample", "--ckpt=out/maze-ar --sampler=remdm --remask=0.1", "--sampler=remdm maze-ar"),
    ("sample", "--ckpt=out/maze-mdlm --sampler=apd", "--sampler=apd --verifier"),
    ("sample", "--ckpt=out/maze-mdlm --verifier=out/maze-ar", "--verifier --sampler=apd"),
    ("sample", "--ckpt=out/maze-mdlm --sampler=apd --verifier=out/maze-mdlm", "--verifier=out/maze-mdlm --model=ar"),
    ("sample", "--ckpt=out/maze-ar --sampler=apd --verifier=out/maze-ar", "--sampler=apd maze-ar"),
    ("sample", "--ckpt=out/blocks --sampler=apd --verifier=out/ar", "--sampler=apd blocks MDLM"),
    ("sample", "--ckpt=out/heads --sampler=apd --verifier=out/ar", "--sampler=apd heads medusa"),
    # a teacher's text
    ("sample", "--ckpt=out/maze-mdlm --shards=d", "--shards out/maze-mdlm"),
    ("sample", "--ckpt=out/heads --shards=d", "--shards out/heads"),
    ("sample", "--ckpt=out/maze-ar --shards=d --tau=0.9", "--shards --tau=1"),
    ("sample", "--ckpt=out/maze-ar --shards=d --greedy", "--shards --greedy"),
    ("sample", "--ckpt=out/maze-ar --shards=d --n=1", "--n 2 --shards"),
    ("sample", "--ckpt=out/maze-ar --shards=out", "out --out"),

    ("evaluate", "poetry --ckpt out/maze-mdlm", "'poetry' nfe"),
    ("evaluate", "maze --ckpt out/maze-mdlm --nfe=0", "--nfe 1"),
    ("evaluate", "maze --ckpt out/maze-mdlm --decode=best", "--decode=best greedy"),
    ("evaluate", "maze --ckpt out/maze-mdlm --json=no/such.json", "--json no/such.json"),
    ("evaluate", "maze --ckpt out/maze-mdlm --samples=out/maze-ar/ckpt.pt", "--samples=out/maze-ar/ckpt.pt"),
    ("evaluate", "nfe --ckpt out/maze-mdlm --plot=p.txt", "--plot=p.txt .png .svg"),
    ("evaluate", "ppl --ckpt out/heads", "--ckpt heads acceptance"),
    ("evaluate", "maze --ckpt out/heads", "--ckpt heads acceptance"),
    ("evaluate", "ppl --ckpt out/plain --data=nowhere", "nowhere"),
    ("evaluate", "ppl --ckpt out/plain --length=40", "--length=40 24 plain"),
    ("evaluate", "ppl --ckpt out/blocks --length=22", "--length=22 blocks 4"),
    ("evaluate", "genppl --judge=out/ar --ckpt out/plain --length=40", "--length=40 24 plain"),
    ("evaluate", "genppl --judge=out/ar --ckpt out/heads --length=40", "--length=40 24 heads"),
    ("evaluate", "genppl --judge=out/ar --ckpt out/ar --length=40", "--length=40 24 ar"),
    ("evaluate", "genppl --judge=out/plain --ckpt out/plain", "--judge=out/plain mdlm"),
    ("evaluate", "infill --judge=out/ar --ckpt out/ar", "--ckpt ar"),
    ("evaluate", "infill --judge=out/ar --ckpt out/plain --masked=24", "--masked=24 --length"),
    ("evaluate", "acceptance --ckpt out/plain", "--ckpt plain mdlm"),
    ("evaluate", "acceptance --ckpt out/heads --accept=always", "--accept=always typical"),
    ("evaluate", "acceptance --ckpt out/heads --prompt_length=22", "22 --prompt_length"),
    ("evaluate", "acceptance --ckpt out/heads --length=3", "3 --prompt_length"),
    ("evaluate", "acceptance --ckpt out/heads --length=48", "--length=48 24 heads"),
]
COMMANDS = dict(train=train, sample=sample, evaluate=evaluate)


def modification_times(root):
    """{every file and folder below: its modification time}."""
    paths = [os.path.join(folder, name) for folder, folders, files in os.walk(root, followlinks=True)
             for name in [*folders, *files]]
    return {path: os.stat(path).st_mtime_ns for path in paths}


@pytest.mark.parametrize("command,flags,names", REFUSED, ids=[f"{command} {flags}" for command, flags, _ in REFUSED])
def test_bad_input_is_refused_in_one_sentence(all_runs, cli, monkeypatch, command, flags, names):
    monkeypatch.chdir(all_runs)
    before = modification_times(".")
    refused(cli(COMMANDS[command], flags), *names.split())
    assert modification_times(".") == before


# flags that are given, and that no model and decoding of the command reads: command, flags, the flag that is named
IDLE = [
    ("sample", "--ckpt=out/plain --tau=0.3", "--tau=0.3"),
    ("sample", "--ckpt=out/plain --sampler=apd --verifier=out/ar --steps=3", "--steps=3"),
    ("sample", "--ckpt=out/plain --sampler=first_hitting --steps=3", "--steps=3"),
    ("sample", "--ckpt=out/plain --resample_noise", "--resample_noise"),
    ("sample", "--ckpt=out/plain --accept=exact", "--accept"),
    ("sample", "--ckpt=out/plain --apd_ratio=0.5", "--apd_ratio"),
    ("sample", "--ckpt=out/gumbel --greedy --top_p=0.5", "--top_p"),
    ("sample", "--ckpt=out/ar --steps=3", "--steps"),
    ("sample", "--ckpt=out/ar --sampler=first_hitting", "--sampler"),
    ("sample", "--ckpt=out/ar --greedy --tau=0.5", "--tau"),
    ("sample", "--ckpt=out/ar --shards=data/new --n=4 --accept=exact", "--accept"),
    ("sample", "--ckpt=out/heads --accept=exact --epsilon=0.1", "--epsilon"),
    ("sample", "--ckpt=out/heads --greedy --accept=exact", "--accept"),
    ("sample", "--ckpt=out/heads --stop_at_eos", "--stop_at_eos"),
    ("evaluate", "genppl --judge=out/ar --ckpt out/plain out/blocks --tau=0.5", "--tau"),
    ("evaluate", "genppl --judge=out/ar --ckpt out/plain --decode=greedy --top_p=0.5", "--top_p"),
    ("evaluate", "genppl --judge=out/ar --ckpt out/ar --nfe=4", "--nfe"),
    ("evaluate", "genppl --judge=out/ar --ckpt out/plain --sampler=first_hitting --nfe=1,4", "--nfe"),
    ("evaluate", "maze --ckpt out/maze-ar --tau=0.5", "--tau"),
    ("evaluate", "maze --ckpt out/maze-ar --decode=greedy", "--decode"),
    ("evaluate", "nfe --ckpt out/maze-mdlm --judge=out/maze-ar", "--judge"),
    ("evaluate", "ppl --ckpt out/ar out/plain --teacher=nowhere", "--teacher"),
    ("train", f"--model=ar --data=mine --t_one=0 {NEW}", "--t_one"),
    ("train", f"--model=medusa --teacher=out/ar --data=mine --dropout=0 {NEW}", "--dropout"),
]


@pytest.mark.parametrize("command,flags,name", IDLE, ids=lambda value: str(value)[:60])
def test_a_flag_that_nothing_reads_is_refused(all_runs, cli, monkeypatch, command, flags, name):
    monkeypatch.chdir(all_runs)
    refused(cli(COMMANDS[command], flags), name)


@pytest.mark.parametrize("flags", [
    "sample --ckpt=out/gumbel --tau=0.5 --greedy", "sample --ckpt=out/ar --tau=0.5",
    "sample --ckpt=out/heads --no_cache",
    "evaluate genppl --judge=out/ar --n=4 --ckpt out/plain out/ar --nfe=4 --tau=0.5",
    "evaluate genppl --judge=out/ar --n=4 --ckpt out/plain out/gumbel --nfe=4 --tau=0.5 --decode=sample,greedy "
    "--top_p=1"])
def test_a_flag_that_one_of_the_models_reads_is_accepted(all_runs, cli, monkeypatch, flags):
    monkeypatch.chdir(all_runs)
    command, _, flags = flags.partition(" ")
    succeeded(cli(COMMANDS[command], flags))


@pytest.mark.parametrize("name,damage", [
    ("ckpt.pt", lambda raw, ckpt: b"not a checkpoint"),
    ("ckpt.pt", lambda raw, ckpt: b"the quick brown fox"),
    ("ckpt.pt", lambda raw, ckpt: raw[:len(raw) // 2]),
    ("ckpt.pt", lambda raw, ckpt: {"weights": 1}),
    ("blocks.2", lambda raw, ckpt: dict(ckpt, config=dict(ckpt["config"], n_layer=3))),
    ("'rnn'", lambda raw, ckpt: dict(ckpt, args=dict(ckpt["args"], model="rnn"))),
    ("colour", lambda raw, ckpt: dict(ckpt, config=dict(ckpt["config"], colour=3))),
])
def test_damaged_checkpoints_are_refused(runs, tmp_path, cli, name, damage):
    """No torch file, text, cut off, another dict, weights or a class or fields that the config does not describe."""
    path = runs / "out/maze-mdlm/ckpt.pt"
    bad = damage(path.read_bytes(), torch.load(path, weights_only=True))
    if isinstance(bad, bytes):
        (tmp_path / "ckpt.pt").write_bytes(bad)
    else:
        torch.save(bad, tmp_path / "ckpt.pt")
    refused(cli(sample, f"--ckpt={tmp_path}"), name)
    refused(cli(evaluate, f"maze --ckpt {tmp_path}"), name)


@pytest.mark.parametrize("what", ["genppl", "mauve"])
def test_default_judge_is_named_where_it_cannot_be_downloaded(in_text_runs, cli, monkeypatch, tmp_path, what):
    offline(monkeypatch, tmp_path)
    refused(cli(evaluate, f"{what} --ckpt out/plain"), "gpt2-large", "offline")


@slow
@pytest.mark.parametrize("script", ["train.py", "sample.py", "evaluate.py", "data/prepare.py"])
def test_commands_run_from_any_folder(script, tmp_path):
    """As a script of its own, and not only from within these tests."""
    done = subprocess.run([sys.executable, f"{HERE}/{script}", "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: " + os.path.basename(script))


# ---------------------------------------------------------------------------------------------------------------------
# train.py: flags and files

def same_checkpoints(a, b):
    """Whether two checkpoints hold the same weights, averages, optimizer state and step, bit for bit."""
    a = torch.load(a, weights_only=True)
    b = torch.load(b, weights_only=True)

    def equal(x, y):
        if isinstance(x, dict):
            return set(x) == set(y) and all(equal(x[k], y[k]) for k in x)
        if isinstance(x, list):
            return len(x) == len(y) and all(map(equal, x, y))
        if isinstance(x, torch.Tensor):
            return torch.equal(x, y)
        return x == y
    return all(equal(a[k], b[k]) for k in ("model", "ema", "optimizer", "step", "tokens_seen"))


def settings(flags, *names):
    """The values of these settings, where these flags are given."""
    args = vars(train.parse(flags.split()))
    return tuple(args[name] for name in names)


def test_defaults_are_the_papers():
    """Appendix C.1; for Medusa C.2."""
    flags = "--model=mdlm --gumbel --teacher=x"
    assert settings(flags, "steps", "batch_size", "lr", "warmup", "schedule", "ema", "dropout", "length") == (
        1_000_000, 512, 3e-4, 2500, "constant", 0.9999, 0.1, 1024)
    assert settings(flags, "n_layer", "n_embd", "n_head", "data", "out") == (
        12, 768, 12, "data/openwebtext", "out/openwebtext-mdlm-gumbel")
    assert settings("--gumbel", "data", "teacher") == ("data/openwebtext", None)
    flags = "--model=medusa --gumbel --teacher=x"
    assert settings(flags, "heads", "n_layer", "n_embd", "batch_size", "lr", "schedule", "steps") == (
        3, 1, None, 256, 1e-3, "cosine", 20_000)


def test_data_and_size_set_other_defaults_and_flags_win():
    shape = ("n_layer", "n_embd", "n_head", "length")
    assert settings("--model=ar --data=maze_skewed --n_layer=3", *shape, "data", "out") == (
        3, 128, 8, None, "data/maze_skewed", "out/maze_skewed-ar")
    assert settings("--data=lm1b --size=medium --n_head=8", *shape) == (24, 1024, 8, 128)
    assert settings("--data=maze --size=tiny --n_layer=2 --gumbel", *shape, "t_one") == (2, 256, 8, None, 0.5)
    assert settings("--model=bd3lm --gumbel --data=maze", "length", "block_size", "t_one") == (12, 4, 0.5)


def test_noise_implies_gumbel_and_names_the_run():
    assert settings("--noise=uniform --data some/where", "gumbel", "data", "out") == (
        True, "some/where", "out/where-mdlm-uniform")


def test_the_lines_that_the_readme_names_are_these():
    """`losses` and `unmask`, each from its def to its last return."""
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as f:
        found = re.findall(r"(\d+) to (\d+) \(`(losses|unmask)`", f.read())
    with open(os.path.join(HERE, "mdlm.py"), encoding="utf-8") as f:
        lines = f.read().split("\n")
    assert {name for _, _, name in found} == {"losses", "unmask"}
    for first, last, name in found:
        assert f"def {name}(" in lines[int(first) - 1]
        assert lines[int(last) - 1].strip().startswith("return ")
        assert not any("def " in line for line in lines[int(first):int(last)])


def test_row_order_is_a_permutation_and_a_function_of_the_step():
    rows = np.concatenate([rows_of_step(step, 10, 4, seed=1) for step in range(5)])
    first_epoch, second_epoch = rows.reshape(2, 10).tolist()
    assert sorted(first_epoch) == list(range(10)) == sorted(second_epoch)
    assert first_epoch != second_epoch
    assert rows_of_step(3, 10, 4, 1).tolist() == rows[12:16].tolist()
    assert rows_of_step(0, 10, 4, 2).tolist() != rows[:4].tolist()


def test_checkpoint_describes_itself(runs):
    ckpt = torch.load(runs / "out/maze-mdlm-gumbel/ckpt.pt", weights_only=True)
    assert set(CHECKPOINT) == set(ckpt)
    assert ckpt["step"] == 6 and ckpt["tokens_seen"] == 6 * 16 * 11
    assert not any("teacher" in name for name in ckpt["model"])
    assert ckpt["config"]["noise"] == "gumbel" and ckpt["meta"]["name"] == "maze"


def test_log_has_the_flags_then_every_loss_and_validation(runs):
    log = jsonl(runs / "out/maze-mdlm-gumbel/log.jsonl")
    losses = {line["step"]: line["loss"] for line in log if "loss" in line}
    validations = {line["step"]: line["val_nll_given_noise"] for line in log if "val_nll_given_noise" in line}
    assert log[0]["args"]["gumbel"]
    assert list(losses) == [1, 2, 3, 4, 5, 6] and list(validations) == [4, 6]
    assert all(math.isfinite(loss) for loss in losses.values())
    assert {"lr", "grad_norm", "tokens_per_s", "nll_masked"} <= set(log[1])
    assert any("val_nelbo" in line for line in jsonl(runs / "out/maze-mdlm/log.jsonl"))


# --- the loop

@slow
def test_sigterm_saves_and_the_same_command_continues(runs):
    """SIGINT ends it as well; both with the exit code that a shell expects."""
    command = [sys.executable, f"{HERE}/train.py", "--model=mdlm", "--data=maze", "--steps=3000", "--out=out/term",
               *TINY.split()]
    log = runs / "out/term/log.jsonl"
    deadline = time.time() + 600
    p = subprocess.Popen(command, cwd=runs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def wait_for(step):
        while not log.exists() or f'"step": {step},' not in log.read_text():
            assert p.poll() is None and time.time() < deadline
            time.sleep(0.01)
    wait_for(3)
    p.send_signal(signal.SIGTERM)
    _, err = p.communicate(timeout=600)
    assert p.returncode == 128 + signal.SIGTERM and "saved" in err and "Traceback" not in err
    step = torch.load(runs / "out/term/ckpt.pt", weights_only=True)["step"]
    assert 3 <= step < 3000
    p = subprocess.Popen(command, cwd=runs, stderr=subprocess.PIPE, text=True)
    seen = ""
    while f"continuing at step {step}" not in seen:
        line = p.stderr.readline()
        assert line, seen
        seen += line
    wait_for(step + 2)                                     # handlers are in place
    p.send_signal(signal.SIGINT)
    assert p.wait(600) == 128 + signal.SIGINT


# ways in which what lies under a run's paths may change: (what is done to its folder, whether it is still continued)
def prepare_other_text(folder):
    meta = json.loads((folder / "data/mine/meta.json").read_text())
    ids = np.fromfile(folder / "data/mine/train.bin", "<u2")
    ids[0] ^= 1
    ids.tofile(folder / "data/mine/train.bin")
    meta["files"][0]["sha256"] = sha256(folder / "data/mine/train.bin")
    (folder / "data/mine/meta.json").write_text(json.dumps(meta))


def train_the_teacher_on(folder):
    ckpt = torch.load(folder / "out/ar/ckpt.pt", weights_only=True)
    ckpt["ema"]["transformer.norm.weight"][0] += 1
    torch.save(ckpt, folder / "out/ar/ckpt.pt")


@pytest.mark.parametrize("change,names", [
    (prepare_other_text, "other shards data/mine"), (train_the_teacher_on, "another teacher out/ar")])
def test_a_run_is_not_continued_on_other_data_or_with_another_teacher(text_runs, cli, monkeypatch, tmp_path, change,
                                                                      names):
    """A path does not stand for what lies there."""
    for name in ("data", "out/ar", "out/gumbel"):
        shutil.copytree(text_runs / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    change(tmp_path)
    before = (tmp_path / "out/gumbel/ckpt.pt").read_bytes()
    refused(cli(train, f"{NOISY} --data=mine --length=24 {TINY} --out=out/gumbel --steps=8"), *names.split())
    assert (tmp_path / "out/gumbel/ckpt.pt").read_bytes() == before


def test_a_bound_says_that_the_teacher_is_another(text_runs, cli, monkeypatch, tmp_path):
    for name in ("data", "out/ar", "out/gumbel"):
        shutil.copytree(text_runs / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    _, err = succeeded(cli(evaluate, "ppl --ckpt out/gumbel --n=4"))
    assert "another teacher" not in err
    train_the_teacher_on(tmp_path)
    _, err = succeeded(cli(evaluate, "ppl --ckpt out/gumbel --n=4"))
    assert err.count("another teacher") == 1


@pytest.mark.parametrize("name,value", [
    ("processes", 2), ("micro_batch_size", 4), ("device", "xpu"), ("dtype", "float16"), ("torch", "2.0"),
    ("random", 0)])
def test_a_run_is_continued_under_other_conditions_with_a_warning(in_maze_runs, cli, tmp_path, name, value):
    """The same law, other draws or other rounding: said once, and noted in the log."""
    shutil.copytree("out/maze-mdlm", tmp_path / "m")
    ckpt = torch.load(tmp_path / "m/ckpt.pt", weights_only=True)
    now = ckpt["conditions"][name]
    ckpt["conditions"][name] = value
    ckpt["args"] |= dict(schedule="constant")
    torch.save(ckpt, tmp_path / "m/ckpt.pt")
    flags = f"--model=mdlm --data=maze --steps=7 --save_every=3 {TINY} --schedule=constant --out={tmp_path}/m"
    _, err = succeeded(cli(train, flags))
    assert err.count("other conditions") == 1 and name in err
    assert [line["changed"] for line in jsonl(tmp_path / "m/log.jsonl") if "changed" in line] == [{name: [value, now]}]


def test_a_checkpoint_that_is_older_than_its_conditions_is_continued(in_maze_runs, cli, tmp_path):
    shutil.copytree("out/maze-mdlm", tmp_path / "m")
    ckpt = torch.load(tmp_path / "m/ckpt.pt", weights_only=True)
    for name in ("conditions", "bad_steps"):
        del ckpt[name]
    ckpt["args"] |= dict(schedule="constant")
    torch.save(ckpt, tmp_path / "m/ckpt.pt")
    flags = f"--model=mdlm --data=maze --steps=7 --save_every=3 {TINY} --schedule=constant --out={tmp_path}/m"
    _, err = succeeded(cli(train, flags))
    assert "cannot be checked" in err
    assert "conditions" in torch.load(tmp_path / "m/ckpt.pt", weights_only=True)


def test_the_checkpoint_before_the_last_is_kept_and_named_where_the_last_is_damaged(in_maze_runs, cli, tmp_path):
    """Every bit counts: torch writes checksums, and does not read them."""
    succeeded(cli(train, f"--model=mdlm --data=maze --steps=6 --save_every=2 {TINY} --out={tmp_path}"))
    assert sample.load_checkpoint(f"{tmp_path}/ckpt.previous.pt")["step"] == 4
    succeeded(cli(sample, f"--ckpt={tmp_path}/ckpt.previous.pt --n=1"))
    raw = bytearray((tmp_path / "ckpt.pt").read_bytes())
    with zipfile.ZipFile(tmp_path / "ckpt.pt") as archive:
        tensor = max(archive.infolist(), key=lambda entry: entry.file_size)
    raw[tensor.header_offset + tensor.file_size // 2 + 200] ^= 16
    (tmp_path / "ckpt.pt").write_bytes(raw)
    refused(cli(sample, f"--ckpt={tmp_path} --n=1"), "ckpt.pt", "checksum", "ckpt.previous.pt")


@pytest.mark.parametrize("damage", [
    b"", b"\0" * 400, b'{"step": 3, "lo', b"[1, 2]\n", b"\xff\xfe\n", b'"text"\n', b"[" * 5000 + b"\n"])
def test_a_damaged_log_does_not_stop_a_resume(in_maze_runs, cli, tmp_path, damage):
    """What is whole of it stays."""
    shutil.copytree("out/maze-mdlm", tmp_path / "m")
    ckpt = torch.load(tmp_path / "m/ckpt.pt", weights_only=True)
    ckpt["args"] |= dict(schedule="constant")
    torch.save(ckpt, tmp_path / "m/ckpt.pt")
    whole = (tmp_path / "m/log.jsonl").read_bytes()
    (tmp_path / "m/log.jsonl").write_bytes(damage + (b"\n" if damage else b"") + whole)
    flags = f"--model=mdlm --data=maze --steps=7 --save_every=3 {TINY} --schedule=constant --out={tmp_path}/m"
    succeeded(cli(train, flags))
    lines = (tmp_path / "m/log.jsonl").read_bytes()
    assert lines.startswith(whole) and jsonl(tmp_path / "m/log.jsonl")[-1]["step"] == 7


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["ar", "plain", "gumbel", "blocks", "heads"])
def test_weights_that_are_not_finite_are_refused(in_medusa_runs, block_runs, cli, tmp_path, name, value):
    ckpt = torch.load(f"out/{name}/ckpt.pt", weights_only=True)
    for state in (ckpt["ema"], ckpt["model"]):
        list(state.values())[-1].view(-1)[-1] = value
    torch.save(ckpt, tmp_path / "ckpt.pt")
    refused(cli(sample, f"--ckpt={tmp_path} --n=1"), str(tmp_path), "finite")
    if name == "ar":
        refused(cli(train, f"--gumbel --teacher={tmp_path} {TEXT} --steps=1 --out={tmp_path}/x"), "finite")
        refused(cli(evaluate, f"genppl --judge={tmp_path} --ckpt out/plain"), "finite")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_results_reach_the_disk_and_any_terminal(in_text_runs, tmp_path, encoding):
    """A table has a τ, which these terminals have not."""
    command = [sys.executable, f"{HERE}/evaluate.py", "genppl", "--judge=out/ar", "--ckpt", "out/gumbel", "--n=4",
               "--nfe=2", f"--json={tmp_path}/x.json", f"--samples={tmp_path}"]
    done = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONIOENCODING": encoding})
    assert done.returncode == 0 and b"GenPPL" in done.stdout and b"Traceback" not in done.stderr
    assert len(json.loads((tmp_path / "x.json").read_text())["rows"]) == 1


def test_a_closed_pipe_is_one_sentence_and_loses_no_result(in_text_runs, tmp_path):
    """As in `evaluate.py ... | head -0`."""
    command = [sys.executable, f"{HERE}/evaluate.py", "genppl", "--judge=out/ar", "--ckpt", "out/plain", "--n=4",
               "--nfe=2", f"--json={tmp_path}/x.json", f"--samples={tmp_path}"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    run.stdout.close()
    err = run.stderr.read().decode()
    assert run.wait() == 2 and "Traceback" not in err and err.count("error:") == 1 and "closed" in err
    assert len(json.loads((tmp_path / "x.json").read_text())["rows"]) == 1


@pytest.mark.parametrize("name,value", [("WORLD_SIZE", "abc"), ("WORLD_SIZE", "8"), ("RANK", "-1"), ("WORLD_SIZE", "")])
def test_a_wrong_environment_is_one_sentence(in_maze_runs, cli, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    refused(cli(train, f"--model=mdlm --data=maze {NEW}"), name)


def test_lack_of_memory_names_the_flags_that_were_given(in_maze_runs, cli, monkeypatch):
    def full(*args):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 10 bytes")
    for failure in (full, lambda *args: bytearray(1 << 60)):
        monkeypatch.setattr(train, "train", failure)
        refused(cli(train, f"--model=mdlm --data=maze --batch_size=64 --length=11 {NEW}"), "--batch_size", "--length")


@pytest.fixture
def bad_loss(monkeypatch):
    """bad_loss(calls): MDLM's loss is nan in the calls of these numbers in training, counted from 0."""
    def install(calls):
        loss = MDLM.forward
        numbers = itertools.count()

        def sometimes_nan(self, *args, **kw):
            value, parts = loss(self, *args, **kw)
            if self.training and next(numbers) in calls:
                value = value * math.nan
            return value, parts
        monkeypatch.setattr(MDLM, "forward", sometimes_nan)
    return install


def same_state(a, b):
    """Whether the checkpoints of two runs hold the same weights, averages, moments and step."""
    a, b = (torch.load(f"{out}/ckpt.pt", weights_only=True) for out in (a, b))
    moments = [ckpt["optimizer"]["state"] for ckpt in (a, b)]
    pairs = [(a[key][name], b[key][name]) for key in ("model", "ema") for name in a[key]]
    pairs += [(moments[0][i][name], moments[1][i][name]) for i in moments[0] for name in moments[0][i]]
    return a["step"] == b["step"] and all(torch.equal(x, y) for x, y in pairs)


NAN_RUN = f"--model=mdlm --data=maze --schedule=constant {TINY}"


@pytest.mark.parametrize("steps,bad,good", [(100, range(6, 100), 6), (9, range(6, 9), 6), (9, range(9), 0)])
def test_a_run_that_ends_in_bad_steps_keeps_what_was_before(in_maze_runs, cli, bad_loss, tmp_path, steps, bad, good):
    """Twenty in a row, or the last ones: exit code 1, the step is named, nothing of them is saved."""
    succeeded(cli(train, f"{NAN_RUN} --steps={max(good, 1)} --out={tmp_path}/before"))
    bad_loss(bad)
    code, _, err = cli(train, f"{NAN_RUN} --steps={steps} --save_every=1 --out={tmp_path}/nan")
    assert code == 1 and f"step {good} " in err.splitlines()[-1] and "--init_from" in err.splitlines()[-1]
    assert err.count("step skipped") == min(20, steps - good)
    if good:
        assert same_state(f"{tmp_path}/nan", f"{tmp_path}/before")
    assert torch.load(tmp_path / "nan/ckpt.pt", weights_only=True)["step"] == good


def test_bad_steps_are_tried_again_and_their_way_out_works(in_maze_runs, cli, bad_loss, tmp_path):
    """The same command, with the loss as it should be: the result of a run that was never bad."""
    succeeded(cli(train, f"{NAN_RUN} --steps=8 --out={tmp_path}/good"))
    with pytest.MonkeyPatch.context() as m:
        m.setattr(MDLM, "forward", MDLM.forward)
        bad_loss(range(5, 8))
        assert cli(train, f"{NAN_RUN} --steps=8 --out={tmp_path}/nan")[0] == 1
    succeeded(cli(train, f"{NAN_RUN} --init_from={tmp_path}/nan --out={tmp_path}/new --lr=1e-4 --steps=2"))
    with pytest.MonkeyPatch.context() as m:
        m.setattr(MDLM, "forward", MDLM.loss)
        succeeded(cli(train, f"{NAN_RUN} --steps=8 --out={tmp_path}/nan"))
    assert same_state(f"{tmp_path}/nan", f"{tmp_path}/good")
    assert [line["step"] for line in jsonl(tmp_path / "nan/log.jsonl") if "loss" in line] == list(range(1, 9))


def test_single_bad_steps_are_skipped_and_counted(in_maze_runs, cli, bad_loss, tmp_path):
    """A bad step changes no weights: SIGTERM in a streak saves the state at its first step."""
    bad_loss([2, 4])
    _, err = succeeded(cli(train, f"{NAN_RUN} --steps=6 --out={tmp_path}/nan"))
    assert "2 steps were skipped" in err.splitlines()[-1]
    lines = [line for line in jsonl(tmp_path / "nan/log.jsonl") if "loss" in line]
    assert [line["skipped"] for line in lines] == [False, False, True, False, True, False]
    assert lines[-1]["bad_steps"] == 2 and lines[2]["loss"] is None


def test_sigterm_among_bad_steps_saves_the_state_before_them(in_maze_runs, cli, bad_loss, monkeypatch, tmp_path):
    succeeded(cli(train, f"{NAN_RUN} --steps=3 --out={tmp_path}/before"))
    bad_loss(range(3, 100))
    record = train.Log.record

    def terminate(self, **line):
        if line.get("step") == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        record(self, **line)
    monkeypatch.setattr(train.Log, "record", terminate)
    assert cli(train, f"{NAN_RUN} --steps=50 --out={tmp_path}/nan")[0] == 143
    assert same_state(f"{tmp_path}/nan", f"{tmp_path}/before")


def test_a_continued_run_frees_its_checkpoint(in_text_runs, cli, monkeypatch, tmp_path):
    """Of what was read nothing is referenced any more in training: a copy of all weights in each process."""
    succeeded(cli(train, f"{TEXT} --steps=2 --out={tmp_path}"))
    read = []
    load = torch.load

    def spy(*args, **kw):
        ckpt = load(*args, **kw)
        read.extend(weakref.ref(w) for w in ckpt["model"].values())
        return ckpt
    monkeypatch.setattr(torch, "load", spy)
    left = []
    forward = MDLM.forward

    def count(self, *args, **kw):
        gc.collect()
        left.append(sum(ref() is not None for ref in read))
        return forward(self, *args, **kw)
    monkeypatch.setattr(MDLM, "forward", count)
    succeeded(cli(train, f"{TEXT} --steps=3 --out={tmp_path}"))
    assert len(read) > 5 and left == [0]


def test_checkpoints_by_steps_or_minutes_whichever_is_first(in_text_runs, cli, monkeypatch, tmp_path):
    """--save_minutes may differ when a run is continued; the log says what memory and waiting for data took."""
    saved = []
    save = data.run.save
    monkeypatch.setattr(data.run, "save", lambda *args, **kw: saved.append(kw["step"]) or save(*args, **kw))
    clock = itertools.count()
    monkeypatch.setattr(train.Log, "save_is_due", lambda self: next(clock) % 4 == 2)
    # (TEXT brings --save_every=2: the last one counts)
    succeeded(cli(train, f"{TEXT} --save_every=5 --save_minutes=1 --steps=8 --out={tmp_path}"))
    assert saved == [3, 5, 7, 8]
    for line in jsonl(tmp_path / "log.jsonl")[1:]:
        if "loss" in line:
            assert 0 <= line["peak_gb"] < 64 and 0 <= line["data_wait_s"] < 60 and line["bad_steps"] == 0
    succeeded(cli(train, f"{TEXT} --save_every=5 --save_minutes=3 --steps=9 --out={tmp_path}"))
    monkeypatch.undo()
    log = SimpleNamespace(saved=time.time() - 61, save_seconds=60)
    assert train.Log.save_is_due(log) and not train.Log.save_is_due(SimpleNamespace(saved=time.time(), save_seconds=60))


def test_a_board_goes_on_where_its_run_is_continued(in_text_runs, cli, monkeypatch, tmp_path):
    started = []

    class Board:
        def __init__(self, id):
            self.id = id or f"board{len(started)}"

        def log(self, line, step):
            pass

        def finish(self):
            pass

    def init(**kw):
        started.append(kw["id"])
        assert kw["resume"] == "allow"
        return Board(kw["id"])
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for steps in (2, 4):
        succeeded(cli(train, f"{TEXT} --wandb=x --steps={steps} --out={tmp_path}"))
    os.remove(tmp_path / "ckpt.pt")
    succeeded(cli(train, f"{TEXT} --wandb=x --steps=2 --out={tmp_path}"))
    assert started == [None, "board1", None]


@pytest.mark.parametrize("flags,gb,length,share,rows", [
    ("--model=mdlm --gumbel", 80, 1024, 64, 32), ("--model=mdlm --gumbel", 24, 1024, 64, 16),
    ("--model=mdlm --gumbel", 80, 1024, 48, 24), ("--model=bd3lm --gumbel", 80, 1024, 64, 32),
    ("--model=bd3lm --gumbel", 24, 1024, 64, 8), ("--model=mdlm", 80, 128, 64, 64),
    ("--model=medusa --gumbel", 24, 1024, 32, 32), ("--model=mdlm", 80, 11, 128, 128),
    ("--model=mdlm --size=medium", 24, 1024, 64, 4), ("--model=mdlm --size=medium", 8, 1024, 64, 1)])
def test_a_micro_batch_goes_by_tokens_and_memory(monkeypatch, flags, gb, length, share, rows):
    """The default on a GPU, of a `share` of the batch: `bench plan` says that these fit."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(total_memory=gb * 1e9))
    args = train.parse(flags.split())
    assert data.run.rows_that_fit(args, length, 50257, share) == rows


def test_lack_of_a_gpus_memory_names_the_micro_batch_and_the_plan(in_maze_runs, cli, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.07 GiB")
    monkeypatch.setattr(train, "train", full)
    refused(cli(train, f"--model=mdlm --data=maze --batch_size=64 {NEW}"), "--micro_batch_size", "extra.bench plan")


@pytest.mark.parametrize("command,calls", [
    ("--model=mdlm --data=maze --steps=1 --report=0", 0), ("--ckpt=out/maze-mdlm --n=1", 1),
    ("maze --ckpt out/maze-mdlm --n=2 --nfe=1", 1)])
def test_samplers_keep_off_cudnns_attention(in_maze_runs, cli, monkeypatch, tmp_path, command, calls):
    """Its plans are made anew for every length of a cache; training, whose shapes stay, may use it."""
    seen = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", seen.append)
    if command.startswith("--model"):
        command += f" --out={tmp_path}"
    module = {"--model": train, "--ckpt": sample, "maze": evaluate}[re.split("[= ]", command)[0]]
    succeeded(cli(module, command))
    assert seen == [False] * calls


def test_frozen_bodies_are_cast_once_for_bf16(in_text_runs, cli, monkeypatch):
    """Student, judge and teacher: the same numbers as with a cast at each call, and none in float32."""
    cast = []
    monkeypatch.setattr(sample, "body_to_bfloat16", cast.append)
    outputs = []
    for function in (cast.append, data.run.body_to_bfloat16):
        cast.clear()
        monkeypatch.setattr(sample, "body_to_bfloat16", lambda m: cast.append(m) or function(m))
        outputs.append(succeeded(cli(evaluate, "ppl --ckpt out/gumbel --n=8 --dtype=bfloat16"))[0])
        assert len({id(m) for m in cast}) == 2             # the student and its teacher
    assert re.sub(r"\|[^|]*\|$", "", outputs[0], flags=re.M) == re.sub(r"\|[^|]*\|$", "", outputs[1], flags=re.M)
    cast.clear()
    succeeded(cli(evaluate, "ppl --ckpt out/gumbel --n=8 --dtype=float32"))
    assert not cast


@pytest.mark.parametrize("flags,words", [
    ("--model=mdlm --gumbel", ["18 GB", "prepare.py openwebtext", "gpt2-large, 3.2 GB", "sample.py --ckpt=gpt2-large"]),
    ("--model=medusa --data=lm1b", ["prepare.py lm1b", "gpt2, 0.5 GB"]),
    ("--model=mdlm --gumbel --teacher=out/mine", ["prepare.py openwebtext", "out/mine"])])
def test_what_a_run_of_the_paper_lacks_is_said_at_once(cli, monkeypatch, tmp_path, flags, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GUMBEL_CACHE", str(tmp_path))
    refused(cli(train, flags), *words)
    for name in ("gpt2", "gpt2-large"):                    # with the teacher there, only the data are missing
        save_gpt2(tmp_path / name)
    _, _, err = cli(train, flags)
    assert words[0] in err and "sample.py" not in err
    assert "teacher" not in cli(train, "--model=mdlm")[2]  # which reads none


def test_averaged_weights_are_their_recursion_and_hold_no_graph(in_maze_runs, monkeypatch):
    """After n updates, with decay d = (1 + n) / (10 + n) at first: average = d average + (1 - d) weights."""
    seen = []
    averages = []
    save = data.run.save
    deepcopy = copy.deepcopy

    def spy(args, model, averaged, *more, **kw):
        seen.append(deepcopy({"model": model.state_dict(), "ema": averaged.state_dict()}))
        save(args, model, averaged, *more, **kw)

    def keep(copied, *args):
        copied = deepcopy(copied, *args)
        if isinstance(copied, MDLM):
            averages.append(copied)
        return copied
    monkeypatch.setattr(data.run, "save", spy)
    monkeypatch.setattr(train.copy, "deepcopy", keep)
    args = train.parse(f"--model=mdlm --data=maze --out=out/ema --steps=5 --save_every=1 {TINY}".split())
    train.train(args, train.World("float32"))
    assert not any(p.requires_grad for p in averages[0].parameters())
    assert len(averages) == 1 and len(seen) == 5
    for n, (before, after) in enumerate(zip(seen, seen[1:]), start=1):
        d = (1 + n) / (10 + n)
        for name, average in before["ema"].items():
            want = d * average + (1 - d) * after["model"][name]
            assert torch.allclose(after["ema"][name], want, atol=1e-6), name


# --- what is trained, and continued

def trained_and_continued(cli, flags, out, steps=4):
    """Train so many steps, then two more of the same command -> (stderr of the first run, the log after it)."""
    _, err = succeeded(cli(train, f"{flags} --steps={steps} --out={out}"))
    log = jsonl(f"{out}/log.jsonl")
    _, err_of_second = succeeded(cli(train, f"{flags} --steps={steps + 2} --out={out}"))
    assert f"continuing at step {steps}" in err_of_second
    assert sample.load_checkpoint(str(out))["step"] == steps + 2
    return err, log


@pytest.fixture
def gpt2_folder(tmp_path, monkeypatch):
    """A folder, the current one, with data/ids, shards of 300 ids, and a GPT-2 of this vocabulary, rows of 64."""
    monkeypatch.chdir(tmp_path)
    writer = Writer("data/ids", dict(name="ids", tokenizer="ids", row_length=None, vocab_size=300, bos=299,
                                     predict_bos=True))
    for split in ("train", "val"):
        writer.write(split, np.random.default_rng(0).integers(0, 299, 2000))
    writer.finish()
    save_gpt2("gpt2", V=300, L=64)
    return f"--model=medusa --gumbel --data=ids --steps=2 {HEADS}"


@pytest.mark.parametrize("flags,validation,shift", [
    (f"{TEXT} --kd=token --teacher=out/ar", "val_nelbo", False),
    pytest.param(f"{TEXT} --init_from=out/ar", "val_nelbo", True, marks=slow),
    (f"{TEXT} {NOISY} --init_from=out/ar", "val_nll_given_noise", True),
    pytest.param(f"{TEXT} {NOISY} --init_from=out/plain", "val_nll_given_noise", False, marks=slow),
    (BLOCKS, "val_nelbo", False),
    pytest.param(f"{BLOCKS} --init_from=out/plain --block_size=8", "val_nelbo", False, marks=slow),
    (f"{BLOCKS} --init_from=out/gumbel", "val_nelbo", False),
    pytest.param(f"{BLOCKS} {NOISY} --init_from=out/plain --block_size=1", "val_nll_given_noise", False, marks=slow),
    (f"{BLOCKS} {NOISY} --init_from=out/gumbel --clip=0.6,1", "val_nll_given_noise", False),
    (f"{BLOCKS} --init_from=out/ar --kd=token --teacher=out/ar --block_size=24", "val_nelbo", True)])
def test_students_train_by_kd_and_from_other_weights(in_text_runs, cli, tmp_path, flags, validation, shift):
    """From scratch, from an MDLM with and without noise, from an AR model; then continued."""
    err, log = trained_and_continued(cli, flags, tmp_path)
    assert any(validation in line for line in log)
    assert ("kl_masked" in log[1]) == ("--kd" in flags)
    assert sample.load_checkpoint(str(tmp_path))["config"]["shift"] == shift
    assert "has block size" not in err


def test_run_from_before_a_flag_existed_continues_without_it(in_text_runs, cli, tmp_path):
    """And is refused with it."""
    shutil.copy("out/plain/ckpt.pt", tmp_path)
    ckpt = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    for name in ("clip_search", "block_size", "kd"):
        del ckpt["args"][name]
    torch.save(ckpt, tmp_path / "ckpt.pt")
    _, err = succeeded(cli(train, f"{TEXT} --steps=7 --out={tmp_path}"))
    assert "continuing at step 6" in err
    refused(cli(train, f"{TEXT} --kd=token --teacher=out/ar --steps=9 --out={tmp_path}"), "--kd", "None", "token")


def test_clip_search_logs_all_windows_and_trains_in_the_best(in_block_runs, cli, tmp_path):
    """At first, and after each validation; from blocks of another size, which is said."""
    flags = f"{BLOCKS} --init_from=out/blocks --block_size=8 --clip_search --eval_rows=8"
    err, log = trained_and_continued(cli, flags, tmp_path)
    assert "has block size 4, this run 8" in err
    first, second = [line for line in log if "clip_search" in line]
    assert (first["step"], second["step"]) == (0, 4)
    assert len(first["clip_search"]) == len(bd3lm.clip_windows(8))
    best = min(second["clip_search"], key=second["clip_search"].get)
    assert second["clip"] == [float(level) for level in best.split(",")]
    assert second["clip"] == list(sample.load_checkpoint(str(tmp_path))["clip"])


def test_both_weights_start_from_the_sources_averaged_ones(in_text_runs, cli, tmp_path):
    """Raw and EMA, after a step that is too small to see."""
    succeeded(cli(train, f"{BLOCKS} --block_size=8 --init_from=out/plain --lr=1e-12 --steps=1 --out={tmp_path}"))
    source = sample.load_model("out/plain").transformer.embed.weight
    for weights in ("raw", "ema"):
        started = sample.load_model(str(tmp_path), weights).transformer.embed.weight
        assert torch.allclose(started, source, atol=1e-6)


def test_blocks_on_the_maze_find_the_teacher_of_their_length(in_maze_runs, cli, tmp_path):
    """Rows of 12, one more PAD, divide into blocks of 4; success is the same notion, of every row of the table."""
    succeeded(cli(train, f"--model=ar --data=maze --length=12 --steps=2 --out=out/maze-ar-12 {TINY}"))
    _, err = succeeded(cli(train, f"--model=bd3lm --gumbel --data=maze --steps=4 {TINY}"))
    assert "training it first" not in err
    models = "out/maze-ar-12 out/maze-bd3lm-gumbel"
    rows, _, _ = evaluated(cli, f"maze --ckpt {models} --n=50 --nfe=1,6,12", tmp_path / "m.json")
    assert [row["nfe"] for row in rows if "bd3lm" in row["model"]] == [3, 6, 12] * 2    # 3 blocks: at least 3 calls
    out, _ = succeeded(cli(evaluate, "nfe --ckpt out/maze-mdlm out/maze-bd3lm-gumbel --n=50 --nfe=1,6"))
    assert "| NFE 1 | NFE 3 | NFE 6 |" in out
    assert out.splitlines()[4].count("±") == 2             # the blocks' line has no NFE 1


def test_more_padding_leaves_a_path_valid():
    more_pad = np.pad(maze_paths(), ((0, 0), (0, 1)), constant_values=PAD)
    one_move_more = np.pad(maze_paths(), ((0, 0), (0, 1)), constant_values=0)
    assert maze_valid(more_pad).all()
    assert not maze_valid(one_move_more).any()


@pytest.mark.parametrize("flags,heads,validation", [
    ("", 3, "val_nll_heads"), pytest.param("--noise=unpaired", 3, "val_nll_heads", marks=slow),
    ("--gumbel --heads=2", 2, "val_nll_heads_given_noise")])
def test_heads_train_and_continue_bit_for_bit(in_text_runs, cli, tmp_path, flags, heads, validation):
    """Interrupted and continued they are those of a run left alone; the checkpoint has nothing of the backbone."""
    _, log = trained_and_continued(cli, f"{MEDUSA} {flags}", tmp_path / "heads")
    assert validation in log[-1]
    assert {"nll_head1", "nll_head2"} <= set(log[1])
    succeeded(cli(train, f"{MEDUSA} {flags} --steps=6 --out={tmp_path}/alone"))
    assert same_checkpoints(tmp_path / "heads/ckpt.pt", tmp_path / "alone/ckpt.pt")
    ckpt = sample.load_checkpoint(str(tmp_path / "heads"))
    assert ckpt["config"]["backbone"] == "out/ar" and ckpt["args"]["heads"] == heads
    reads_noise = {"noise_embed", "accumulator"} if flags else set()
    assert {name.split(".")[0] for name in ckpt["model"]} == {"heads"} | reads_noise


def test_heads_start_from_heads_of_the_same_backbone(in_medusa_runs, cli, tmp_path):
    succeeded(cli(train, f"{MEDUSA} --gumbel --steps=2 --out={tmp_path} --init_from=out/heads"))


def test_heads_of_a_backbone_that_has_changed_or_gone_are_refused(in_medusa_runs, cli, tmp_path):
    """Other weights under the same name, as if it was trained on; in sample.py, and where training would continue."""
    backbone = tmp_path / "ar"
    shutil.copytree("out/ar", backbone)
    flags = f"{MEDUSA.replace('out/ar', str(backbone))} --out={tmp_path}/heads"
    sampling = f"--ckpt={tmp_path}/heads --n=1"
    succeeded(cli(train, f"{flags} --steps=2"))
    succeeded(cli(sample, sampling))
    ckpt = torch.load(backbone / "ckpt.pt", weights_only=True)
    for state in (ckpt["ema"], ckpt["model"]):
        state["transformer.head.bias"][3] += 1
    torch.save(ckpt, backbone / "ckpt.pt")
    sample.load_backbone.cache_clear()
    refused(cli(sample, sampling), f"{tmp_path}/heads", str(backbone))
    refused(cli(train, f"{flags} --steps=4"), f"{tmp_path}/heads", str(backbone), "--out")
    shutil.rmtree(backbone)
    sample.load_backbone.cache_clear()
    refused(cli(sample, sampling), f"{tmp_path}/heads", str(backbone))


def test_heads_on_the_mazes_own_teacher_end_with_their_table(in_maze_runs, cli, tmp_path):
    """It is found; the enumerated row of perfect heads without noise stands below: head 1, 0.459."""
    out, err = succeeded(cli(train, f"--model=medusa --gumbel --data=maze --steps=3 {HEADS} --report=20 "
                                    f"--out={tmp_path}/m"))
    assert "training it first" not in err
    assert [line.split(" | ")[:2] for line in out.splitlines()[2:5]] == [
        ["| m", "typical"], ["| m", "exact"], ["| theory", "exact"]]
    assert "| theory | exact | 0.459" in out


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=slow)])
def test_heads_train_on_gpt2(gpt2_folder, cli, dtype):
    succeeded(cli(train, f"{gpt2_folder} --teacher=gpt2 --length=32 --dtype={dtype} --out=out/heads"))
    out, _ = succeeded(cli(evaluate, f"acceptance --ckpt out/heads --n=4 --dtype={dtype}"))
    assert "backbone alone" in out


def test_heads_refuse_rows_that_do_not_fit_gpt2(gpt2_folder, runs, cli):
    for flags, names in (("--teacher=./gpt2 --length=128", "--teacher=./gpt2 --length=64"),
                         (f"--teacher={runs}/out/maze-ar --length=10", "--teacher 6 300"),
                         ("--teacher=./gpt2 --length=4", "'medusa' 4 3")):
        refused(cli(train, f"{gpt2_folder} {flags} --out=out/x"), *names.split())


@slow
def test_gpt2_large_is_the_default_teacher(tmp_path, cli, monkeypatch):
    """Shards of GPT-2 ids and no --teacher: gpt2-large, whatever it is that downloads it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GUMBEL_CACHE", str(tmp_path / "cache"))
    os.makedirs("data/owt")
    ids = np.random.default_rng(0).integers(0, 50257, 4000).astype("<u2")
    for split in ("train", "val"):
        ids.tofile(f"data/owt/{split}.bin")
    save_gpt2(tmp_path / "cache" / "gpt2-large", V=50257, L=64)
    flags = f"--gumbel --data=owt --steps=2 {TINY} --eval_rows=8 --batch_size=4"
    for dtype in ("float32", "bfloat16"):
        succeeded(cli(train, f"{flags} --length=32 --dtype={dtype} --out=out/{dtype}"))
    refused(cli(train, f"{flags} --length=128 --out=out/x"), "gpt2-large", "64", "--length=64")
    model = sample.load_model(str(tmp_path / "cache" / "gpt2-large"))
    assert (model.meta["tokenizer"], model.vocab_size) == ("gpt2", 50257)
    offline(monkeypatch, tmp_path / "elsewhere")
    refused(cli(train, f"{flags} --length=32 --out=out/x"), "gpt2-large", "offline")


# --- a student of one's own: registered in the table of models, it goes through the commands

class FromTheLeft(MDLM):
    """It masks the first tokens of a row, as many as t says, and reveals the last one first."""

    def noised(self, tokens, t, generator=None):
        n = (self.per_token(t, tokens) * (tokens.shape[1] - 1)).ceil()
        position = torch.arange(tokens.shape[1], device=tokens.device)
        return torch.where((position >= 1) & (position <= n), self.mask_id, tokens)

    def reveal_steps(self, masked, steps, *args):
        rank = masked.flip(1).cumsum(1).flip(1) * masked                       # 1 for the last [MASK] of a row
        n = masked.sum(1, keepdim=True)
        return ((rank - 1) * n.clamp(max=steps) // n.clamp(min=1) + 1) * masked


@pytest.fixture
def from_the_left(runs, monkeypatch, cli):
    """Its flags and its run, trained for four steps."""
    monkeypatch.chdir(runs)
    monkeypatch.setitem(sample.MODELS, "from_the_left", FromTheLeft)
    flags = f"--model=from_the_left --gumbel --data=maze --schedule=constant {TINY}"
    succeeded(cli(train, f"{flags} --steps=4 --out=out/left"))
    yield flags
    shutil.rmtree(runs / "out/left")


def test_a_student_of_ones_own_trains_and_continues(from_the_left, cli):
    _, err = succeeded(cli(train, f"{from_the_left} --steps=6 --out=out/left"))
    assert "continuing at step 4" in err
    log = jsonl("out/left/log.jsonl")
    assert [line["step"] for line in log if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert "val_nll_given_noise" in log[-1]
    model = sample.load_model("out/left")
    assert type(model) is FromTheLeft and model.args["model"] == "from_the_left"
    z = model.noised(torch.zeros(2, 11, dtype=torch.long), torch.tensor([0.3, 1.0]))
    assert (z == 6).sum(1).tolist() == [3, 10] and (z[0, 1:4] == 6).all()


def test_a_student_of_ones_own_reveals_as_it_says(from_the_left, cli, monkeypatch):
    """The last places are gone first."""
    seen = []
    hidden = MDLM.hidden
    monkeypatch.setattr(FromTheLeft, "hidden", lambda self, z, *a, **kw: seen.append(z) or hidden(self, z, *a, **kw))
    out, _ = succeeded(cli(sample, "--ckpt=out/left --n=3 --steps=5 --greedy --prompt=D"))
    assert out.count("nfe 5") == 3
    masked = [(z[0] == 6).nonzero().flatten().tolist() for z in seen]
    assert len(masked) == 5
    assert all(places == list(range(2, 2 + len(places))) for places in masked)


def test_a_student_of_ones_own_is_evaluated(from_the_left, cli):
    out, _ = succeeded(cli(evaluate, "maze --ckpt out/maze-ar out/left --n=20 --nfe=1,4"))
    assert "| left | greedy | 4 |" in out
    out, _ = succeeded(cli(evaluate, "ppl --ckpt out/left --n=20"))
    assert "nll_given_noise" in out


# ---------------------------------------------------------------------------------------------------------------------
# sample.py

def test_samples_continue_the_prompt(in_maze_runs, cli, tmp_path):
    """On the screen as a map, in the file as text, tokens and network calls; the same seed gives the same samples."""
    flags = "--ckpt=out/maze-mdlm-gumbel --n=3 --steps=2 --prompt=DD"
    out, _ = succeeded(cli(sample, f"{flags} --out={tmp_path / 's.jsonl'}"))
    assert out.count("--- sample") == 3 and "# S" in out
    rows = jsonl(tmp_path / "s.jsonl")
    assert len(rows) == 3
    for row in rows:
        assert row["text"].startswith("DD") and len(row["tokens"]) == 10 and row["nfe"] <= 2
    assert cli(sample, flags)[1] == out
    assert cli(sample, f"{flags} --seed=1")[1] != out


def test_samples_fill_in_the_masks(in_maze_runs, cli, tmp_path):
    succeeded(cli(sample, f"--ckpt=out/maze-mdlm --n=20 --infill=DD[MASK]R --out={tmp_path / 'i.jsonl'}"))
    rows = jsonl(tmp_path / "i.jsonl")
    assert len(rows) == 20
    assert all(row["text"][:2] + row["text"][3] == "DDR" for row in rows)


def test_samples_of_other_samplers_and_models(in_maze_runs, cli):
    """ReMDM; an AR model, of the file itself and its raw weights: one call a token."""
    flags = "--ckpt=out/maze-mdlm-gumbel --n=3 --steps=8 --prompt=DD --sampler=remdm --remask=0.5"
    assert succeeded(cli(sample, flags))[0].count("DD") >= 3
    out, _ = succeeded(cli(sample, "--ckpt=out/maze-ar/ckpt.pt --n=2 --prompt=U --weights=raw"))
    assert out.count("nfe 9") == 2


@pytest.mark.parametrize("flags,found", [
    ("--ckpt=out/blocks --length=70 --steps=2 --n=3", "nfe"),                   # longer than its rows
    ("--ckpt=out/blocks-clip --length=30 --greedy --prompt=Some --stop_at_eos", "Some"),
    ("--ckpt=out/blocks-1 --infill=So[MASK][MASK]x --no_cache --sampler=first_hitting", "So")])
def test_samples_of_blocks(in_block_runs, cli, flags, found):
    assert found in succeeded(cli(sample, flags))[0]


def test_samples_of_heads(in_medusa_runs, cli, tmp_path):
    """Each of its own noise; every way to accept, with and without cache."""
    flags = f"--ckpt=out/heads-gumbel --n=3 --prompt=The --accept=exact --out={tmp_path}/a.jsonl"
    out, _ = succeeded(cli(sample, flags))
    assert "nfe" in out
    assert len({line for line in out.splitlines() if line.startswith("---")}) == 3
    assert all(row["text"].startswith("The") for row in jsonl(tmp_path / "a.jsonl"))
    for flags in ("--accept=typical --epsilon=0.5", "--greedy", "--greedy --no_cache"):
        succeeded(cli(sample, f"--ckpt=out/heads-gumbel --n=2 {flags}"))


def test_greedy_sample_of_heads_is_the_backbones(in_medusa_runs, cli):
    texts = [succeeded(cli(sample, f"--ckpt={path} --n=1 --greedy --prompt=The"))[0].split("\n", 1)[1]
             for path in ("out/ar", "out/heads")]
    assert texts[0] == texts[1] and texts[0].startswith("The")


@pytest.mark.parametrize("a,b,want", [
    (("hf:a", "1"), ("hf:b", "1"), "fine"),                 # one tokenizer under two paths
    (("hf:a", "1"), ("hf:b", "2"), "refused"),              # two of equal size
    (("hf:a", "1"), ("hf:a", "2"), "refused"),              # the path holds another one now
    (("hf:a", None), ("hf:b", "2"), "a warning"),           # from before fingerprints, and not to be had
    (("hf:a", None), ("hf:a", "2"), "fine"), (("ids", None), ("gpt2", "2"), "fine"),
    (("bytes", None), ("gpt2", None), "refused"),
    (("chars:ab", "1"), ("chars:ba", "2"), "refused")])     # other characters
def test_vocabularies_of_equal_size_are_told_apart(capsys, a, b, want):
    """By name and fingerprint of the tokenizer, as far as these are known."""
    metas = []
    for name, fingerprint in (a, b):
        metas.append(dict(tokenizer=name, vocab_size=10, bos=9))
        if fingerprint:
            metas[-1]["fingerprint"] = fingerprint
    model = argparse.Namespace(vocab_size=10, bos=9, meta=metas[0])
    if want == "refused":
        with pytest.raises(BadInput, match="--teacher=x"):
            sample.check_vocabulary("--teacher=x", model, metas[1])
    else:
        sample.check_vocabulary("--teacher=x", model, metas[1])
        assert ("--teacher=x" in capsys.readouterr().err) == (want == "a warning")


# --- --shards: a teacher's own text

SHARDS = "--ckpt=out/ar --n=50 --batch_size=8 --length=16"


@pytest.fixture(scope="session")
def written(text_runs):
    """A folder of shards that out/ar has written: 50 rows of 15 tokens, one of them for validation."""
    run_in(text_runs, (sample, f"{SHARDS} --shards=data/a"))
    return text_runs / "data/a"


def test_written_shards_are_the_teachers_own_text(written, cli, monkeypatch, tmp_path):
    """Batch 0 is its own generation from that seed, BOS left out; another seed writes other rows."""
    monkeypatch.chdir(written.parent.parent)
    rows = np.fromfile(written / "train.bin", dtype="<u2").reshape(-1, 15)
    assert len(rows) == 49 and len(np.unique(rows, axis=0)) == 49
    ar = sample.load_model("out/ar")
    first, _ = ar.generate(torch.full((8, 1), ar.bos), 16, generator=gen(sample.torch_seed(0, 0)))
    assert np.array_equal(first[1:, 1:].numpy(), rows[:7])
    succeeded(cli(sample, f"{SHARDS} --seed=1 --shards={tmp_path}/c"))
    other = np.fromfile(tmp_path / "c/train.bin", dtype="<u2").reshape(-1, 15)
    assert not np.array_equal(rows, other)


def test_interrupted_shards_continue_to_the_same_bytes(written, cli, monkeypatch, tmp_path):
    monkeypatch.chdir(written.parent.parent)
    with monkeypatch.context() as m:
        interrupt_after(m, 3)
        assert cli(sample, f"{SHARDS} --shards={tmp_path}/b")[0] == 130
    _, err = succeeded(cli(sample, f"{SHARDS} --shards={tmp_path}/b"))
    assert "continuing after 24" in err
    assert same_dataset(written, tmp_path / "b")


def test_students_train_on_written_shards(written, cli, monkeypatch, tmp_path):
    """With and without noise; rows are never cut again, so that another length is refused."""
    monkeypatch.chdir(written.parent.parent)
    meta, _ = read_meta(str(written))
    assert (meta["row_length"], meta["tokenizer"], meta["vocab_size"]) == (15, "bytes", 257)
    assert meta["fingerprint"] == read_meta("data/mine")[0]["fingerprint"]
    flags = f"--data=data/a --steps=2 {TINY}"
    succeeded(cli(train, f"{flags} --length=16 --out={tmp_path}/plain"))
    succeeded(cli(train, f"{flags} --length=16 {NOISY} --out={tmp_path}/noisy"))
    refused(cli(train, f"{flags} --length=12 --out={tmp_path}/x"), "--length=12", "--length=16")


# ---------------------------------------------------------------------------------------------------------------------
# evaluate.py maze

def test_maze_statistics_are_their_definitions():
    """success with its standard error, and the effective number: about that of equally likely paths, here 50."""
    rng = np.random.default_rng(0)
    rows = np.concatenate([maze_paths()[rng.integers(50, size=3000)], np.zeros((1000, 10), np.uint16)])
    s = maze_statistics(rows)
    assert s["success"] == 0.75 and s["distinct"] == 50
    assert abs(s["effective"] - 50) < 3
    assert abs(s["stderr"] - math.sqrt(0.75 * 0.25 / 4000)) < 1e-9
    all_wrong = maze_statistics(rows[-5:])
    assert all_wrong["success"] == 0 and all_wrong["effective"] is None


def test_maze_table_has_a_row_for_each_model_decoding_and_nfe(in_maze_runs, cli, tmp_path):
    """The teacher once, theory last; the map's agreement where one call turns all of the noise into a path."""
    models = ("maze-mdlm-gumbel", "maze-mdlm")
    rows, out, _ = evaluated(cli, "maze --ckpt out/maze-ar out/maze-mdlm-gumbel out/maze-mdlm --n=50 --nfe=1,4",
                             tmp_path / "m.json")
    assert out.startswith("| model | decode | NFE |")
    students = [(m, decode, k) for m in models for decode in ("sample", "greedy") for k in (1, 4)]
    assert [(row["model"], row["decode"], row["nfe"]) for row in rows] == [
        ("teacher", "sample", 10), *students, ("theory", "sample", 1), ("theory", "sample", 4)]
    for row in rows:
        assert 0 <= row["success"] <= 1 and row["nfe_counted"] <= row["nfe"]
        assert {"stderr", "distinct", "effective"} <= set(row)
    assert 0 < rows[0]["validity_mass"] < 1
    assert [row["model"] for row in rows if "agree" in row] == ["maze-mdlm-gumbel"]
    assert (rows[3]["decode"], rows[3]["nfe"]) == ("greedy", 1) and "agree" in rows[3]


def test_json_says_how_its_rows_were_made(in_maze_runs, cli, tmp_path):
    evaluated(cli, "maze --ckpt out/maze-mdlm --n=20 --nfe=1", tmp_path / "m.json")
    meta = json.loads((tmp_path / "m.json").read_text())["meta"]
    assert {"n", "seed", "seconds", "precision", "device", "git", "args"} <= set(meta)


# --- evaluate.py ppl (the bound itself: see the loss)

def test_ppl_of_an_ar_model_is_exp_of_its_loss(in_text_runs, cli, tmp_path):
    """On all validation rows. For a student with noise the teacher's nats are added, a plain one has its NELBO."""
    rows, _, _ = evaluated(cli, "ppl --ckpt out/ar out/gumbel out/plain --n=200 --dtype=float32", tmp_path / "p.json")
    ar, noisy, plain = rows
    data = Shards("data/mine", "val", 24)
    assert len(data) <= 200
    tokens = torch.from_numpy(data.rows(range(len(data))))
    want = sample.load_model("out/ar").loss(tokens)[0].item()
    assert abs(ar["nll"] - want) < 1e-4 and abs(ar["ppl"] - math.exp(want)) < 0.1
    assert noisy["kind"] == "nll_given_noise" and abs(noisy["teacher_nll"] - want) < 1e-4
    assert noisy["ppl_bound"] == noisy["ppl"] == pytest.approx(math.exp(noisy["nll"] + want))
    assert plain["kind"] == "nelbo" and plain["ppl"] == pytest.approx(math.exp(plain["nll"]))
    assert "ppl_bound" not in plain


def test_ppl_of_blocks_is_a_nelbo_or_given_noise(in_block_runs, cli, tmp_path):
    flags = "ppl --n=20 --ckpt out/blocks out/blocks-1 out/blocks-clip out/plain"
    rows, _, _ = evaluated(cli, flags, tmp_path / "p.json")
    assert [row["kind"] for row in rows] == ["nelbo", "nll_given_noise", "nll_given_noise", "nelbo"]


@pytest.mark.parametrize("name", ["ar", "plain", "gumbel"])
def test_ppl_does_not_depend_on_the_batches(in_text_runs, cli, tmp_path, name):
    """33 rows: a last batch of one is no batch to take an error from."""
    found = []
    for batch in (1, 7, 32, 33):
        (row,), _, _ = evaluated(cli, f"ppl --ckpt out/{name} --n=33 --batch_size={batch}", tmp_path / "p.json")
        found.append([row["nll"], row["nll_stderr"], row["ppl"]])
    assert np.allclose(found, found[0], rtol=1e-5)


def test_the_error_of_ppl_is_over_rows(in_text_runs, cli, tmp_path):
    """Of an AR model it is the standard error of the rows' means; of a bound, that of both terms together."""
    (row,), _, _ = evaluated(cli, "ppl --ckpt out/ar --n=25", tmp_path / "p.json")
    data = Shards("data/mine", "val", 24)
    x = torch.from_numpy(data.rows(np.random.default_rng(0).permutation(len(data))[:25]))
    ar = sample.load_model("out/ar")
    logp = ar.log_probs(x[:, :-1]).gather(-1, x[:, 1:, None]).squeeze(-1).double()
    of_rows = -logp.mean(1)
    assert abs(row["nll"] - of_rows.mean()) < 1e-5
    assert abs(row["nll_stderr"] - of_rows.std() / 5) < 1e-5
    (noisy,), _, _ = evaluated(cli, "ppl --ckpt out/gumbel --n=25", tmp_path / "p.json")
    assert abs(noisy["teacher_nll"] - row["nll"]) < 1e-5 and abs(noisy["ppl"] - noisy["ppl_bound"]) < 1e-9
    assert noisy["nll_stderr"] > 0 and abs(math.log(noisy["ppl"]) - noisy["nll"] - row["nll"]) < 1e-5


def test_two_seeds_of_ppl_agree(in_text_runs, cli, tmp_path):
    """Within four standard errors, as the table gives them."""
    tables = []
    for seed in range(2):
        flags = f"ppl --ckpt out/gumbel out/plain --n=300 --seed={seed}"
        tables.append(evaluated(cli, flags, tmp_path / "p.json")[0])
    for a, b in zip(*tables):
        assert 0 < abs(a["nll"] - b["nll"]) < 4 * math.hypot(a["nll_stderr"], b["nll_stderr"]), (a, b)
        assert {"seed", "git", "precision", "device", "seconds", "n"} <= set(a)


# --- evaluate.py genppl

def test_genppl_table_has_the_data_and_each_model(in_text_runs, cli, tmp_path):
    """Defaults on text: tau 0.85 for a student with noise, top_p 0.9."""
    rows, _, _ = evaluated(cli, "genppl --judge=out/ar --ckpt out/ar out/gumbel out/plain --n=20 --nfe=2,5 "
                           "--decode=sample,greedy --data=data/mine", tmp_path / "g.json")
    assert [row["model"] for row in rows] == ["data"] + ["ar"] * 2 + ["gumbel"] * 4 + ["plain"] * 4
    for row in rows:
        assert 1 < row["gen_ppl"] < 1e4
        assert 0 <= row["entropy"] <= row["entropy_set"] + 1e-9                 # entropy is concave
    assert all(row["nfe_counted"] <= row["nfe"] for row in rows[1:])
    # what has no effect is left empty: a nucleus where the likeliest is taken, a temperature where no noise is read
    assert [row["top_p"] for row in rows[1:]] == [0.9, None] + [0.9, 0.9, None, None] * 2
    assert [row["tau"] for row in rows[1:]] == [1.0, None] + [0.85] * 4 + [None] * 4


def test_genppl_of_apd_counts_the_verifiers_calls(in_text_runs, cli):
    out, _ = succeeded(cli(evaluate, "genppl --judge=out/ar --ckpt out/plain --n=9 --sampler=apd --verifier=out/ar"))
    assert "| verifier |" in out


def test_genppl_of_blocks_spreads_the_steps_over_them(in_block_runs, cli, tmp_path):
    """24 tokens in blocks of 4: at least 6 calls."""
    rows, _, _ = evaluated(cli, "genppl --n=4 --judge=out/ar --nfe=3,12,24 --ckpt out/blocks out/plain",
                           tmp_path / "g.json")
    assert [row["nfe"] for row in rows] == [6, 12, 24] + [3, 12, 24]
    assert all(row["nfe_counted"] <= row["nfe"] for row in rows)


def test_genppl_of_heads_is_the_backbones_where_greedy(in_medusa_runs, cli, tmp_path):
    rows, out, _ = evaluated(cli, "genppl --judge=out/ar --ckpt out/heads-gumbel out/ar --n=4 --decode=sample,greedy",
                             tmp_path / "g.json")
    assert "| heads-gumbel | sample | 23 |" in out and "typical acceptance, epsilon 0.09" in out
    sampled, greedy, backbone_sampled, backbone_greedy = [row["gen_ppl"] for row in rows]
    assert greedy == backbone_greedy
    assert sampled != greedy != backbone_sampled


# --- the samples behind a row: kept in a file, and used again

KEPT = "genppl --judge=out/ar --ckpt out/plain --n=6 --nfe=3"


@pytest.fixture
def kept(text_runs, cli, monkeypatch, tmp_path):
    """The table of KEPT, and the file of its samples, alone in the folder s."""
    monkeypatch.chdir(text_runs)
    table, _ = succeeded(cli(evaluate, f"{KEPT} --samples={tmp_path}/s"))
    (name,) = os.listdir(tmp_path / "s")
    return table, tmp_path / "s" / name


def test_kept_samples_give_the_same_table_without_a_network(kept, cli, monkeypatch):
    table, file = kept
    header, *samples = jsonl(file)
    assert header["settings"]["seed"] == 0 and len(samples) == 6
    assert {"text", "tokens", "nfe", "seconds"} <= set(samples[0])
    monkeypatch.setattr(evaluate, "generate", lambda *a, **kw: pytest.fail("drawn again"))
    assert cli(evaluate, f"{KEPT} --samples={file}")[1] == table


@pytest.mark.parametrize("other,names", [
    ("--nfe=3,4", "2 --nfe"), ("--decode=sample,greedy", "2 --decode"), ("--ckpt out/plain out/gumbel", "2 --ckpt"),
    ("--decode=greedy", "decode sample"), ("--nfe=4", "steps 3 4"), ("--n=7", "n 6 7"),
    ("--ckpt out/gumbel", "model plain gumbel"), ("--top_p=0.8", "top_p 0.9 0.8"),
    ("--samples=none.jsonl", "none.jsonl")])
def test_kept_samples_of_other_settings_are_refused(kept, cli, other, names):
    refused(cli(evaluate, f"{KEPT} --samples={kept[1]} {other}"), "--samples", *names.split())


def test_other_settings_have_another_file_of_samples(kept, cli):
    folder = kept[1].parent
    others = ("--seed=1", "--top_p=0.8", "--decode=greedy", "--weights=raw", "--nfe=4", "--length=20", "--n=7",
              "--sampler=remdm --remask=0.5")
    for other in ("", *others):                             # the same settings: the same file
        succeeded(cli(evaluate, f"{KEPT} --samples={folder} {other}"))
    assert len(os.listdir(folder)) == 1 + len(others)


def test_mask_that_a_sampler_leaves_is_an_error_and_leaves_no_samples(kept, cli, monkeypatch):
    folder = kept[1].parent
    generate = evaluate.generate
    monkeypatch.setattr(evaluate, "generate", lambda model, x, *a, **kw: (x, generate(model, x, *a, **kw)[1]))
    with pytest.raises(RuntimeError, match="MASK"):
        cli(evaluate, f"{KEPT} --samples={folder} --seed=2")
    assert len([name for name in os.listdir(folder) if name.endswith(".jsonl")]) == 1


# --- evaluate.py mauve (the measure itself: extra/test_extra.py)

def test_mauve_table_has_each_model_and_decoding(in_text_runs, cli, tmp_path):
    """Few samples: MAUVE is too high then, which is said."""
    rows, out, err = evaluated(cli, "mauve --judge=out/ar --ckpt out/plain out/gumbel --n=30 --nfe=3 "
                               "--decode=greedy,sample", tmp_path / "m.json")
    assert "1000" in err and "| MAUVE |" in out
    assert len(rows) == 4
    for row in rows:
        assert 0 < row["mauve"] <= 1 + 1e-9 and row["mauve_std"] >= 0 and row["entropy"] >= 0


# --- evaluate.py infill

INFILL = "infill --judge=out/ar --n=12 --masked=7"


def infill_problem():
    """The rows that it fills in, and which places of them are masked, [12, 23]: the 7 of the smallest draws."""
    rows = evaluate.validation_rows(Shards("data/mine", "val", 24), 12, 0)
    u = torch.rand(12, 23, generator=gen(sample.torch_seed(0, 1)))
    return torch.from_numpy(rows), u <= u.sort(1).values[:, 6:7]


def test_infill_changes_the_masked_tokens_alone(in_text_runs, cli, tmp_path):
    rows, _, _ = evaluated(cli, f"{INFILL} --nfe=3,7 --samples={tmp_path}/s --ckpt out/plain out/gumbel",
                           tmp_path / "i.json")
    assert [row["model"] for row in rows] == ["data"] + ["plain"] * 2 + ["gumbel"] * 2
    assert rows[0]["recovered"] == 1
    assert all(row["nfe_counted"] <= row["nfe"] and row["recovered"] < 0.9 for row in rows[1:])
    real, masked = infill_problem()
    changed = torch.zeros_like(masked)
    for file in os.listdir(tmp_path / "s"):
        _, *filled = jsonl(tmp_path / "s" / file)
        changed |= torch.tensor([line["tokens"] for line in filled]) != real[:, 1:]
    assert (changed.sum(1) >= 1).all()
    assert not (changed & ~masked).any() and (masked.sum(1) == 7).all()


def test_infill_scores_the_masked_tokens_alone(in_text_runs, cli, tmp_path):
    """The data's own row, by hand: exp of the judge's mean nats of the masked tokens, EOS left out."""
    rows, _, _ = evaluated(cli, f"{INFILL} --nfe=3 --ckpt out/plain", tmp_path / "i.json")
    x, masked = infill_problem()
    logp = sample.load_model("out/ar").log_probs(x[:, :-1]).gather(-1, x[:, 1:, None]).squeeze(-1)
    nll = -logp[masked & (x[:, 1:] != 256)].mean()
    assert abs(rows[0]["gen_ppl"] / math.exp(nll) - 1) < 1e-4


# --- evaluate.py nfe

def nfe_of_three_runs(monkeypatch, plot=None):
    """`evaluate.nfe` of two seeds of one recipe and of another run -> (its arguments, what it returns)."""
    names = ("a-s0", "a-s1", "a-s1-more")
    models = [argparse.Namespace(name=name, meta=dict(tokenizer="maze", name="maze"), drafts=False) for name in names]
    rows = [dict(model="teacher", decode="sample", nfe=10, success=0.98, stderr=0.005, n=100)]
    for model, success in zip(models, (0.2, 0.4, 0.6)):
        for k in (1, 2):
            rows.append(dict(model=model.name, decode="greedy", nfe=k, success=success + k / 10, stderr=0.01, n=100))
    rows.append(dict(model="data", success=1, stderr=0, n=100))
    monkeypatch.setattr(evaluate, "success_rows", lambda *a: rows)
    monkeypatch.setattr(evaluate, "sampling_note", lambda *a: "")
    args = argparse.Namespace(n=100, nfe=[1, 2], plot=plot, tau=None, top_p=None, sampler="ancestral", order="random",
                              drafts=1, weights="ema", seed=0, metric=None, json=None)
    return args, evaluate.nfe(args, models, "cpu")


def test_nfe_of_the_maze_has_a_column_for_each_nfe(in_maze_runs, cli, tmp_path):
    """Theory is of ten times the samples."""
    out, _ = succeeded(cli(evaluate, "nfe --ckpt out/maze-mdlm-gumbel --n=20 --nfe=1,2"))
    header, _, *lines = [line.strip("| ").split(" | ") for line in out.split("\n\n")[0].splitlines()]
    assert header[2:4] == ["NFE 1", "NFE 2"]
    samples = {line[0]: line[header.index("n")] for line in lines if line[1] == "sample"}
    assert samples == {"maze-mdlm-gumbel": "20", "theory": "200"}


def test_nfe_of_text_has_the_metric_that_is_asked_for(in_text_runs, cli, tmp_path):
    """An AR model and the data, which have no NFE to choose, beside it; the figure, where matplotlib is there."""
    figure = tmp_path / "p.png"
    plot = f"--plot={figure}" if importlib.util.find_spec("matplotlib") else ""
    flags = f"nfe --judge=out/ar --ckpt out/ar out/plain --data=data/mine --n=8 --nfe=2,4 {plot}"
    out, _ = succeeded(cli(evaluate, flags))
    assert "| GenPPL | decode | NFE 2 | NFE 4 | NFE 23 | entropy |" in out and "| data: " in out
    assert not plot or figure.stat().st_size > 5000
    flags = "nfe --judge=out/ar --ckpt out/plain --metric=mauve --n=20 --nfe=2 --decode=sample"
    assert "| MAUVE | decode | NFE 2 |" in succeeded(cli(evaluate, flags))[0]


def test_nfe_of_heads_is_a_line_of_its_own(in_medusa_runs, cli):
    out, _ = succeeded(cli(evaluate, "nfe --judge=out/ar --ckpt out/heads-gumbel --n=4 --decode=sample"))
    assert "| heads-gumbel | sample | " in out


def test_nfe_averages_over_seeds(monkeypatch, capsys):
    """Runs whose names differ in nothing but a seed at their end, NAME-s0, NAME-s1 .., are one line: of 30 and 50 per
    cent the mean is 40, the standard deviation 14.1."""
    args, table = nfe_of_three_runs(monkeypatch)
    report(args, *table)
    out = capsys.readouterr().out
    assert "| a-s0 and 1 other seed | greedy | 40.0 ± 14.1 | 50.0 ± 14.1 |" in out
    assert "| a-s1-more | greedy | 70.0 ± 1.0 |" in out
    assert "| teacher | sample |  |  | 98.0 ± 0.5 |" in out
    assert "| data: 100.0 ± 0.0 |" in out


def test_figure_of_nfe_needs_matplotlib(monkeypatch, tmp_path):
    with monkeypatch.context() as m:
        m.setitem(sys.modules, "matplotlib", None)          # as if it was not installed
        with pytest.raises(BadInput, match="--plot.*matplotlib"):
            nfe_of_three_runs(m, "p.svg")
    pytest.importorskip("matplotlib")
    nfe_of_three_runs(monkeypatch, str(tmp_path / "p.svg"))
    assert "</svg>" in (tmp_path / "p.svg").read_text()


# --- evaluate.py acceptance (what perfect heads reach: see Medusa)

def test_acceptance_of_each_head_and_way_to_accept(in_medusa_runs, cli, tmp_path):
    """24 tokens from prompts of 6: calls per token are of the 18 that are written. Exact and greedy acceptance give the
    backbone's own text."""
    rows, out, _ = evaluated(cli, "acceptance --ckpt out/heads-gumbel out/heads --n=6 --batch_size=4 "
                             "--accept=typical,exact,greedy", tmp_path / "a.json")
    assert "| heads-gumbel | typical |" in out and "speed-up" in out
    assert [row["accept"] for row in rows] == ["typical", "exact", "greedy"] * 2
    assert "head3" not in rows[0] and "head3" in rows[3]    # the first has two heads
    for row in rows:
        assert 1 <= row["accepted_length"] <= 4 and 0 <= row["head1"] <= 1 and row["n"] == 6
        assert row["agreement"] == 1 or row["accept"] == "typical"
        assert abs(row["calls_per_token"] * 18 - row["nfe_counted"]) < 1e-9 and row["nfe_counted"] <= 18
