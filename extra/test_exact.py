"""The tests of exact decoding (verified.py) and of its table (exact.py)."""
import functools
import json

import numpy as np
import pytest
import torch

import evaluate
import sample
from bd3lm import BD3LM
from data.cli import BadInput
from data.maze import ExactDenoiser, maze_dataset
from extra import noise_use
from extra.exact import both_choose, exact_theory, near_ties
from extra.verified import DRAFTS, choose_draft, generate_exact, generate_verified
from gumbel import sample_gumbel
from mdlm import MDLM
from sample import load_model
from teacher import GPT2, CausalLM
from test_gumbel import (LANGUAGE, all_masked, counted_calls, evaluated, fits, gen, jsonl, llama_backbone, refused,
                         rows_of, save_gpt2, slow, succeeded, tiny, tiny_ar, tiny_blocks, with_and_without_noise)
from test_gumbel import (block_runs, cli, in_block_runs, in_maze_runs, in_medusa_runs, in_text_runs,  # noqa: F401
                         medusa_runs, runs, text_runs)

L = 14
SAMPLING = [dict(), dict(tau=0.7, top_p=0.8), dict(tau=1.4), dict(greedy=True)]


# ---------------------------------------------------------------------------------------------------------------------
# what the tests share

def beginnings(n=12, V=7):
    """Rows of L tokens with beginnings of all lengths: BOS alone, prompts, one token missing, nothing missing."""
    start = rows_of(n, V, L)
    for row, given in zip(start, np.resize([1, 4, 1, 7, L - 1, 1, L, 2], n)):
        row[given:] = V
    return start


def written_alone(verifier, start, noise, **sampling):
    """What the verifier writes from the same noise, row by row, with its cache."""
    rows = []
    for row, xi in zip(start, noise):
        given = row[row < verifier.vocab_size]
        rows.append(verifier.generate(given[None], L, noise=xi[None], **sampling)[0])
    return torch.cat(rows)


def peaked_ar(seed=0):
    """Likelier tokens than those of an untrained network: more to agree on."""
    model = tiny_ar(L=L, seed=seed).requires_grad_(False)
    model.transformer.head.weight.mul_(2)
    return model


def make_verifier(kind, folder):
    if kind == "gpt2":
        save_gpt2(folder, V=7, L=L)
        return GPT2.from_pretrained(str(folder))
    if kind == "hf":
        return llama_backbone(folder, L)
    return peaked_ar()


def student_of(kind, noise):
    if kind == "blocks":
        return tiny_blocks(noise, L=16, block_size=4)       # the last block ends beyond the rows
    return tiny(noise, L=L)


class Language:
    """A verifier that knows an enumerable language, rows [N, L - 1] without BOS: the true p(x_i | x_<i)."""
    generate = CausalLM.generate

    def __init__(self, rows, V):
        self.vocab_size = V
        self.bos = V - 1
        self.length = rows.shape[1] + 1
        self.counts = {}
        for row in rows.tolist():
            for d, x in enumerate(row):
                self.counts.setdefault(tuple(row[:d]), np.zeros(V))[x] += 1

    def new_cache(self, batch, length):
        return TokenCache(batch)

    def hidden(self, tokens, cache):
        cache.tokens = torch.cat([cache.tokens, tokens], 1)
        n = tokens.shape[1]
        known = cache.tokens[:, 1:].tolist()
        first = cache.tokens.shape[1] - n
        laws = np.ones((len(tokens), n, self.vocab_size))   # uniform after what is no beginning
        for i, row in enumerate(known):
            for d in range(n):
                laws[i, d] = self.counts.get(tuple(row[:first + d]), laws[i, d])
        laws = torch.from_numpy(laws)
        return (laws / laws.sum(-1, keepdim=True)).log()

    def logits(self, h):
        return h


class TokenCache:
    """A KV cache's shape, for tokens."""

    def __init__(self, batch):
        self.tokens = torch.zeros(batch, 0, dtype=torch.long)

    def crop(self, n):
        self.tokens = self.tokens[:, :n]

    def batch_select_indices(self, rows):
        self.tokens = self.tokens[rows]


class TrueMarginals:
    """A noise-blind student that knows a language's true conditionals: an ExactDenoiser behind BOS."""
    noise_embed = None
    paired = False
    quantile = False
    fresh_noise = MDLM.fresh_noise

    def __init__(self, rows, V):
        self.mask_id = self.vocab_size = V
        self.exact = ExactDenoiser(rows, V)
        self.logits = self.exact.logits

    def check_sampling(self, *args):
        pass

    def hidden(self, z, g, wanted):
        return self.exact.hidden(z[:, 1:], wanted=wanted[:, 1:])


# ---------------------------------------------------------------------------------------------------------------------
# verified.py: what is written, and what it costs

@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("student", ["mdlm", "blocks"])
@pytest.mark.parametrize("verifier", ["ar", "gpt2", pytest.param("hf", marks=slow)])
@pytest.mark.parametrize("noise", [None, "gumbel", "quantile"])
def test_text_is_the_verifiers_own(noise, verifier, student, draft, tmp_path):
    """Token for token, whatever the student proposes; rows of all paces in one batch; given tokens stay."""
    model = student_of(student, noise)
    verifier = make_verifier(verifier, tmp_path)
    start = beginnings()
    missing = (start == 7).sum(1)
    xi = model.fresh_noise((12, L), gen(1))
    calls_are_saved = False
    for sampling in SAMPLING:
        if noise == "quantile" and "tau" in sampling:
            sampling = dict(top_p=sampling.get("top_p", 1.0))
        x, nfe, calls, *_ = generate_exact(model, start, verifier, draft, noise=xi, **sampling)
        assert torch.equal(x, written_alone(verifier, start, xi, **sampling)), sampling
        assert torch.equal(x[start < 7], start[start < 7])
        assert (calls <= missing).all() and (calls[missing > 0] >= 1).all()
        if draft == "every":
            assert torch.equal(nfe, calls)
        if draft == "never":
            assert not nfe.any()
        calls_are_saved |= bool((calls < missing).any())
    assert calls_are_saved
    drawn, again = (generate_exact(model, start, verifier, draft, generator=gen(2))[0] for _ in range(2))
    noise = model.fresh_noise((12, L), gen(2))             # a fresh draw is the first of the generator
    assert torch.equal(drawn, again) and torch.equal(drawn, written_alone(verifier, start, noise))


@pytest.mark.parametrize("noise, seed", [(None, 0), ("quantile", 0), pytest.param(None, 1, marks=slow)])
def test_no_row_differs_in_a_thousand(noise, seed):
    """1500 rows by each way to draft; those that differ would have to part at a near tie."""
    verifier = peaked_ar(seed)
    start = all_masked(1500, L)
    model = tiny(noise, L=L)
    xi = model.fresh_noise((1500, L), gen(seed))
    own, _ = verifier.generate(start[:, :1], L, noise=xi)
    for draft in DRAFTS:
        x, *_ = generate_exact(model, start, verifier, draft, noise=xi)
        differs = (x != own).any(1)
        assert differs.sum() <= 1 and torch.equal(near_ties(verifier, x, own, xi, 1.0, 1.0), differs)


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("student", ["mdlm", "blocks"])
@with_and_without_noise
def test_calls_and_positions_are_those_that_are_computed(noise, student, draft):
    """Of each row, whatever the others do: calls, the student's positions. The verifier's depend on the slowest row:
    they are what enters the network."""
    model = student_of(student, noise)
    verifier = peaked_ar()
    start = beginnings()
    xi = sample_gumbel((12, L, 7), gen(1))
    fed = {model: 0, verifier: 0}

    def count(network, module, inputs, output):
        fed[network] += inputs[0].shape[0] * inputs[0].shape[1]

    for network in fed:
        network.transformer.register_forward_hook(functools.partial(count, network))
    students_rows = counted_calls(model)
    verifiers_rows = counted_calls(verifier)
    x, nfe, calls, positions, verifier_positions = generate_exact(model, start, verifier, draft, noise=xi)
    assert sum(students_rows) == nfe.sum() and sum(verifiers_rows) == calls.sum()
    assert fed == {model: positions.sum(), verifier: verifier_positions.sum()}
    assert len(calls.unique()) > 2                          # rows of different paces
    alone = [generate_exact(model, start[i:i + 1], verifier, draft, noise=xi[i:i + 1]) for i in range(12)]
    for together, parts in zip((x, nfe, calls, positions), zip(*alone)):
        assert torch.equal(together, torch.cat(parts))
    assert (torch.cat([row[4] for row in alone]) <= verifier_positions).all()
    if student == "mdlm":
        assert torch.equal(positions, L * nfe)


def draft_by_hand(model, known, xi):
    """What a student drafts after a known text, in the plain forward of training: argmax for one that reads the noise
    xi [T, V], argmax(log q + xi) for another; MDLM all that is missing, BD3-LM the rest of the block."""
    T = len(xi)
    z = torch.tensor([known + [7] * (T - len(known))])
    noise = None if model.noise_embed is None else xi[None]
    end = L
    if isinstance(model, BD3LM):
        end = min(L, len(known) // 4 * 4 + 4)
        scores = model.log_probs(z, z.masked_fill(z == 7, 0), noise)
    else:
        scores = model.log_probs(z, noise)
    scores = scores[0, :, :7]
    if noise is None:
        scores = scores + xi
    return scores.argmax(-1).tolist()[len(known):end]


def decode_by_hand(model, verifier, draft, xi):
    """One row from BOS, without cache -> (the text, calls of the student, of the verifier)."""
    known = [6]
    left = xi[1:L].argmax(-1).tolist() if draft == "never" else []      # of the last draft, as the verifier has it
    nfe = calls = 0
    while len(known) < L:
        if draft == "every" or not left:
            left = draft_by_hand(model, known, xi)
            nfe += 1
        x = known + left
        logits = verifier.logits(verifier.hidden(torch.tensor([x])))[0]
        y = [None] + (logits[:L - 1] + xi[1:len(logits[:L - 1]) + 1]).argmax(-1).tolist()
        calls += 1
        i = len(known)
        while i < len(x) and x[i] == y[i]:
            i += 1
        known = x[:i] + y[i:i + 1]
        left = y[i + 1:len(x)]
    return known, nfe, calls


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("student", ["mdlm", "blocks"])
@with_and_without_noise
def test_rounds_are_those_of_the_definition(noise, student, draft):
    model = student_of(student, noise).requires_grad_(False)
    verifier = peaked_ar()
    xi = sample_gumbel((8, L, 7), gen(1))
    x, nfe, calls, *_ = generate_exact(model, all_masked(8, L), verifier, draft, noise=xi, generator=gen(2))
    if student == "blocks":                                 # what ends the last block has noise of its own
        xi = torch.cat([xi, sample_gumbel((8, 2, 7), gen(2))], 1)
    for got, noise_of_row in zip(zip(x.tolist(), nfe.tolist(), calls.tolist()), xi):
        assert got == decode_by_hand(model, verifier, draft, noise_of_row)


def test_a_student_that_knows_the_text_takes_one_call_of_each():
    """And unpaired noise, which says nothing of the text, leaves a student as blind as none: the shared noise draws."""
    verifier = peaked_ar()
    start = all_masked(5, L)
    xi = sample_gumbel((5, L, 7), gen(1))
    own, _ = verifier.generate(start[:, :1], L, noise=xi)
    student = TrueMarginals(own[:1, 1:], 7)
    for draft in ("every", "once"):
        x, *counts = generate_exact(student, start[:1], verifier, draft, noise=xi[:1])
        assert torch.equal(x, own[:1]) and [int(count) for count in counts] == [1, 1, L, L - 1]
    blind = tiny(L=L)
    unpaired = tiny("unpaired", L=L, inject="add")
    unpaired.load_state_dict(blind.state_dict() | {"noise_embed.weight": torch.zeros(32, 7)})
    of_blind, of_unpaired = (generate_exact(model, start, verifier, noise=xi) for model in (blind, unpaired))
    assert all(torch.equal(a, b) for a, b in zip(of_blind, of_unpaired))


@pytest.mark.parametrize("change", [dict(draft="always"), dict(tau=0.0), dict(top_p=0.0), dict(start="infill"),
                                    dict(start="long"), dict(start="no bos")])
def test_what_cannot_be_decoded_is_refused(change):
    start = all_masked(2, L)
    kind = change.pop("start", None)
    if kind == "infill":
        start[1, 5] = 3
    elif kind == "long":
        start = all_masked(2, L + 1)
    elif kind == "no bos":
        start[:, 0] = 1
    with pytest.raises(ValueError):
        generate_exact(tiny(L=L), start, peaked_ar(), **change)
    if kind == "infill":                                    # as a prompt of ids can be
        with pytest.raises(BadInput, match="--prompt"):
            generate_verified(tiny(L=L), start, peaked_ar(), dict(sampler="exact", tau=1.0, top_p=1.0, greedy=False))


# ---------------------------------------------------------------------------------------------------------------------
# exact.py: theory

def laws(n, V, seed=0, zeros=0.0):
    """n random distributions, [n, V]; about a share `zeros` of their entries is 0."""
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.full(V, 0.5), n)
    weights[:, 1:] *= rng.random((n, V - 1)) >= zeros       # (one entry stays)
    return weights / weights.sum(1, keepdims=True)


def test_shared_noise_agrees_as_the_formula_says():
    """P(argmax(log p + xi) = argmax(log q + xi) = j), by Monte Carlo; with entries of 0 in either."""
    for seed, zeros in enumerate((0.0, 0.4)):
        p, q = (laws(4, 6, seed + k, zeros) for k in (0, 10))
        xi = sample_gumbel((40_000, 6), gen(seed)).numpy()
        for p_i, q_i, agreed in zip(p, q, both_choose(p, q)):
            with np.errstate(divide="ignore"):
                x = (np.log(q_i) + xi).argmax(1)
                y = (np.log(p_i) + xi).argmax(1)
            counts = np.bincount(y[x == y], minlength=6)
            possible = agreed > 0
            assert not counts[~possible].any()
            assert fits([*counts[possible], (x != y).sum()], [*agreed[possible], 1 - agreed.sum()])


def test_agreement_lies_between_its_bounds():
    """(1 - TV) / (1 + TV) <= P(x = y) <= 1 - TV; equal laws always agree, those without a common token never."""
    p, q = laws(2000, 8, 1), laws(2000, 8, 2)
    agreed = both_choose(p, q).sum(1)
    tv = np.abs(p - q).sum(1) / 2
    assert (agreed >= (1 - tv) / (1 + tv) - 1e-12).all() and (agreed <= 1 - tv + 1e-12).all()
    assert np.allclose(both_choose(p, p), p)
    assert both_choose(np.array([0.5, 0.5, 0]), np.array([0.0, 0, 1])).sum() == 0


def measured_rounds(rows, V, n, start=1, seed=0):
    """The sampler with true marginals and a true verifier -> (calls [n], tokens of the first draft that are right [n],
    the text [n, L])."""
    verifier = Language(rows, V)
    student = TrueMarginals(rows, V)
    xi = sample_gumbel((n, verifier.length, V), gen(seed))
    begin = all_masked(n, verifier.length, V)
    if start > 1:                                           # as a text begins
        begin[:, 1:start] = torch.from_numpy(rows[np.random.default_rng(seed).integers(len(rows), size=n), :start - 1])
    own, _ = verifier.generate(begin[:, :start], noise=xi)
    x, nfe, calls, *_ = generate_exact(student, begin, verifier, noise=xi)
    assert torch.equal(x, own) and torch.equal(nfe, calls)
    unknown = begin == V
    first = (student.hidden(begin, None, unknown) + xi[unknown]).argmax(-1)
    draft = begin.masked_scatter(unknown, first)
    right = (draft == own)[:, start:].long().cumprod(1).sum(1)
    return calls.double().numpy(), right.double().numpy(), own


def agrees(sample_of_n, expected):
    """Whether the mean of a sample can be this: within 4 standard errors."""
    return abs(sample_of_n.mean() - expected) < 4 * sample_of_n.std() / np.sqrt(len(sample_of_n))


@pytest.mark.parametrize("rows,V,n,start", [
    (LANGUAGE, 4, 8000, 1), (LANGUAGE, 4, 8000, 2), pytest.param("maze_skewed", 6, 1500, 1, marks=slow),
    pytest.param("maze", 6, 1500, 1, marks=slow), pytest.param("maze", 6, 1500, 4, marks=slow)])
def test_theory_counts_the_calls_of_a_perfect_blind_student(rows, V, n, start):
    """Products of P(x_i = y_i), enumerated, against the sampler; the text is the language's, and its law."""
    if isinstance(rows, str):
        rows = maze_dataset(rows).astype(np.int64)
    calls, right, text = measured_rounds(rows, V, n, start)
    theory = exact_theory(rows, start - 1)
    assert agrees(calls, theory["verifier_calls"]) and agrees(right, theory["first_prefix"])
    assert 1 < theory["verifier_calls"] < rows.shape[1] - start + 1
    # an enumerated law: each row of the language as often as it should be
    if len(rows) == len(LANGUAGE):
        known, times = np.unique(rows, axis=0, return_counts=True)
        counts = [(text[:, 1:].numpy() == row).all(1).sum() for row in known]
        assert sum(counts) == n and fits(counts, times)


def test_theory_of_a_text_that_marginals_know():
    """Independent tokens: the marginals are the verifier's own laws, one round writes all. So does a single text."""
    independent = np.array([[a, b] for a in range(2) for b in range(3)])
    for rows in (independent, np.array([[1, 0, 2]])):
        theory = exact_theory(rows)
        assert abs(theory["verifier_calls"] - 1) < 1e-12 and abs(theory["first_prefix"] - rows.shape[1]) < 1e-12


def test_the_usual_test_of_a_draft_is_biased_with_shared_noise():
    """u < p / q, and else a draw from the residual (p - q)+ with the same noise: not p; with fresh noise it is p, as
    comparing tokens is with shared noise."""
    p = np.array([0.5, 0.3, 0.2])
    q = np.array([0.1, 0.2, 0.7])
    n = 40_000
    xi = sample_gumbel((n, 3), gen(0)).numpy()
    fresh = sample_gumbel((n, 3), gen(1)).numpy()
    u = np.random.default_rng(0).random(n)
    with np.errstate(divide="ignore"):
        residual = np.log(np.clip(p - q, 0, None))
    x = (np.log(q) + xi).argmax(1)
    accepted = u < (p / q)[x]

    def counts(redrawn):
        return np.bincount(np.where(accepted, x, redrawn), minlength=3)

    assert fits(counts((residual + fresh).argmax(1)), p)
    assert not fits(counts((residual + xi).argmax(1)), p)
    assert fits(np.bincount((np.log(p) + xi).argmax(1)), p)  # y, which decides here


def test_near_ties_are_found():
    """Rows that part where the two best sums are equal, or differ by more; rows that do not part; a nucleus's edge."""
    verifier = peaked_ar()
    xi = sample_gumbel((4, L, 7), gen(1))
    own, _ = verifier.generate(torch.full((4, 1), 6), L, noise=xi)
    logits = verifier.logits(verifier.hidden(own[:, :-1]))
    other = own.clone()
    for row, gap in ((0, 1e-4), (1, 1e-4), (2, 1e-2)):
        best = own[row, 5]
        k = (best + 1) % 7
        xi[row, 5, k] = logits[row, 4, best] + xi[row, 5, best] - logits[row, 4, k] - gap
        other[row, 5] = k
    other[1] = own[1]
    assert near_ties(verifier, other, own, xi, 1.0, 1.0).tolist() == [True, False, False, False]
    # a nucleus that ends just behind, or just before, the token that the noise prefers
    p, order = logits[3, 4].double().softmax(-1).sort(descending=True)
    xi[3, 5] = 0
    xi[3, 5, order[1]] = 50
    other[3, 5] = (own[3, 5] + 1) % 7
    for off, near in ((1e-5, True), (-1e-5, True), (0.05, False)):
        assert near_ties(verifier, other, own, xi, 1.0, float(p[0]) + off)[3] == near


# ---------------------------------------------------------------------------------------------------------------------
# the commands

EXACT = "--sampler=exact --verifier=out/ar"


@pytest.mark.parametrize("flags,names", [
    (f"--ckpt=out/plain {EXACT} --infill=a[MASK]", "--sampler=exact --infill"),
    (f"--ckpt=out/plain {EXACT} --steps=3", "--steps=3"),
    (f"--ckpt=out/plain {EXACT} --order=left_to_right", "--order --sampler=fixed"),
    (f"--ckpt=out/gumbel {EXACT} --resample_noise", "--resample_noise"),
    (f"--ckpt=out/blocks {EXACT} --stop_at_eos", "--stop_at_eos"),
    (f"--ckpt=out/plain {EXACT} --apd_ratio=0.3", "--apd_ratio --sampler=apd"),
    (f"--ckpt=out/plain {EXACT} --greedy --tau=0.5", "--tau"),
    (f"--ckpt=out/plain {EXACT} --draft=always", "--draft always"),
    (f"--ckpt=out/blocks {EXACT} --length=48", "--verifier=out/ar --length=48"),
    ("--ckpt=out/plain --sampler=exact", "--sampler=exact --verifier"),
    ("--ckpt=out/plain --sampler=exact --verifier=out/gumbel", "--verifier=out/gumbel --model=ar"),
    ("--ckpt=out/plain --draft=once", "--draft --sampler=exact"),
    ("--ckpt=out/plain --sampler=apd --verifier=out/ar --draft=once", "--draft --sampler=exact"),
    (f"--ckpt=out/ar {EXACT}", "--sampler=exact ar"),
    (f"--ckpt=out/heads {EXACT}", "--sampler=exact heads MDLM BD3LM")])
@slow
def test_flags_of_exact_decoding_are_refused_in_one_sentence(in_block_runs, in_medusa_runs, cli, flags, names):
    refused(cli(sample, flags), *names.split())


@pytest.mark.parametrize("flags,names", [
    (f"infill --judge=out/ar --ckpt out/plain {EXACT}", "--sampler=exact --infill"),
    (f"genppl --judge=out/ar --ckpt out/plain {EXACT} --nfe=4", "--nfe=4"),
    ("acceptance --ckpt out/plain", "--ckpt plain --verifier"),
    ("acceptance --ckpt out/ar --verifier=out/ar", "--ckpt ar heads"),
    ("acceptance --ckpt out/heads --verifier=out/ar", "--verifier=out/ar"),
    ("acceptance --ckpt out/heads --draft=once", "--draft=once"),
    ("acceptance --ckpt out/plain --verifier=out/ar --accept=exact", "--accept=exact"),
    ("acceptance --ckpt out/plain --verifier=out/ar --draft=always", "--draft=always never"),
    ("acceptance --ckpt out/plain --verifier=out/ar --prompt_length=24", "24 --prompt_length"),
    ("acceptance --ckpt out/plain --verifier=out/ar --length=48", "--length=48 24 plain"),
    ("acceptance --ckpt out/blocks --verifier=out/ar --length=48", "--length=48 24")])
@slow
def test_tables_refuse_flags_in_one_sentence(in_block_runs, in_medusa_runs, cli, flags, names):
    refused(cli(evaluate, flags), *names.split())


@slow
def test_samples_of_exact_decoding_are_the_verifiers(in_block_runs, cli, tmp_path):
    """The same noise for every student and way to draft, and so the same texts, which begin with the prompt; the
    temperature is by default the verifier's own."""
    texts = set()
    for i, flags in enumerate([f"--ckpt=out/{name} --draft={draft}" for name in ("plain", "gumbel", "blocks")
                               for draft in DRAFTS]):
        out, err = succeeded(cli(sample, f"{flags} {EXACT} --n=3 --prompt=The --out={tmp_path}/{i}.jsonl"))
        assert "verifier_positions" in out and "tau 1.0, top_p 0.9" in err
        rows = jsonl(tmp_path / f"{i}.jsonl")
        texts.add(tuple(row["text"] for row in rows))
        assert all(row["text"].startswith("The") and row["verifier_calls"] <= 20 for row in rows)
    assert len(texts) == 1
    verifier = load_model("out/ar")
    xi = sample_gumbel((3, 24, 257), gen(0))
    prompt = torch.tensor([[256, *b"The"]]).expand(3, -1)
    own, _ = verifier.generate(prompt, 24, top_p=0.9, noise=xi)
    assert own[:, 1:].tolist() == [row["tokens"] for row in rows]
    greedy, _ = succeeded(cli(sample, f"--ckpt=out/gumbel {EXACT} --n=1 --greedy --prompt=The"))
    alone, _ = succeeded(cli(sample, "--ckpt=out/ar --n=1 --greedy --prompt=The"))
    assert greedy.split("\n", 1)[1] == alone.split("\n", 1)[1]


@slow
def test_tables_count_calls_and_positions(in_maze_runs, cli, tmp_path):
    """Of the maze; a file of samples is read back for a row with the same way to draft alone."""
    flags = "maze --ckpt out/maze-mdlm-gumbel --n=20 --decode=sample --sampler=exact --verifier=out/maze-ar"
    rows, out, _ = evaluated(cli, f"{flags} --samples={tmp_path}", tmp_path / "a.json")
    assert "verifier's positions" in out and "draft every" in out
    row = rows[0]
    assert row["nfe_counted"] == row["verifier_calls"] >= 1 and row["positions"] == 11 * row["nfe_counted"]
    assert row["nfe"] == 10 and 10 <= row["verifier_positions"]
    (file,) = tmp_path.glob("*.jsonl")
    flags = f"{flags} --samples={file}"
    again, *_ = evaluated(cli, flags, tmp_path / "b.json")
    assert again[0]["verifier_positions"] == row["verifier_positions"]
    refused(cli(evaluate, f"{flags} --draft=once"), "draft", str(file))


@slow
def test_acceptance_of_students_beside_heads(in_block_runs, in_medusa_runs, cli, tmp_path):
    """18 tokens after prompts of 6; a row for each student and way to draft, one for Jacobi, one for the verifier."""
    rows, out, _ = evaluated(cli, "acceptance --ckpt out/plain out/heads out/gumbel out/blocks --verifier=out/ar --n=6 "
                             "--batch_size=4 --accept=exact --dtype=float32", tmp_path / "a.json")
    assert "near ties" in out and "head k" in out and "never" in out
    assert [(row["model"], row.get("draft")) for row in rows] == [
        ("heads", None), *[(name, draft) for name in ("plain", "gumbel", "blocks") for draft in ("every", "once")],
        ("ar", "never"), ("ar", "alone")]
    for row in rows[1:-1]:
        assert row["agreement"] == 1 and row["near_ties"] == 0 and row["n"] == 6
        assert row["first_prefix"] <= 18 * row["first_agreement"] + 1e-9
        assert abs(row["accepted_length"] * row["verifier_calls"] - 18) < 1e-9
    assert rows[-1]["verifier_calls"] == 18 and rows[-1]["verifier_positions"] == 23


@slow
def test_acceptance_on_the_maze_has_the_theory(in_maze_runs, cli, tmp_path):
    flags = "acceptance --ckpt out/maze-mdlm --verifier=out/maze-ar --n=8 --draft=every"
    rows, *_ = evaluated(cli, flags, tmp_path / "a.json")
    assert [row["model"] for row in rows] == ["maze-mdlm", "maze-ar", "theory"]
    assert 2.9 < rows[-1]["verifier_calls"] < 3 and 3.7 < rows[-1]["first_prefix"] < 3.8
    rows, *_ = evaluated(cli, f"{flags} --tau=0.5", tmp_path / "b.json")
    assert [row["model"] for row in rows] == ["maze-mdlm", "maze-ar"]


# ---------------------------------------------------------------------------------------------------------------------
# infilling: one of several drafts

@pytest.mark.parametrize("n_drafts", [1, 3])
def test_one_of_several_drafts_has_the_enumerated_law(n_drafts):
    """Of drafts from q, one by its weight p: P(x) = sum over all tuples of drafts of prod q times p(x) / sum p."""
    model = tiny()
    verifier = peaked_ar().eval()
    row = rows_of(1, 7, 6)
    row[0, 3] = 7
    q = model.log_probs(row)[0, 3, :7].exp().detach().double()
    filled = row.repeat(7, 1)
    filled[:, 3] = torch.arange(7)
    p = (-verifier.losses(filled).sum(1)).softmax(0).double()
    law = torch.zeros(7, dtype=torch.float64)
    for drafts in torch.cartesian_prod(*[torch.arange(7)] * n_drafts).view(-1, n_drafts):
        weight = p[drafts] / p[drafts].sum()
        law.index_add_(0, drafts, q[drafts].prod() * weight)
    tokens, nfe, calls = choose_draft(model, row.repeat(20_000, 1), verifier, n_drafts, gen(0), steps=1)
    assert (nfe == n_drafts).all() and (calls == n_drafts).all()
    assert (tokens[:, :3] == row[:, :3]).all() and (tokens[:, 4:] == row[:, 4:]).all()
    assert fits(tokens[:, 3].bincount(minlength=7), law)


def test_drafts_fill_in(in_text_runs, cli, tmp_path):
    flags = "--ckpt=out/plain --infill=So[MASK][MASK]x --drafts=3 --verifier=out/ar --steps=2"
    succeeded(cli(sample, f"{flags} --n=2 --out={tmp_path / 'd.jsonl'}"))
    assert [row["verifier_calls"] for row in jsonl(tmp_path / "d.jsonl")] == [3, 3]
    infill = "infill --judge=out/ar --ckpt out/plain --n=6 --masked=7 --nfe=2"
    rows, out, _ = evaluated(cli, f"{infill} --drafts=2 --verifier=out/ar --samples={tmp_path}", tmp_path / "i.json")
    assert rows[1]["verifier_calls"] == 2 and "one of 2 drafts" in out
    (file,) = tmp_path.glob("plain-*.jsonl")
    succeeded(cli(evaluate, f"{infill} --drafts=2 --verifier=out/ar --samples={file}"))
    refused(cli(evaluate, f"{infill} --samples={file}"), str(file))
    refused(cli(sample, flags.replace(" --verifier=out/ar", "")), "--drafts=3", "--verifier")
    refused(cli(sample, "--ckpt=out/plain --drafts=3 --verifier=out/ar"), "--drafts=3", "infilling")
    refused(cli(sample, "--ckpt=out/plain --infill=a[MASK] --verifier=out/ar"), "--verifier")


# ---------------------------------------------------------------------------------------------------------------------
# noise_use.py

def test_teacher_writes_around_what_is_revealed():
    teacher = peaked_ar().eval()
    start = all_masked(20, L)
    noise = sample_gumbel((20, L, 7), gen(0))
    text = noise_use.write_left_to_right(teacher, start, 7, noise)
    alone, _ = teacher.generate(start[:, :1], noise=noise)
    assert torch.equal(text, alone)
    # its own tokens revealed change nothing; others stay, and change what follows them alone
    revealed = torch.rand(20, L, generator=gen(1)) < 0.5
    revealed[:, 0] = True
    assert torch.equal(noise_use.write_left_to_right(teacher, text.masked_fill(~revealed, 7), 7, noise), text)
    x = start.clone()
    x[:, 5] = (text[:, 5] + 1) % 7
    other = noise_use.write_left_to_right(teacher, x, 7, noise)
    assert torch.equal(other[:, :5], text[:, :5]) and torch.equal(other[:, 5], x[:, 5])
    assert (other[:, 6:] != text[:, 6:]).any()


def test_noise_use_of_two_students(in_text_runs, cli, tmp_path):
    """Agreement with the student's own tokens revealed is that of the sampler; a plain student has one loss."""
    flags = f"--ckpt out/plain out/gumbel --teacher=out/ar --n=40 --json={tmp_path / 'n.json'}"
    succeeded(cli(noise_use, flags))
    with open(tmp_path / "n.json") as f:
        plain, gumbel = json.load(f)["rows"]
    assert plain["loss_own"] == plain["loss_fresh"] and gumbel["loss_own"] != gumbel["loss_fresh"]
    for row in (plain, gumbel):
        assert all(0 <= row[f"{what}_{share}"] <= 1 for what in ("own", "teacher", "other") for share in (0.25, 0.75))
    refused(cli(noise_use, "--ckpt out/ar --teacher=out/ar"), "out/ar", "mdlm")
