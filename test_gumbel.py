"""The tests: every formula against theory, brute force or an independent implementation.

    python -m pytest -q test_gumbel.py            # -s also prints the two-token toy

Tests against the authors' tensors, and those that need GPT-2's BPE files, skip where these are absent: the folder is
taken from GUMBEL_SHARED, and is ../shared by default.
"""
import argparse
import copy
import functools
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
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")           # no test reaches a hub; read when its library is imported

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import bd3lm
import evaluate
import gumbel
import mdlm
import sample
import train
from bd3lm import BD3LM, clipped_mask, training_mask
from data import prepare
from data.batches import rows_of_step
from data.cli import BadInput, run_main
from data.maze import PAD, ExactDenoiser, maze_dataset, maze_keys, maze_paths, maze_valid
from data.report import report
from data.shards import Shards, Writer, read_meta
from data.teacher_cache import TeacherLogits
from extra import scores
from extra.acceptance import acceptance_row, perfect_heads
from extra.init_from import initial_weights
from extra.confidence import unmask_by_confidence
from gumbel import (GumbelEmbedding, draw_tokens, gumbel_max, nucleus, posterior_gumbel, sample_exponential,
                    sample_gumbel)
from medusa import Medusa
from mdlm import (MDLM, Denoiser, close_gaps, load_published, remasked_path, reveal_steps, revealing_path,
                  stratified_t, unmask)
from teacher import AR, GPT2, HF, KVCache, extract_parallel, extract_sequential
from teacher import load_published as load_published_ar

HERE = os.path.dirname(os.path.abspath(__file__))
SHARED = os.environ.get("GUMBEL_SHARED", os.path.join(HERE, "..", "shared"))
needs_shared = pytest.mark.skipif(not os.path.isdir(os.path.join(SHARED, "golden")),
                                  reason="the golden tensors are absent")


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def golden(name):
    return torch.load(os.path.join(SHARED, "golden", name + ".pt"), weights_only=True)


# ---------------------------------------------------------------------------------------------------------------------
# gumbel.py: draws

def test_gumbel_moments_and_law():
    x = sample_gumbel((1_000_000,), gen()).double()
    assert abs(x.mean() - 0.57722) < 5 * (math.pi / 6**0.5) / 1000
    assert abs(x.var() - math.pi**2 / 6) < 0.02
    assert stats.kstest(x[:100_000].numpy(), "gumbel_r").pvalue > 1e-4
    assert torch.equal(sample_gumbel((5, 7), gen(3)), sample_gumbel((5, 7), gen(3)))


def test_tail_has_the_right_frequency_and_is_not_quantised():
    """P(noise > a) = 1 - exp(-exp(-a)); float32 rand would give none above 16.6 and ties on a grid of 2^-24 below."""
    n, top = 0, []
    for i in range(25):
        x = sample_gumbel((8_000_000,), gen(i))
        n += x.numel()
        top.append(x[x > 12])
    top = torch.cat(top)
    for a in (12, 14, 16):
        count, want = int((top > a).sum()), n * math.exp(-a)
        assert abs(count - want) < 5 * math.sqrt(want), (a, count, want)
    # in exponential time the tail must be uniform on (0, e^-12), at full resolution: ties would show a grid
    T = torch.exp(-top.double())
    assert stats.kstest((T / math.exp(-12)).numpy(), "uniform").pvalue > 1e-4
    grid = torch.round(T * 2**24)
    assert (T * 2**24 - grid).abs().mean() > 0.2 and len(top.unique()) > 0.98 * len(top)
    assert sample_exponential((1_000_000,), gen()).min() > 0


def test_gumbel_max_draws_from_the_softmax():
    logits = torch.randn(6, generator=gen())
    x = gumbel_max(logits.expand(200_000, 6), sample_gumbel((200_000, 6), gen(1)))
    assert stats.chisquare(torch.bincount(x, minlength=6).numpy(),
                           (200_000 * logits.double().softmax(-1)).numpy()).pvalue > 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# gumbel.py: the posterior (Theorem 4.1, Algorithm 1)

@pytest.mark.parametrize("V,rows,scale", [(20, 500_000, 3.0), (1000, 20_000, 8.0), (50257, 512, 3.0),
                                          (50257, 512, 20.0)])
def test_posterior_argmax_is_the_token(V, rows, scale):
    """With certainty, whether the token was drawn from p or is a surprise; inputs are not modified; no inf, no nan."""
    g, step = gen(1), max(1, 20_000_000 // V)
    for a in range(0, rows, step):
        n = min(step, rows - a)
        logits = scale * torch.randn(n, V, generator=g) - 80
        w = gumbel_max(logits, sample_gumbel((n, V), g))
        w[::2] = torch.randint(V, (len(w[::2]),), generator=g)
        before, w_before = logits.clone(), w.clone()
        noise = posterior_gumbel(logits, w, g)
        assert noise.dtype == torch.float32 and noise.isfinite().all()
        assert (gumbel_max(logits, noise) == w).all()
        assert torch.equal(logits, before) and torch.equal(w, w_before)


def test_posterior_argmax_repair():
    """A surprise of 10^4 nats: float32's noise_w has steps of 2^-10, so rounding alone loses some rows. Repaired, none;
    and no other entry of the noise is touched, nor noise_w where it wins anyway."""
    logits, w = torch.tensor([[0.0, -1e4]]).expand(100_000, 2), torch.ones(100_000, dtype=torch.long)
    noise = posterior_gumbel(logits, w, gen(1))
    e = torch.cat([sample_exponential((len(part), 2), g) for g in [gen(1)]
                   for part in logits.split(gumbel.CHUNK // 2)])
    plain = torch.stack([-(e[:, 0] + logits[:, 0].exp() * e[:, 1]).log(), -e[:, 1].log() + 1e4], 1)
    lost = gumbel_max(logits, plain) != 1
    assert 0 < lost.sum() < 200 and (gumbel_max(logits, noise) == 1).all()
    assert torch.allclose(noise[:, 0], plain[:, 0], atol=1e-5)
    assert torch.equal(noise[~lost, 1], plain[~lost, 1]) and (noise[lost, 1] - plain[lost, 1]).abs().max() < 0.01


def test_posterior_extreme_rows():
    V = 8
    logits = torch.zeros(4, V)
    logits[0, 3:] = -math.inf                              # p_k = 0 gives noise_k = -log E_k
    logits[1] = torch.tensor([0.0] + [-300.0] * (V - 1))   # w's probability underflows
    logits[2] = -1e4 * torch.arange(V)
    w = torch.tensor([1, 5, 7, 0])
    noise = posterior_gumbel(logits, w, gen())
    assert noise.isfinite().all() and (gumbel_max(logits, noise) == w).all()
    assert 295 < noise[1, 5] < 320                         # -log E_0 - log p_w, not clipped by float32's smallest value
    f = gumbel.posterior_times(logits, w, sample_exponential((4, V), gen()))
    s = gumbel.noise_features(f)
    assert s.isfinite().all() and torch.allclose(s.sum(-1), torch.ones(4)) and s[1, 5] > 0.999999
    with pytest.raises(ValueError, match="-inf"):
        posterior_gumbel(logits[:1], torch.tensor([5]))
    with pytest.raises(ValueError, match="-inf .* inf or nan"):
        posterior_gumbel(torch.full((1, V), math.nan), torch.tensor([5]))
    with pytest.raises(ValueError, match="out of range"):
        posterior_gumbel(logits, torch.tensor([0, 1, 2, V]))
    assert gumbel.posterior_times(logits[:1], torch.tensor([5]), sample_exponential((1, V), gen())).isnan().any()
    assert posterior_gumbel(torch.zeros(2, 3, V), torch.zeros(2, 3, dtype=torch.long)).shape == (2, 3, V)


@pytest.mark.parametrize("gap", [95, 200, 10_000])
def test_posterior_is_exact_where_p_underflows(gap):
    """noise_w + log p_w is standard Gumbel however unlikely w is: p_w underflows in float32 from 88 nats on. A repair
    that merely lifts noise_w above the runner-up would give another law."""
    n, logits = 20_000, torch.tensor([0.0, -1.0, -2.0, -gap])
    noise = posterior_gumbel(logits.expand(n, 4), torch.full((n,), 3), gen(gap))
    winning = noise[:, 3].double() + logits.double().log_softmax(-1)[3]
    assert stats.kstest(winning.numpy(), "gumbel_r").pvalue > 1e-3
    for k in range(3):                                     # the losers: T_k = E_k + p_k E_0, with the same E_0
        p_k, T_k = logits.double().softmax(-1)[k], torch.exp(-noise[:, k].double())
        e_k = T_k - p_k * torch.exp(-winning)
        assert stats.kstest(e_k.numpy(), "expon").pvalue > 1e-3, k


def posterior_pairs(p, n, seed):
    """(w, noise) with w ~ p and noise from the posterior; and the forward construction (argmax, noise)."""
    logits = p.log().float().expand(n, len(p))
    w = torch.multinomial(p.expand(n, len(p)), 1, generator=gen(seed)).squeeze(1)
    forward = sample_gumbel((n, len(p)), gen(seed + 1))
    return (w, posterior_gumbel(logits, w, gen(seed + 2))), (gumbel_max(logits, forward), forward)


def test_posterior_noise_is_iid_gumbel():
    p = torch.tensor([0.6, 0.2, 0.1, 0.07, 0.03], dtype=torch.float64)
    (_, noise), _ = posterior_pairs(p, 200_000, 0)
    for k in range(5):
        assert stats.kstest(noise[:, k].numpy(), "gumbel_r").pvalue > 1e-4, k
    # independence: linear correlations of several functions of the noise, bounded at 5 / sqrt(n)
    for f in (lambda x: x, lambda x: torch.exp(-x), lambda x: (x > 1).double(), lambda x: (x > 3).double()):
        c = torch.corrcoef(f(noise.double()).T) - torch.eye(5)
        assert c.abs().max() < 5 / math.sqrt(200_000)
    # and of the ranks' joint law: each of the 120 orders is equally likely
    orders = (noise.argsort(-1) * 5 ** torch.arange(5)).sum(-1)
    assert stats.chisquare(orders.unique(return_counts=True)[1].numpy()).pvalue > 1e-4 and len(orders.unique()) == 120


def test_posterior_joint_law_equals_forward_construction():
    """(w, noise) with w ~ p has the law of (argmax, noise): compared given each w, in the marginals and the maximum."""
    p = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    (w, a), (x, b) = posterior_pairs(p, 200_000, 5)
    logp = p.log().float()
    for v in range(4):
        for k in range(4):
            assert stats.ks_2samp(a[w == v, k].numpy(), b[x == v, k].numpy()).pvalue > 1e-5, (v, k)
        assert stats.ks_2samp((a + logp)[w == v].amax(-1).numpy(), (b + logp)[x == v].amax(-1).numpy()).pvalue > 1e-5
        second_a = (a + logp)[w == v].topk(2, -1).values.diff(dim=-1)
        second_b = (b + logp)[x == v].topk(2, -1).values.diff(dim=-1)
        assert stats.ks_2samp(second_a.squeeze(1).numpy(), second_b.squeeze(1).numpy()).pvalue > 1e-5


def test_posterior_agrees_with_rejection():
    """Conditioning by brute force: prior noise kept if its argmax is w. A 2-d histogram test of (noise_w, noise_k)."""
    logits = torch.tensor([1.0, 0.0, -1.0, -2.0])
    prior = sample_gumbel((2_000_000, 4), gen())
    kept = prior[gumbel_max(logits.expand_as(prior), prior) == 2]
    ours = posterior_gumbel(logits.expand(len(kept), 4), torch.full((len(kept),), 2), gen(1))
    for i, j in itertools.combinations(range(4), 2):
        edges = [np.quantile(kept[:, k].numpy(), np.linspace(0, 1, 7)[1:-1]) for k in (i, j)]
        cell = [6 * np.digitize(x[:, i].numpy(), edges[0]) + np.digitize(x[:, j].numpy(), edges[1])
                for x in (kept, ours)]
        table = np.stack([np.bincount(c, minlength=36) for c in cell])
        assert stats.chi2_contingency(table[:, table.sum(0) > 20]).pvalue > 1e-4, (i, j)


def test_the_method_on_one_screen():
    """`python gumbel.py`: the student that reads the noise has the teacher's joint law, the blind one the product of
    its marginals. Total variation, so that collapse onto one pair cannot pass for success."""
    done = subprocess.run([sys.executable, "gumbel.py"], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.rsplit(maxsplit=2) for line in done.stdout.splitlines()[1:]]
    (reads, blind, teacher, independent) = [(float(equal), float(distance)) for _, equal, distance in rows]
    assert reads[0] > 0.97 and reads[1] < 0.03
    assert 0.11 < blind[0] < 0.14 and 0.86 < blind[1] < 0.89
    assert teacher == (1, 0) and independent == (0.125, 0.875)


# ---------------------------------------------------------------------------------------------------------------------
# gumbel.py: transforms and the embedding

def test_transforms_have_the_right_law_and_can_be_inverted():
    noise = torch.linspace(-2.5, 15, 2001, dtype=torch.float64)
    T = torch.exp(-noise)
    u, z = gumbel.to_uniform(T), gumbel.to_gaussian(T)
    assert (-(-u.log()).log() - noise).abs().max() < 1e-8
    # back from the Gaussian through scipy: T = -log Phi(z), log Phi accurate in both tails
    assert np.abs(-np.log(-stats.norm.logcdf(z.numpy())) - noise.numpy()).max() < 1e-8
    assert torch.all(z.diff() > 0) and torch.all(u.diff() > 0)
    e = sample_exponential((100_000,), gen())
    assert stats.kstest(gumbel.to_uniform(e).numpy(), "uniform").pvalue > 1e-4
    assert stats.kstest(gumbel.to_gaussian(e).numpy(), "norm").pvalue > 1e-4
    assert gumbel.to_gaussian(torch.tensor([0.0, 1e-37, 1e-20, 1.0, 40.0, 700.0, 1e30])).isfinite().all()


@pytest.mark.parametrize("tau", [1.0, 0.85, 2.0])
def test_noise_features_are_the_softmax_of_the_noise(tau):
    e = sample_exponential((1000, 300), gen())
    want = (-tau * e.double().log()).softmax(-1)
    assert torch.allclose(gumbel.noise_features(e.clone(), "gumbel", tau).double(), want, rtol=1e-5, atol=1e-9)
    assert torch.allclose(gumbel.noise_features(e.clone(), "uniform", tau).double(),
                          (tau * torch.exp(-e.double())).softmax(-1), rtol=1e-5)
    emb = GumbelEmbedding(300, 16)
    assert torch.allclose(emb(-e.log(), tau), want.float() @ emb.weight.T, rtol=1e-4, atol=1e-6)


def test_embedding_from_posterior_equals_the_plain_formula(monkeypatch):
    """Same draws, values and gradient, in many chunks; two calls of one generator draw different noise."""
    V, D, n = 37, 16, 50
    monkeypatch.setattr(gumbel, "CHUNK", 7 * V)            # 8 chunks, the last one short
    logits, w = 3 * torch.randn(n, V, generator=gen()), torch.randint(V, (n,), generator=gen(1))
    emb, up = GumbelEmbedding(V, D), torch.randn(n, D, generator=gen(2))
    g = gen(3)
    out = emb.from_posterior(lambda a, b: logits[a:b], w, g)
    out2 = emb.from_posterior(lambda a, b: logits[a:b], w, g)
    (out * up).sum().backward()
    grad, emb.weight.grad = emb.weight.grad, None
    want = posterior_gumbel(logits, w, gen(3)).softmax(-1) @ emb.weight.T
    (want * up).sum().backward()
    assert torch.allclose(out, want, atol=1e-6) and torch.allclose(grad, emb.weight.grad, atol=1e-5)
    assert not torch.allclose(out, out2)
    prior = emb.from_prior(n, 0.85, gen(4))
    assert torch.allclose(prior, (0.85 * sample_gumbel((n, V), gen(4))).softmax(-1) @ emb.weight.T, atol=1e-6)
    control = GumbelEmbedding(V, D, "unpaired")
    assert torch.equal(control.from_posterior(None, w, gen(5)), control.from_prior(n, generator=gen(5)))
    assert emb.from_posterior(lambda a, b: logits[a:b], w[:0], g).shape == (0, D)
    assert 0.015 < GumbelEmbedding(2000, 64).from_prior(500, generator=gen()).std() < 0.025  # a token embedding's scale
    with pytest.raises(ValueError, match="gaussian"):
        GumbelEmbedding(V, D, "gauss")


def test_embedding_memory():
    """4096 rows, GPT-2's vocabulary, D = 768: the peak above parameters and W's gradient stays under 400 MB."""
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
# against the authors' network

@needs_shared
@pytest.mark.parametrize("name", ["mdlm", "mdlm_gumbel"])
def test_golden_mdlm(name):
    d = golden(name)
    model, z = load_published(d["state_dict"]), d["inputs"]["indices"]
    noise = F.pad(d["inputs"]["gumbel"], (0, 0, 1, 0)) if "gumbel" in d["inputs"] else None
    with torch.no_grad():
        g = None if noise is None else model.noise_embed(noise)
        assert (model.logits(model.hidden(z, g)) - d["backbone_out"][..., :100]).abs().max() < 1e-5
        logp, want = model.log_probs(z, noise), d["log_probs"]
        real = want > -1e5                                 # theirs says -1e6 where ours says -inf
        assert (logp - want)[real].abs().max() < 1e-5 and (logp[~real] == -math.inf).all() and logp.shape == want.shape
        loss, _ = model.loss(d["loss"]["x0"], d["loss"]["t"][:, 0], z=d["loss"]["xt"], noise=noise)
        assert abs(loss - d["loss"]["loss_eval_mode"]) < 1e-5
        if noise is not None:
            logits = model.logits(model.hidden(z, model.noise_embed(noise, 0.85)))
            assert (logits - d["extra"]["backbone_out_gumbel_temperature_0.85"][..., :100]).abs().max() < 1e-5
            model = load_published({"backbone." + k: v for k, v in d["state_dict"].items()}, n_heads=4, inject="add")
            assert (model.logits(model.hidden(z, g))
                    - d["extra"]["backbone_out_inject_add"][..., :100]).abs().max() < 1e-5


@needs_shared
def test_golden_ar():
    d = golden("ar")
    model = load_published_ar(d["state_dict"], bos=0)
    with torch.no_grad():
        assert (model.log_probs(d["inputs"]["indices"]) - d["log_probs"][..., :100]).abs().max() < 1e-5
        assert abs(model.loss(d["inputs"]["x0"])[0] - d["loss"]["loss"]) < 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# small models with random weights

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


def rows_of(n, V=7, L=6, seed=0):
    x = torch.randint(V - 1, (n, L), generator=gen(seed))
    x[:, 0] = V - 1
    return x


def test_untrained_network_is_uniform():
    model = MDLM(11, 6, 10, n_layer=2, n_embd=32, n_head=2, dropout=0.0)
    logp = model.log_probs(torch.tensor([[10, 11, 11, 3, 11, 11]]))
    assert torch.allclose(logp[0, 1, :11], torch.full((11,), -math.log(11))) and logp[0, 1, 11] == -math.inf
    assert logp[0, 3, 3] == 0 and (logp[0, 3, [0, 1, 2, 4]] == -math.inf).all()


def test_bos_is_never_predicted_where_it_never_occurs():
    assert (tiny(predict_bos=False).log_probs(torch.full((1, 6), 7))[..., 6] == -math.inf).all()
    x, _ = tiny_ar(predict_bos=False).generate(torch.full((200, 1), 6), generator=gen())
    assert (x[:, 1:] != 6).all()


def test_causal_and_cached():
    """The AR model sees no later token; with the KV cache, one token or several at a time, it gives the same logits."""
    model, x = tiny_ar(), rows_of(3)
    full = model.log_probs(x)
    y = x.clone()
    y[:, 4] = (y[:, 4] + 1) % 6
    assert (torch.equal(model.log_probs(y)[:, :4], full[:, :4])
            and not torch.allclose(model.log_probs(y)[:, 4], full[:, 4]))
    for parts in ([1] * 6, [2, 3, 1], [4, 2]):
        cache = KVCache(model.transformer, 3, 6)
        got = torch.cat([model.logits(model.hidden(part, cache)) for part in x.split(parts, 1)], 1).log_softmax(-1)
        assert torch.allclose(got, full, atol=1e-5), parts


def test_positions_matter_and_only_relatively():
    """RoPE: a bidirectional network tells positions apart, and a shifted row gives shifted outputs inside a window."""
    model = tiny()
    h = model.hidden(torch.full((1, 6), 7))
    assert torch.allclose(h[0, 1], h[0, 4], atol=1e-5)     # all inputs alike: nothing to tell positions by
    x = torch.full((1, 6), 7)
    x[0, 0] = 6
    h = model.hidden(x)
    assert (h[0, 1] - h[0, 4]).abs().max() > 1e-3          # BOS anchors them


# ---------------------------------------------------------------------------------------------------------------------
# MDLM's loss

def test_stratified_t():
    t = torch.stack([stratified_t(64, np.random.default_rng(i)) for i in range(500)])
    assert t.min() >= 1e-3 and t.max() <= 1
    s = ((t - 1e-3) / (1 - 1e-3)).double().sort(-1).values
    assert ((s * 64).floor() == torch.arange(64)).float().mean() > 0.98        # one in each stratum (but for the wrap)
    assert (t.mean(0) - 0.5005).abs().max() < 5 * 0.289 / math.sqrt(500)        # no row gets systematically more noise
    assert (stratified_t(8, np.random.default_rng(0), 0.5) == 1).sum() >= 4


def subset_nelbo(model, x, noise=None):
    """The NELBO of one row by enumeration of its masks, and -log p of the random-order sampler. x [L] -> two floats.

    E_t (1/t) sum over masks of t^k (1-t)^(n-k) = sum over masks of B(k, n-k+1), k masked of n: Beta integrals.
    """
    n, V = len(x) - 1, model.mask_id
    nelbo, logp = 0.0, {}
    for mask in itertools.product([False, True], repeat=n):
        m = torch.tensor((False,) + mask)
        lp = model.log_probs(x.masked_fill(m, V)[None], noise)[0].double().gather(-1, x[:, None]).squeeze(1)
        logp[mask] = lp[1:]
        k = sum(mask)
        if k:
            nelbo -= math.exp(math.lgamma(k) + math.lgamma(n - k + 1) - math.lgamma(n + 1)) * float(lp[m].sum())

    @functools.cache
    def p(mask):                                           # reveal the masked positions in a uniformly random order
        masked = [i for i in range(n) if mask[i]]
        return sum(math.exp(logp[mask][i]) * p(mask[:i] + (False,) + mask[i + 1:])
                   for i in masked) / len(masked) if masked else 1.0
    return nelbo, -math.log(p((True,) * n))


def test_loss_is_the_nelbo_and_bounds_the_likelihood():
    model = tiny(V=4, L=4)
    with torch.no_grad():
        for x in rows_of(3, V=4, L=4):
            nelbo, nll = subset_nelbo(model, x)
            assert nelbo >= nll - 1e-6
            n = 40_000
            t = stratified_t(n, np.random.default_rng(0))
            loss, info = model.loss(x.expand(n, -1), t, generator=gen())
            assert abs(loss * 3 - nelbo) < 0.03 * nelbo, (loss * 3, nelbo)
            assert info["nll_masked"] > 0
        total = sum(math.exp(-subset_nelbo(model, torch.tensor((3,) + c))[1])
                    for c in itertools.product(range(4), repeat=3))
    assert abs(total - 1) < 1e-6                           # the random-order likelihood is a distribution


def test_loss_is_tight_for_the_exact_denoiser():
    """On an enumerable language, the NELBO of the true conditionals averages to the entropy (mask by mask, exactly)."""
    rows = np.array([[0, 0, 1], [0, 1, 1], [1, 0, 0], [1, 0, 0]])
    exact = ExactDenoiser(rows, 2)
    total = 0.0
    for x in rows:
        for mask in itertools.product([False, True], repeat=3):
            if k := sum(mask):
                m = torch.tensor(mask)
                x_ = torch.tensor(x)
                lp = exact.hidden(x_.masked_fill(m, 2)[None])[0].gather(-1, x_[:, None]).squeeze(1)[m].sum()
                total -= math.exp(math.lgamma(k) + math.lgamma(4 - k) - math.lgamma(4)) * float(lp) / 4
    assert abs(total - 1.5 * math.log(2)) < 1e-5


def test_loss_does_not_depend_on_chunks_or_micro_batches(monkeypatch):
    model, x = tiny("gumbel"), rows_of(8)
    noise, t = sample_gumbel((8, 6, 7), gen()), stratified_t(8, np.random.default_rng(0))
    z = x.masked_fill((torch.rand(8, 6, generator=gen(1)) < 0.6) & (torch.arange(6) > 0), 7)

    def grads(parts):
        model.zero_grad()
        for i in torch.arange(8).split(parts):
            (model.loss(x[i], t[i], z=z[i], noise=noise[i])[0] * len(i) / 8).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])
    whole = grads(8)
    assert torch.allclose(grads(2), whole, atol=1e-6)
    monkeypatch.setattr(mdlm, "CHUNK", 7)                  # 4 rows of logits at a time, recomputed in the backward pass
    assert torch.allclose(grads(8), whole, atol=1e-6)


def test_student_reads_noise_at_masked_positions_only():
    model, x = tiny("gumbel"), rows_of(2)
    z = x.clone()
    z[:, [2, 4]] = 7
    noise = sample_gumbel((2, 6, 7), gen())
    other = noise.clone()
    other[:, [0, 1, 3, 5]] = 5.0
    assert torch.equal(model.log_probs(z, noise), model.log_probs(z, other))
    other[:, 2] = 5.0 * torch.eye(7)[0]
    assert not torch.allclose(model.log_probs(z, noise), model.log_probs(z, other))
    with pytest.raises(ValueError, match="give it some"):
        model.log_probs(z)
    with pytest.raises(ValueError, match="without noise"):
        tiny().hidden(z, torch.zeros(2, 6, 32))
    with pytest.raises(ValueError, match="without noise"):
        tiny().log_probs(z, noise)
    with pytest.raises(ValueError, match="teacher"):
        model.loss(x, torch.ones(2))


def test_loss_with_a_teacher_equals_loss_with_its_extracted_noise():
    """Training's chunked path draws what extract_parallel draws: same law. Alignment: position i reads row i - 1."""
    teacher, model, x = tiny_ar(), tiny("gumbel"), rows_of(1)
    z = x.clone()
    z[:, 1:] = 7                                           # everything masked: rows in the same order in both paths
    with torch.no_grad():
        a = model.loss(x, torch.ones(1), teacher=teacher, z=z, generator=gen(1))[0]
        b = model.loss(x, torch.ones(1), noise=extract_parallel(teacher, x, gen(1)), z=z)[0]
    assert abs(a - b) < 1e-5
    noise = extract_parallel(teacher, x, gen(1))
    logits = teacher.log_probs(x)
    assert torch.equal(gumbel_max(logits[:, :-1], noise[:, 1:]), x[:, 1:]) and (noise[:, 0] == 0).all()

    class Data:                                            # a TeacherLogits gives the same numbers
        def rows(self, i):
            return rows_of(5).numpy()[list(i)]

        def __len__(self):
            return 5
    table, masked = TeacherLogits(teacher, Data(), batch=2), torch.rand(5, 6, generator=gen()) < 0.5
    masked[:, 0] = False
    want = teacher.posterior_logits(rows_of(5), masked)(0, 99)
    table.for_rows(table.load([0, 1, 2, 3, 4]))
    assert torch.allclose(table.posterior_logits(rows_of(5), masked)(0, 99), want, atol=1e-5)


@pytest.mark.parametrize("model", ["mdlm", "bd3lm", "ar"])
def test_compiles_without_graph_breaks(model):
    """The whole transformer is one graph: same output and gradient, any graph break would raise."""
    net = dict(mdlm=tiny, bd3lm=tiny_blocks, ar=tiny_ar)[model]().transformer
    randomise(net)
    h = torch.randn(2, 12, net.embed.weight.shape[1], generator=gen())
    mask = training_mask(6, 2, torch.device("cpu")) if model == "bd3lm" else None
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    grads = []
    for f in (net, compiled):
        net.zero_grad()
        f(h, mask=mask).square().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in net.blocks.parameters()]))
    assert torch.allclose(*grads, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", gumbel.KINDS)
@pytest.mark.parametrize("inject", ["replace", "add"])
def test_every_noise_trains_and_samples(kind, inject):
    """Loss, gradient to W, sampling; under bf16 autocast too, where the loss must stay near the float32 one."""
    model, teacher, x, t = tiny(kind, inject=inject), tiny_ar(), rows_of(32), torch.ones(32)
    loss, _ = model.loss(x, t, teacher, generator=gen())
    loss.backward()
    assert loss.isfinite() and model.noise_embed.weight.grad.abs().max() > 0
    with torch.autocast("cpu", torch.bfloat16):
        low, _ = model.loss(x, t, teacher, generator=gen())
        low.backward()
        start = x.masked_fill(torch.arange(6) > 0, 7)
        assert (model.generate(start, 2, generator=gen())[0] != 7).all()
        assert teacher.generate(x[:, :2], generator=gen())[0].shape == (32, 6)
    assert abs(loss - low) < 0.05 * loss


# ---------------------------------------------------------------------------------------------------------------------
# samplers

def test_nucleus_and_draws():
    p = torch.tensor([[0.35, 0.5, 0.05, 0.1]])
    assert (nucleus(p.log(), 0.9) > -math.inf).tolist() == [[True, True, False, True]]     # the crossing token is kept
    assert (nucleus(p.log(), 0.3) > -math.inf).tolist() == [[False, True, False, False]]
    x = draw_tokens(p.log().expand(100_000, 4), top_p=0.9, generator=gen())
    assert stats.chisquare(torch.bincount(x, minlength=4)[[0, 1, 3]].numpy(),
                           100_000 * np.array([0.35, 0.5, 0.1]) / 0.95).pvalue > 1e-4
    assert not (x == 2).any() and draw_tokens(p.log(), greedy=True).tolist() == [1]


@pytest.mark.parametrize("top_p", [0.2, 0.55, 0.9, 1.0])
def test_draws_without_sorting_have_the_law_of_the_sorted_nucleus(top_p):
    """Rows of several kinds, one with tied tokens, of which the nucleus holds a part, one with impossible ones."""
    for logits in (torch.randn(300, generator=gen()) * 2, torch.zeros(7),
                   torch.tensor([0.0, -math.inf, 1.0, 1.0, -math.inf, 0.5])):
        n, V = 30_000, len(logits)
        x = draw_tokens(logits.expand(n, V), top_p, generator=gen(1))
        want = nucleus(logits[None].double(), top_p).softmax(-1)[0]
        count = torch.bincount(x, minlength=V).double()
        if not (logits == 0).all():
            assert not count[want == 0].any()
        else:                                              # which of the tied ones is free, how many is not
            count, want = count.sort().values, want.sort().values
        many = want * n > 5
        count, want = count[many].numpy(), want[many].numpy()
        assert len(want) == 1 or stats.chisquare(count, want / want.sum() * count.sum()).pvalue > 1e-4
    # inversion in float64: an improbable token comes as often as it should
    x = draw_tokens(torch.tensor([0.0, -12.0]).expand(10_000_000, 2), generator=gen(2))
    assert abs(x.sum().item() - (m := 10_000_000 * math.exp(-12))) < 5 * m**0.5


def test_reveal_steps():
    masked = torch.rand(50, 20, generator=gen()) < 0.7
    for sampler, order, steps in [("ancestral", "random", 5), ("fixed", "random", 5), ("fixed", "left_to_right", 6),
                                  ("fixed", "random", 100), ("first_hitting", "random", 3)]:
        s = reveal_steps(masked, steps, sampler, order, gen())
        assert ((s > 0) == masked).all()
        if sampler != "ancestral":
            n, k = masked.sum(1), torch.stack([torch.bincount(r, minlength=101)[1:] for r in s])
            want = n if sampler == "first_hitting" else n.clamp(max=steps)
            assert ((k > 0).sum(1) == want).all()
            for row, m in zip(k, want):
                assert row[:m].max() - row[:m].min() <= 1  # cut evenly, no gaps
        if order == "left_to_right":
            for row, m in zip(s, masked):
                assert (row[m].diff() >= 0).all()
    big = reveal_steps(torch.ones(20_000, 4, dtype=torch.bool), 3, generator=gen())
    assert stats.chisquare(torch.bincount((big * 4 ** torch.arange(4)).sum(1)).numpy()[
        torch.bincount((big * 4 ** torch.arange(4)).sum(1)).numpy() > 0]).pvalue > 1e-4
    assert close_gaps(torch.tensor([[0, 7, 3, 7], [2, 9, 4, 5], [0, 0, 0, 0]])).tolist() == [
        [0, 2, 1, 2], [1, 4, 2, 3], [0, 0, 0, 0]]
    with pytest.raises(ValueError, match="steps"):
        reveal_steps(masked, 0)


@pytest.mark.parametrize("eta", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("steps", [4, 16])
def test_remasking_keeps_the_share_of_masks(steps, eta):
    """After step k, 1 - k / steps of the places are masked, within four errors; at eta > 0 some are drawn twice; given
    ones never. Rows of very many places: every row reveals something at every step, so that calls are steps."""
    B, L = 4, 50_000
    masked = torch.rand(B, L, generator=gen(1)) < 0.9
    calls = list(remasked_path(masked, steps, eta, generator=gen(2)))
    assert len(calls) == steps and torch.equal(calls[0][0], masked)
    n, drawn = int(masked.sum()), torch.zeros(B, L, dtype=torch.long)
    for k, (before, now) in enumerate(calls):
        share = 1 - k / steps
        assert abs(int(before.sum()) - share * n) <= 4 * (share * (1 - share) * n) ** 0.5, k
        assert not (now & ~before).any() and not (before & ~masked).any()
        drawn += now
        left = before & ~now
        if k + 1 < steps:                                  # masked again: not after this call, but before the next
            again = calls[k + 1][0] & ~left
            assert not (left & ~calls[k + 1][0]).any() and (again.any() == (eta > 0 and k > 0))
    assert not left.any() and ((drawn >= 1) == masked).all() and (drawn.max() > 1) == (eta > 0)


def test_without_remasking_it_is_ancestral_sampling():
    """eta = 0: each place's step is uniform and independent of the others'."""
    masked, steps = torch.ones(20_000, 3, dtype=torch.bool), 4
    ancestral = reveal_steps(masked, steps, generator=gen())
    ours = torch.zeros(20_000, 3, dtype=torch.long)
    for k, (before, now) in enumerate(remasked_path(masked, steps, 0.0, generator=gen(1)), start=1):
        ours[now] = k
    key = 5 ** torch.arange(3)
    table = torch.stack([torch.bincount((s * key).sum(1), minlength=125) for s in (ancestral, ours)])
    assert (ours > 0).all() and stats.chi2_contingency(table[:, table.sum(0) > 0].numpy()).pvalue > 1e-4


def test_remasking_with_the_exact_denoiser_on_the_maze():
    """Not below ancestral's success at 64 and 256 steps, with about one token in ten masked again. (An exact denoiser
    has no errors to take back but those of tokens drawn together, of which more remasking makes more.)"""
    n = 2000
    exact, x = ExactDenoiser(maze_dataset("maze").astype(np.int64), 5), torch.full((n, 10), 5)
    for steps, eta in ((64, 0.003), (256, 0.001)):
        path = revealing_path(reveal_steps(x == 5, steps, generator=gen()))
        plain, calls = unmask(x, path, 5, exact, generator=gen(1))
        path = remasked_path(x == 5, steps, eta, generator=gen())
        again, more = unmask(x, path, 5, exact, generator=gen(1))
        a, b = (maze_valid(rows.numpy()).mean() for rows in (plain, again))
        assert b > a - 3 * (a * (1 - a) / n + b * (1 - b) / n) ** 0.5, (steps, a, b)
        assert (more <= steps).all() and 0.5 < (more - calls).double().mean() < 2


@pytest.mark.parametrize("block_size", [None, 128])
def test_remasking_keeps_the_share_of_masks_of_what_the_network_sees(block_size, monkeypatch):
    """The same through `generate`, for MDLM and in each block: rows so long that each reveals some at each step."""
    B, L, steps = 24, 256, 8
    if block_size:
        model, K = tiny_blocks(L=L, block_size=block_size), block_size
    else:
        model, K = tiny(L=L), L
    seen, embed = [], model.embed
    monkeypatch.setattr(model, "embed", lambda z, g=None: seen.append(z == 7) or embed(z, g))
    model.generate(all_masked(B, L), steps, "remdm", remask=0.3, generator=gen(1))
    assert len(seen) == steps * L // K
    for k, masked in enumerate(seen):
        n, share = B * (K - (k < steps)), 1 - k % steps / steps                  # BOS, in the first block, is given
        assert abs(int(masked.sum()) - share * n) <= 4 * (share * (1 - share) * n) ** 0.5, k


@pytest.mark.parametrize("noise", [None, "gumbel"])
def test_remdm_contract(noise):
    """MDLM and blocks: nothing given changes, nothing stays masked, a seed reproduces, nfe is what was spent."""
    for model, L in ((tiny(noise), 6), (tiny_blocks(noise, block_size=4), 14)):
        start = all_masked(30, L)
        start[:, 1] = 2
        start[:10, 4] = 3
        calls = []
        model.transformer.register_forward_hook(lambda m, i, o: calls.append(len(i[0])))
        x, nfe = model.generate(start, 8, "remdm", remask=0.5, generator=gen(1))
        assert (x != 7).all() and torch.equal(x[start != 7], start[start != 7]) and len(calls) >= nfe.max()
        assert L > 6 or sum(calls) == nfe.sum()            # (blocks: the first call of a block is for all rows)
        again, _ = model.generate(start, 8, "remdm", remask=0.5, generator=gen(1))
        other, _ = model.generate(start, 8, "remdm", remask=0.5, generator=gen(2))
        assert torch.equal(x, again) and not torch.equal(x, other)
        uncached = dict(cached=False) if L > 6 else {}
        assert torch.equal(model.generate(start, 8, "remdm", remask=0.5, generator=gen(1), **uncached)[0], x)
        for kw, words in ((dict(remask=1.5), "remask"), (dict(order="left_to_right"), "fixed"),
                          (dict(steps=0), "steps")):
            with pytest.raises(ValueError, match=words):
                model.generate(start, **dict(dict(steps=8, sampler="remdm"), **kw))


LANGUAGE = np.array([[0, 0, 1, 2], [0, 1, 1, 0], [1, 0, 0, 2], [1, 0, 0, 2],
                     [2, 2, 2, 1], [2, 1, 0, 0], [1, 1, 1, 1], [1, 0, 2, 2]])


def sampled_language(n, steps, sampler, seed=0):
    exact = ExactDenoiser(LANGUAGE, 3)
    x = torch.full((n, 4), 3)
    path = revealing_path(reveal_steps(x == 3, steps, sampler, generator=gen(seed)))
    x, nfe = unmask(x, path, 3, exact, generator=gen(seed + 1))
    return x, nfe


@pytest.mark.parametrize("sampler,steps", [("first_hitting", 1), ("ancestral", 40_000), ("fixed", 4)])
def test_exact_denoiser_gives_the_true_joint(sampler, steps):
    x, nfe = sampled_language(40_000, steps, sampler)
    keys, want = (x * 3 ** torch.arange(4)).sum(1), (torch.tensor(LANGUAGE) * 3 ** torch.arange(4)).sum(1)
    u, c = want.unique(return_counts=True)
    assert (nfe == 4).float().mean() > 0.999
    keys = keys[nfe == 4]                                  # 40,000 steps: two tokens at once in 1 of 7,000 rows
    assert set(keys.tolist()) <= set(u.tolist())
    assert stats.chisquare([int((keys == k).sum()) for k in u], (len(keys) * c / c.sum()).numpy()).pvalue > 1e-4


@pytest.mark.parametrize("name,want", [("maze", [4.63, 20.2, 44.0, 67.3, 81.4]), ("maze_skewed", [23.1])])
def test_perfect_mdlm_reaches_the_known_figures(name, want):
    # the 2000 draws of maze_skewed depend on the order in which the paths are enumerated: 23.4 here
    for steps, percent in zip([1, 2, 4, 8, 16], want):
        rows, calls = evaluate.maze_theory(name, 10_000, steps, seed=1)
        assert abs(100 * maze_valid(rows).mean() - percent) < 2.0, steps
        assert calls == 1 if steps == 1 else calls < steps
    rows = maze_dataset(name)                      # one step: exactly the product of the marginals
    marginals = np.stack([(rows == k).mean(0) for k in range(5)], 1)
    exact = 100 * np.exp(np.log(marginals[np.arange(10), maze_paths()] + 1e-300).sum(1)).sum()
    assert abs(exact - want[0]) < (0.05 if name == "maze" else 0.5)


@pytest.mark.parametrize("noise", [None, "gumbel"])
@pytest.mark.parametrize("sampler,order", [("ancestral", "random"), ("fixed", "random"), ("fixed", "left_to_right"),
                                           ("fixed", "confidence"), ("first_hitting", "random")])
def test_sampler_contract(noise, sampler, order):
    """No [MASK] is left, nothing given is changed, a seed reproduces, nfe is what was spent."""
    model = tiny(noise)
    start = rows_of(40).masked_fill((torch.rand(40, 6, generator=gen(5)) < 0.6) & (torch.arange(6) > 0), 7)
    start[3] = rows_of(1)[0]                               # a row with nothing to do
    calls = []
    model.transformer.register_forward_hook(lambda m, i, o: calls.append(len(i[0])))
    for steps in (1, 3, 50):
        calls.clear()
        x, nfe = model.generate(start, steps, sampler, order, generator=gen(9))
        assert (x != 7).all() and torch.equal(x[start != 7], start[start != 7])
        assert sum(calls) == nfe.sum() and nfe[3] == 0 and len(calls) == nfe.max()
        masked = (start == 7).sum(1)
        if sampler != "first_hitting":
            assert (nfe <= masked.clamp(max=steps)).all()
        if sampler == "fixed":
            assert (nfe == masked.clamp(max=steps)).all()
        again, _ = model.generate(start, steps, sampler, order, generator=gen(9))
        other, _ = model.generate(start, steps, sampler, order, generator=gen(10))
        assert torch.equal(x, again) and not torch.equal(x, other)
    if noise:
        model.generate(start, 3, sampler, order, resample_noise=True, tau=0.5, top_p=0.9, generator=gen())


@pytest.mark.parametrize("shift", [False, True])
def test_states_where_they_are_wanted_are_those_of_the_full_pass(shift):
    model, z = tiny(shift=shift), rows_of(8).masked_fill(torch.arange(6) % 3 > 0, 7)
    at = torch.rand(8, 6, generator=gen()) < 0.4
    at[:, 0] = False
    want = model.hidden(z)[at]
    assert want.std() > 0.1 and (model.hidden(z, wanted=at) - want).abs().max() < 1e-5
    blocks, at = tiny_blocks(shift=shift, L=6), at.roll(1, 0)
    assert torch.equal(blocks.hidden(z, None, rows_of(8), at), blocks.hidden(z, None, rows_of(8))[at])


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


@pytest.mark.parametrize("noise", [None, "gumbel"])
def test_batch_equals_single_rows(noise, monkeypatch):
    """... and neither depends on how many rows the output layer takes at once."""
    model = tiny(noise)
    monkeypatch.setattr(mdlm, "CHUNK", 5 * 7)
    start = torch.full((16, 6), 7)
    start[:, 0] = 6
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


def test_sampler_bad_input():
    model = tiny("gumbel")
    start = torch.full((2, 6), 7)
    with pytest.raises(ValueError, match="BOS"):
        model.generate(start, 1)
    start[:, 0] = 6
    for kw, word in [(dict(steps=0), "steps"), (dict(steps=1, tau=0), "tau"), (dict(steps=1, top_p=0), "top_p"),
                     (dict(steps=1, sampler="x"), "sampler"), (dict(steps=2, order="left_to_right"), "fixed"),
                     (dict(steps=1, sampler="first_hitting", order="confidence"), "fixed"),
                     (dict(steps=1, noise=sample_gumbel((2, 6, 7)), resample_noise=True), "resample")]:
        with pytest.raises(ValueError, match=word):
            model.generate(start, **kw)


# ---------------------------------------------------------------------------------------------------------------------
# bd3lm.py

def tiny_blocks(noise=None, V=7, L=8, block_size=2, seed=0, **kw):
    torch.manual_seed(seed)
    return randomise(BD3LM(V, L, V - 1, block_size=block_size, n_layer=2, n_embd=32, n_head=2, dropout=0.0,
                           noise=noise, **kw), seed)


def all_masked(n, T, V=7):
    x = torch.full((n, T), V)
    x[:, 0] = V - 1
    return x


@needs_shared
@pytest.mark.parametrize("name", ["bd3lm", "bd3lm_gumbel"])
def test_golden_bd3lm(name):
    """Training pass, sampling pass (one call, and block by block through the cache), both losses."""
    d = golden(name)
    model, i = bd3lm.load_published(d["state_dict"], 4, bos=99), d["inputs"]
    assert torch.equal(training_mask(32, 4, torch.device("cpu")), i["block_diff_mask"])
    noise, sample_noise = (F.pad(i[k], (0, 0, 1, 0)) if k in i else None for k in ("gumbel", "sample_gumbel"))
    with torch.no_grad():
        logp, want = model.log_probs(i["xt"], i["x0"], noise), d["log_probs"]
        real = want > -1e5
        assert (logp - want)[real].abs().max() < 1e-5 and (logp[~real] == -math.inf).all()
        z, want = i["sample_indices"], d["sample_backbone_out"][:, 8:, :100]
        g = None if sample_noise is None else model.noise_embed(sample_noise)[:, 8:]
        h = model.block_hidden(model.new_cache(3, 12), z[:, :8], z[:, 8:], g)
        assert (model.logits(h) - want).abs().max() < 1e-5
        cache = model.new_cache(3, 12)
        model.block_hidden(cache, z[:, :4], z[:, 4:8], g)  # a call for the second block
        assert (model.logits(model.block_hidden(cache, z[:, 4:8], z[:, 8:], g)) - want).abs().max() < 1e-5
        for key, clip in (("loss", None), ("loss_clip_0.6_to_1", (0.6, 1.0))):
            x = d[key]
            loss, _ = model.loss(x["x0"], x["t"].view(3, 8, 4)[:, :, 0], z=x["xt"], noise=noise, clip=clip)
            assert abs(loss - x["loss_eval_mode"]) < 1e-5


@pytest.mark.parametrize("L,K", [(8, 2), (6, 6), (5, 1)])
def test_training_mask_is_its_definition(L, K):
    want = torch.zeros(2 * L, 2 * L, dtype=torch.bool)
    for q, k in itertools.product(range(2 * L), repeat=2):
        bq, bk = q % L // K, k % L // K
        if q < L:                                          # noised: its own block, noised, and earlier ones, clean
            want[q, k] = bk == bq if k < L else bk < bq
        else:                                              # clean: itself and earlier ones, clean
            want[q, k] = k >= L and bk <= bq
    assert torch.equal(training_mask(L, K, torch.device("cpu")), want)


def test_flex_attention_computes_the_same():
    """The rule as flex_attention takes it on CUDA, here uncompiled (no backward on a CPU), against the boolean mask."""
    L, K = 512, 16
    mask = create_block_mask(bd3lm.training_rule(L, K), None, None, 2 * L, 2 * L, "cpu")
    assert mask.sparsity() > 50                            # of 128 x 128 tiles: what a GPU skips
    qkv = torch.randn(3, 1, 2, 2 * L, 8, generator=gen())
    with torch.no_grad():                                  # and through the network, where a BlockMask is recognised
        assert (flex_attention(*qkv, block_mask=mask) - F.scaled_dot_product_attention(
            *qkv, attn_mask=training_mask(L, K, torch.device("cpu")))).abs().max() < 1e-5
        model, x = tiny_blocks(L=L, block_size=K), rows_of(2, L=L)
        z = x.masked_fill((torch.rand(2, L, generator=gen()) < 0.5) & (torch.arange(L) > 0), 7)
        want = model.log_probs(z, x)
        old = mdlm.compiled_flex, bd3lm.training_mask
        try:
            mdlm.compiled_flex, bd3lm.training_mask = lambda: flex_attention, lambda *a: mask
            assert torch.allclose(model.log_probs(z, x), want, atol=1e-5)
        finally:
            mdlm.compiled_flex, bd3lm.training_mask = old


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_flex_attention_on_a_gpu():
    """Compiled, forward and backward, through the network: loss and gradients of the boolean mask."""
    model, x = tiny_blocks(L=256, block_size=16).cuda(), rows_of(4, L=256).cuda()
    grads = []
    for rule in (training_mask, lambda L, K, device, sparse: training_mask(L, K, device)):
        old, bd3lm.training_mask = bd3lm.training_mask, rule
        model.zero_grad()
        model.loss(x, torch.full((4, 16), 0.5, device="cuda"), generator=torch.Generator("cuda").manual_seed(0)
                   )[0].backward()
        bd3lm.training_mask = old
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (grads[0] - grads[1]).abs().max() < 1e-4 * grads[1].abs().max()


@pytest.mark.parametrize("noise,shift", [(None, False), ("gumbel", False), ("gumbel", True)])
def test_one_block_is_mdlm(noise, shift):
    """Block size L: the same loss, the same samples, with the weights of an MDLM."""
    plain, model = tiny(noise, L=8, shift=shift), tiny_blocks(noise, block_size=8, shift=shift)
    model.load_state_dict(plain.state_dict())
    teacher = tiny_ar(L=8) if noise else None
    x, t = rows_of(16, L=8), stratified_t(16, np.random.default_rng(0))
    with torch.no_grad():
        a = plain.loss(x, t, teacher=teacher, generator=gen(1))
        b = model.loss(x, t[:, None], teacher=teacher, generator=gen(1))
        assert abs(a[0] - b[0]) < 1e-5 and abs(a[1]["nll_masked"] - b[1]["nll_masked"]) < 1e-5
    start = all_masked(16, 8)
    for kw in (dict(steps=3), dict(steps=4, sampler="fixed", order="confidence"), dict(steps=1, greedy=True)):
        a, b = (m.generate(start, generator=gen(2), **kw) for m in (plain, model))
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_blocks_from_an_ar_model_continue_it():
    """With its weights and `shift`: blocks of one token are the AR model, in the training pass and in the sampler; in
    larger blocks, the first token given nothing of its block is predicted from the clean text before it alone."""
    ar, x = tiny_ar(L=8), rows_of(3, L=8)
    for K in (1, 4):
        model = BD3LM(7, 8, 6, block_size=K, n_layer=2, n_embd=32, n_head=2, dropout=0.0, shift=True).eval()
        initial_weights(model, ar, "ar")
        logp = model.log_probs(x.clone().index_fill_(1, torch.arange(1, 8), 7), x)
        if K == 1:
            assert torch.allclose(logp[:, 1:, :7], ar.log_probs(x)[:, :-1], atol=1e-5)
            for cached in (True, False):
                assert torch.equal(model.generate(all_masked(3, 8), 1, greedy=True, cached=cached)[0],
                                   ar.generate(torch.full((3, 1), 6), greedy=True)[0])
        else:
            y = x.clone()
            y[:, 5:] = (y[:, 5:] + 1) % 6
            other = model.log_probs(y.clone().index_fill_(1, torch.arange(1, 8), 7), y)
            assert torch.equal(other[:, 4], logp[:, 4]) and not torch.equal(
                model.log_probs(y.clone().index_fill_(1, torch.arange(1, 8), 7), y.flip(1))[:, 4], logp[:, 4])


@pytest.mark.parametrize("noise", [None, "gumbel"])
def test_blocks_of_one_token_are_the_chain_rule(noise):
    """At t = 1 and block size 1 the loss is -log p(x), token by token through the sampler's cached calls."""
    model, x = tiny_blocks(noise, block_size=1), rows_of(5, L=8)
    xi = sample_gumbel((5, 8, 7), gen()) if noise else None
    with torch.no_grad():
        loss, _ = model.loss(x, torch.ones(5, 8), noise=xi)
        cache, total = model.new_cache(5, 8), 0.0
        for i in range(1, 8):
            g = None if xi is None else model.noise_embed(xi[:, i:i + 1])
            h = model.block_hidden(cache, x[:, i - 1:i], torch.full((5, 1), 7), g)
            total -= model.logits(h[:, 0]).log_softmax(-1).gather(-1, x[:, i:i + 1]).mean() / 7
    assert abs(loss - total) < 1e-5


def test_block_loss_is_the_nelbo_of_each_block():
    """Against the enumeration of every block's masks, clean context given."""
    model, x = tiny_blocks(V=4, L=6, block_size=3), rows_of(1, V=4, L=6)[0]
    want = 0.0
    with torch.no_grad():
        for b in range(2):
            inside = [i for i in range(3 * b, 3 * b + 3) if i]
            for k in range(1, len(inside) + 1):
                for some in itertools.combinations(inside, k):
                    z = x.clone()
                    z[list(some)] = 4
                    lp = model.log_probs(z[None], x[None])[0, list(some)].gather(-1, x[list(some), None]).sum()
                    want -= float(lp) * math.exp(
                        math.lgamma(k) + math.lgamma(len(inside) - k + 1) - math.lgamma(len(inside) + 1))
        n = 20_000
        t = stratified_t(2 * n, np.random.default_rng(0)).view(n, 2)
        loss = model.loss(x.expand(n, -1), t, generator=gen())[0] * 5
    assert abs(loss - want) < 0.03 * want, (loss, want)


class ExactBlocks(BD3LM):
    """A block sampler whose network is the true conditional of LANGUAGE given the clean blocks and the block."""

    exact = ExactDenoiser(np.concatenate([np.full((8, 1), 2), LANGUAGE, np.zeros((8, 1), int)], 1), 3)

    def block_hidden(self, cache, clean, z, g=None):
        x = torch.cat([clean, z], 1)
        return self.exact.hidden(F.pad(x, (0, 6 - x.shape[1]), value=3))[:, -6:][:, x.shape[1] - z.shape[1]:x.shape[1]]

    def logits(self, h):
        return h


@pytest.mark.parametrize("block_size", [2, 3])
def test_right_denoiser_gives_the_true_joint_through_the_block_sampler(block_size):
    """BOS (here 2), LANGUAGE's four tokens and a 0, in blocks, one token at a time."""
    model = ExactBlocks(3, 6, 2, block_size=block_size, n_layer=1, n_embd=4, n_head=1)
    x, nfe = model.generate(all_masked(40_000, 6, 3), 1, "first_hitting", cached=False, generator=gen())
    assert (x[:, 5] == 0).all() and (nfe == 5).all()
    keys, want = ((r * 3 ** torch.arange(4)).sum(1) for r in (x[:, 1:5], torch.tensor(LANGUAGE)))
    u, c = want.unique(return_counts=True)
    assert set(keys.tolist()) <= set(u.tolist())
    assert stats.chisquare([int((keys == k).sum()) for k in u], (40_000 * c / c.sum()).numpy()).pvalue > 1e-4


def recorded_calls(model, monkeypatch, **kw):
    calls, call = [], BD3LM.block_hidden

    def record(self, cache, clean, z, g=None):
        h = call(self, cache, clean, z, g)
        calls.append(h)
        return h
    with monkeypatch.context() as m:
        m.setattr(BD3LM, "block_hidden", record)
        return *model.generate(**kw), calls


@pytest.mark.parametrize("noise,shift", [(None, False), ("gumbel", False), ("gumbel", True)])
@pytest.mark.parametrize("T", [8, 21, 50])
def test_cached_equals_uncached(noise, shift, T, monkeypatch):
    """Same tokens, same calls, hidden states to 1e-5: within the training length (8) and far beyond it, prompts that
    end within a block, rows of different pace."""
    model = tiny_blocks(noise, shift=shift, block_size=4 if T == 50 else 2)
    start = all_masked(6, T)
    start[:, 1:5] = rows_of(6, L=5)[:, 1:]
    start[:3, 5] = 2
    start[1, 7] = 3
    same = []
    for kw in (dict(steps=2), dict(steps=1, greedy=True), dict(steps=4, sampler="fixed", order="left_to_right")):
        a, b = (recorded_calls(model, monkeypatch, tokens=start, cached=cached, generator=gen(3), **kw)
                for cached in (True, False))
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and len(a[2]) == len(b[2])
        # the first call for a block runs all rows with the cache: compare those calls in which all rows took part
        same += [float((h - k).abs().max()) for h, k in zip(a[2], b[2]) if h.shape == k.shape]
        assert (a[0] != 7).all() and torch.equal(a[0][start != 7], start[start != 7])
    assert len(same) > 4 and max(same) < 1e-5
    if noise:
        xi = sample_gumbel((6, T, 7), gen())
        a, b = (model.generate(start, 2, greedy=True, noise=xi, cached=c, generator=gen()) for c in (True, False))
        assert torch.equal(a[0], b[0])


def test_window_is_what_the_training_pass_sees():
    """Beyond the training length L a block still sees L - K clean tokens, and what these saw; within it, the sampler's
    hidden states are those of the training pass."""
    model, x = tiny_blocks(), rows_of(3, L=8)
    with torch.no_grad():
        z = x.clone()
        z[:, 5:8] = 7
        want = model.hidden(z, None, x)[:, 6:]
        got = model.block_hidden(model.new_cache(3, 8), x[:, :6], z[:, 6:])
        assert (got - want).abs().max() < 1e-5
        # RoPE is relative: with one layer nothing outside the window can matter
        model.transformer.blocks = model.transformer.blocks[:1]
        long = torch.cat([rows_of(3, L=20, seed=1), torch.full((3, 2), 7)], 1)
        a = model.block_hidden(model.new_cache(3, 22), long[:, :20], long[:, 20:])
        b = model.block_hidden(model.new_cache(3, 8), long[:, 14:20], long[:, 20:])
        assert (a - b).abs().max() < 1e-5
        long[:, 14] = (long[:, 14] + 1) % 6
        assert (model.block_hidden(model.new_cache(3, 22), long[:, :20], long[:, 20:]) - a).abs().max() > 1e-3
        long[:, 13] = (long[:, 13] + 1) % 6
        long[:, 14] = (long[:, 14] - 1) % 6
        assert (model.block_hidden(model.new_cache(3, 22), long[:, :20], long[:, 20:]) - a).abs().max() < 1e-5


@pytest.mark.parametrize("noise", [None, "gumbel"])
def test_block_sampler_contract(noise):
    """nfe is what was spent, the cache costs no call; a batch equals its rows; nothing given changes."""
    model = tiny_blocks(noise, block_size=4)
    start = all_masked(12, 19)
    start[::2, 1:7] = rows_of(6, L=7)[:, 1:]
    start[3, 8:12] = 1
    calls = []
    model.transformer.register_forward_hook(lambda m, i, o: calls.append(len(o)))
    for sampler, steps in (("ancestral", 3), ("fixed", 2), ("first_hitting", 1)):
        calls.clear()
        x, nfe = model.generate(start, steps, sampler, generator=gen(1))
        assert (x != 7).all() and torch.equal(x[start != 7], start[start != 7]) and x.shape == (12, 19)
        if sampler == "first_hitting":                     # one token a call; the last block has one beyond the sample
            assert torch.equal(nfe, (start == 7).sum(1) + 1) and len(calls) == 3 + 4 * 4
        if sampler == "fixed":
            blocks = F.pad(start == 7, (0, 1), value=True).view(12, 5, 4).sum(2).clamp(max=2).sum(1)
            assert torch.equal(nfe, blocks)
        again, _ = model.generate(start, steps, sampler, generator=gen(1))
        assert torch.equal(x, again)
    xi = sample_gumbel((12, 20, 7), gen()) if noise else None
    padded = F.pad(start, (0, 1), value=7)
    kw = dict(sampler="fixed", order="left_to_right", greedy=True)
    together, nfe = model.generate(padded, 3, noise=xi, **kw)
    for i in range(12):
        alone, n = model.generate(padded[i:i + 1], 3, noise=None if xi is None else xi[i:i + 1], **kw)
        assert torch.equal(alone[0], together[i]) and n[0] == nfe[i]
    if noise:
        model.generate(start, 2, tau=0.5, top_p=0.9, resample_noise=True, generator=gen())
    for a, b in ((1, 9), (5, 14)):                         # a prompt, and text between masks, in one row of the batch
        long = all_masked(3, 19)
        long[1, a:b] = 1
        with pytest.raises(ValueError, match="window of 8"):
            model.generate(long, 1)
        long[1, b - 1] = 7
        model.generate(long, 1)
    long[:, 3:] = 1                                        # nothing is drawn after it: any length, no call
    assert (model.generate(long, 1, generator=gen())[1] == 1).all()
    with pytest.raises(ValueError, match="BOS"):
        model.generate(torch.full((1, 8), 7), 1)
    with pytest.raises(ValueError, match="divide"):
        BD3LM(7, 8, 6, block_size=3)
    with pytest.raises(ValueError, match="clean"):
        MDLM.log_probs(model, start[:, :8], xi)


@pytest.mark.parametrize("noise", [None, "gumbel"])
@pytest.mark.parametrize("cached", [True, False])
def test_rows_end_at_eos(noise, cached):
    """Up to its first EOS a row is what it is without stopping, after it all is EOS, and costs nothing."""
    model = tiny_blocks(noise, L=8, block_size=2)
    model.transformer.head.bias.data[6] -= 0.3 if noise else 0.0                        # so that some rows get far
    start, kw = all_masked(60, 40), dict(greedy=True, cached=cached)
    kw["noise"] = sample_gumbel((60, 40, 7), gen()) if noise else None
    if not noise:                                          # greedy rows would all be the same: vary the prompt
        start[:, 1:4] = rows_of(60, L=4)[:, 1:]
    free, all_nfe = model.generate(start, 1, **kw)
    x, nfe = model.generate(start, 1, **kw, stop_at_eos=True)
    ends = 0
    assert torch.equal(free[start != 7], start[start != 7])
    for i in range(60):
        eos = ((free[i] == 6) & (start[i] == 7)).nonzero().flatten()
        if len(eos):
            ends += 10 < int(eos[0]) < 38
            assert torch.equal(x[i, :eos[0]], free[i, :eos[0]]) and (x[i, eos[0]:] == 6).all()
            assert nfe[i] == all_nfe[i] - (19 - eos[0] // 2)
        else:
            assert torch.equal(x[i], free[i]) and nfe[i] == all_nfe[i]
    assert ends > 5 or noise is None


@pytest.mark.parametrize("K,clip", [(4, (0.3, 0.8)), (4, (0.6, 1.0)), (8, (1e-3, 0.5)), (3, (0.45, 0.55)),
                                    (1, (1.0, 1.0))])
def test_clipped_masks_have_the_law_of_redrawing(K, clip):
    """Against the ancestors' loop: redraw a block until its masked fraction lies in the window (BOS not counted)."""
    n, L = 20_000, 2 * K
    t = torch.full((n, 2), min(0.7, clip[1]) if K > 1 else 1.0)
    a, b = clipped_mask(t, L, clip, gen(1)).view(n, 2, K), torch.zeros(n, 2, K, dtype=torch.bool)
    g, todo = gen(2), torch.ones(n, 2, dtype=torch.bool)
    free = torch.ones(2, K, dtype=torch.bool)
    free[0, 0] = False
    low = 0 if clip[0] <= 1e-3 else clip[0]
    possible = torch.tensor([any(low <= m / f <= clip[1] for m in range(f + 1)) if f else False
                             for f in free.sum(1).tolist()])
    while todo.any():
        new = (torch.rand(n, 2, K, generator=g) < t[:, :, None]) & free
        b = torch.where(todo[:, :, None], new, b)
        share = b.sum(2) / free.sum(1).clamp(min=1)
        todo = ((share < low - 1e-6) | (share > clip[1] + 1e-6)) & possible
    assert not a[:, 0, 0].any()
    for block in range(2):
        keys = [(m[:, block] * 2 ** torch.arange(K)).sum(1).bincount(minlength=2 ** K).double() for m in (a, b)]
        seen = (keys[0] + keys[1]) > 0
        if seen.sum() > 1:
            assert stats.chi2_contingency(torch.stack([k[seen] for k in keys]).numpy()).pvalue > 1e-4
        else:
            assert torch.equal(keys[0], keys[1])


def test_windows_and_levels_of_a_clipped_schedule():
    windows = bd3lm.clip_windows(4)
    assert len(windows) == 64 == len(set(windows)) and windows[0] == (1e-3, 1.0) and (0.45, 0.95) in windows
    assert {round(b - a, 3) for a, b in windows[1:] if a > 1e-3} == {w / 100 for w in range(50, 95, 5)}
    assert bd3lm.clip_windows(1) == [(1e-3, 1.0), (1.0, 1.0)]
    t = stratified_t(1000, np.random.default_rng(0), 0.0, 0.3, 0.8).sort()[0]
    assert 0.3 <= t[0] and t[-1] <= 0.8 and (t.diff() - 0.0005).abs().max() < 1e-6
    assert train.parse_clip("0,0.5") == (1e-3, 0.5) and train.parse_clip("1,1") == (1.0, 1.0)


def test_blocks_get_the_same_noise_levels_on_average():
    """Stratified over batch x blocks in a random order: no position gets systematically more noise."""
    t = torch.stack([stratified_t(8, np.random.default_rng([0, i])).view(2, 4) for i in range(4000)])
    assert (t.mean((0, 1)) - 0.5).abs().max() < 0.02


# ---------------------------------------------------------------------------------------------------------------------
# medusa.py

def tiny_heads(noise=None, V=7, L=12, seed=0, heads=3, std=0.3, **kw):
    """Random heads on a random backbone."""
    torch.manual_seed(seed)
    ar = tiny_ar(V, L, seed)
    model = randomise(Medusa(V, L, V - 1, 32, heads, noise=noise, bias=True, **kw), seed, std=std)
    return model.attach(ar)


@pytest.mark.parametrize("noise", [None, "gumbel"])
def test_heads_start_as_the_backbone(noise):
    model = Medusa(7, 12, 6, 32, noise=noise, bias=True).attach(tiny_ar(7, 12), start=True)
    x, xi = rows_of(3, L=12), sample_gumbel((3, 16, 7), gen())
    logp = model.log_probs(x, xi if noise else None)
    assert logp.shape == (3, 12, 4, 7)
    assert torch.allclose(logp, model.backbone.log_probs(x)[:, :, None].expand_as(logp), atol=1e-5)
    assert not any("backbone" in name for name in model.state_dict())


def test_heads_are_their_formula():
    """Each (j, k) by itself: the transformer run on e_{j+1} .. e_{j+1+k} alone, then a + SiLU(U a + b), then W."""
    model, x, xi = tiny_heads("gumbel"), rows_of(2, L=12), sample_gumbel((2, 16, 7), gen(1))
    h, W = model.backbone.hidden(x), model.noise_embed.weight
    got = model.log_probs(x, xi)
    e = xi.softmax(-1) @ W.t()
    for j in (0, 4, 11):
        assert torch.allclose(got[:, j, 0], model.backbone.log_probs(x)[:, j], atol=1e-5)
        for k in (1, 2, 3):
            a = h[:, j] + model.accumulator(e[:, j + 1:j + 2 + k])[:, -1]
            fc, out = model.heads[k - 1].fc, model.heads[k - 1].out
            u = a @ fc.weight.t() + fc.bias
            z = (a + u * torch.sigmoid(u)) @ out.weight.t() + out.bias
            assert torch.allclose(got[:, j, k], z.log_softmax(-1), atol=1e-5), (j, k)
    plain = tiny_heads()
    a = plain.backbone.hidden(x)[:, 3]
    z = plain.heads[1].out(a + F.silu(plain.heads[1].fc(a)))
    assert torch.allclose(plain.log_probs(x)[:, 3, 2], z.log_softmax(-1), atol=1e-5)


def test_heads_read_the_noise_of_their_own_positions_only():
    """Head k at j: the noise of j + 1 .. j + 1 + k, no later one, none of the past, and no token after j."""
    model, x, xi = tiny_heads("gumbel"), rows_of(1, L=12), sample_gumbel((1, 16, 7), gen(1))
    full = model.log_probs(x, xi)
    for i in range(16):
        other = xi.clone()
        other[:, i] = sample_gumbel((7,), gen(2))
        changed = (model.log_probs(x, other) != full).any(-1)[0]                                        # (L, K + 1)
        for j in range(12):
            for k in range(4):
                assert bool(changed[j, k]) == (k > 0 and j + 1 <= i <= j + 1 + k), (i, j, k)
    y = x.clone()
    y[0, 7] = (y[0, 7] + 1) % 6
    changed = (model.log_probs(y, xi) != full).any(-1)[0]
    assert not changed[:7].any() and changed[7:].all()


@pytest.mark.parametrize("noise", [None, "gumbel"])
def test_heads_loss_is_the_cross_entropy_at_their_offsets(noise, monkeypatch):
    """Against log_probs, position by position; with noise drawn by the loss and with the same noise extracted before;
    whatever the chunks, gradients included."""
    model, x = tiny_heads(noise), rows_of(4, L=12)
    xi = extract_parallel(model.backbone, x, gen(5)) if noise else None
    logp = model.log_probs(x, xi)
    want = [-torch.stack([logp[range(4), j, k, x[:, j + 1 + k]] for j in range(12 - 1 - k)]).mean().detach()
            for k in (1, 2, 3)]
    grads = []
    for values in (gumbel.CHUNK, 50):
        monkeypatch.setattr(gumbel, "CHUNK", values)
        monkeypatch.setattr(mdlm, "CHUNK", values)
        loss, parts = model.loss(x, generator=gen(5)) if values > 50 else model.loss(x, xi)
        assert torch.allclose(loss, sum(want) / 3, atol=1e-5)
        assert [round(v, 4) for v in parts.values()] == [round(float(w), 4) for w in want]
        assert list(parts) == ["nll_head1", "nll_head2", "nll_head3"]
        model.zero_grad()
        loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.allclose(*grads, atol=1e-5) and (grads[0] != 0).float().mean() > 0.5
    assert all(p.grad is None for p in model.backbone.parameters())


def test_each_head_learns_its_own_offset():
    """A row of independent tokens, but x_7 = x_5, x_13 = x_10, x_20 = x_16, on a backbone that sees one token: only
    head 1 at 5, head 2 at 10 and head 3 at 16 can know better than chance. (In this family the first head has been left
    untrained, and the last ignored, more than once.)"""
    torch.manual_seed(0)
    V, L, pairs = 6, 22, {(5, 1): 7, (10, 2): 13, (16, 3): 20}

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
        loss, _ = model.loss(rows(64, step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = rows(400, 1000)
    logp = model.log_probs(x)
    for k in (1, 2, 3):
        for j in range(L - 1 - k):
            nll = -logp[range(400), j, k, x[:, j + 1 + k]].mean()
            assert nll < 0.3 if (j, k) in pairs else nll > math.log(V - 1) - 0.1, (j, k, nll)


@pytest.mark.parametrize("kind", ["ar", "gpt2", "hf"])
@pytest.mark.parametrize("noise", [None, "gumbel"])
def test_exact_acceptance_is_the_backbone_alone(noise, kind, tmp_path):
    """With heads that know nothing: token for token what the backbone draws with the same noise, and its argmax under
    greedy acceptance; with and without cache, in a batch and row by row; up to the last position the backbone has."""
    model, L = tiny_heads(noise), 12
    if kind == "gpt2":
        model.attach(randomise(GPT2(7, L, 6, 2, 32, 2, 0.0), std=1.0).requires_grad_(False))
    elif kind == "hf":
        transformers = pytest.importorskip("transformers", reason="pip install transformers")
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(transformers.LlamaConfig(
            vocab_size=7, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            bos_token_id=6, initializer_range=0.5, max_position_embeddings=L)).save_pretrained(tmp_path)
        model.attach(HF(str(tmp_path)))
    start, xi = rows_of(9, L=3), sample_gumbel((9, L, 7), gen(1))
    paces = set()
    for kw in (dict(), dict(tau=0.7, top_p=0.8)):
        want, _ = model.backbone.generate(start, L, noise=xi, **kw)
        for cached in (True, False):
            x, nfe, verified, accepted = model.decode(start, L, accept="exact", noise=xi, cached=cached, **kw)
            assert torch.equal(x, want), cached
        alone = [model.decode(start[i:i + 1], L, accept="exact", noise=xi[i:i + 1], **kw) for i in range(9)]
        for got, parts in zip((x, nfe, verified, accepted), zip(*alone)):
            assert torch.equal(got, torch.cat(parts))
        paces |= set(nfe.tolist())
        assert (verified[:, 0] > 0).all() and (accepted <= verified).all()
        assert (verified[:, 1:] == accepted[:, :-1]).all()
    assert len(paces) > 1 and max(paces) <= L - 3                               # some candidates were right, by chance
    want, _ = model.backbone.generate(start, L, greedy=True)
    assert torch.equal(model.decode(start, L, accept="greedy")[0], want)
    for length in (3, 4, 5):                                # nothing to write, one token, two
        x, nfe, *_ = model.decode(start, length, accept="exact", noise=xi)
        assert torch.equal(x, model.backbone.generate(start, length, noise=xi)[0]) and (nfe == min(length - 3, 2)).all()


def test_noise_of_undecided_positions_is_kept():
    """Fresh noise, exact acceptance: the joint law of the text is the backbone's, whatever the heads propose; it would
    not be if a rejected candidate's position drew new noise (it would then avoid the candidate)."""
    V, L = 4, 5
    model = tiny_heads("gumbel", V, L, std=1.0)
    x, nfe = model.generate(torch.full((30_000, 1), V - 1), accept="exact", generator=gen(1))
    assert len(nfe.unique()) > 1
    rows = torch.cartesian_prod(*[torch.arange(V)] * (L - 1))
    rows = torch.cat([torch.full((len(rows), 1), V - 1), rows], 1)
    with torch.no_grad():
        p = model.backbone.log_probs(rows[:, :-1]).gather(-1, rows[:, 1:, None]).sum((1, 2)).exp().double()
    count = torch.bincount((x[:, 1:] * V ** torch.arange(L - 2, -1, -1)).sum(1), minlength=len(rows))
    order = p.argsort()
    parts = [order[i::32] for i in range(32)]               # cells large enough for a chi-squared test
    assert abs(p.sum() - 1) < 1e-4
    want = np.array([p[i].sum() for i in parts]) * 30_000
    assert stats.chisquare([int(count[i].sum()) for i in parts], want / want.sum() * 30_000).pvalue > 1e-4
    top = order[-8:]
    assert stats.chisquare(count[top].double() / count[top].sum() * 1000, p[top] / p[top].sum() * 1000).pvalue > 1e-4


def decode_by_hand(model, x, T, tau, top_p, accept, epsilon, delta, xi):
    """One row, no cache, written from METHOD: prompt x (list), noise xi [T, V] -> (tokens, nfe, verified, accepted)."""
    backbone, K, V = model.backbone, len(model.heads), xi.shape[1]
    x, nfe, verified, accepted = list(x), 0, [0] * K, [0] * K

    def distribution(z):
        p = (z / tau).double().softmax(-1).numpy()
        order, inside, mass = np.argsort(-p, kind="stable"), np.zeros(V, dtype=bool), 0.0
        for i in order:
            if mass < top_p:
                inside[i], mass = True, mass + p[i]
        return p * inside / p[inside].sum()

    def choose(z, noise):
        return int(z.argmax()) if accept == "greedy" else int(np.argmax(
            np.log(np.where((p := distribution(z)) > 0, p, 1)) + np.where(p > 0, noise.double().numpy(), -np.inf)))
    h = backbone.hidden(torch.tensor([x]))[0]
    nfe, h = 1, h[-1]
    while len(x) < T:
        p, proposals = len(x), []
        for k in range(1, K + 1):
            a = h
            if model.noise_embed is not None:
                rows = [xi[i] if i < T else torch.zeros(V) for i in range(p, p + 1 + k)]
                e = torch.stack([(tau * r).softmax(-1) for r in rows]) @ model.noise_embed.weight.t()
                a = a + model.accumulator(e[None])[0, -1]
            z = model.heads[k - 1].out(a + F.silu(model.heads[k - 1].fc(a)))
            proposals.append(int(z[:V - (not model.config.predict_bos)].argmax()))  # BOS is the last id
        x.append(choose(backbone.logits(h), xi[p]))
        if len(x) == T:
            break
        states, whole = backbone.hidden(torch.tensor([(x + proposals)[:T]]))[0], p + K < T
        nfe += 1
        for k, candidate in enumerate(proposals):
            if p + 1 + k == T:
                break
            z = backbone.logits(states[p + k])
            q = distribution(z)
            ok = (candidate == choose(z, xi[p + 1 + k]) if accept != "typical" else
                  q[candidate] > min(epsilon, delta * math.exp(sum(v * math.log(v) for v in q if v > 0))))
            verified[k] += whole
            if not ok:
                break
            accepted[k] += whole
            x.append(candidate)
        h = states[len(x) - 1]
    return x, nfe, verified, accepted


@pytest.mark.parametrize("accept", ["typical", "exact", "greedy"])
@pytest.mark.parametrize("noise", [None, "gumbel"])
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
        start, xi = rows_of(6, L=P, seed=seed), sample_gumbel((6, T, 7), gen(seed))
        xi = torch.zeros_like(xi) if accept == "greedy" else xi
        kw = dict(length=T, tau=tau, top_p=top_p, accept=accept, epsilon=0.2, delta=0.6)
        for cached in (True, False):
            got = [t.tolist() for t in model.decode(start, noise=xi, cached=cached, **kw)]
            for row, *rest in zip(start.tolist(), xi, *got):
                want = decode_by_hand(model, row, T, tau, top_p, accept, 0.2, 0.6, rest[0])
                assert tuple(rest[1:]) == want, (seed, cached)
        counts += np.array(got[2:]).sum(1)
        if accept == "greedy":
            assert [t.tolist() for t in model.decode(start, **kw)] == got
    assert (0 < counts[1, :2]).all() and (counts[1] < counts[0]).all(), counts


def test_typical_acceptance_in_its_limits():
    """Everything is accepted; nothing is, and the text is then the backbone's own."""
    model, start, xi = tiny_heads("gumbel"), rows_of(5, L=2), sample_gumbel((5, 12, 7), gen(1))
    x, nfe, verified, accepted = model.decode(start, 12, epsilon=0.0, noise=xi)
    assert torch.equal(verified, accepted) and (nfe == 4).all()                 # prompt, 4 + 4 tokens, 1 + 1
    x, nfe, verified, accepted = model.decode(start, 12, epsilon=1.0, delta=1e9, noise=xi)
    assert accepted.sum() == 0 and (nfe == 10).all() and torch.equal(x, model.backbone.generate(start, 12, noise=xi)[0])
    assert acceptance_row(verified.numpy(), accepted.numpy())["head2"] is None


def test_decoding_bad_input():
    model, start = tiny_heads(), rows_of(2, L=3)
    for kw, words in ((dict(accept="always"), "accept"), (dict(tau=0), "tau"), (dict(top_p=0), "top_p"),
                      (dict(length=13), "backbone"), (dict(length=2), "prompt")):
        with pytest.raises(ValueError, match=words):
            model.generate(start, **kw)
    with pytest.raises(ValueError, match="too short"):
        Medusa(7, 4, 6, 32, heads=3)
    with pytest.raises(ValueError, match="width 32"):
        model.attach(AR(7, 12, 6, n_layer=1, n_embd=16, n_head=1))
    with pytest.raises(ValueError, match="without noise"):
        model.log_probs(start, sample_gumbel((2, 3, 7)))


def test_what_the_noise_buys():
    """A language small enough to enumerate: under exact acceptance, heads without noise reach what the true marginals
    give them (head 1: max_x q(x)) and no more, heads with noise pass it on their way to 1."""
    V, L, K = 4, 8, 2
    torch.manual_seed(0)
    ar = randomise(AR(V, L, V - 1, n_layer=2, n_embd=32, n_head=2, dropout=0.0, predict_bos=False), std=1.0)
    ar.requires_grad_(False)
    rows = torch.cartesian_prod(*[torch.arange(V - 1)] * (L - 1))
    rows = torch.cat([torch.full((len(rows), 1), V - 1), rows], 1)
    p = ar.log_probs(rows[:, :-1]).gather(-1, rows[:, 1:, None]).sum((1, 2)).exp().double()
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
            optimizer.zero_grad()
            model.loss(x, generator=gen(step))[0].backward()
            optimizer.step()
            optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / 400)
        _, _, v, a = model.eval().decode(torch.full((4000, 1), V - 1), accept="exact", generator=gen(1))
        got[noise] = acceptance_row(v.numpy(), a.numpy())
    print(f"\nacceptance of heads 1, 2 under exact acceptance: best without noise {best.round(3)}, "
          f"trained without {got[None]}, with {got['gumbel']}")
    for k in (1, 2):
        error = 4 * got[None][f"head{k}_stderr"]
        assert got[None][f"head{k}"] < best[k - 1] + error and got["gumbel"][f"head{k}"] > best[k - 1] + error


def test_perfect_heads_and_errors():
    """The enumeration against a decoder whose heads are the true marginals; the error of a ratio against a bootstrap.
    """
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 3, (60, 7))
    v, a = perfect_heads(rows, 2, start=1)
    for row, vr, ar in zip(rows, v, a):
        p, seen, taken = 1, [0, 0], [0, 0]
        while p + 2 < 7:
            fit = [r for r in rows if list(r[:p]) == list(row[:p])]
            step = 1
            for k in (1, 2):
                seen[k - 1] += 1
                counts = [sum(r[p + k] == x for r in fit) for x in range(3)]
                if counts.index(max(counts)) != row[p + k]:
                    break
                taken[k - 1] += 1
                step += 1
            p += step
        assert list(vr) == seen and list(ar) == taken
    b = rng.integers(1, 20, 400)
    a = rng.binomial(b, 0.3 + 0.4 * (b > 10))               # a long prompt accepts more
    r, error = scores.ratio_with_error(a, b)
    draws = [(a[i].sum() / b[i].sum()) for i in rng.integers(0, 400, (2000, 400))]
    assert r == a.sum() / b.sum() and abs(error / np.std(draws) - 1) < 0.1


# ---------------------------------------------------------------------------------------------------------------------
# teacher.py: parallel and sequential extraction

def test_ar_samples_follow_its_probabilities():
    model = tiny_ar(V=4, L=3)
    x, nfe = model.generate(torch.full((60_000, 1), 3), generator=gen())
    assert (nfe == 2).all() and (x[:, 0] == 3).all()
    pairs = torch.tensor(list(itertools.product(range(4), repeat=2)))
    logp = model.log_probs(torch.cat([torch.full((16, 1), 3), pairs], 1))
    p = (logp[:, 0].gather(1, pairs[:, :1]) + logp[:, 1].gather(1, pairs[:, 1:])).squeeze(1).double().exp()
    assert abs(p.sum() - 1) < 1e-6
    assert stats.chisquare(torch.bincount(x[:, 1] * 4 + x[:, 2], minlength=16).numpy(),
                           (60_000 * p / p.sum()).detach().numpy()).pvalue > 1e-4
    prompt = torch.tensor([[3, 1]]).expand(50, 2)
    y, nfe = model.generate(prompt, generator=gen())
    assert (y[:, 1] == 1).all() and (nfe == 1).all()
    cold, _ = model.generate(prompt, tau=1e-3, generator=gen())
    assert torch.equal(cold, model.generate(prompt, greedy=True)[0])
    with pytest.raises(ValueError, match="prompt"):
        model.generate(torch.full((1, 4), 3))
    with pytest.raises(ValueError, match="tau"):
        model.generate(prompt, tau=0)


def test_sequential_extraction_is_reproduced_by_its_noise():
    teacher = tiny_ar()
    x, noise = extract_sequential(teacher, 500, generator=gen())
    assert (noise[:, 0] == 0).all()
    logits = teacher.log_probs(x[:, :-1])
    assert (gumbel_max(logits, noise[:, 1:]) == x[:, 1:]).float().mean() > 0.999


class CountingTeacher:
    """The exact AR model of the maze: next-token probabilities by counting prefixes among the 2000 paths."""
    vocab_size, bos, length = 6, 5, 11

    def __init__(self, rows):
        self.exact = ExactDenoiser(rows.astype(np.int64), 6)

    def hidden(self, tokens, cache=None):
        out = []
        for i in range(tokens.shape[1]):
            x = torch.full((len(tokens), 10), 6)
            x[:, :i] = tokens[:, 1:i + 1]
            out.append(self.exact.hidden(x)[:, min(i, 9)])
        return torch.stack(out, 1)

    def logits(self, h):
        return h


def test_parallel_on_teacher_text_equals_sequential_extraction():
    """The same joint law of (text, noise), on the maze with the exact teacher: two-sample tests given the text."""
    teacher, n = CountingTeacher(maze_paths()), 20_000
    # sequential: ancestral sampling, noise recorded (the loop of `AR.generate`, without a cache)
    x, noise = torch.full((n, 1), 5), sample_gumbel((n, 11, 6), gen())
    for i in range(1, 11):
        x = torch.cat([x, gumbel_max(teacher.hidden(x)[:, -1], noise[:, i])[:, None]], 1)
    assert maze_valid(x[:, 1:].numpy()).all()
    counts = np.unique(maze_keys(x[:, 1:].numpy()), return_counts=True)[1]
    assert len(counts) > 1990 and stats.chisquare(np.append(counts, [0] * (2000 - len(counts)))).pvalue > 1e-4
    again = extract_parallel(teacher, x, gen(1))           # the noise redrawn, given the text
    noise[:, 0] = 0
    for i in (1, 3, 6, 8, 10):
        for token in range(5):
            at = x[:, i] == token
            if at.sum() < 200:
                continue
            for k in range(6):
                assert stats.ks_2samp(noise[at, i, k].numpy(), again[at, i, k].numpy()).pvalue > 1e-5, (i, token, k)
    # independent across positions, in both: correlation of the winner's noise at neighbours
    for xi in (noise, again):
        w = xi.gather(-1, x[:, :, None]).squeeze(-1)[:, 1:9]
        assert (torch.corrcoef(w.T)
                - torch.corrcoef(noise.gather(-1, x[:, :, None]).squeeze(-1)[:, 1:9].T)).abs().max() < 0.05
        flat = xi[:, 1:].reshape(n, -1)
        assert (torch.corrcoef(flat.T) - torch.eye(flat.shape[1])).abs().max() < 6 / math.sqrt(n)


# ---------------------------------------------------------------------------------------------------------------------
# the paper in four lines: two tokens, always equal

def test_two_token_toy_through_mdlm():
    """x1 = x2 uniform on K values. A perfect plain denoiser at NFE 1 is 1 - 1/K in total variation from the truth; the
    Gumbel student, trained here in seconds, must come close to 0."""
    K, n = 8, 20_000

    def tv(x):
        joint = torch.bincount(x[:, 0] * K + x[:, 1], minlength=K * K).double() / len(x)
        return 0.5 * float((joint - torch.eye(K).flatten() / K).abs().sum())
    pairs = np.stack([np.arange(K)] * 2, 1)
    exact = ExactDenoiser(pairs, K)
    x = torch.full((n, 2), K)
    plain = tv(unmask(x, revealing_path(reveal_steps(x == K, 1, generator=gen())), K, exact, generator=gen(1))[0])

    class Teacher:                                         # exact: x1 uniform, x2 = x1
        def posterior_logits(self, tokens, masked):
            logits = torch.zeros(*masked.shape, K + 1)
            logits[:, 2] = torch.where(torch.arange(K + 1) == tokens[:, 1:2], 0.0, -math.inf)
            logits[..., K] = -math.inf                     # BOS
            rows = logits[masked]
            return lambda a, b: rows[a:b]
    torch.manual_seed(0)
    model = MDLM(K + 1, 3, K, n_layer=2, n_embd=64, n_head=2, dropout=0.0, noise="gumbel", predict_bos=False)
    optimizer, g = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.0), gen(2)
    steps = 1000
    for step in range(steps):
        x1 = torch.randint(K, (256, 1), generator=g)
        tokens = torch.cat([torch.full((256, 1), K), x1, x1], 1)
        loss, _ = model.loss(tokens, stratified_t(256, np.random.default_rng(step)), Teacher(), generator=g)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.step()
    start = torch.tensor([[K, K + 1, K + 1]]).expand(n, 3)
    x, nfe = model.generate(start, 1, greedy=True, generator=gen(3))
    student = tv(x[:, 1:])
    print(f"\ntwo equal tokens, uniform on {K} values, one network call; total variation from the truth:\n"
          f"  perfect plain denoiser   {plain:.3f}   (theory: 1 - 1/{K} = {1 - 1 / K:.3f})\n"
          f"  trained Gumbel student   {student:.3f}")
    assert abs(plain - (1 - 1 / K)) < 0.02 and (nfe == 1).all()
    assert student < 0.05


# ---------------------------------------------------------------------------------------------------------------------
# GPT-2, other teachers, and weights from other projects

def save_gpt2(folder, V=301, L=40, spelling="plain", config=True, safetensors=True):
    """A randomly initialised GPT-2 of `transformers`, saved in `folder` -> the transformers model."""
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    torch.manual_seed(0)
    lm = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_layer=2, n_embd=128, n_head=2, vocab_size=V, n_positions=L, bos_token_id=V - 1, eos_token_id=V - 1)).eval()
    for name, p in lm.named_parameters():
        torch.nn.init.normal_(p, mean=1.0 if "ln_" in name and "weight" in name else 0.0, std=0.15)
    os.makedirs(folder, exist_ok=True)
    state = dict(lm.state_dict())
    if spelling == "plain":                               # as the openai-community files: no prefix, no head, buffers
        state = {k.removeprefix("transformer."): v for k, v in state.items() if k != "lm_head.weight"}
        state |= {f"h.{i}.attn.bias": torch.ones(1, 1, L, L).tril() for i in range(2)}
    else:
        state |= {f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    if safetensors:
        pytest.importorskip("safetensors.torch").save_file({k: v.clone() for k, v in state.items()},
                                                           f"{folder}/model.safetensors", {"format": "pt"})
    else:
        torch.save(state, f"{folder}/pytorch_model.bin")
    if config:
        lm.config.save_pretrained(folder)
    return lm


@pytest.mark.parametrize("spelling,config,safetensors", [("plain", True, True), ("plain", False, False),
                                                         ("prefixed", True, False), ("prefixed", False, True)])
def test_gpt2_equals_transformers(tmp_path, spelling, config, safetensors):
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


def test_gpt2_sizes_and_download(tmp_path, monkeypatch):
    """The four published sizes; a name is downloaded once, to the folder that the variable names."""
    import teacher
    assert {k: round(12 * n * d * d / 1e6) for k, (n, d, _) in teacher.GPT2_SIZES.items()} == {
        "gpt2": 85, "gpt2-medium": 302, "gpt2-large": 708, "gpt2-xl": 1475}
    save_gpt2(tmp_path / "source")
    calls = []

    def download(url, dst, **kw):
        calls.append(url)
        shutil.copy(tmp_path / "source" / "model.safetensors", dst)
    monkeypatch.setenv("GUMBEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        assert GPT2.from_pretrained("gpt2-large").vocab_size == 301
    assert len(calls) == 1 and "gpt2-large" in calls[0] and calls[0].startswith("https://")
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *a: (_ for _ in ()).throw(OSError("no route")))
    with pytest.raises(OSError, match="could not download gpt2-xl.*no route"):
        GPT2.from_pretrained("gpt2-xl")


def test_gpt2_bad_files(tmp_path):
    lm = save_gpt2(tmp_path / "a")
    path = tmp_path / "a" / "model.safetensors"
    good = path.read_bytes()
    header = int.from_bytes(good[:8], "little")
    for bad in (good[:-5], good[:100], b"", good[:8] + b"x" + good[9:], (1 << 60).to_bytes(8, "little") + good[8:],
                good.replace(b'"F32"', b'"F99"', 1), good.replace(b"[301,128]", b"[128,301,9]"[:9], 1),
                b"\x02" + bytes(7) + b"[]", good[:8] + good[8:8 + header].replace(b"data_offsets", b"data_offse**")):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="no GPT-2"):
            GPT2.from_pretrained(str(tmp_path / "a"))
    os.remove(path)
    with pytest.raises(ValueError, match="neither model.safetensors nor pytorch_model.bin"):
        GPT2.from_pretrained(str(tmp_path / "a"))
    (tmp_path / "a" / "pytorch_model.bin").write_bytes(b"no torch file")
    with pytest.raises(ValueError, match="not a readable torch file"):
        GPT2.from_pretrained(str(tmp_path / "a"))
    state = dict(lm.state_dict())
    for change, words in (({"transformer.h.0.attn.c_attn.weight": None}, "Missing key"),
                          ({"transformer.h.0.extra.weight": torch.zeros(2)}, "unknown weight h.0.extra"),
                          ({"transformer.ln_f.weight": torch.zeros(3)}, "size mismatch")):
        with pytest.raises(ValueError, match=words):
            GPT2.from_state({k: v for k, v in (state | change).items() if v is not None}, {})
    with pytest.raises(ValueError, match="activation_function"):
        GPT2.from_state(state, {"activation_function": "relu"})


def test_evaluation_of_an_ar_model_has_a_float32_head():
    ar, rows = tiny_ar(), rows_of(64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        h = ar.hidden(rows[:, :-1]).float()
        want = F.cross_entropy(ar.logits(h).flatten(0, 1), rows[:, 1:].flatten())
        assert torch.equal(ar.eval().loss(rows)[0], want) and not torch.equal(ar.train().loss(rows)[0], want)


def test_teacher_body_in_bfloat16_keeps_a_float32_head(tmp_path):
    save_gpt2(tmp_path)
    model = GPT2.from_pretrained(str(tmp_path))
    x = torch.randint(301, (2, 20), generator=gen())
    want = model.log_probs(x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model.body_to_bfloat16()
        h = model.hidden(x)
        logits = model.posterior_logits(x, torch.ones_like(x, dtype=torch.bool).index_fill(1, torch.tensor(0), False))
        assert logits(0, 5).dtype == torch.float32
        got = model.logits(h)
    assert model.transformer.embed.weight.dtype == torch.float32 == model.transformer.head.weight.dtype
    assert model.transformer.blocks[0].fc.weight.dtype == torch.bfloat16
    # the head is exact on the h it gets; the bf16 body costs a few per cent of the logits' scale
    assert torch.allclose(got, h.float() @ model.transformer.embed.weight.T, atol=1e-5)
    assert 0 < (got.log_softmax(-1) - want).abs().mean() < 0.05 * want.std()


def test_hugging_face_teacher(tmp_path, cli, monkeypatch, text_file):
    """Any causal LM: its logits; shards with its tokenizer; a student trained on both; what does not fit is refused."""
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    tokenizers = pytest.importorskip("tokenizers")
    torch.manual_seed(0)
    lm = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=120, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2)).eval()
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.train_from_iterator([" ".join(DOCS)], tokenizers.trainers.BpeTrainer(
        vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"]))
    n = bpe.get_vocab_size() + 3                           # padded, as many models are
    lm.resize_token_embeddings(n)
    lm.save_pretrained(tmp_path / "lm")
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>").save_pretrained(
        tmp_path / "lm")
    model = HF(str(tmp_path / "lm"))
    x = torch.randint(n, (2, 30), generator=gen())
    with torch.no_grad():
        want = lm(x).logits
        assert (model.logits(model.hidden(x)) - want).abs().max() < 1e-5
        cache = model.new_cache(2, 30)
        assert (torch.cat([model.logits(model.hidden(p, cache)) for p in x.split([9, 1, 20], 1)], 1)
                - want).abs().max() < 1e-4
    assert (model.vocab_size, model.bos, model.length) == (n, 1, 64)
    monkeypatch.chdir(tmp_path)
    assert cli(prepare, f"text --files {text_file} --tokenizer=hf:lm --out=data/mine")[0] == 0
    meta, _ = read_meta("data/mine")
    assert (meta["tokenizer"], meta["vocab_size"], meta["bos"]) == ("hf:lm", n, 1)
    small = f"--data=data/mine --length=12 --steps=3 {TINY}"
    assert cli(train, f"--gumbel --teacher=hf:lm --out=out/a {small}")[0] == 0
    code, out, _ = cli(sample, "--ckpt=out/a --n=1 --steps=3")
    assert code == 0 and "sample 0" in out
    code, out, _ = cli(sample, "--ckpt=hf:lm --n=1 --length=9")
    assert code == 0 and "nfe 8" in out
    assert cli(prepare, f"text --files {text_file} --tokenizer=bytes --out=data/b")[0] == 0
    refused(cli(train, f"--gumbel --teacher=hf:lm --out=out/b {small.replace('mine', 'b')}"), "vocab_size", "257")
    refused(cli(train, f"--gumbel --teacher=hf:nowhere --out=out/b {small}"), "hf:nowhere", "cannot load")
    capped = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, final_logit_softcapping=0.5))
    capped.save_pretrained(tmp_path / "capped")
    with pytest.raises(ValueError, match="scales or caps"):
        HF(str(tmp_path / "capped"))


# ---------------------------------------------------------------------------------------------------------------------
# baselines: token-level distillation, starting from other weights, APD

@pytest.mark.parametrize("predict_bos", [True, False])
def test_token_kd_is_its_formula(monkeypatch, predict_bos):
    """loss = NELBO + kd * (1/t) sum KL(teacher(x_i | x_<i) || student(x_i | z)); in chunks too; finite gradients."""
    student, teacher = tiny(predict_bos=predict_bos), tiny_ar(predict_bos=predict_bos)
    rows, t = rows_of(5), torch.tensor([0.2, 0.5, 0.7, 0.9, 1.0])
    z = rows.masked_fill(torch.rand(rows.shape, generator=gen(1)) < 0.6, 7)
    z[:, 0] = rows[:, 0]
    p = student.log_probs(z)[..., :7]
    q = teacher.log_probs(rows)
    kl = torch.tensor(0.0)
    for b, i in (z == 7).nonzero().tolist():
        for k in range(7):
            if q[b, i - 1, k] > -math.inf:
                kl += q[b, i - 1, k].exp() * (q[b, i - 1, k] - p[b, i, k]) / t[b] / (5 * 5)
    plain = student.loss(rows, t, z=z)[0]
    grads = []
    for chunk in (1 << 22, 7):
        monkeypatch.setattr(mdlm, "CHUNK", chunk)
        loss, parts = student.loss(rows, t, teacher, z=z, kd=0.7)
        assert torch.allclose(loss, plain + 0.7 * kl, atol=1e-5) and kl > 0.1 and parts["kl_masked"] > 0
        student.zero_grad()
        loss.backward()
        grads.append([p.grad.clone() for p in student.parameters()])
        assert all(g.isfinite().all() for g in grads[-1])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*grads))


def test_student_from_an_ar_model_computes_what_it_did():
    """--init_from an AR checkpoint: made causal again, the student's row i is the AR model's row i - 1."""
    ar = tiny_ar()
    for noise in (None, "gumbel"):
        student = MDLM(**{k: v for k, v in vars(ar.config).items() if k != "predict_bos"}, noise=noise, shift=True)
        before = copy.deepcopy(student.state_dict())
        initial_weights(student, ar, "x")
        assert torch.equal(student.transformer.embed.weight[:-1], ar.transformer.embed.weight)
        assert torch.equal(student.transformer.embed.weight[-1], before["transformer.embed.weight"][-1])
        student.eval().transformer.causal = True
        rows = rows_of(4)
        g = torch.zeros(4, 6, 32) if noise else None
        got = student.logits(student.hidden(rows, g)).log_softmax(-1)
        assert torch.allclose(got[:, 1:], ar.log_probs(rows)[:, :-1], atol=1e-5)
    with pytest.raises(BadInput, match="another kind or shape"):
        initial_weights(tiny(V=8), ar, "x")
    plain, noisy = tiny(seed=1), tiny("gumbel")            # without the noise embedding, where there is no noise
    initial_weights(plain, noisy, "x")
    assert torch.equal(plain.transformer.head.weight, noisy.transformer.head.weight)


# ---------------------------------------------------------------------------------------------------------------------
# the scripts: run in this process unless a signal or several processes are what is tested

@pytest.fixture
def cli(capsys, monkeypatch):
    """cli(module, "flags") -> (exit code, stdout, stderr), as from a shell."""
    def run(module, flags):
        monkeypatch.setattr(sys, "argv", [module.__name__.split(".")[-1] + ".py", *flags.split()])
        capsys.readouterr()
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


TINY = ("--n_layer=1 --n_embd=16 --n_head=2 --batch_size=16 --warmup=2 "
        "--log_every=1 --eval_every=4 --eval_rows=40 --report=0")


@functools.cache                                         # once, whichever files the tests lie in
def maze_runs(root):
    root.mkdir()
    for flags in ("--model=ar", "--model=mdlm --gumbel", "--model=mdlm"):
        done = subprocess.run([sys.executable, f"{HERE}/train.py", "--data=maze", "--steps=6", "--save_every=3",
                               *TINY.split(), *flags.split()], cwd=root, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return root


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A folder with the maze, and with tiny runs on it: out/maze-ar, out/maze-mdlm-gumbel, out/maze-mdlm."""
    return maze_runs(tmp_path_factory.getbasetemp() / "maze_runs")


DOCS = ["First document.\nIt has two lines.", "Zwölf Boxkämpfer jagen Viktor — quer über den Sylter Deich.",
        "x" * 50 + " y\n\n  z", "fourth"]


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n<|endoftext|>\n".join(DOCS) + "\n", encoding="utf-8")
    return path


def same_dataset(a, b):
    files = sorted(os.listdir(a))
    return files == sorted(os.listdir(b)) and all(open(f"{a}/{f}", "rb").read().replace(b'"a"', b'"b"')
                                                  == open(f"{b}/{f}", "rb").read() for f in files)


def interrupt_after(monkeypatch, commits):
    """Make the writer's commit raise after it has done its work so many times."""
    commit, count = Writer.commit, []

    def stop(self, done):
        commit(self, done)
        count.append(done)
        if len(count) == commits:
            raise KeyboardInterrupt
    monkeypatch.setattr(Writer, "commit", stop)
    monkeypatch.setattr(prepare, "COMMIT", 1)


LONG = [f"Document {i}: " + " ".join(f"w{i * k % 97}" for k in range(60)) for i in range(400)]


# --- train.py

def test_defaults_are_the_papers_and_presets_give_way():
    args = train.parse(["--model=mdlm", "--gumbel", "--teacher=x"])
    assert (args.steps, args.batch_size, args.lr, args.warmup, args.schedule, args.ema, args.dropout, args.length) == (
        1_000_000, 512, 3e-4, 2500, "constant", 0.9999, 0.1, 1024)
    assert (args.n_layer, args.n_embd, args.n_head, args.data, args.out) == (
        12, 768, 12, "data/openwebtext", "out/openwebtext-mdlm-gumbel")
    args = train.parse(["--model=ar", "--data=maze_skewed", "--n_layer=3"])
    assert (args.n_layer, args.n_embd, args.length, args.data, args.out) == (
        3, 128, None, "data/maze_skewed", "out/maze_skewed-ar")
    args = train.parse(["--noise=uniform", "--data", "some/where"])
    assert args.gumbel and args.out == "out/where-mdlm-uniform" and args.data == "some/where"
    args = train.parse(["--data=lm1b", "--size=medium", "--n_head=8"])
    assert (args.length, args.n_layer, args.n_embd, args.n_head) == (128, 24, 1024, 8)
    args = train.parse(["--data=maze", "--size=tiny", "--n_layer=2", "--gumbel"])
    assert (args.length, args.n_layer, args.n_embd, args.t_one) == (None, 2, 256, 0.5)


@pytest.mark.parametrize("flags,words", [
    ("--model=gpt", ["--model", "'gpt'", "mdlm"]), ("--data=maze --size=huge", ["--size", "tiny"]),
    ("--noise=gauss", ["--noise", "gaussian"]),
    ("--data=nowhere --model=ar", ["data/nowhere", "prepare.py text"]), ("--lr=0 --data=maze", ["--lr", "above 0"]),
    ("--lr=fast", ["--lr", "not a number"]), ("--steps=0", ["--steps", "at least 1"]),
    ("--batch_size=0", ["--batch_size", "at least 1"]), ("--steps=1.5", ["--steps", "whole number"]),
    ("--model=ar --gumbel", ["--gumbel", "students"]), ("--inject=add", ["--inject", "--gumbel"]),
    ("--noise=unpaired --teacher=x", ["--teacher", "unpaired"]), ("--seed=-1", ["--seed", "at least 0"]),
    ("--data=maze --model=ar --out=out/maze-ar/ckpt.pt", ["--out=out/maze-ar/ckpt.pt", "run directory"]),
    ("--teacher=x", ["--teacher", "--gumbel"]), ("--teacher_cache=8", ["--teacher_cache", "noise from a teacher"]),
    ("--model=medusa --gumbel --teacher_cache=8", ["--teacher_cache", "masked"]),
    ("--data=maze --gumbel --teacher_cache=0", ["--teacher_cache", "at least 1"]),
    ("--n_embd=30 --n_head=4", ["--n_embd=30", "multiple"]), ("--batch 3", ["--batch"]),
    ("--dropout=2", ["--dropout", "at most 1"]),
    ("--data=maze --micro_batch_size=7 --out=out/new", ["--micro_batch_size=7", "divide"]),
    ("--data=maze --gumbel --teacher=nowhere --out=out/new", ["nowhere", "no checkpoint"]),
    ("--data=maze --gumbel --teacher=out/maze-mdlm --out=out/new", ["out/maze-mdlm", "--model=ar"]),
    ("--data=data/text --length=16 --gumbel --out=out/new", ["--teacher", "--model=ar"]),
    ("--data=data/text --length=16 --gumbel --teacher=out/maze-ar --out=out/new", ["vocab_size 6", "257"]),
    ("--data=data/text --length=4000", ["no train row", "--length"]),
    ("--data=openwebtext", ["data/openwebtext", "prepare.py openwebtext"]),
    ("--kd=token --gumbel", ["--kd", "without noise"]), ("--kd=sequence", ["--kd", "token"]),
    ("--kd=token --model=ar", ["--kd", "masked"]), ("--kd=token --model=medusa", ["--kd", "masked"]),
    ("--heads=2", ["--heads", "medusa"]), ("--model=medusa --heads=0", ["--heads", "at least 1"]),
    ("--model=medusa --n_layer=2", ["--n_layer", "--gumbel"]),
    ("--model=medusa --n_embd=64", ["--n_embd", "backbone"]), ("--model=medusa --t_one=0.5", ["--t_one", "masked"]),
    ("--model=medusa --gumbel --inject=add", ["--inject", "masked"]),
    ("--data=data/text --length=16 --model=medusa --out=out/new", ["--model=medusa", "--teacher", "--model=ar"]),
    ("--data=data/text --length=16 --model=medusa --teacher=out/maze-mdlm --out=out/x", ["maze-mdlm", "--model=ar"]),
    ("--data=maze --init_from=nowhere --out=out/new", ["nowhere", "no checkpoint"]),
    ("--data=maze --init_from=out/maze-ar --out=out/new", ["--init_from=out/maze-ar", "shape"]),
    ("--data=data/text --length=16 --kd=token --out=out/new", ["--teacher", "--model=ar"]),
    ("--data=maze --model=ar --n_layer=2", ["out/maze-ar", "other settings", "n_layer", "--out"]),
    ("--data=maze --model=ar --out=out/maze-mdlm", ["out/maze-mdlm", "other settings", "model"]),
])
def test_train_refuses_bad_input(runs, cli, monkeypatch, flags, words):
    """One sentence, exit code 2, before any work, and nothing overwritten."""
    monkeypatch.chdir(runs)
    if not os.path.exists("data/text"):
        Writer("data/text", {})
        writer = Writer("data/text", dict(name="text", tokenizer="bytes", row_length=None,
                                                  vocab_size=257, bos=256, predict_bos=True))
        for split in ("train", "val"):
            writer.write(split, np.arange(200) % 257)
        writer.finish()
    before = {p: os.stat(p).st_mtime_ns for d, _, files in os.walk("out") for p in [os.path.join(d, f) for f in files]}
    refused(cli(train, flags), *words)
    assert before == {p: os.stat(p).st_mtime_ns
                      for d, _, files in os.walk("out") for p in [os.path.join(d, f) for f in files]}


def test_checkpoint_describes_itself(runs):
    ckpt = torch.load(runs / "out/maze-mdlm-gumbel/ckpt.pt", weights_only=True)
    assert set(sample.CHECKPOINT_KEYS) <= set(ckpt) and ckpt["step"] == 6 and ckpt["tokens_seen"] == 6 * 16 * 11
    assert (not any("teacher" in k for k in ckpt["model"])
            and ckpt["config"]["noise"] == "gumbel" and ckpt["meta"]["name"] == "maze")
    log = [json.loads(line) for line in open(runs / "out/maze-mdlm-gumbel/log.jsonl")]
    assert log[0]["args"]["gumbel"] and [r["step"] for r in log if "loss" in r] == [1, 2, 3, 4, 5, 6]
    assert ([r["step"] for r in log if "val_nll_given_noise" in r] == [4, 6]
            and all(math.isfinite(r.get("loss", 0)) for r in log))
    assert {"lr", "grad_norm", "tokens_per_s", "nll_masked"} <= set(log[1])
    assert any("val_nelbo" in line for line in open(runs / "out/maze-mdlm/log.jsonl"))


@pytest.mark.parametrize("damage,words", [
    (lambda c: b"not a checkpoint", ["not a readable checkpoint"]),
    (lambda c: b"the quick brown fox", ["not a readable checkpoint"]),
    (lambda c: c[:len(c) // 2], ["not a readable checkpoint"]),
    (lambda c: {"weights": 1}, ["not a checkpoint of this project", "model"]),
    (lambda c: dict(c, config=dict(c["config"], n_layer=3)), ["weights that its config describes"]),
    (lambda c: dict(c, args=dict(c["args"], model="rnn")), ["unknown model 'rnn'", "mdlm"]),
    (lambda c: dict(c, config=dict(c["config"], colour=3)), ["cannot build", "colour"]),
])
def test_damaged_checkpoints_are_refused(runs, tmp_path, cli, damage, words):
    path = runs / "out/maze-mdlm/ckpt.pt"
    bad = (damage(path.read_bytes()) if "bytes" in str(words) or words[0].startswith("not a readable")
           else damage(torch.load(path, weights_only=True)))
    if isinstance(bad, bytes):
        (tmp_path / "ckpt.pt").write_bytes(bad)
    else:
        torch.save(bad, tmp_path / "ckpt.pt")
    refused(cli(sample, f"--ckpt={tmp_path}"), *words)
    refused(cli(evaluate, f"maze --ckpt {tmp_path}"), *words)


def same_checkpoints(a, b):
    a, b = (torch.load(p, weights_only=True) for p in (a, b))

    def equal(x, y):
        if isinstance(x, dict):
            return set(x) == set(y) and all(equal(x[k], y[k]) for k in x)
        if isinstance(x, list):
            return len(x) == len(y) and all(map(equal, x, y))
        return torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
    return all(equal(a[k], b[k]) for k in ("model", "ema", "optimizer", "step", "tokens_seen"))


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_run_continues_bit_for_bit(runs, processes):
    """kill -9 in the middle, rerun, compare with the run left alone: weights, EMA, optimizer, logged losses."""
    launch = [sys.executable] if processes == 1 else [
        sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}",
        f"--master_port={29500 + os.getpid() % 400}"]
    flags = ["--model=mdlm", "--gumbel", "--data=maze", "--teacher=out/maze-ar", "--steps=40", "--save_every=10",
             "--dropout=0.1", "--micro_batch_size=4", *TINY.split()]
    env = dict(os.environ, OMP_NUM_THREADS="1")

    def start(out):
        return subprocess.Popen([*launch, f"{HERE}/train.py", *flags, f"--out={out}"], cwd=runs, env=env,
                                start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    alone, killed = f"out/alone{processes}", f"out/killed{processes}"
    p = start(alone)
    assert p.wait() == 0, p.stderr.read()
    p = start(killed)
    log = runs / killed / "log.jsonl"
    deadline = time.time() + 600
    while not (runs / killed / "ckpt.pt").exists() or '"step": 13' not in log.read_text():
        assert p.poll() is None and time.time() < deadline, p.stderr.read()
        time.sleep(0.005)
    os.killpg(p.pid, signal.SIGKILL)
    p.wait()
    assert torch.load(runs / killed / "ckpt.pt", weights_only=True)["step"] < 40
    p = start(killed)
    assert p.wait() == 0, p.stderr.read()
    assert same_checkpoints(runs / alone / "ckpt.pt", runs / killed / "ckpt.pt")
    losses = [[(r["step"], r["loss"]) for r in map(json.loads, open(runs / d / "log.jsonl")) if "loss" in r]
              for d in (alone, killed)]
    assert losses[0] == losses[1] and len(losses[0]) == 40


def test_sigterm_saves_and_the_same_command_continues(runs):
    flags = [sys.executable, f"{HERE}/train.py", "--model=mdlm", "--data=maze", "--steps=3000",
             "--out=out/term", *TINY.split()]
    p = subprocess.Popen(flags, cwd=runs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 600
    while not (runs / "out/term/log.jsonl").exists() or '"step": 3,' not in (runs / "out/term/log.jsonl").read_text():
        assert p.poll() is None and time.time() < deadline
        time.sleep(0.01)
    p.send_signal(signal.SIGTERM)
    _, err = p.communicate(timeout=600)
    assert p.returncode == 128 + signal.SIGTERM and "saved" in err and "Traceback" not in err
    step = torch.load(runs / "out/term/ckpt.pt", weights_only=True)["step"]
    assert 3 <= step < 3000
    p = subprocess.Popen(flags, cwd=runs, stderr=subprocess.PIPE, text=True)
    seen = ""
    while f"continuing at step {step}" not in seen:
        assert (line := p.stderr.readline()), seen
        seen += line
    while f'"step": {step + 2},' not in (runs / "out/term/log.jsonl").read_text():          # handlers are in place
        assert p.poll() is None and time.time() < deadline
        time.sleep(0.01)
    p.send_signal(signal.SIGINT)
    assert p.wait(600) == 128 + signal.SIGINT


def test_nan_stops_the_run_and_keeps_the_checkpoint(runs, cli, monkeypatch):
    monkeypatch.chdir(runs)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    code, out, err = cli(train, f"--model=mdlm --data=maze --steps=100 --lr=1e30 --out=out/nan --save_every=1 {TINY}"
                         .replace("--warmup=2", "--warmup=0"))
    assert code == 2 and err.count("step skipped") == 20 and "20 steps in a row" in err and "--lr" in err
    saved = torch.load("out/nan/ckpt.pt", weights_only=True)
    assert all(v.isfinite().all() for v in saved["optimizer"]["state"][0].values())


def test_averaged_weights_hold_no_graph(runs, monkeypatch):
    """EMA by hand: after n updates the average is what the recursion says, and it carries no autograd history."""
    monkeypatch.chdir(runs)
    seen, save = [], train.save
    models, copied = [], copy.deepcopy

    def spy(path, state):
        seen.append({k: {n: p.clone() for n, p in state[k].items()} for k in ("model", "ema")})
        save(path, state)
    monkeypatch.setattr(train, "save", spy)
    monkeypatch.setattr(train.copy, "deepcopy", lambda *a: models.append(copied(*a)) or models[-1])
    args = train.parse(f"--model=mdlm --data=maze --out=out/ema --steps=5 --save_every=1 {TINY}".split())
    train.train(args, train.World("float32"))
    assert not any(p.requires_grad for p in models[-1].parameters())
    for n, (a, b) in enumerate(zip(seen, seen[1:]), start=1):
        d = (1 + n) / (10 + n)
        for name in a["ema"]:
            assert torch.allclose(b["ema"][name], d * a["ema"][name] + (1 - d) * b["model"][name], atol=1e-6), name


def test_row_order_is_a_permutation_and_a_function_of_the_step():
    rows = np.concatenate([rows_of_step(step, 10, 4, seed=1) for step in range(5)])
    assert (sorted(rows[:10]) == list(range(10)) and sorted(rows[10:20]) == list(range(10))
            and rows[:10].tolist() != rows[10:20].tolist())
    assert (rows_of_step(3, 10, 4, 1).tolist() == rows[12:16].tolist()
            and rows_of_step(0, 10, 4, 2).tolist() != rows[:4].tolist())


def ddp_worker(rank, world, port, path):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    model, x, t, z, noise = ddp_problem()
    ddp = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    mine = slice(rank * 4, rank * 4 + 4)
    ddp(x[mine], t[mine], z=z[mine], noise=noise[mine])[0].backward()
    if rank == 0:
        torch.save([p.grad for p in model.parameters()], path)
    torch.distributed.destroy_process_group()


def ddp_problem():
    x = rows_of(8)
    z = x.masked_fill((torch.rand(8, 6, generator=gen(1)) < 0.5) & (torch.arange(6) > 0), 7)
    return tiny("gumbel"), x, stratified_t(8, np.random.default_rng(0)), z, sample_gumbel((8, 6, 7), gen())


def test_ddp_gives_the_gradients_of_one_process(tmp_path):
    """Two gloo processes with half the batch each: the gradients of one process with all of it."""
    torch.multiprocessing.spawn(ddp_worker, (2, 29900 + os.getpid() % 90, str(tmp_path / "g.pt")), nprocs=2)
    model, x, t, z, noise = ddp_problem()
    model.loss(x, t, z=z, noise=noise)[0].backward()
    for got, p in zip(torch.load(tmp_path / "g.pt", weights_only=True), model.parameters()):
        assert torch.allclose(got, p.grad, atol=1e-6)


def test_the_lines_that_the_readme_names_are_these():
    text = open(os.path.join(HERE, "README.md"), encoding="utf-8").read()
    lines = open(os.path.join(HERE, "mdlm.py"), encoding="utf-8").read().split("\n")
    found = re.findall(r"(\d+) to (\d+) \(`(\w+)`", text)
    assert [name for _, _, name in found] == ["losses", "unmask"]
    for first, last, name in found:
        assert f"def {name}(" in lines[int(first) - 1] and lines[int(last) - 1].strip().startswith("return ")
        assert not any("def " in line for line in lines[int(first):int(last)])


class FromTheLeft(MDLM):
    """An MDLM of one's own: it masks the first tokens of a row, as many as t says, and reveals the last one first."""

    def noised(self, tokens, t, generator=None):
        n = (self.per_token(t, tokens) * (tokens.shape[1] - 1)).ceil()
        position = torch.arange(tokens.shape[1], device=tokens.device)
        return torch.where((position >= 1) & (position <= n), self.mask_id, tokens)

    def reveal_steps(self, masked, steps, *args):
        rank = masked.flip(1).cumsum(1).flip(1) * masked                       # 1 for the last [MASK] of a row
        n = masked.sum(1, keepdim=True)
        return ((rank - 1) * n.clamp(max=steps) // n.clamp(min=1) + 1) * masked


def test_a_student_of_ones_own_needs_one_line(runs, cli, monkeypatch, tmp_path):
    """Registered in the table of models, it trains, resumes, samples and is evaluated through the commands."""
    monkeypatch.chdir(runs)
    monkeypatch.setitem(sample.MODELS, "from_the_left", FromTheLeft)
    flags = f"--model=from_the_left --gumbel --data=maze --schedule=constant --out={tmp_path}/left {TINY}"
    for steps in (4, 6):
        code, _, err = cli(train, f"{flags} --steps={steps}")
        assert code == 0 and ("continuing at step 4" in err) == (steps == 6), err
    log = [json.loads(line) for line in open(tmp_path / "left/log.jsonl")]
    assert [r["step"] for r in log if "loss" in r] == [1, 2, 3, 4, 5, 6] and "val_nll_given_noise" in log[-1]
    model = sample.load_model(str(tmp_path / "left"))
    assert type(model) is FromTheLeft and model.args["model"] == "from_the_left"
    z = model.noised(torch.zeros(2, 11, dtype=torch.long), torch.tensor([0.3, 1.0]))
    assert (z == 6).sum(1).tolist() == [3, 10] and (z[0, 1:4] == 6).all()
    seen, fill = [], MDLM.hidden
    monkeypatch.setattr(FromTheLeft, "hidden", lambda self, z, *a, **kw: seen.append(z) or fill(self, z, *a, **kw))
    code, out, err = cli(sample, f"--ckpt={tmp_path}/left --n=3 --steps=5 --greedy --prompt=D")
    assert code == 0 and out.count("nfe 5") == 3, err
    left = [(z[0] == 6).nonzero().flatten().tolist() for z in seen]            # the last places are gone first
    assert len(left) == 5 and all(places == list(range(2, 2 + len(places))) for places in left)
    code, out, err = cli(evaluate, f"maze --ckpt out/maze-ar {tmp_path}/left --n=20 --nfe=1,4")
    assert code == 0 and "| left | greedy | 4 |" in out, err
    code, out, err = cli(evaluate, f"ppl --ckpt {tmp_path}/left --n=20")
    assert code == 0 and "nll_given_noise" in out, err


# --- sample.py, evaluate.py

def test_sample_cli(runs, cli, monkeypatch, tmp_path):
    monkeypatch.chdir(runs)
    code, out, err = cli(sample,
                         f"--ckpt=out/maze-mdlm-gumbel --n=3 --steps=2 --prompt=DD --out={tmp_path / 's.jsonl'}")
    assert code == 0 and out.count("--- sample") == 3 and "# S" in out
    rows = [json.loads(line) for line in open(tmp_path / "s.jsonl")]
    assert len(rows) == 3 and all(r["text"].startswith("DD") and len(r["tokens"]) == 10 and r["nfe"] <= 2 for r in rows)
    assert cli(sample, "--ckpt=out/maze-mdlm-gumbel --n=3 --steps=2 --prompt=DD")[1] == out
    assert cli(sample, "--ckpt=out/maze-mdlm-gumbel --n=3 --steps=2 --prompt=DD --seed=1")[1] != out
    infilled = tmp_path / "i.jsonl"
    assert cli(sample, f"--ckpt=out/maze-mdlm --n=20 --infill=DD[MASK]R --out={infilled}")[0] == 0
    assert all(r["text"][:2] + r["text"][3] == "DDR" for r in map(json.loads, open(infilled)))
    code, out, _ = cli(sample, "--ckpt=out/maze-mdlm-gumbel --n=3 --steps=8 --prompt=DD --sampler=remdm --remask=0.5")
    assert code == 0 and out.count("DD") >= 3
    code, out, _ = cli(sample, "--ckpt=out/maze-ar/ckpt.pt --n=2 --prompt=U --weights=raw")
    assert code == 0 and out.count("nfe 9") == 2
    for flags, words in [("--ckpt=nowhere", ["nowhere", "no checkpoint"]),
                         ("--ckpt=out/maze-mdlm --tau=0", ["--tau", "above 0"]),
                         ("--ckpt=out/maze-mdlm --steps=0", ["--steps", "at least 1"]),
                         ("--ckpt=out/maze-mdlm --prompt=DDRRRUUUUUU", ["--prompt", "at most 10"]),
                         ("--ckpt=out/maze-mdlm --prompt=xyz", ["U D L R"]),
                         ("--ckpt=out/maze-ar --infill=D[MASK]", ["--infill", "masked"]),
                         ("--ckpt=out/maze-mdlm --top_p=1.5", ["--top_p", "at most 1"]),
                         ("--ckpt=out/maze-mdlm --batch_size=0", ["--batch_size"]),
                         ("--ckpt=out/maze-mdlm --length=40", ["--length=40", "11"]),
                         ("--ckpt=out/maze-mdlm --order=left_to_right", ["--sampler=fixed"]),
                         ("--ckpt=out/maze-mdlm --remask=0.1", ["--remask", "--sampler=remdm"]),
                         ("--ckpt=out/maze-mdlm --sampler=remdm", ["--remask above 0"]),
                         ("--ckpt=out/maze-mdlm --sampler=remdm --remask=2", ["--remask", "at most 1"]),
                         ("--ckpt=out/maze-ar --sampler=remdm --remask=0.1", ["--sampler=remdm", "masked models"]),
                         ("--ckpt=out/maze-mdlm --sampler=apd", ["--verifier"]),
                         ("--ckpt=out/maze-mdlm --verifier=out/maze-ar", ["--sampler=apd"]),
                         ("--ckpt=out/maze-mdlm --sampler=apd --verifier=out/maze-mdlm", ["--verifier", "--model=ar"]),
                         ("--ckpt=out/maze-ar --sampler=apd --verifier=out/maze-ar", ["masked model"]),
                         ("--ckpt=out/maze-mdlm --shards=d", ["--shards", "AR model"]),
                         ("--ckpt=out/maze-ar --shards=d --tau=0.9", ["--tau=1"]),
                         ("--ckpt=out/maze-ar --shards=d --greedy", ["--shards", "--greedy"]),
                         ("--ckpt=out/maze-ar --shards=d --n=1", ["--n", "at least 2"]),
                         ("--ckpt=out/maze-ar --shards=out", ["out exists already"]),
        ("--ckpt=out/maze-mdlm --prompt=D --infill=D[MASK]", ["--prompt and --infill"]),
        ("--ckpt=out/maze-mdlm --seed=-1", ["--seed", "at least 0"]),
        ("--ckpt=out/maze-mdlm --out=no/such/file", ["--out", "cannot be written"]),
                         ("--ckpt=out/maze-mdlm --sampler=magic", ["--sampler", "ancestral"]),
                         (f"--ckpt=out/maze-mdlm --out={tmp_path / 's.jsonl'}", ["exists"])]:
        refused(cli(sample, flags), *words)


@pytest.mark.parametrize("a,b,want", [
    (("hf:a", "1"), ("hf:b", "1"), "fine"),                 # one tokenizer under two paths
    (("hf:a", "1"), ("hf:b", "2"), "another"),              # two of equal size
    (("hf:a", "1"), ("hf:a", "2"), "another"),              # the path holds another one now
    (("hf:a", None), ("hf:b", "2"), "cannot be told"),      # from before fingerprints, and not to be had
    (("hf:a", None), ("hf:a", "2"), "fine"), (("ids", None), ("gpt2", "2"), "fine"),
    (("bytes", None), ("gpt2", None), "another"),
    (("chars:ab", "1"), ("chars:ba", "2"), "other characters")])
def test_vocabularies_of_equal_size_are_told_apart(capsys, a, b, want):
    meta_a, meta_b = (dict(tokenizer=name, vocab_size=10, bos=9) | ({"fingerprint": f} if f else {})
                      for name, f in (a, b))
    model = argparse.Namespace(vocab_size=10, bos=9, meta=meta_a)
    if want in ("another", "other characters"):
        with pytest.raises(BadInput, match=f"--teacher=x.*{want}"):
            sample.check_vocabulary("--teacher=x", model, meta_b)
        return
    sample.check_vocabulary("--teacher=x", model, meta_b)
    assert ("cannot be told" in capsys.readouterr().err) == (want == "cannot be told")


@functools.cache
def bytes_runs(root):
    root.mkdir()
    (root / "x.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in LONG))
    commands = [["data/prepare.py", "text", "--files", "x.jsonl", "--tokenizer=bytes", "--out=data/mine"]]
    for flags in ("--model=ar --out=out/ar", "--gumbel --teacher=out/ar --out=out/gumbel", "--out=out/plain"):
        commands.append(["train.py", "--data=mine", "--length=24", "--steps=6", *TINY.split(), *flags.split()])
    for command in commands:
        done = subprocess.run([sys.executable, f"{HERE}/{command[0]}", *command[1:]], cwd=root, capture_output=True,
                              text=True)
        assert done.returncode == 0, done.stderr
    return root


@pytest.fixture(scope="session")
def text_runs(tmp_path_factory):
    """A folder with bytes of English-like text, a tiny teacher out/ar, students out/gumbel and out/plain."""
    return bytes_runs(tmp_path_factory.getbasetemp() / "bytes_runs")


def test_teacher_written_shards(text_runs, cli, monkeypatch, tmp_path):
    """Sequential extraction: rows as the teacher writes them, never re-cut; interrupted, it continues to the same
    bytes; a student trains on them, with and without noise."""
    monkeypatch.chdir(text_runs)
    flags = "--ckpt=out/ar --n=50 --batch_size=8 --length=16"
    assert cli(sample, f"{flags} --shards={tmp_path}/a")[0] == 0
    with monkeypatch.context() as m:
        interrupt_after(m, 3)
        assert cli(sample, f"{flags} --shards={tmp_path}/b")[0] == 130
    code, _, err = cli(sample, f"{flags} --shards={tmp_path}/b")
    assert code == 0 and "continuing after 24" in err and same_dataset(tmp_path / "a", tmp_path / "b")
    assert cli(sample, f"{flags} --seed=1 --shards={tmp_path}/c")[0] == 0
    rows = np.fromfile(tmp_path / "a" / "train.bin", dtype="<u2").reshape(-1, 15)
    assert len(rows) == 49 and len(np.unique(rows, axis=0)) == 49
    assert not np.array_equal(rows, np.fromfile(tmp_path / "c" / "train.bin", dtype="<u2").reshape(-1, 15))
    meta = read_meta(str(tmp_path / "a"))[0]
    assert (meta["row_length"], meta["tokenizer"], meta["vocab_size"]) == (15, "bytes", 257)
    assert meta["fingerprint"] == read_meta("data/mine")[0]["fingerprint"]
    # the rows are the teacher's: batch 0 is its own generation from that seed, BOS left out
    ar = sample.load_model("out/ar")
    first, _ = ar.generate(torch.full((8, 1), ar.bos), 16, generator=gen(sample.torch_seed(0, 0)))
    assert np.array_equal(first[1:, 1:].numpy(), rows[:7])
    for extra in ("", "--gumbel --teacher=out/ar"):
        code, _, err = cli(train, f"--data={tmp_path}/a --length=16 --steps=2 {extra} {TINY} "
                           f"--out={tmp_path}/run{len(extra)}")
        assert code == 0, err
    refused(cli(train, f"--data={tmp_path}/a --length=12 --steps=2 {TINY} --out={tmp_path}/run"), "--length=16")


def test_kd_and_init_from_train_and_continue(text_runs, cli, monkeypatch, tmp_path):
    monkeypatch.chdir(text_runs)
    base = f"--data=mine --length=24 {TINY} --save_every=2"
    noisy = "--gumbel --teacher=out/ar"
    for name, flags, val in (("kd", "--kd=token --teacher=out/ar", "val_nelbo"),
                             ("from-ar", "--init_from=out/ar", "val_nelbo"),
                             ("gumbel-from-ar", f"{noisy} --init_from=out/ar", "val_nll_given_noise"),
                             ("gumbel-from-plain", f"{noisy} --init_from=out/plain", "val_nll_given_noise")):
        out = tmp_path / name
        code, _, err = cli(train, f"{base} {flags} --steps=4 --out={out}")
        assert code == 0, err
        log = [json.loads(line) for line in open(out / "log.jsonl")]
        assert any(val in line for line in log) and ("kl_masked" in log[1]) == (name == "kd")
        ckpt = sample.load_checkpoint(str(out))
        assert ckpt["config"]["shift"] == ("from-ar" in name)
        code, _, err = cli(train, f"{base} {flags} --steps=6 --out={out}")   # constant schedule: more steps continue
        assert code == 0 and "continuing at step 4" in err
        assert sample.load_checkpoint(str(out))["step"] == 6
    refused(cli(train, f"{base} --steps=4 --out={tmp_path / 'kd'}"), "other settings", "kd")
    ckpt = torch.load(tmp_path / "from-ar/ckpt.pt", weights_only=True)     # a run from before some flags existed
    for key in ("clip_search", "block_size", "kd"):
        del ckpt["args"][key]
    torch.save(ckpt, tmp_path / "from-ar/ckpt.pt")
    code, _, err = cli(train, f"{base} --init_from=out/ar --steps=7 --out={tmp_path}/from-ar")
    assert code == 0 and "continuing at step 6" in err, err
    refused(cli(train, f"{base} --init_from=out/ar --kd=token --teacher=out/ar --steps=9 --out={tmp_path}/from-ar"),
            "--kd: None there, token now")


def test_block_diffusion_trains_samples_and_is_evaluated(text_runs, cli, monkeypatch, tmp_path):
    """From scratch, from an MDLM with and without noise, from an AR model, from other blocks; then every command."""
    monkeypatch.chdir(text_runs)
    base = f"--model=bd3lm --data=mine --length=24 {TINY} --save_every=2"
    noisy = "--gumbel --teacher=out/ar"
    nelbo, given_noise = "val_nelbo", "val_nll_given_noise"
    for name, flags, val in (("plain", "", nelbo), ("from-plain", "--init_from=out/plain --block_size=8", nelbo),
                             ("gumbel", f"{noisy} --init_from=out/plain --block_size=1", given_noise),
                             ("gumbel2", f"{noisy} --init_from=out/gumbel --clip=0.6,1", given_noise),
                             ("without", "--init_from=out/gumbel", nelbo),
                             ("from-ar", "--init_from=out/ar --kd=token --teacher=out/ar --block_size=24", nelbo),
                             ("again", f"--init_from={tmp_path}/from-plain --block_size=4 --clip_search", nelbo)):
        out = tmp_path / name
        code, _, err = cli(train, f"{base} {flags} --steps=4 --out={out}")
        assert code == 0, err
        assert ("has block size 8, this run 4" in err) == (name == "again")
        log = [json.loads(line) for line in open(out / "log.jsonl")]
        ckpt = sample.load_checkpoint(str(out))
        assert any(val in line for line in log) and ckpt["config"]["shift"] == (name == "from-ar")
        code, _, err = cli(train, f"{base} {flags} --steps=6 --out={out}")
        assert code == 0 and "continuing at step 4" in err, err
        if name == "from-plain":                           # raw and EMA both start from the source's EMA weights
            source = sample.load_model("out/plain")
            code, _, err = cli(train, f"{base} --block_size=8 --init_from=out/plain --lr=1e-12 --steps=1 "
                               f"--out={tmp_path}/x")
            for weights in ("raw", "ema"):
                assert torch.allclose(sample.load_model(f"{tmp_path}/x", weights).transformer.embed.weight,
                                      source.transformer.embed.weight, atol=1e-6)
        if name == "again":
            found = [line for line in log if "clip_search" in line]
            assert [line["step"] for line in found] == [0, 4] and len(found[0]["clip_search"]) == 64
            best = min(found[-1]["clip_search"], key=found[-1]["clip_search"].get)
            assert found[-1]["clip"] == [float(v) for v in best.split(",")] == list(ckpt["clip"])
    for name, flags, words in (("plain", "--length=70 --steps=2 --n=3", ["nfe"]),
                               ("gumbel2", "--length=30 --greedy --prompt=Some --stop_at_eos", ["Some"]),
                               ("gumbel", "--infill=So[MASK][MASK]x --no_cache --sampler=first_hitting", ["So"])):
        code, out, err = cli(sample, f"--ckpt={tmp_path}/{name} {flags}")
        assert code == 0 and all(w in out for w in words), err
    code, out, err = cli(evaluate, f"ppl --n=20 --ckpt {tmp_path}/plain {tmp_path}/gumbel {tmp_path}/gumbel2 "
                         f"out/plain --json={tmp_path}/p.json")
    assert code == 0, err
    kinds = [r["kind"] for r in json.load(open(tmp_path / "p.json"))["rows"]]
    assert kinds == ["nelbo", "nll_given_noise", "nll_given_noise", "nelbo"]
    code, out, err = cli(evaluate, f"genppl --n=4 --judge=out/ar --nfe=3,12,24 --ckpt {tmp_path}/plain out/plain "
                         f"--json={tmp_path}/g.json")
    rows = json.load(open(tmp_path / "g.json"))["rows"]
    assert [r["nfe"] for r in rows] == [6, 12, 24] + [3, 12, 24]                   # 6 blocks: at least 6 calls
    assert all(r["nfe_counted"] <= r["nfe"] for r in rows)
    for module, flags, words in (
            (train, f"{base} --block_size=5", ["--block_size=5", "--length=24", "divisor"]),
            (train, f"{base} --clip=0.8,0.3", ["--clip=0.8,0.3", "LOW < HIGH"]),
            (train, f"{base} --clip=0.5", ["--clip=0.5", "LOW"]),
            (train, f"{base} --clip=0,2", ["--clip", "at most 1"]),
            (train, f"{base} --clip=0.1,0.7 --clip_search", ["exclude"]),
            (train, "--data=mine --block_size=4", ["--model=bd3lm"]),
            (sample, "--ckpt=out/plain --stop_at_eos", ["BD3-LM"]),
            (sample, f"--ckpt={tmp_path}/plain --length=60 --prompt={'a' * 30}", ["30 tokens in a row", "has 24"]),
            (sample, f"--ckpt={tmp_path}/plain --length=20 --prompt={'a' * 30}", ["30 tokens", "at most 19"]),
            (sample, f"--ckpt={tmp_path}/plain --sampler=apd --verifier=out/ar", ["--sampler=apd", "MDLM"]),
            (evaluate, f"ppl --ckpt {tmp_path}/plain --length=22", ["--length=22", "block size, 4"])):
        refused(cli(module, flags), *words)


def test_maze_in_blocks(runs, cli, monkeypatch):
    """Rows of 12, one more PAD, divide into blocks; the teacher of that length is found; success is the same notion."""
    monkeypatch.chdir(runs)
    args = train.parse(["--model=bd3lm", "--gumbel", "--data=maze"])
    assert (args.length, args.block_size, args.t_one) == (12, 4, 0.5)
    assert cli(train, f"--model=ar --data=maze --length=12 --steps=2 --out=out/maze-ar-12 {TINY}")[0] == 0
    code, _, err = cli(train, f"--model=bd3lm --gumbel --data=maze --steps=4 {TINY}")
    assert code == 0 and "training it first" not in err, err
    code, out, err = cli(evaluate, "maze --ckpt out/maze-ar-12 out/maze-bd3lm-gumbel --n=50 --nfe=1,6,12")
    assert code == 0, err
    assert [line.split("|")[3].strip() for line in out.splitlines() if "bd3lm" in line] == ["3", "6", "12"] * 2
    code, out, err = cli(evaluate, "nfe --ckpt out/maze-mdlm out/maze-bd3lm-gumbel --n=50 --nfe=1,6")
    assert code == 0 and "| NFE 1 | NFE 3 | NFE 6 |" in out and out.splitlines()[4].count("±") == 2, out
    paths = maze_paths()
    assert maze_valid(np.pad(paths, ((0, 0), (0, 1)), constant_values=PAD)).all()
    assert not maze_valid(np.pad(paths, ((0, 0), (0, 1)), constant_values=0)).any()


HEADS = "--batch_size=16 --warmup=2 --log_every=1 --eval_every=4 --eval_rows=40 --report=0"


def test_medusa_trains_decodes_and_is_evaluated(text_runs, cli, monkeypatch, tmp_path):
    monkeypatch.chdir(text_runs)
    args = train.parse(["--model=medusa", "--gumbel", "--teacher=x"])
    assert (args.heads, args.n_layer, args.n_embd, args.batch_size, args.lr, args.schedule, args.steps) == (
        3, 1, None, 256, 1e-3, "cosine", 20_000)
    base = f"--model=medusa --teacher=out/ar --data=mine --length=24 --schedule=constant {HEADS}"
    for name, flags, val in (("plain", "", "val_nll_heads"), ("unpaired", "--noise=unpaired", "val_nll_heads"),
                             ("gumbel", "--gumbel --heads=2", "val_nll_heads_given_noise")):
        out = tmp_path / name
        for steps in (4, 6):                               # the second continues the first
            code, _, err = cli(train, f"{base} {flags} --steps={steps} --out={out}")
            assert code == 0 and ("continuing at step 4" in err) == (steps == 6), err
        log = [json.loads(line) for line in open(out / "log.jsonl")]
        assert val in log[-1] and {"nll_head1", "nll_head2"} <= set(log[1])
        ckpt = sample.load_checkpoint(str(out))
        assert ckpt["config"]["backbone"] == "out/ar" and ckpt["args"]["heads"] == 3 - (name == "gumbel")
        assert {k.split(".")[0] for k in ckpt["model"]} - {"heads"} == (
            set() if name == "plain" else {"noise_embed", "accumulator"})             # and nothing of the backbone
    code, _, err = cli(train, f"{base} --steps=6 --out={tmp_path}/whole")
    assert code == 0 and same_checkpoints(tmp_path / "whole/ckpt.pt", tmp_path / "plain/ckpt.pt")
    if not os.path.exists("out/ar-s1"):
        assert cli(train, f"--model=ar --data=mine --length=24 --steps=1 --seed=1 {TINY} --out=out/ar-s1")[0] == 0
    code, out, err = cli(sample, f"--ckpt={tmp_path}/gumbel --n=3 --prompt=The --accept=exact --out={tmp_path}/a.jsonl")
    assert code == 0 and "nfe" in out, err
    assert len({line for line in out.splitlines() if line.startswith("---")}) == 3
    assert all(json.loads(line)["text"].startswith("The") for line in open(f"{tmp_path}/a.jsonl"))
    for flags in ("--accept=typical --epsilon=0.5", "--greedy", "--greedy --no_cache"):
        assert cli(sample, f"--ckpt={tmp_path}/gumbel --n=2 {flags}")[0] == 0
    texts = [cli(sample, f"--ckpt={path} --n=1 --greedy --prompt=The")[1].split("\n", 1)[1]
             for path in ("out/ar", f"{tmp_path}/plain")]
    assert texts[0] == texts[1] and texts[0].startswith("The")
    code, out, err = cli(evaluate, f"acceptance --ckpt {tmp_path}/gumbel {tmp_path}/plain --n=6 --batch_size=4 "
                         f"--accept=typical,exact,greedy --json={tmp_path}/a.json")
    assert code == 0 and "| gumbel | typical |" in out and "speed-up" in out, err
    rows = json.load(open(f"{tmp_path}/a.json"))["rows"]
    assert [r["accept"] for r in rows] == ["typical", "exact", "greedy"] * 2 and "head3" not in rows[0]
    for r in rows:
        assert 1 <= r["accepted_length"] <= 4 and 0 <= r["head1"] <= 1 and r["n"] == 6
        assert r["agreement"] == 1 or r["accept"] == "typical"
        assert abs(r["calls_per_token"] * 18 - r["nfe_counted"]) < 1e-9 and r["nfe_counted"] <= 18
    code, out, err = cli(evaluate, f"genppl --judge=out/ar --ckpt {tmp_path}/gumbel out/ar --n=4 --decode=sample,greedy"
                         f" --json={tmp_path}/g.json")
    assert code == 0 and "| gumbel | sample | 23 |" in out and "typical acceptance, epsilon 0.09" in out, (out, err)
    values = [r["gen_ppl"] for r in json.load(open(f"{tmp_path}/g.json"))["rows"]]
    assert values[0] != values[1] and values[1] == values[3] != values[2]      # greedy: the backbone's text
    code, out, err = cli(evaluate, f"nfe --judge=out/ar --ckpt {tmp_path}/gumbel --n=4 --decode=sample")
    assert code == 0 and "| gumbel | sample | " in out, err
    for what in ("ppl", "maze"):
        refused(cli(evaluate, f"{what} --ckpt {tmp_path}/gumbel"), "Medusa heads", "acceptance")
    refused(cli(evaluate, "acceptance --ckpt out/plain"), "mdlm checkpoint", "Medusa")
    refused(cli(evaluate, f"acceptance --ckpt {tmp_path}/plain --accept=always"), "--accept=always", "typical")
    for flags in ("--prompt_length=22", "--length=3"):
        refused(cli(evaluate, f"acceptance --ckpt {tmp_path}/plain {flags}"), "no room", "--prompt_length")
    for path in (f"{tmp_path}/plain", "out/ar"):
        refused(cli(evaluate, f"genppl --judge=out/ar --ckpt {path} --length=40"), "--length=40", "24")
    refused(cli(evaluate, f"acceptance --ckpt {tmp_path}/plain --length=48"), "--length=48", "24")
    refused(cli(sample, f"--ckpt={tmp_path}/plain --infill=a[MASK]"), "--infill")
    refused(cli(sample, f"--ckpt={tmp_path}/plain --prompt={'x' * 24}"), "--prompt has 24 tokens")
    refused(cli(sample, f"--ckpt={tmp_path}/plain --sampler=apd --verifier=out/ar"), "apd", "medusa")
    refused(cli(sample, f"--ckpt={tmp_path}/plain --shards={tmp_path}/s"), "AR model")
    refused(cli(train, f"{base} --steps=6 --out={tmp_path}/x --init_from=out/ar"), "--init_from=out/ar", "kind")
    assert cli(train, f"{base} --gumbel --steps=2 --out={tmp_path}/more --init_from={tmp_path}/plain")[0] == 0
    refused(cli(train, f"{base} --steps=2 --out={tmp_path}/x --init_from={tmp_path}/plain".replace("ar ", "ar-s1 ")),
            "another backbone", "out/ar-s1")
    refused(cli(train, f"--gumbel --teacher={tmp_path}/plain --data=mine --length=24 --out={tmp_path}/x {TINY}"),
            "--teacher", "--model=ar")
    # the backbone trained on: other weights under the same name
    shutil.copytree("out/ar", tmp_path / "ar")
    heads = f"{base.replace('out/ar', str(tmp_path / 'ar'))} --steps=2 --out={tmp_path}/heads"
    assert cli(train, heads)[0] == 0 and cli(sample, f"--ckpt={tmp_path}/heads --n=1")[0] == 0
    ckpt = torch.load(tmp_path / "ar/ckpt.pt", weights_only=True)
    for state in (ckpt["ema"], ckpt["model"]):
        state["transformer.head.bias"][3] += 1
    torch.save(ckpt, tmp_path / "ar/ckpt.pt")
    sample.load_backbone.cache_clear()
    refused(cli(sample, f"--ckpt={tmp_path}/heads --n=1"), "another backbone", "ar")
    refused(cli(train, heads.replace("--steps=2", "--steps=4")), "another backbone", "--out")
    shutil.rmtree(tmp_path / "ar")
    sample.load_backbone.cache_clear()
    refused(cli(sample, f"--ckpt={tmp_path}/heads --n=1"), "heads", "backbone", "no checkpoint")


def test_medusa_on_the_maze_and_on_other_backbones(runs, cli, monkeypatch, tmp_path):
    """The maze's own teacher as backbone, with the enumerated row; a GPT-2 folder and a Hugging Face model."""
    monkeypatch.chdir(runs)
    small = HEADS.replace("--report=0", "--report=20")
    code, out, err = cli(train, f"--model=medusa --gumbel --data=maze --steps=3 {small} --out={tmp_path}/m")
    assert code == 0 and "training it first" not in err, err
    lines = out.splitlines()
    assert ["m | typical", "m | exact", "theory | exact"] == [" | ".join(s.split(" | ")[:2])[2:] for s in lines[2:5]]
    assert "| theory | exact | 0.459" in out
    writer = Writer(str(tmp_path / "ids"), dict(name="ids", tokenizer="ids", row_length=None, vocab_size=300,
                                                        bos=299, predict_bos=True))
    for split in ("train", "val"):
        writer.write(split, np.random.default_rng(0).integers(0, 299, 2000))
    writer.finish()
    save_gpt2(tmp_path / "gpt2", V=300, L=64)
    base, gpt2 = f"--model=medusa --gumbel --data={tmp_path}/ids --steps=2 {HEADS}", f"--teacher={tmp_path}/gpt2"
    for dtype in ("float32", "bfloat16"):
        code, _, err = cli(train, f"{base} {gpt2} --length=32 --dtype={dtype} --out={tmp_path}/{dtype}")
        assert code == 0, err
        code, out, err = cli(evaluate, f"acceptance --ckpt {tmp_path}/{dtype} --n=4 --dtype={dtype}")
        assert code == 0 and "backbone alone" in out, err
    refused(cli(train, f"{base} {gpt2} --length=128 --out={tmp_path}/x"), "rows of 64", "--length=64")
    refused(cli(train, f"{base} --teacher=out/maze-ar --length=10 --out={tmp_path}/x"), "vocab_size 6", "300")
    refused(cli(train, f"{base} {gpt2} --length=4 --out={tmp_path}/x"), "too short for 3 heads")


def test_gpt2_large_is_the_default_teacher(tmp_path, cli, monkeypatch):
    """Shards of GPT-2 ids and no --teacher: gpt2-large, whatever it is that downloads it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GUMBEL_CACHE", str(tmp_path / "cache"))
    np.random.default_rng(0).integers(0, 50257, 4000).astype("<u2").tofile("train.bin")
    os.makedirs("data/owt")
    for split in ("train", "val"):
        shutil.copy("train.bin", f"data/owt/{split}.bin")
    save_gpt2(tmp_path / "cache" / "gpt2-large", V=50257, L=64)
    small = f"--gumbel --data=owt --length=32 --steps=2 {TINY} --eval_rows=8 --batch_size=4"
    assert train.parse(["--gumbel"]).data == "data/openwebtext" and train.parse(["--gumbel"]).teacher is None
    for dtype in ("float32", "bfloat16"):
        code, _, err = cli(train, f"{small} --dtype={dtype} --out=out/{dtype}")
        assert code == 0, err
    with monkeypatch.context() as m:
        m.setenv("GUMBEL_CACHE", str(tmp_path / "elsewhere"))
        m.setattr(torch.hub, "download_url_to_file", lambda *a: (_ for _ in ()).throw(OSError("offline")))
        refused(cli(train, f"{small} --out=out/x"), "gpt2-large", "offline")
    refused(cli(train, f"{small.replace('32', '128')} --out=out/x"), "rows of 64 tokens", "--length=64")
    model = sample.load_model(str(tmp_path / "cache" / "gpt2-large"))
    assert (model.meta["tokenizer"], model.vocab_size) == ("gpt2", 50257)


def test_genppl_and_ppl_cli(text_runs, cli, monkeypatch, tmp_path):
    monkeypatch.chdir(text_runs)
    code, out, err = cli(evaluate, "genppl --judge=out/ar --ckpt out/ar out/gumbel out/plain --n=20 --nfe=2,5 "
                         f"--decode=sample,greedy --data=data/mine --json={tmp_path / 'g.json'}")
    assert code == 0, err
    rows = json.loads((tmp_path / "g.json").read_text())["rows"]
    assert [r["model"] for r in rows] == ["data"] + ["ar"] * 2 + ["gumbel"] * 4 + ["plain"] * 4
    assert all(1 < r["gen_ppl"] < 1e4 and 0 <= r["entropy"] <= r["entropy_set"] + 1e-9 for r in rows)
    assert all(r["nfe_counted"] <= r["nfe"] for r in rows[1:])
    assert [r["tau"] for r in rows[3:8:4]] == [0.85, 1.0] and all(r["top_p"] == 0.9 for r in rows[1:])
    code, out, err = cli(evaluate, f"ppl --ckpt out/ar out/gumbel out/plain --n=200 --json={tmp_path / 'p.json'}")
    assert code == 0, err
    ar, noisy, plain = json.loads((tmp_path / "p.json").read_text())["rows"]
    data = Shards("data/mine", "val", 24)
    model = sample.load_model("out/ar")
    want = model.loss(torch.from_numpy(data.rows(range(len(data)))))[0].item()
    assert len(data) <= 200 and abs(ar["nll"] - want) < 1e-4 and abs(ar["ppl"] - math.exp(want)) < 0.1
    assert noisy["kind"] == "nll_given_noise" and abs(noisy["teacher_nll"] - want) < 1e-4
    assert noisy["ppl_bound"] == noisy["ppl"] == pytest.approx(math.exp(noisy["nll"] + want))
    assert plain["kind"] == "nelbo" and plain["ppl"] == pytest.approx(math.exp(plain["nll"]))
    assert "ppl_bound" not in plain
    code, out, err = cli(evaluate, "genppl --judge=out/ar --ckpt out/plain --n=9 --sampler=apd --verifier=out/ar")
    assert code == 0 and "| verifier |" in out, err
    refused(cli(evaluate, "genppl --judge=out/plain --ckpt out/plain"), "--judge=out/plain", "AR model")
    refused(cli(evaluate, "ppl --ckpt out/plain --data=nowhere"), "nowhere")
    for what in ("genppl --judge=out/ar", "ppl"):
        refused(cli(evaluate, f"{what} --ckpt out/plain --length=40"), "--length=40", "24 tokens", "plain")
    code, out, err = cli(evaluate, "mauve --judge=out/ar --ckpt out/plain out/gumbel --n=30 --nfe=3 "
                         f"--decode=greedy,sample --json={tmp_path / 'm.json'}")
    rows = json.loads((tmp_path / "m.json").read_text())["rows"]
    assert code == 0 and "below 1000 MAUVE is too high" in err and len(rows) == 4 and "| MAUVE |" in out, err
    assert all(0 < r["mauve"] <= 1 + 1e-9 and r["mauve_std"] >= 0 and r["entropy"] >= 0 for r in rows), rows
    with monkeypatch.context() as m:                       # the default judge
        m.setenv("GUMBEL_CACHE", str(tmp_path))
        m.setattr(torch.hub, "download_url_to_file", lambda *a: (_ for _ in ()).throw(OSError("offline")))
        for what in ("genppl", "mauve"):
            refused(cli(evaluate, f"{what} --ckpt out/plain"), "gpt2-large", "offline")


def perfect_student_nats(rows, teacher, n_draws):
    """E_q[-log p(x | noise)] of a student that runs the teacher's Gumbel-max itself on the noise: 0 by Theorem 4.1."""
    wrong = 0
    for seed in range(n_draws):
        noise = extract_parallel(teacher, rows, gen(seed))
        again, _ = teacher.generate(rows[:, :1], rows.shape[1], noise=noise)
        wrong += int((again != rows).sum())
    return wrong


def test_ppl_bound_is_tight_for_a_perfect_student_and_valid_for_any():
    """-log p_student(x) <= E_q[-log p(x | noise)] - log p_teacher(x): by enumeration of a two-token language.

    The student writes both tokens in one step: p(x) = E_prior prod_i p(x_i | noise), computed by Monte Carlo.
    """
    teacher, total = tiny_ar(V=4, L=3, seed=2), 0.0
    rows = torch.tensor([[3, a, b] for a in range(4) for b in range(4)])
    assert perfect_student_nats(rows, teacher, 20) == 0
    student = tiny("gumbel", V=4, L=3, seed=5)
    start = torch.tensor([[3, 4, 4]])
    with torch.no_grad():
        prior = sample_gumbel((60_000, 3, 4), gen(1))
        lp = student.log_probs(start.expand(60_000, -1), prior)[:, 1:, :4].double()
        teacher_lp = teacher.log_probs(rows)[:, :-1].gather(-1, rows[:, 1:, None]).squeeze(-1).sum(1)
        for x, t in zip(rows, teacher_lp):
            marginal = -lp.gather(-1, x[None, 1:, None].expand(60_000, -1, 1)).squeeze(-1).sum(1).exp().mean().log()
            many = x.expand(4000, -1)
            q = extract_parallel(teacher, many, gen(2))
            first = -student.log_probs(start.expand(4000, -1), q)[:, 1:].gather(
                -1, many[:, 1:, None]).squeeze(-1).sum(1).mean()
            assert first - t >= marginal - 0.02, (x, first, t, marginal)
            total += float((t - first).exp())
    # exp(-bound) is at most p(x), so these sum to at most one: exactly one for a perfect student, whose first term is 0
    assert total <= 1.01 and abs(float(teacher_lp.exp().sum()) - 1) < 1e-4


def test_evaluate_maze_cli(runs, cli, monkeypatch, tmp_path):
    monkeypatch.chdir(runs)
    flags = f"maze --ckpt out/maze-ar out/maze-mdlm-gumbel out/maze-mdlm --n=50 --nfe=1,4 --json={tmp_path / 'm.json'}"
    code, out, _ = cli(evaluate, flags)
    assert code == 0 and out.startswith("| model | decode | NFE |")
    result = json.loads((tmp_path / "m.json").read_text())
    assert {"n", "seed", "seconds", "precision", "device", "git", "args"} <= set(result["meta"])
    rows = result["rows"]
    assert [(r["model"], r["decode"], r["nfe"]) for r in rows] == [("teacher", "sample", 10)] + [
        (m, d, k) for m in ("maze-mdlm-gumbel", "maze-mdlm") for d in ("sample", "greedy") for k in (1, 4)] + [
        ("theory", "sample", 1), ("theory", "sample", 4)]
    for r in rows:
        assert 0 <= r["success"] <= 1 and r["nfe_counted"] <= r["nfe"] and {"stderr", "distinct", "effective"} <= set(r)
    assert 0 < rows[0]["validity_mass"] < 1 and "agree" in rows[3] and "agree" not in rows[7]
    code, out, _ = cli(evaluate, "nfe --ckpt out/maze-mdlm-gumbel --n=20 --nfe=1,2")
    assert code == 0 and "NFE 2" in out
    ns = {line.split(" | ")[0]: line.split(" | ")[4] for line in out.splitlines() if "| sample |" in line}
    assert ns == {"| maze-mdlm-gumbel": "20", "| theory": "200"}
    refused(cli(evaluate, f"nfe --ckpt out/maze-mdlm --plot={tmp_path}/p.txt"), "--plot", ".png or .svg")
    refused(cli(evaluate, f"maze --ckpt out/maze-mdlm --samples={tmp_path}/m.json"), "--samples", "another folder")
    refused(cli(evaluate, "maze --ckpt out/maze-mdlm --nfe=0"), "--nfe", "at least 1")
    refused(cli(evaluate, "maze --ckpt out/maze-mdlm --json=no/such.json"), "--json", "cannot be written")
    refused(cli(evaluate, "maze --ckpt out/maze-mdlm --decode=best"), "--decode", "greedy")
    refused(cli(evaluate, "poetry --ckpt out/maze-mdlm"), "'poetry'", "nfe")


def test_nfe_averages_over_seeds(monkeypatch, capsys, tmp_path):
    """Runs whose names differ in nothing but a seed at their end, NAME-s0, NAME-s1 .., are one line."""
    class Model:
        meta = dict(tokenizer="maze")

        def __init__(self, name):
            self.name = name
    models = [Model("a-s0"), Model("a-s1"), Model("a-s1-more")]
    rows = [dict(model="teacher", decode="sample", nfe=10, success=0.98, stderr=0.005, n=100)] + [
        dict(model=m.name, decode="greedy", nfe=k, success=s + k / 10, stderr=0.01, n=100)
        for m, s in zip(models, (0.2, 0.4, 0.6)) for k in (1, 2)] + [dict(model="data", success=1, stderr=0, n=100)]
    monkeypatch.setattr(evaluate, "maze_rows", lambda *a: rows)
    args = argparse.Namespace(n=100, nfe=[1, 2], plot=None, tau=None, top_p=None, sampler="ancestral", order="random",
                              weights="ema", seed=0, metric=None, json=None)
    report(args, *evaluate.nfe(args, models, "cpu"))
    out = capsys.readouterr().out
    assert "| a-s0 and 1 other seed | greedy | 40.0 ± 14.1 | 50.0 ± 14.1 |" in out
    assert "| a-s1-more | greedy | 70.0 ± 1.0 |" in out and "| teacher | sample |  |  | 98.0 ± 0.5 |" in out
    assert "| data: 100.0 ± 0.0 |" in out
    if importlib.util.find_spec("matplotlib"):
        args.plot = str(tmp_path / "p.svg")
        evaluate.nfe(args, models, "cpu")
        assert "</svg>" in open(args.plot).read()
    else:
        args.plot = "p.svg"
        with pytest.raises(BadInput, match="pip install matplotlib"):
            evaluate.nfe(args, models, "cpu")


def test_infill_cli(text_runs, cli, monkeypatch, tmp_path):
    """Only the masked tokens are filled in and scored; the data's own row, by hand."""
    monkeypatch.chdir(text_runs)
    flags = f"infill --judge=out/ar --n=12 --masked=7 --nfe=3,7 --samples={tmp_path}/s"
    code, out, err = cli(evaluate, f"{flags} --ckpt out/plain out/gumbel --json={tmp_path / 'i.json'}")
    assert code == 0, err
    rows = json.loads((tmp_path / "i.json").read_text())["rows"]
    assert [r["model"] for r in rows] == ["data"] + ["plain"] * 2 + ["gumbel"] * 2 and rows[0]["recovered"] == 1
    assert all(r["nfe_counted"] <= r["nfe"] and r["recovered"] < 0.9 for r in rows[1:])
    real = evaluate.validation_rows(Shards("data/mine", "val", 24), 12, 0)
    changed = np.zeros(real.shape, dtype=bool)
    for file in os.listdir(tmp_path / "s"):
        filled = [json.loads(line).get("tokens") for line in open(tmp_path / "s" / file)][1:]
        changed[:, 1:] |= np.array(filled) != real[:, 1:]
    assert 1 <= changed.sum(1).min() and changed.sum(1).max() <= 7
    u = torch.rand(12, 23, generator=gen(sample.torch_seed(0, 1)))
    masked = (u <= u.sort(1).values[:, 6:7])
    assert not (changed[:, 1:] & ~masked.numpy()).any()
    x, model = torch.from_numpy(real), sample.load_model("out/ar")
    nll = -model.log_probs(x[:, :-1]).gather(-1, x[:, 1:, None]).squeeze(-1)[masked & (x[:, 1:] != 256)].mean()
    assert abs(rows[0]["gen_ppl"] / math.exp(nll) - 1) < 1e-4
    refused(cli(evaluate, f"{flags} --ckpt out/ar"), "only masked models")
    refused(cli(evaluate, f"{flags.replace('=7 ', '=24 ')} --ckpt out/plain"), "--masked=24", "mask fewer")


def test_samples_are_kept_and_used_again(text_runs, cli, monkeypatch, tmp_path):
    """Each row's samples have a file, other settings another one; read from it, no network is called, and the numbers
    are the same. A [MASK] that a sampler leaves is an error, and leaves nothing behind."""
    monkeypatch.chdir(text_runs)
    flags = f"genppl --judge=out/ar --ckpt out/plain --n=6 --nfe=3 --samples={tmp_path}/s"
    first = cli(evaluate, flags)
    assert first[0] == 0, first[2]
    (name,) = os.listdir(tmp_path / "s")
    lines = [json.loads(line) for line in open(tmp_path / "s" / name)]
    assert lines[0]["settings"]["seed"] == 0 and len(lines) == 7
    assert {"text", "tokens", "nfe", "seconds"} <= set(lines[1])
    read = flags.replace(f"{tmp_path}/s", f"{tmp_path}/s/{name}")
    with monkeypatch.context() as m:
        m.setattr(evaluate, "generate", lambda *a, **kw: pytest.fail("drawn again"))
        assert cli(evaluate, read)[1] == first[1]
        for other, words in (("--nfe=3,4", "one --nfe"), ("--decode=sample,greedy", "one --decode"),
                             ("--ckpt out/plain out/gumbel", "one --ckpt"), ("--decode=greedy", "decode sample"),
                             ("--nfe=4", "steps 3"), ("--n=7", "n 6"), ("--ckpt out/gumbel", "model plain"),
                             ("--tau=0.9", "tau 1.0"), ("--samples=none.jsonl", "no file of samples")):
            refused(cli(evaluate, f"{read} {other}"), "--samples", words)
    assert cli(evaluate, flags)[0] == 0
    others = ("--seed=1", "--tau=0.9", "--decode=greedy", "--weights=raw", "--nfe=4", "--length=20", "--n=7",
              "--sampler=remdm --remask=0.5")
    for other in others:
        assert cli(evaluate, f"{flags} {other}")[0] == 0
    assert len(os.listdir(tmp_path / "s")) == 1 + len(others)
    real = evaluate.generate
    with monkeypatch.context() as m:
        m.setattr(evaluate, "generate", lambda model, x, *a, **kw: (x, real(model, x, *a, **kw)[1]))
        with pytest.raises(RuntimeError, match="MASK"):
            cli(evaluate, f"{flags} --seed=2")
    assert len([f for f in os.listdir(tmp_path / "s") if f.endswith(".jsonl")]) == 1 + len(others)


def test_nfe_of_text(text_runs, cli, monkeypatch, tmp_path):
    """Any metric against NFE; an AR model and the data, which have none, beside it."""
    monkeypatch.chdir(text_runs)
    plot = f"--plot={tmp_path / 'p.png'}" if importlib.util.find_spec("matplotlib") else ""
    code, out, err = cli(evaluate, "nfe --judge=out/ar --ckpt out/ar out/plain --data=data/mine --n=8 --nfe=2,4 "
                         + plot)
    assert code == 0 and "| GenPPL | decode | NFE 2 | NFE 4 | NFE 23 | entropy |" in out and "| data: " in out, err
    assert not plot or (tmp_path / "p.png").stat().st_size > 5000
    code, out, err = cli(evaluate, "nfe --judge=out/ar --ckpt out/plain --metric=mauve --n=20 --nfe=2 --decode=sample")
    assert code == 0 and "| MAUVE | decode | NFE 2 |" in out, err


def test_two_seeds_of_ppl_agree(text_runs, cli, monkeypatch, tmp_path):
    monkeypatch.chdir(text_runs)
    rows = []
    for seed in range(2):
        flags = f"ppl --ckpt out/gumbel out/plain --n=300 --seed={seed} --json={tmp_path / 'p.json'}"
        assert cli(evaluate, flags)[0] == 0
        rows.append(json.loads((tmp_path / "p.json").read_text())["rows"])
    for a, b in zip(*rows):
        assert 0 < abs(a["nll"] - b["nll"]) < 4 * math.hypot(a["nll_stderr"], b["nll_stderr"]), (a, b)
        assert {"seed", "git", "precision", "device", "seconds", "n"} <= set(a)


def test_maze_statistics():
    """success, and the effective number: about the number of equally likely paths."""
    paths, rng = maze_paths(), np.random.default_rng(0)
    rows = np.concatenate([paths[rng.integers(50, size=3000)], np.zeros((1000, 10), np.uint16)])
    s = evaluate.maze_statistics(rows)
    assert s["success"] == 0.75 and s["distinct"] == 50 and abs(s["effective"] - 50) < 3
    assert abs(s["stderr"] - math.sqrt(0.75 * 0.25 / 4000)) < 1e-9
    assert (evaluate.maze_statistics(rows[-5:])["success"] == 0
            and evaluate.maze_statistics(rows[-5:])["effective"] is None)


def test_exact_teacher_has_all_its_mass_on_valid_paths():
    class Exact(CountingTeacher):
        def log_probs(self, tokens):
            return self.hidden(tokens)
    assert abs(evaluate.validity_mass(Exact(maze_paths()), "cpu") - 1) < 1e-4
