"""What exact decoding costs, and what it would with perfect drafts: its rows of `evaluate.py acceptance`.

Shapes: n prompts, P tokens of each, L length, V vocabulary.
"""
import time

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from extra.scores import ratio_with_error
from extra.verified import ExactDecoding
from extra.quantile import cumulative
from gumbel import gumbel_max, nucleus
from sample import torch_seed

NEAR = 1e-3                                 # two best sums as close as this may change places by rounding
NEAR_QUANTILE = 1e-6                        # u as close as this to an interval's end may be drawn on its other side
TITLES = dict(nfe_counted="calls", verifier_calls="verifier", positions="positions",
              verifier_positions="verifier's positions")
EXACT_COLUMNS = dict(draft="draft") | TITLES | dict(first_prefix="first prefix", first_agreement="first draft right")
EXACT_NOTE = f"""
Exact decoding: calls (of the student; of heads: of their backbone) and positions are of a row, those of the verifier
beside them. never: the verifier on its own last draft; alone: with its cache. first draft right: of its tokens; first
prefix: those before the first wrong one; accepted length: tokens per verifier call; same text: of all rows, those that
the verifier alone writes from the same noise; near ties: of the others, those that part where the two best sums lie
within {NEAR} (quantile noise: u and an interval's end within {NEAR_QUANTILE})."""


# ---------------------------------------------------------------------------------------------------------------------
# measured

def exact_rows(students, verifier, args, prompts, length, device):
    """The rows of these students and ways to draft, and of the verifier alone: prompts [n, P] continued to `length`."""
    jobs = [(model, draft) for model in students for draft in args.draft if draft != "never"]
    if "never" in args.draft:               # no student drafts: one row for all
        jobs.append((students[0], "never"))
    sampling = dict(tau=args.tau, top_p=args.top_p)
    counted = [[] for job in jobs]          # for each batch, what `measure` counts
    seconds = np.zeros(len(jobs))
    alone = 0.0
    bar = tqdm(total=len(prompts) * len(jobs), unit="prompt", disable=None)
    for i, start in enumerate(prompts.split(args.batch_size)):
        start = start.to(device)
        generator = torch.Generator(device)
        seed = torch_seed(args.seed, i * args.batch_size)
        own = {}                            # what the verifier writes alone, from each kind of noise
        for model in students:
            if model.quantile not in own:
                noise = model.fresh_noise((len(start), length), generator.manual_seed(seed), device)
                own[model.quantile], _ = verifier.generate(start, length, **sampling, noise=noise)
                own[model.quantile].cpu()   # (waits for the device, or the clock below would count it)
        if i == 0:                          # the warm-up
            for model, draft in jobs:
                measure(model, draft, start[:8], verifier, own[model.quantile][:8], sampling, generator)
        began = time.perf_counter()
        verifier.generate(start, length, generator=generator, **sampling)[0].cpu()      # (waits for the device)
        alone += time.perf_counter() - began
        for k, (model, draft) in enumerate(jobs):
            counts, took = measure(model, draft, start, verifier, own[model.quantile], sampling,
                                   generator.manual_seed(seed))
            counted[k].append(counts)
            seconds[k] += took
            bar.update(len(start))
    bar.close()

    n, P = prompts.shape
    n_new = n * (length - P)
    rows = []
    for (model, draft), batches, took in zip(jobs, counted, seconds):
        counts = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
        row = dict(model=verifier.name if draft == "never" else model.name, draft=draft, n=n)
        row |= summary(counts, length - P)
        rows.append(row | dict(tokens_per_s=n_new / took, speedup=alone / took, seconds=float(took)))
    rows.append(dict(model=verifier.name, draft="alone", n=n, nfe_counted=0.0, verifier_calls=float(length - P),
                     positions=0.0, verifier_positions=float(length - 1), accepted_length=1.0,
                     tokens_per_s=n_new / alone, seconds=alone))
    return rows


def measure(model, draft, start, verifier, own, sampling, generator):
    """One batch: start [b, P] -> (counts {name: [b]}, seconds). own [b, L]: what the verifier writes from the noise
    that this generator draws.
    """
    b, P = start.shape
    L = own.shape[1]
    tokens = F.pad(start, (0, L - P), value=model.mask_id)
    began = time.perf_counter()
    state = ExactDecoding(model, tokens, verifier, draft, greedy=False, noise=None, generator=generator, **sampling)
    state.draft()
    first = state.x[:, P:L].clone()
    while len(state.rows):
        state.verify()
        state.draft()
    written, *counts = state.result()
    written.cpu()                           # (waits for the device)
    seconds = time.perf_counter() - began

    counts = dict(zip(TITLES, counts))
    drafted = first != model.mask_id        # BD3-LM: the first block
    right = drafted & (first == own[:, P:])
    counts |= dict(drafted=drafted.sum(1), right=right.sum(1), prefix=right.cumprod(1).sum(1))
    counts |= dict(same=(written == own).all(1), near=near_ties(verifier, written, own, state.noise, **sampling))
    return {name: count.cpu().numpy() for name, count in counts.items()}, seconds


def near_ties(verifier, written, own, noise, tau, top_p):
    """Which rows of two texts [b, L] by one verifier from one noise part where rounding may decide -> [b] bool: where
    the two best sums lie within NEAR, or a nucleus larger or smaller by this share has another best; of quantile noise,
    where u lies within NEAR_QUANTILE of an interval's end.
    """
    differs = written != own
    place = differs.int().argmax(1)                        # the first
    h = verifier.hidden(own[:, :-1])
    row = torch.arange(len(own), device=own.device)
    logits = verifier.logits(h[row, place - 1]).double() / tau
    xi = noise[row, place]
    if xi.dim() == 1:
        if top_p < 1:
            logits = nucleus(logits, top_p)
        to_an_end = (cumulative(logits) - xi[:, None]).abs().amin(1)
        return differs.any(1) & (to_an_end < NEAR_QUANTILE)
    smaller = nucleus(logits, top_p * (1 - NEAR)) if top_p < 1 else logits
    larger = nucleus(logits, min(1.0, top_p * (1 + NEAR))) if top_p < 1 else logits
    best = (larger + xi).topk(2).values
    near = (best[:, 0] - best[:, 1] < NEAR) | (gumbel_max(larger, xi) != gumbel_max(smaller, xi))
    return differs.any(1) & near


def summary(counts, n_new):
    """Counts of rows, {name: [n]}, of which each got `n_new` tokens -> the numbers of a row of the table."""
    row = {}
    for name in TITLES:
        row[name] = float(counts[name].mean())
    ones = np.ones(len(counts["same"]))
    of = dict(first_prefix=(counts["prefix"], ones), first_agreement=(counts["right"], counts["drafted"]),
              accepted_length=(n_new * ones, counts["verifier_calls"]))
    for name, (part, whole) in of.items():
        row[name], row[f"{name}_stderr"] = ratio_with_error(part, whole)
    return row | dict(agreement=float(counts["same"].mean()), near_ties=int(counts["near"].sum()))


# ---------------------------------------------------------------------------------------------------------------------
# theory: a student without noise

def both_choose(p, q):
    """P(argmax(log p + xi) = j = argmax(log q + xi)) for one Gumbel noise xi: 1 / sum_k max(p_k / p_j, q_k / q_j), for
    each j (Daliri, Musco, Suresh 2024). p, q [..., V] -> [..., V]; its sum is at least (1 - TV) / (1 + TV).

    In exponential time: j wins both races if its arrival T_j is before T_k p_j / p_k and T_k q_j / q_k, for all k.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        of_p = p[..., None, :] / p[..., :, None]           # (..., j, k); 0 / 0 is nan, and no rival
        of_q = q[..., None, :] / q[..., :, None]
        return 1 / np.nansum(np.fmax(of_p, of_q), -1)


def exact_theory(rows, start=0):
    """The row of a student without noise that knows the true marginals of an enumerable language, and of a verifier
    that knows the language: rows [N, L] without BOS, of equal probability; `start` tokens are given.
    """
    one_hot = np.eye(int(rows.max()) + 1)[rows]            # (N, L, V)
    found = {}                              # prefix -> the numbers of the rows that begin with it
    for i, row in enumerate(rows.tolist()):
        for d in range(len(row) + 1):
            found.setdefault(tuple(row[:d]), []).append(i)
    # the law of each place, given a prefix: [L, V]
    marginals = {prefix: one_hot[some].mean(0) for prefix, some in found.items()}
    rounds = {}
    first = {}
    for prefix in sorted(found, key=len, reverse=True):    # later rounds are known first
        if len(prefix) >= start:
            rounds[prefix], first[prefix] = expected_round(prefix, marginals, rounds)
    share = {prefix: len(some) / len(rows) for prefix, some in found.items() if len(prefix) == start}
    calls = float(sum(p * rounds[prefix] for prefix, p in share.items()))
    first_prefix = float(sum(p * first[prefix] for prefix, p in share.items()))
    return dict(model="theory", draft="every", nfe_counted=calls, verifier_calls=calls, first_prefix=first_prefix,
                accepted_length=(rows.shape[1] - start) / calls)


def expected_round(prefix, marginals, rounds):
    """(Rounds until a text that begins so is complete, right tokens of its next draft before the first wrong one), from
    the law of each place after each prefix, and the rounds from each longer prefix.

    The draft is right down to a prefix v with a product of `both_choose`: p is the verifier's law after v, q the
    marginal that was drafted from, given what was known. It ends at v with y = j != x: p_j - both_choose_j. Noise that
    decided nothing is as fresh as before, so the next round starts from v and j alone.
    """
    drafted_from = marginals[prefix]
    if len(prefix) == len(drafted_from):
        return 0.0, 0.0
    expected = 1.0
    right = 0.0
    accepted = [(prefix, 1.0)]                             # with the probability of each
    for v, reached in accepted:                            # which grows meanwhile
        if len(v) == len(drafted_from):
            continue
        p = marginals[v][len(v)]
        agreed = both_choose(p, drafted_from[len(v)])
        for j in np.flatnonzero(p):
            after = (*v, int(j))
            right += reached * agreed[j]
            expected += reached * (p[j] - agreed[j]) * rounds[after]
            accepted.append((after, reached * agreed[j]))
    return expected, right
