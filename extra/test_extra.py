"""The tests of extra/: published weights, decoding with a verifier, judges, MAUVE, lm-eval, bench."""
import argparse
import functools
import http.server
import importlib.util
import json
import math
import os
import sys
import threading
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

import bd3lm
import evaluate
import sample
import train
from bd3lm import BD3LM
from data import prepare
from data.cli import BadInput
from extra import bench
from extra import judge as llm_judge
from extra import lm_eval_model, published, scores
from extra.verified import generate_apd
from gumbel import GumbelEmbedding, nucleus, sample_gumbel
from mdlm import load_published
from teacher import GPT2, CausalConfig, CausalLM, extract_parallel
from teacher import load_published as load_published_ar
from test_gumbel import (gen, golden, needs_shared, randomise, refused, rows_of, save_gpt2, tiny, tiny_ar)
from test_gumbel import cli, runs  # noqa: F401, the fixtures


def test_load_published_refuses_other_files(tmp_path):
    torch.save({"state_dict": {"weight": torch.zeros(2)}}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="not a published"):
        load_published(str(tmp_path / "x.ckpt"))


def test_safetensors_reader(tmp_path):
    st = pytest.importorskip("safetensors.torch", reason="pip install safetensors")
    tensors = {str(d): torch.randn(3, 4, generator=gen()).mul(5).to(d) for d in published.DTYPES.values()}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "odd": torch.arange(3, dtype=torch.uint8),
                "after odd": torch.randn(5, dtype=torch.float64, generator=gen())}
    st.save_file(tensors, tmp_path / "x.safetensors", {"k": "v"})
    got = published.read_safetensors(tmp_path / "x.safetensors")
    assert got.keys() == tensors.keys()
    assert all(got[k].dtype == v.dtype and torch.equal(got[k], v) for k, v in tensors.items())


class _Bomb:
    """A pickled object that would leave a trace if it were executed."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


class _Node:
    """Pickles as OmegaConf's containers and leaves do: an object with a state dict."""

    def __init__(self, **state):
        self.__dict__.update(state)


def _config(tree):
    if isinstance(tree, dict):
        return _Node(_metadata=_Node(x=1), _content={k: _config(v) for k, v in tree.items()}, _parent=None)
    return _Node(_metadata=_Node(x=1), _val=tree)


def lightning_file(path, name, bomb=None, ema=True, **change):
    """A .ckpt as the authors' code writes it, from a golden state dict. EMA weights differ from the raw ones."""
    g = golden(name)
    state = {"backbone._orig_mod." + k: v for k, v in g["state_dict"].items()}                  # as torch.compile names
    state |= {"teacher_model.wte.weight": torch.zeros(3), "sampling_eps_min": torch.tensor(1e-3)}
    if g["config"]["block_size"] == 32:
        change = {"block_size": "${model.length}"} | change                # pickled unresolved, as their configs say it
    ckpt = {"epoch": 1, "global_step": 7, "state_dict": state, "loops": {"x": _Node(y=2)}, "callbacks": {},
            "hyper_parameters": {"config": _config(g["config"] | change), "tokenizer": bomb or _Node(z=3)}}
    if ema:
        names = [k for k in g["state_dict"] if not k.endswith("inv_freq")]
        ckpt["ema"] = {"decay": 0.9999, "num_updates": 7, "shadow_params": [
            torch.nn.Parameter(g["state_dict"][k] + 0.01 * (i % 3 == 0), False) for i, k in enumerate(names)]}
    torch.save(ckpt, path)
    return g


@needs_shared
@pytest.mark.parametrize("name", ["mdlm", "mdlm_gumbel", "bd3lm", "bd3lm_gumbel", "ar"])
def test_published_lightning_checkpoints(tmp_path, name, cli):
    """Raw weights equal the golden output; EMA weights are the shadow list; nothing pickled is executed."""
    trace, path = tmp_path / "executed", str(tmp_path / "x.ckpt")
    g = lightning_file(path, name, _Bomb(trace))
    blocks = name.startswith("bd3lm")
    x = g["inputs"]["xt" if blocks else "indices"]
    noise = (g["inputs"]["x0"],) if blocks else ()
    if name.endswith("gumbel"):
        noise += F.pad(g["inputs"]["gumbel"], (0, 0, 1, 0)),
    raw = sample.load_model(path, "raw")
    assert raw.args["model"] == name.removesuffix("_gumbel") and getattr(raw, "block_size", 4) == 4
    want = g["log_probs"][..., :raw.vocab_size]
    got = raw.log_probs(x, *noise)[..., :raw.vocab_size]
    masked = x == raw.vocab_size if name != "ar" else torch.ones_like(x, dtype=torch.bool)
    # (the authors normalise the AR output over V + 1 ids: compare up to a constant)
    drift = (got - want)[masked] - (got - want)[masked][:, :1] * (name == "ar")
    assert drift.abs().max() < 1e-4
    ema = sample.load_model(path, "ema")
    state = {k: v + 0.01 * (i % 3 == 0) for i, (k, v) in enumerate(
        (k, v) for k, v in g["state_dict"].items() if not k.endswith("inv_freq"))}
    state["rotary_emb.inv_freq"] = g["state_dict"]["rotary_emb.inv_freq"]
    module = load_published_ar if name == "ar" else (
        functools.partial(bd3lm.load_published, block_size=4) if blocks else load_published)
    again = module(state, length=32, bos=99)
    assert torch.equal(ema.log_probs(x, *noise), again.log_probs(x, *noise))
    assert not torch.equal(ema.log_probs(x, *noise), raw.log_probs(x, *noise))
    assert (ema.length, ema.bos, ema.config.n_head) == (32, 99, 4) and not trace.exists()
    assert module(path).length == 32
    code, out, err = cli(sample, f"--ckpt={path} --n=2 --steps=4 --length=8")
    assert code == 0 and out.count("--- sample") == 2 and "entropy" in out, err
    lightning_file(path, name, ema=False)
    refused(cli(sample, f"--ckpt={path} --n=1 --weights=ema"), "no EMA weights", "--weights=raw")
    assert torch.equal(sample.load_model(path).log_probs(x, *noise), raw.log_probs(x, *noise))


@needs_shared
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_published_folders_and_what_is_refused(tmp_path, cli):
    st = pytest.importorskip("safetensors.torch", reason="pip install safetensors")
    g = golden("mdlm")
    state = {"backbone." + k: v.clone() for k, v in g["state_dict"].items()}
    folder = tmp_path / "mdlm-owt"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dict(model_type="mdlm", model_length=32, n_heads=4, n_blocks=3,
                                                        hidden_dim=64, vocab_size=101)))
    st.save_file(state, folder / "model.safetensors")
    model = sample.load_model(str(folder))
    x = g["inputs"]["indices"]
    assert (model.log_probs(x)[..., :100] - g["log_probs"][..., :100])[x == 100].abs().max() < 1e-4
    assert model.length == 32
    refused(cli(sample, f"--ckpt={folder} --n=1 --prompt=700"), "ids below 100")
    code, out, _ = cli(sample, f"--ckpt={folder} --n=1 --steps=4 --prompt=5")
    assert code == 0 and out.splitlines()[1].startswith("5 ")
    lightning_file(tmp_path / "block.ckpt", "bd3lm", block_size=5)
    refused(cli(sample, f"--ckpt={tmp_path / 'block.ckpt'} --n=1"), "block_size 5 does not divide", "32")
    (tmp_path / "bad.ckpt").write_bytes(b"no zip")
    refused(cli(sample, f"--ckpt={tmp_path / 'bad.ckpt'} --n=1"), "bad.ckpt", "not a readable Lightning checkpoint")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.ckpt")              # would run its code
    refused(cli(sample, f"--ckpt={tmp_path / 'script.ckpt'} --n=1"), "not a readable Lightning checkpoint")
    torch.save({"state_dict": {}}, tmp_path / "empty.ckpt")
    refused(cli(sample, f"--ckpt={tmp_path / 'empty.ckpt'} --n=1 --weights=raw"), "not a published")
    ckpt = lightning_file(tmp_path / "short.ckpt", "mdlm")
    ckpt = {"state_dict": {"backbone." + k: v for k, v in ckpt["state_dict"].items()},
            "ema": {"shadow_params": [torch.zeros(2)]}}
    torch.save(ckpt, tmp_path / "short.ckpt")
    refused(cli(sample, f"--ckpt={tmp_path / 'short.ckpt'} --n=1"), "1 EMA tensors do not match the 40")


def apd_by_hand(student, verifier, row, ratio, look, top_p, greedy, generator, g=None):
    """Section 4 of Israel et al. as a plain loop over one row."""
    x, calls, V = row.clone(), 0, student.mask_id
    while (x == V).any():
        first = int((x == V).nonzero()[0])
        where = [i for i in range(first, min(first + look, len(x))) if x[i] == V]
        logits = student.logits(student.hidden(x[None], g)[0])[where].double()
        if top_p < 1:
            logits = nucleus(logits, top_p)
        zeta = torch.zeros(()) if greedy else sample_gumbel(logits.shape, generator)
        draft = (logits + zeta).argmax(-1)
        y = x.clone()
        y[where] = draft
        y[y == V] = 0
        ar = torch.stack([verifier.log_probs(y[None])[0, i - 1] for i in where]).double()
        for j, i in enumerate(where):
            target = torch.where(logits[j] == -math.inf, -math.inf, ratio * logits[j].log_softmax(-1)
                                 + (1 - ratio) * ar[j])
            if j and (target + (zeta if greedy else zeta[j])).argmax() != draft[j]:
                break
            x[i] = draft[j]
        calls += 1
    return x, calls


@pytest.mark.parametrize("noise", [None, "gumbel"])
def test_apd_is_its_definition(noise):
    student, verifier = tiny(noise, L=12), tiny_ar(L=12)
    kept = 0
    for seed, (ratio, look, top_p, greedy) in enumerate([
            (0.5, 4, 1.0, False), (0.0, 11, 1.0, False), (0.7, 3, 0.6, False), (0.3, 5, 1.0, True),
            (0.5, 1, 1.0, False)] * 4):
        row = rows_of(1, L=12, seed=seed)[0]
        row[torch.rand(12, generator=gen(seed)) < 0.8] = 7
        row[0] = student.bos
        xi = sample_gumbel((1, 12, 7), gen(seed)) if noise else None
        got, nfe, checks = generate_apd(student, row[None], verifier, ratio, look, 1.0, top_p, greedy, xi,
                                                generator=gen(seed + 50))
        g = student.noise_embed(xi) if noise else None
        want, calls = apd_by_hand(student, verifier, row, ratio, look, top_p, greedy, gen(seed + 50), g)
        assert torch.equal(got[0], want) and nfe.tolist() == [calls] == checks.tolist()
        assert torch.equal(got[0][row != 7], row[row != 7])
        kept += int((row == 7).sum()) - calls
    assert kept > 5                                        # some drafts were longer than one token


def test_apd_limits():
    """R = 1 accepts every draft; a batch goes at its own pace; bad values are refused."""
    student, verifier = tiny(L=12), tiny_ar(L=12)
    start = torch.full((3, 12), 7)
    start[:, 0] = student.bos
    start[1, 1:6] = 2
    start[2] = rows_of(1, L=12)[0]
    x, nfe, checks = generate_apd(student, start, verifier, 1.0, 4, generator=gen())
    assert nfe.tolist() == [3, 2, 0] == checks.tolist() and (x < 7).all() and torch.equal(x[2], start[2])
    for kw in (dict(ratio=1.5), dict(max_lookahead=0), dict(tau=0.0), dict(top_p=0.0)):
        with pytest.raises(ValueError):
            generate_apd(student, start, verifier, **kw)


def test_apd_cli(runs, cli, monkeypatch):
    monkeypatch.chdir(runs)
    for model in ("out/maze-mdlm", "out/maze-mdlm-gumbel"):
        code, out, _ = cli(sample, f"--ckpt={model} --n=2 --sampler=apd --verifier=out/maze-ar --max_lookahead=4")
        assert code == 0 and out.count("verifier_calls") == 2
    code, out, _ = cli(evaluate, "maze --ckpt out/maze-ar out/maze-mdlm --n=20 --nfe=4 --sampler=apd "
                       "--verifier=out/maze-ar")
    assert code == 0 and "| verifier |" in out and "| teacher |" in out


def test_judge_nll(tmp_path):
    """The mean over predicted tokens, EOS targets left out, whatever the lengths; windows for long samples."""
    judge = tiny_ar(V=9, L=16, seed=3).requires_grad_(False)
    samples = [np.random.default_rng(i).integers(0, 9, n) for i, n in enumerate([15, 3, 9, 1, 15])]
    nll, count = scores.judge_nll(judge, samples, "cpu", batch=2)
    for s, a, c in zip(samples, nll, count):
        x = torch.tensor([8, *s])[None]
        logp = judge.log_probs(x[:, :-1])[0].gather(-1, x[0, 1:, None]).squeeze(1)
        keep = x[0, 1:] != 8
        assert abs(a + float(logp[keep].sum())) < 1e-4 and c == keep.sum()
    x = torch.randint(0, 8, (1, 40), generator=gen())
    nll, count = scores.judge_nll(judge, [x[0].numpy()], "cpu")
    full, want, done = torch.cat([torch.tensor([[8]]), x], 1), 0.0, 1
    for start in range(0, 40, 8):                          # windows of 16 ids, stride 8, each id scored once
        part = full[:, start:start + 16]
        logp = judge.log_probs(part[:, :-1])[0].gather(-1, part[0, 1:, None]).squeeze(1)
        for j in range(part.shape[1] - 1):
            if start + j + 1 >= done:
                want, done = want - float(logp[j]), start + j + 2
    assert count[0] == 40 and done == 41 and abs(nll[0] - want) < 1e-3


def test_mauve_is_that_of_mauve_text(recwarn):
    """The same features: equal to mauve-text's within what the seeds of k-means differ by, from near to far apart; a
    set against itself scores 1, sets that share no cluster almost 0."""
    reference = pytest.importorskip("mauve", reason="pip install mauve-text")
    A = torch.randn(24, 24, generator=gen())
    for shift in (0.0, 0.3, 1.0):
        p, q = (torch.randn(500, 24, generator=gen(i)) @ A + shift * i for i in (0, 1))
        ours = scores.mauve_scores(p, q)
        theirs = np.array([reference.compute_mauve(p.numpy(), q.numpy(), seed=s).mauve for s in range(5)])
        assert abs(ours.mean() - theirs.mean()) < 2 * math.hypot(ours.std(), theirs.std()) / 5 ** 0.5 + 0.004, (
            shift, ours, theirs)
    assert np.allclose(scores.mauve_scores(p, p), 1)
    assert scores.mauve_scores(p, p + 50).max() < 0.01


def test_kmeans():
    """A fixed point of Lloyd's iteration, the best of the runs, two clusters where there are two; more clusters than
    distinct points are no obstacle."""
    x = torch.randn(300, 5, generator=gen())

    def cost(labels, check=False):
        centre = torch.stack([x[labels == i].mean(0) for i in range(8)])
        assert not check or torch.equal(torch.cdist(x, centre).argmin(1), labels)
        return float((x - centre[labels]).square().sum())
    assert cost(scores.kmeans(x, 8, gen(2)), check=True) < cost(scores.kmeans(x, 8, gen(2), redo=1))
    x[:100] += 20
    labels = scores.kmeans(x, 2, gen())
    assert (labels[:100] == labels[0]).all() and (labels[100:] == 1 - labels[0]).all()
    assert len(scores.kmeans(torch.ones(30, 5), 4, gen())) == 30


def test_mauve_features_are_those_of_mauve_text(tmp_path):
    """The last layer at each text's last token, no BOS in front, texts of different lengths in one batch."""
    mauve_utils = pytest.importorskip("mauve.utils", reason="pip install mauve-text")
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    save_gpt2(tmp_path, V=60, L=32)
    samples = [torch.randint(60, (n,), generator=gen(n)) for n in (5, 31, 12, 7, 32)]
    want = mauve_utils.featurize_tokens_from_model(
        transformers.GPT2LMHeadModel.from_pretrained(tmp_path), [s[None] for s in samples], 2)
    got = scores.last_hidden(GPT2.from_pretrained(str(tmp_path)), [s.numpy() for s in samples], "cpu", batch=3)
    assert torch.allclose(got, want, atol=1e-4)


class Unigram(CausalLM):
    """A judge that gives every token the same distribution, wherever it stands."""

    def __init__(self, p, length=64):
        super().__init__(CausalConfig(vocab_size=len(p), length=length, bos=len(p) - 1))
        self.table = torch.nn.Parameter(torch.tensor(p).log())

    def hidden(self, tokens, cache=None):
        return tokens[..., None].float()

    def logits(self, h, exact=True):
        return self.table.expand(*h.shape[:-1], -1)


def test_genppl_on_a_case_with_a_known_answer():
    """Under the judge that wrote the samples: exp(its entropy), within the printed error, which is right on average; a
    repetitive sample is liked better, and its entropy gives it away."""
    p = np.array([0.5, 0.25, 0.15, 0.1, 1e-9])
    judge, rng = Unigram(p / p.sum()), np.random.default_rng(0)
    runs = [scores.gen_ppl(judge, rng.choice(5, (40, 30), p=p / p.sum()), "cpu") for _ in range(200)]
    values, errors = (np.array([r[k] for r in runs]) for k in ("gen_ppl", "gen_ppl_stderr"))
    truth = math.exp(-(p * np.log(p)).sum())
    assert abs(values.mean() - truth) < 4 * values.std() / 200 ** 0.5 + 0.01
    assert 0.8 < errors.mean() / values.std() < 1.25
    assert (np.abs(values[::2] - values[1::2]) < 4 * np.hypot(errors[::2], errors[1::2])).all()              # two seeds
    same = np.zeros((40, 30), dtype=int)
    facts = scores.gen_ppl(judge, same, "cpu") | scores.text_facts(same)
    assert abs(facts["gen_ppl"] - 2) < 1e-4 < truth - 2 and facts["entropy"] == facts["entropy_set"] == 0
    assert (facts["distinct_1"], facts["distinct_3"]) == (1 / 1200, 1 / 1120)
    once = scores.text_facts(np.arange(200_000, 200_000 + 24).reshape(2, 12))
    assert once["distinct_1"] == once["distinct_2"] == once["distinct_3"] == 1
    assert abs(once["entropy"] - math.log(12)) < 1e-12
    twice = scores.text_facts(np.array([[1, 2, 1, 2], [1, 2, 3, 1]]))         # 12 21 12 12 23 31, 121 212 123 231
    assert (twice["distinct_1"], twice["distinct_2"], twice["distinct_3"]) == (3 / 8, 4 / 6, 1)
    with pytest.raises(BadInput, match="MASK"):
        scores.gen_ppl(judge, np.array([[1, 5]]), "cpu")


def test_genppl_is_that_of_transformers(tmp_path):
    """A random GPT-2 in the published format: the mean of transformers' own loss over rows."""
    lm = save_gpt2(tmp_path)
    samples = torch.randint(300, (6, 20), generator=gen())
    rows = torch.cat([torch.full((6, 1), 300), samples], 1)
    with torch.no_grad():
        want = math.exp(lm(rows, labels=rows).loss.item())
    assert abs(scores.gen_ppl(sample.load_model(str(tmp_path)), samples.numpy(), "cpu")["gen_ppl"] / want - 1) < 1e-4


def test_bench(cli):
    """Every table comes out, with the rows that it names; and what it compares with does the same thing."""
    net = "--size=tiny --vocab_size=40 --repeats=1"
    for flags, words in ((f"sampling {net} --length=16 --nfe=4 --batch_size=2", ["as the authors' code", "AR, KV"]),
                         ("noise --rows=30 --size=tiny --vocab_size=6000 --repeats=1",
                          ["full tensors", "teacher cache, k = 8"]),
                         (f"step {net} --length=16 --micro_batch_size=2", ["MDLM + Gumbel, teacher cache", "AR as"])):
        code, out, err = cli(bench, flags)
        assert code == 0 and all(w in out for w in words) and "| nan" not in out, (flags, out, err)
    refused(cli(bench, f"step {net} --length=15"), "--block_size=4", "divide")
    refused(cli(bench, f"sampling {net} --length=24"), "--length=24", "multiple of 16")
    model, V = bench.filled(tiny("gumbel", V=30, L=8)).eval(), 30
    x = torch.cat([torch.full((4000, 1), 29), torch.full((4000, 7), V)], 1)
    noise = sample_gumbel((1, 8, V), gen()).expand(4000, 8, V)
    with torch.no_grad():
        a = bench.reference_sample(model, x, 3, noise, 1.0, gen(1), bench.Clock())
        b, _ = model.generate(x, 3, noise=noise, generator=gen(2))
    assert (a < V).all() and (a[:, 0] == 29).all()
    for i in range(1, 8):                                  # given the noise: the same law, of neighbours too
        u, v = (torch.bincount(s[:, i] * 3 + s[:, 1 + i % 7] % 3, minlength=3 * V) for s in (a, b))
        many = u + v > 20
        assert stats.chi2_contingency(torch.stack([u[many], v[many]]).numpy()).pvalue > 1e-4
    logits, w = torch.randn(1, V, generator=gen()).expand(20_000, V), torch.full((20_000,), 3)
    eye, emb = torch.eye(V), GumbelEmbedding(V, V)
    emb.weight.data.copy_(eye)
    torch.manual_seed(0)
    u, v = bench.reference_noise(logits, w, eye), emb.from_posterior(lambda a, b: logits[a:b], w, gen()).detach()
    assert (u.mean(0) - v.mean(0)).abs().max() < 5 * (u.var(0) * 2 / 20_000).sqrt().max()


def completion(rows, start, end):
    scored = torch.zeros_like(rows, dtype=torch.bool)
    scored[:, start:end] = True
    return scored


def test_completion_scores_are_their_definition():
    """AR: the chain rule. MDLM: one pass with the completion masked. BD3-LM: block after block, each with the clean
    ones before it; what follows the completion is masked. Whether each token is the argmax."""
    rows = rows_of(5, V=7, L=12, seed=1)
    scored = completion(rows, 5, 10)
    ar = tiny_ar(V=7, L=12, seed=3)
    lp = ar.log_probs(rows)[:, 4:9].gather(-1, rows[:, 5:10, None]).squeeze(-1)
    got, greedy = lm_eval_model.score(ar, rows, scored)
    assert torch.allclose(got.float(), lp.sum(1), atol=1e-4) and not greedy.all()
    best = rows[:1].clone()
    for i in range(5, 10):
        best[:, i] = ar.log_probs(best)[:, i - 1].argmax(-1)
    assert lm_eval_model.score(ar, best, scored[:1])[1].all()
    plain = tiny(V=7, L=12)
    z = rows.masked_fill(completion(rows, 5, 12), 7)
    want = plain.log_probs(z).gather(-1, rows[:, :, None]).squeeze(-1)[:, 5:10].sum(1)
    assert torch.allclose(lm_eval_model.score(plain, rows, scored)[0].float(), want, atol=1e-4)
    torch.manual_seed(0)
    blocks = randomise(BD3LM(7, 12, 6, block_size=4, n_layer=2, n_embd=32, n_head=2, dropout=0.0), 1)
    want = torch.zeros(5)
    for first in (4, 8):                                    # the blocks of positions 4-7 and 8-11
        z = rows.clone()
        z[:, max(5, first):first + 4] = 7
        junk = rows.clone()
        junk[:, first + 4:] = 3                             # later blocks are not seen
        lp = blocks.log_probs(z, junk).gather(-1, rows[:, :, None]).squeeze(-1)
        want += lp[:, max(5, first):min(10, first + 4)].sum(1)
    assert torch.allclose(lm_eval_model.score(blocks, rows, scored)[0].float(), want, atol=1e-4)


def test_completion_score_of_a_gumbel_student_is_a_bound():
    """Its mean is E_q[log p(completion | context, noise)] + log p_teacher, at most log p(completion | context)."""
    teacher, student = tiny_ar(V=4, L=4, seed=2), tiny("gumbel", V=4, L=4, seed=5)
    row, n = torch.tensor([[3, 1, 2, 0]]), 20_000
    many = row.expand(n, -1)
    scored, start = completion(many, 2, 4), torch.tensor([[3, 1, 4, 4]]).expand(n, -1)
    t = teacher.log_probs(row)[0, [1, 2], row[0, 2:]].sum().item()
    given, _ = lm_eval_model.score(student, many, scored, teacher, True, gen(0))
    bound, _ = lm_eval_model.score(student, many, scored, teacher, False, gen(0))
    assert torch.allclose(bound, given + t, atol=1e-5)
    with torch.no_grad():
        q = extract_parallel(teacher, many, gen(1))
        q[:, 1] = 0                                        # noise of the context is not read
        want, prior = (student.log_probs(start, xi)[:, 2:].gather(-1, many[:, 2:, None]).squeeze(-1).sum(1).double()
                       for xi in (q, sample_gumbel((n, 4, 4), gen(2))))
    assert abs(given.mean() - want.mean()) < 5 * want.std() / n ** 0.5 and given.std() > 0
    assert bound.mean() < prior.exp().mean().log() + 0.01


def test_lm_eval_finds_what_a_model_knows(tmp_path, cli, monkeypatch):
    """Questions of two letters' answer that the training text determines: all right, for every kind of model. Questions
    whose labels contradict each other: half right, whatever is answered."""
    pytest.importorskip("lm_eval", reason="pip install lm_eval")
    monkeypatch.chdir(tmp_path)
    answers = dict(zip("abcdefgh", ["fa", "hc", "ae", "cb", "gd", "bh", "eg", "df"]))
    docs = [f"{q}>{a}" for q, a in answers.items()]
    open("x.txt", "w").write("\n".join(docs * 100))
    assert cli(prepare, "text --files x.txt --tokenizer=chars --separator=\\n --out=data/qa")[0] == 0
    size = ("--data=qa --length=6 --n_layer=2 --n_embd=32 --n_head=2 --dropout=0 --batch_size=64 --lr=5e-3 --warmup=10 "
            "--eval_every=400 --eval_rows=8 --report=0 --ema=0.9")
    for flags in ("--model=ar --steps=100 --out=out/ar",
                  "--model=mdlm --steps=150 --init_from=out/ar --out=out/mdlm",
                  "--model=bd3lm --block_size=3 --steps=50 --init_from=out/mdlm --out=out/bd3lm",
                  "--model=mdlm --gumbel --teacher=out/ar --steps=100 --init_from=out/ar --out=out/gumbel"):
        code, _, err = cli(train, f"{size} {flags}")
        assert code == 0, err
    for task, questions in (("known", [(q + ">", a) for q, a in answers.items()]),
                            ("unknown", [("a>", a) for a in ("xx", "yy", "xx", "yy")])):
        with open(f"{task}.jsonl", "w") as f:
            for q, a in questions:
                choices = list(answers.values()) if task == "known" else ["hh", "gg"]
                right = choices.index(a) if a in choices else int(a == "yy")
                f.write(json.dumps(dict(question=q, choices=choices, answer=right)) + "\n")
        open(f"{task}.yaml", "w").write(f"""task: {task}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/{task}.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
""")
    flags = "--include_path=. --tasks=known,unknown --ckpt out/ar out/mdlm out/bd3lm out/gumbel --json=r.json"
    code, out, err = cli(lm_eval_model, flags)
    assert code == 0, err
    found = {(r["model"], r["task"]): r for r in json.load(open("r.json"))["rows"]}
    for model in ("ar", "mdlm", "bd3lm", "gumbel"):
        assert found[model, "known"]["acc"] == 1, out
        assert model == "gumbel" or found[model, "unknown"]["acc"] == 0.5, out
        assert found[model, "mean"]["acc"] >= 0.5 and found[model, "known"]["n"] == 8
    assert found["gumbel", "known"]["score"] == "bound" and found["ar", "known"]["score"] is None
    code, out, err = cli(lm_eval_model, "--include_path=. --tasks=known --ckpt out/gumbel --score=given_noise --n=1")
    assert code == 0 and "| given_noise |" in out and "| 1 |" in out, err                # (one question has no error)
    refused(cli(lm_eval_model, "--include_path=. --tasks=nothing --ckpt out/ar"), "--tasks", "nothing")
    with monkeypatch.context() as m:
        m.setattr(importlib.util, "find_spec", lambda *a: None)
        m.setitem(sys.modules, "lm_eval", None)
        refused(cli(lm_eval_model, "--tasks=known --ckpt out/ar"), "pip install lm_eval")

KEY = "sk-secret-0123456789"


@pytest.fixture
def endpoint(monkeypatch):
    """A local stub of an OpenAI-compatible endpoint: `script` is what it does, request by request; `seen` what came."""
    good = {name: 1 + i for i, name in enumerate(llm_judge.CRITERIA)} | {"justification": f"fine {KEY}"}
    stub = argparse.Namespace(script=[], seen=[], good=good)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            stub.seen.append((self.path, self.headers.get("Authorization"), body))
            what = stub.script.pop(0) if stub.script else good
            if what == "hang":
                time.sleep(1.5)
            if what == "drop":
                return
            if isinstance(what, int):
                self.send_response(what)
                self.send_header("Location", "http://127.0.0.1:9/" + KEY)
                self.end_headers()
                return self.wfile.write(f"your key {KEY} is bad".encode())
            content = what if isinstance(what, str) else "Here it is: " + json.dumps(what)
            answer = b"{no json" if what == "garbage" else json.dumps(
                {"choices": [{"message": {"content": content}}]}).encode()
            try:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(answer)
            except OSError:                                # it hung too long
                pass

        def log_message(self, *a):
            pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1/")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(llm_judge.judge, "__defaults__", (0.01, 3))                        # no waiting between tries
    yield stub
    server.shutdown()
    server.server_close()


def test_judge(endpoint, cli, monkeypatch, tmp_path):
    """Scores from a server that fails in every way; what is answered is kept, a rerun asks for the rest only, and the
    key is nowhere but in the request."""
    monkeypatch.chdir(tmp_path)
    for name, texts in (("a", ["one", "two", "three"]), ("b", ["four", "one"])):
        with open(name + ".jsonl", "w") as f:
            f.write(json.dumps(dict(settings={})) + "\n")
            for text in texts:
                f.write(json.dumps(dict(text=text)) + "\n")
    flags = "--samples a.jsonl b.jsonl --model=m --parallel=1 --timeout=0.5 --json=r.json --out=j.jsonl"
    code, out, err = cli(llm_judge, flags + " --dry_run")
    assert code == 0 and "----------\none\n----------" in out and not endpoint.seen and not os.path.exists("j.jsonl")
    good, wrong = endpoint.good, endpoint.good | {"style": 11}
    endpoint.script = [500, "garbage", good,                         # one
                       wrong, good | {"clarity": True}, "hang",      # two: three tries
                       "drop", "no object", good,                    # three
                       429, good | {"factuality": None}, good]       # four
    code, out, err = cli(llm_judge, flags)
    assert code == 1 and "1 of 4 samples" in err and "no answer within 0.5 s" in err, err
    assert "| 1.00 ± 0.00 | 2.00 ± 0.00 | 3.00 ± 0.00 | 4.00 ± 0.00 | 5.00 ± 0.00 |" in out
    rows = json.load(open("r.json"))["rows"]
    assert [(r["model"], r["n"]) for r in rows] == [("a", 2), ("b", 2)] and rows[0]["creativity"] == 5
    assert len(endpoint.seen) == 12 and all(p == "/v1/chat/completions" and a == f"Bearer {KEY}" and b["model"] == "m"
                                            for p, a, b in endpoint.seen)
    log = open("j.jsonl").read()
    assert log.count("\n") == 3 and KEY not in log + out + err + open("r.json").read() and "fine ***" in log
    with open("j.jsonl", "a") as f:
        f.write('{"key": "cut')                            # a crash while writing
    del endpoint.seen[:]
    endpoint.script = [good | {"clarity": 9.0}]
    code, out, err = cli(llm_judge, flags)
    assert code == 0 and len(endpoint.seen) == 1 and "two" in endpoint.seen[0][2]["messages"][0]["content"], err
    assert "| 3.67 ± 2.67 |" in out
    code, out, err = cli(llm_judge, flags)
    assert code == 0 and len(endpoint.seen) == 1 and "| 3.67 ± 2.67 |" in out, err        # nothing left to ask
    for status in (401, 302, 307):
        endpoint.script = [status]
        result = cli(llm_judge, flags.replace("model=m", f"model=x{status}"))
        assert KEY not in result[1] + result[2]
        refused(result, f"HTTP {status}", "OPENAI_API_KEY")
    for name, value in (("OPENAI_BASE_URL", "sk-in-the-wrong-place"), ("OPENAI_API_KEY", KEY + "\nX: y")):
        with monkeypatch.context() as m:
            m.setenv(name, value)
            result = cli(llm_judge, flags.replace("model=m", "model=y"))
            refused(result, name)
            assert value.split("\n")[0] not in result[2]
    refused(cli(llm_judge, "--samples no.jsonl --model=m"), "no.jsonl")
    open("one_line.json", "w").write('{"text": "not ours"}')
    for path in ("a.jsonl", "one_line.json"):              # nobody's file is cut or appended to
        before = open(path).read()
        refused(cli(llm_judge, f"--samples b.jsonl --model=m --out={path}"), f"--out={path}", "no file of answers")
        assert open(path).read() == before
    open("c.jsonl", "w").write("plain text\n")
    refused(cli(llm_judge, "--samples c.jsonl --model=m"), "c.jsonl", "JSON")
    with monkeypatch.context() as m:
        m.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/" + KEY)
        code, out, err = cli(llm_judge, flags.replace("model=m", "model=z"))
        assert code == 1 and "the connection failed" in err and KEY not in out + err
