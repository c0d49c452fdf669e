"""The tests of quantile noise (quantile.py): its law, its embedding, and the students that read it."""
import math
import os
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from scipy import stats

import evaluate
import sample
import train
from data.cli import BadInput
from data.sampling import resolve_sampling
from data.shards import Shards
from data.teacher_cache import QuantileCache
from extra.exact import near_ties
from extra.quantile import OCTAVES, QuantileEmbedding, cumulative, draw_by_quantile, features, interval_of
from gumbel import DEVICE, GumbelEmbedding
from medusa import Medusa
from teacher import model_hash
from test_gumbel import TINY, all_masked, gen, jsonl, refused, rows_of, succeeded, tiny, tiny_ar, tiny_blocks
from test_gumbel import cli, in_text_runs, text_runs  # noqa: F401, the fixtures


def posterior(logits, tokens, seed=0):
    """The u behind tokens [N] under logits [N, V], as training draws it."""
    embedding = QuantileEmbedding(logits.shape[1], 8)
    return embedding.posterior(lambda a, b: logits[a:b], tokens, gen(seed))


# ---------------------------------------------------------------------------------------------------------------------
# the law

def test_a_uniform_draws_the_teachers_law():
    """Against softmax, by chi-square; a token of probability 0 is never drawn."""
    logits = 2 * torch.randn(9, generator=gen())
    logits[3] = -math.inf
    u = torch.rand(200_000, generator=gen(1), dtype=torch.float64)
    x = draw_by_quantile(logits.expand(len(u), 9), u)
    counts = x.bincount(minlength=9)
    expected = logits.double().softmax(-1) * len(u)
    assert counts[3] == 0
    possible = expected > 0
    assert stats.chisquare(counts[possible].numpy(), expected[possible].numpy()).pvalue > 1e-5


def test_the_draw_is_the_first_token_whose_cumulative_mass_exceeds_u():
    """By brute force in exact fractions, at u just below each end of an interval, at it, and within."""
    logits = torch.tensor([0.0, -math.inf, 1.0, 0.3, -math.inf])
    p = [Fraction(v) for v in logits.softmax(-1).double().tolist()]
    ends = cumulative(logits[None])[0]
    us = torch.cat([ends[:3].nextafter(torch.zeros(())), ends[:3], torch.tensor([0.0, 0.1, 0.4, 0.9999])])
    us = us[us < 1]
    for u in us.tolist():
        mass = Fraction(0)
        for want, part in enumerate(p):
            mass += part
            if mass / sum(p) > Fraction(u) + Fraction(1, 2**52):
                break
        found = int(draw_by_quantile(logits[None], torch.tensor([u], dtype=torch.float64)))
        at_an_end = (ends - u).abs().min() < 2**-51            # there float64 and fractions may part
        assert found == want or at_an_end
    assert draw_by_quantile(logits[None], ends[:1]).item() == 2, "F(0) is not above F(0); token 1 has no mass"


def test_noise_of_drawn_tokens_is_uniform():
    """Given x ~ p, u is uniform, whatever p is; and uniform in its own interval, given x."""
    logits = 2 * torch.randn(60_000, 11, generator=gen())
    x = torch.multinomial(logits.softmax(-1), 1, generator=gen(1)).squeeze(1)
    u = posterior(logits, x)
    assert u.dtype == torch.float64
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-5
    beginning, length = interval_of(logits, x)
    assert stats.kstest(((u - beginning) / length).numpy(), "uniform").pvalue > 1e-5
    # of tokens that are not drawn from p it is not
    assert stats.kstest(posterior(logits, torch.zeros_like(x)).numpy(), "uniform").pvalue < 1e-5


def test_the_noise_of_a_token_draws_it_again():
    """Wherever p(x) > 2^-46, of 10^5 rows, with probabilities down to e^-70; below, u is off by 2^-52 at most."""
    V = 50
    order = torch.randperm(V, generator=gen())
    logits = torch.linspace(0, -70, V)[order] + torch.randn(2000 * V, V, generator=gen(1))
    x = torch.arange(len(logits)) % V
    u = posterior(logits, x)
    p = logits.double().softmax(-1).gather(1, x[:, None]).squeeze(1)
    possible = p > 2.0**-46
    assert 0.2 < possible.double().mean() < 0.8
    assert torch.equal(draw_by_quantile(logits, u)[possible], x[possible])
    ends = F.pad(cumulative(logits), (1, 0))
    below = ends.gather(1, x[:, None]).squeeze(1) - u
    above = u - ends.gather(1, x[:, None] + 1).squeeze(1)
    assert max(below.max(), above.max()) <= 2**-52
    assert 0 <= u.min() and u.max() < 1


@pytest.mark.parametrize("v", [0.0, 0.5, 1 - 2**-53])
def test_no_number_leaves_its_interval_by_rounding(v):
    """The ends included: beginning + v * length is at F(x - 1) or above, and below F(x)."""
    logits = 3 * torch.randn(20_000, 200, generator=gen())
    x = torch.randint(200, (20_000,), generator=gen(1))
    beginning, length = interval_of(logits, x)
    u = beginning + v * length
    assert torch.equal(draw_by_quantile(logits, u), x)


def test_a_token_that_cannot_have_been_drawn_shows():
    logits = torch.tensor([[0.0, -math.inf, 0.0]])
    assert posterior(logits, torch.tensor([1])).isnan().all()


def test_shared_quantile_noise_is_a_weaker_coupling_than_gumbel_noise():
    """Two laws on 64 tokens, one of which moves 1/64 of the mass from the last to the first: with one u they never
    agree but at the ends; with one Gumbel vector, with probability (1 - TV) / (1 + TV) or more."""
    V = 64
    p = torch.full((V,), 1 / V)
    q = p.clone()
    q[0] += 1 / V
    q[-1] = 0
    n = 20_000
    u = torch.rand(n, generator=gen(), dtype=torch.float64)
    quantile = draw_by_quantile(p.log().expand(n, V), u) == draw_by_quantile(q.log().expand(n, V), u)
    gumbel = -torch.rand(n, V, generator=gen(1), dtype=torch.float64).log().neg().log()
    shared = (p.log() + gumbel).argmax(1) == (q.log() + gumbel).argmax(1)
    TV = 1 / V
    assert quantile.double().mean() < 0.05
    assert shared.double().mean() > (1 - TV) / (1 + TV) - 0.01


# ---------------------------------------------------------------------------------------------------------------------
# the embedding

def test_features_are_sines_and_cosines_of_exact_phases():
    """2^k u modulo 1 in exact fractions."""
    u = torch.rand(50, generator=gen(), dtype=torch.float64)
    for value, found in zip(u.tolist(), features(u)):
        phases = [float(Fraction(value) * 2**k % 1) for k in range(OCTAVES)]
        want = [math.sin(2 * math.pi * phase) for phase in phases] + [math.cos(2 * math.pi * phase) for phase in phases]
        assert (found - torch.tensor(want)).abs().max() < 1e-6
    assert features(torch.tensor([0.25], dtype=torch.float64)).dtype == torch.float32


def test_an_embedding_starts_at_the_scale_of_a_tokens():
    g = QuantileEmbedding(50, 64).from_prior(4000, generator=gen())
    assert 0.018 < g.std() < 0.022


def test_the_noise_can_be_drawn_apart_from_its_embedding(monkeypatch):
    """In chunks as in one, with a gradient for W; no tau."""
    logits = torch.randn(40, 9, generator=gen())
    x = torch.randint(9, (40,), generator=gen(1))
    embedding = QuantileEmbedding(9, 16)
    whole = embedding.from_posterior(lambda a, b: logits[a:b], x, gen(2))
    monkeypatch.setattr(DEVICE, "chunk", 27)               # 3 rows
    parts = embedding.from_posterior(lambda a, b: logits[a:b], x, gen(2))
    assert torch.equal(whole, parts)
    assert torch.equal(whole, embedding(posterior(logits, x, seed=2)))
    parts.sum().backward()
    assert embedding.weight.grad.abs().sum() > 0
    assert embedding.from_posterior(lambda a, b: logits[a:b], x[:0], gen()).shape == (0, 16)
    with pytest.raises(ValueError, match="tau 0.5"):
        embedding.from_prior(3, tau=0.5)


def test_two_tokens_that_must_agree_are_learnt():
    """As `python gumbel.py`: written in one call from two uniforms, 95 % of the pairs are equal (chance: 12.5 %)."""
    K = 8
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(4 * OCTAVES, 64), nn.ReLU(), nn.Linear(64, 2 * K))
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    first = torch.zeros(256, K)
    for step in range(400):
        x1 = torch.randint(K, (256,))
        second = torch.full((256, K), -math.inf).scatter(1, x1[:, None], 0.0)
        u = torch.stack([posterior(first, x1, step), posterior(second, x1, step + 1000)], 1)
        logits = student(features(u).flatten(1)).view(-1, 2, K)
        loss = F.cross_entropy(logits.flatten(0, 1), torch.stack([x1, x1], 1).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    u = torch.rand(4000, 2, dtype=torch.float64, generator=gen())
    x = student(features(u).flatten(1)).view(-1, 2, K).argmax(-1)
    assert (x[:, 0] == x[:, 1]).double().mean() > 0.95
    assert x[:, 0].bincount(minlength=K).min() > 300       # of 500 expected: no collapse


# ---------------------------------------------------------------------------------------------------------------------
# students

@pytest.mark.parametrize("make", [tiny, tiny_blocks])
def test_the_loss_of_drawn_noise_is_that_of_the_same_noise_given(make):
    model = make("quantile", L=8)
    teacher = tiny_ar(L=8)
    x = rows_of(5, L=8)
    z = x.masked_fill(torch.rand(x.shape, generator=gen(3)) < 0.5, 7)
    z[:, 0] = 6
    t = torch.full((5, model.n_blocks), 0.5)
    drawn, _ = model.loss(x, t, teacher, z, generator=gen(1))
    masked = z == 7
    u = torch.zeros(x.shape, dtype=torch.float64)
    u[masked] = model.noise_embed.posterior(teacher.posterior_logits(x, masked), x[masked], gen(1))
    given, _ = model.loss(x, t, None, z, noise=u)
    assert torch.equal(drawn, given)
    fresh, _ = model.loss(x, t, None, z, noise=model.fresh_noise(x.shape, gen(2)))
    assert (fresh - given).abs() > 1e-4, "the noise is read"


@pytest.mark.parametrize("make", [tiny, tiny_blocks])
def test_a_sample_is_a_function_of_its_noise(make):
    model = make("quantile", L=8)
    start = all_masked(6, 8)
    u = model.fresh_noise((6, 8), gen(1))
    x, nfe = model.generate(start, 1, noise=u, greedy=True)
    again, _ = model.generate(start, 1, noise=u, greedy=True, generator=gen(5))
    other, _ = model.generate(start, 1, noise=model.fresh_noise((6, 8), gen(2)), greedy=True)
    assert torch.equal(x, again) and not torch.equal(x, other)
    with pytest.raises(ValueError, match="tau 0.5"):
        model.generate(start, 1, tau=0.5)
    assert model.default_tau() == 1


def test_a_vector_embedding_and_heads_refuse_the_kind():
    with pytest.raises(ValueError, match="quantile"):
        GumbelEmbedding(7, 16, "quantile")
    with pytest.raises(ValueError, match="quantile"):
        Medusa(7, 12, 6, 32, 3, noise="quantile")


def test_near_ties_of_quantile_noise_lie_at_the_ends_of_intervals():
    verifier = tiny_ar(L=6)
    x = rows_of(40, L=6)
    logits = verifier.logits(verifier.hidden(x[:, :-1])).detach()
    ends = cumulative(logits[:, 2])[:, 2]                  # of position 3, between tokens 2 and 3
    u = torch.rand(40, 6, dtype=torch.float64, generator=gen())
    u[:, 3] = ends + torch.tensor([1e-7, 1e-3]).repeat(20)
    written = x.clone()
    written[:, 3] = (x[:, 3] + 1) % 6
    near = near_ties(verifier, written, x, u, 1.0, 1.0)
    assert near[::2].all() and near[1::2].double().mean() < 0.2
    assert not near_ties(verifier, x, x, u, 1.0, 1.0).any()


# ---------------------------------------------------------------------------------------------------------------------
# the cache

@pytest.fixture(scope="module")
def cached(text_runs, tmp_path_factory):
    """A teacher, rows of text, and the folder of their cache."""
    data = Shards(str(text_runs / "data/mine"), "train", 24)
    teacher = tiny_ar(V=257, L=24)
    cache = QuantileCache(model_hash(teacher), data)
    cache.fill(teacher, data)
    return teacher, data, cache


def test_a_cache_gives_the_noise_that_the_teacher_gives(cached):
    """To the last bit, from 12 bytes a token."""
    teacher, data, cache = cached
    sizes = [os.path.getsize(cache.path(name)) for name in ("beginning.bin", "length.bin")]
    assert sum(sizes) == 12 * 23 * len(data)
    rows = [0, 5, len(data) - 1]
    x = torch.from_numpy(data.rows(rows))
    masked = torch.rand(x.shape, generator=gen()) < 0.5
    masked[:, 0] = False
    embedding = QuantileEmbedding(257, 16)
    again = QuantileCache(model_hash(teacher), data)       # as another run opens it
    stored = again.for_rows(again.load(rows)).posterior_logits(x, masked)
    found = embedding.posterior(stored, x[masked], gen(1))
    # the very logits: of these rows as the cache has asked for them, eight at once
    h = teacher.hidden(torch.from_numpy(data.rows(range(8)))[:, :-1])
    logits = teacher.logits(h.flatten(0, 1)).view(8, 23, 257)
    want = embedding.posterior(lambda a, b: logits[0][masked[0, 1:]][a:b], x[0][masked[0]], gen(1))
    assert torch.equal(found[:len(want)], want)
    # and those of another batch, but for rounding
    live = embedding.posterior(teacher.posterior_logits(x, masked), x[masked], gen(1))
    assert (found - live).abs().max() < 1e-6


def test_a_damaged_cache_is_refused(cached, tmp_path, monkeypatch):
    teacher, data, cache = cached
    path = cache.path("beginning.bin")
    whole = open(path, "rb").read()
    for content in (whole[:-8], b"\xff" * 8 + whole[8:]):
        with open(path, "wb") as f:
            f.write(content)
        with pytest.raises(BadInput, match="remove it"):
            QuantileCache(model_hash(teacher), data)
    with open(path, "wb") as f:
        f.write(whole)
    QuantileCache(model_hash(teacher), data)


# ---------------------------------------------------------------------------------------------------------------------
# the commands

QUANTILE = f"--noise=quantile --teacher=out/ar --data=mine --length=24 --steps=3 {TINY}"


def test_students_are_trained_sampled_from_and_measured(in_text_runs, cli, tmp_path):  # noqa: F811
    succeeded(cli(train, f"--model=mdlm {QUANTILE} --out={tmp_path}/q"))
    succeeded(cli(train, f"--model=mdlm {QUANTILE} --teacher_cache=2 --out={tmp_path}/c"))
    succeeded(cli(train, f"--model=bd3lm --block_size=4 {QUANTILE} --out={tmp_path}/b"))
    for run in ("q", "c", "b"):
        losses = [row["loss"] for row in jsonl(tmp_path / run / "log.jsonl") if "loss" in row]
        assert len(losses) == 3 and all(map(math.isfinite, losses))
    for run in ("q", "b"):
        assert "sample 0" in succeeded(cli(sample, f"--ckpt={tmp_path}/{run} --n=1 --steps=2"))[0]
        out, _ = succeeded(cli(sample, f"--ckpt={tmp_path}/{run} --n=2 --sampler=exact --verifier=out/ar"))
        assert "sample 1" in out
        refused(cli(sample, f"--ckpt={tmp_path}/{run} --n=1 --tau=0.5"), "--tau")
        refused(cli(sample, f"--ckpt={tmp_path}/{run} --n=1 --sampler=exact --verifier=out/ar --tau=0.5"), "--tau")
    succeeded(cli(evaluate, f"ppl --ckpt {tmp_path}/q --n=8"))
    out, _ = succeeded(cli(evaluate, f"acceptance --ckpt {tmp_path}/q out/gumbel --verifier=out/ar --n=8 "
                                     "--prompt_length=1 --draft=every,never --tau=1"))
    assert "near ties" in out
    refused(cli(evaluate, f"acceptance --ckpt {tmp_path}/q out/gumbel --verifier=out/ar --n=8 --tau=0.5"), "--tau=0.5")


def test_exact_decoding_takes_no_nucleus_unless_it_is_asked_for():
    """In which u would mean another token than the student was told."""
    text = dict(tokenizer="bytes")
    exact = SimpleNamespace(tau=None, top_p=None, sampler="exact")
    for noise, want in (("gumbel", 0.9), ("quantile", 1.0)):
        model = tiny(noise)
        model.meta = text
        assert resolve_sampling(exact, model)["top_p"] == want
    exact.top_p = 0.8
    assert resolve_sampling(exact, model)["top_p"] == 0.8


def test_heads_do_not_take_it(in_text_runs, cli):  # noqa: F811
    refused(cli(train, f"--model=medusa {QUANTILE} --out=out/none"), "--noise", "quantile", "mdlm")
