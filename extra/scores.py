"""How good samples are under a judge, an AR model (generative perplexity, MAUVE), and how varied.

A sample is an array of token ids without BOS. Shapes: n samples, b of a batch, T tokens of the longest, D width.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F

from data.cli import BadInput


def ratio_with_error(a, b):
    """sum a / sum b over independent samples, with its standard error, or (None, None) if sum b is 0. a, b [n]."""
    n = len(a)
    total = b.sum()
    if not total:
        return None, None
    ratio = a.sum() / total
    # linearised: samples differ in a and in b, so it is the residuals a - ratio b that vary
    residuals = a - ratio * b
    error = np.sqrt(n / max(1, n - 1) * (residuals ** 2).sum()) / total
    return float(ratio), float(error)


def sum_per_row(values, scored):
    """Values [N] of the scored tokens -> their sums over each row [B]. scored [B, L]."""
    spread = torch.zeros(scored.shape, dtype=values.dtype, device=values.device)
    return spread.masked_scatter(scored, values).sum(1)


def up_to_eos(rows, eos):
    """Which tokens of rows [n, T], an array or a tensor, stand before the first EOS or are it -> [n, T] bool."""
    is_eos = (rows == eos) * 1
    return is_eos.cumsum(1) - is_eos == 0


def by_length(samples, batch, pad):
    """Samples in batches of similar lengths, so that little is padded: yields (indices [b], LongTensor [b, T])."""
    order = sorted(range(len(samples)), key=lambda i: len(samples[i]))
    for a in range(0, len(order), batch):
        chosen = order[a:a + batch]
        ids = [torch.as_tensor(np.asarray(samples[i], dtype=np.int64)) for i in chosen]
        yield chosen, torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad)


# ---------------------------------------------------------------------------------------------------------------------
# generative perplexity

@torch.no_grad()
def judge_nll(judge, samples, device, batch=32, scored=None):
    """-log p of each sample under an AR judge -> (nats [n], how many tokens they are of [n]).

    EOS, the judge's BOS id, is read but not scored; nor are tokens where `scored` [n, T] is False. Of a judge of rows
    of one document the first EOS is, or texts that stop anywhere would look good. A sample that is longer than the
    judge's rows is read in windows that overlap by half. Raises BadInput for ids unknown to the judge.
    """
    one_document = getattr(judge, "meta", {}).get("padded")
    largest = max(np.max(sample) for sample in samples)
    if largest >= judge.vocab_size:
        raise BadInput(f"the judge knows {judge.vocab_size} ids, but a sample holds id {largest}: "
                       "a [MASK], or another vocabulary")
    nats = np.zeros(len(samples))
    count = np.zeros(len(samples), dtype=int)
    for chosen, ids in by_length(samples, batch, judge.bos):
        x = F.pad(ids, (1, 0), value=judge.bos).to(device)                  # (b, 1 + T)
        for start, end, done in windows(x.shape[1], judge.length):
            context = x[:, start:end - 1]
            target = x[:, done + 1:end]                                     # (b, T')
            h = judge.hidden(context)[:, done - start:]                     # (b, T', D)
            logp = log_probs_of(judge, h, target)
            counts = target != judge.bos                   # EOS, and the padding after a shorter sample
            if one_document:
                counts = up_to_eos(x[:, 1:], judge.bos)[:, done:end - 1]
            if scored is not None:
                wanted = scored[chosen][:, done:end - 1]
                counts &= torch.as_tensor(wanted, device=device)
            nats[chosen] -= logp.double().masked_fill(~counts, 0).sum(1).cpu().numpy()
            count[chosen] += counts.sum(1).cpu().numpy()
    return nats, count


def windows(length, size):
    """Windows of `size` ids over rows of `length` ids, BOS included, each half a window further than the one before.

    Yields (start, end, done): the window reads ids start to end, of which those after number `done` have no score yet.
    """
    start = 0
    done = 0                                               # BOS needs none
    while done < length - 1:
        end = min(start + size, length)
        yield start, end, done
        done = end - 1
        start += size // 2


def log_probs_of(judge, h, target):
    """Hidden states h [b, T, D] and the tokens that follow them [b, T] -> log p of these tokens [b, T]."""
    rows = []
    for h_row, target_row in zip(h, target):               # [T, V] at a time: all rows' logits are large
        logp = judge.logits(h_row).log_softmax(-1)
        rows.append(logp.gather(-1, target_row[:, None]).squeeze(1))
    return torch.stack(rows)


def gen_ppl(judge, samples, device, scored=None):
    """exp of the judge's mean nats per token of all samples, with its standard error over samples: a dict with
    `gen_ppl` and `gen_ppl_stderr`, empty if no token counts. Arguments as in `judge_nll`.
    """
    nats, count = judge_nll(judge, samples, device, scored=scored)
    mean, error = ratio_with_error(nats, count)
    if mean is None:
        return {}
    perplexity = math.exp(mean)
    return {"gen_ppl": perplexity, "gen_ppl_stderr": perplexity * error}


# ---------------------------------------------------------------------------------------------------------------------
# MAUVE

@torch.no_grad()
def last_hidden(judge, samples, device, batch=32):
    """MAUVE's features: an AR model's hidden state at the last token of each sample -> [n, D], float32.

    No BOS in front, as mauve-text has it; a sample is cut to the judge's row length.
    """
    samples = [sample[:judge.length] for sample in samples]
    features = [None] * len(samples)
    for chosen, ids in by_length(samples, batch, judge.bos):
        h = judge.hidden(ids.to(device))
        for i, h_row in zip(chosen, h):
            features[i] = h_row[len(samples[i]) - 1].float().cpu()
    return torch.stack(features)


def mauve_scores(p, q, seeds=5):
    """MAUVE (Pillutla et al. 2021) of features p, q [n, D] -> an array [seeds], a score for each seed of k-means.

    1: the same distribution, 0: no overlap. As mauve-text: rows of norm 1, a joint PCA, both sets as histograms over
    joint clusters, n / 10 of them, and the area under the curve of their divergences from mixtures; no smoothing.
    """
    x = F.normalize(torch.cat([p, q]).double())
    x = principal_components(x, share=0.9).float()
    k = max(2, round(min(len(p), len(q)) / 10))
    scores = []
    for seed in range(seeds):
        labels = kmeans(x, k, torch.Generator().manual_seed(seed))
        labels_p, labels_q = labels.split([len(p), len(q)])
        a = torch.bincount(labels_p, minlength=k).double() / len(p)         # (k), sums to 1
        b = torch.bincount(labels_q, minlength=k).double() / len(q)
        scores.append(divergence_area(a, b))
    return np.array(scores)


def principal_components(x, share):
    """x [n, D] -> its projection on the fewest directions that hold this share of the variance."""
    x = x - x.mean(0)
    _, s, v = torch.linalg.svd(x, full_matrices=False)
    held = (s ** 2).cumsum(0) / (s ** 2).sum()
    n = 1 + int((held >= share).nonzero()[0])
    return x @ v[:n].T


def divergence_area(a, b):
    """The area under MAUVE's curve of two histograms a, b [k]: 1 where they are equal, 0 where they share nothing.

    The curve: (exp(-5 KL(b || m)), exp(-5 KL(a || m))) for all mixtures m = w a + (1 - w) b.
    """
    w = torch.linspace(1e-6, 1 - 1e-6, 25).double()[:, None]
    m = w * a + (1 - w) * b                                                 # (25, k)
    ends = torch.eye(2).double()                           # the curve starts in (1, 0) and ends in (0, 1)
    x = torch.cat([ends[:, 0], torch.exp(-5 * kl(b, m))])
    y = torch.cat([ends[:, 1], torch.exp(-5 * kl(a, m))])
    # between the points the curve is only known roughly: the mean of the areas seen from both axes
    return float(area(x, y)) / 2 + float(area(y, x)) / 2


def kl(p, q):
    """KL(p || q) of p [k] from each row of q [n, k] -> [n]; 0 log 0 is 0."""
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(1)


def area(x, y):
    """The area under the points (x, y) [n] in the order of x."""
    order = x.argsort()
    return torch.trapezoid(y[order], x[order])


def kmeans(x, k, generator, redo=5, iterations=500):
    """Clusters by Lloyd's algorithm, started from k random points; the best of `redo` runs. x [n, D] -> labels [n]."""
    best_cost = math.inf
    best_labels = None
    for _ in range(redo):
        start = torch.randperm(len(x), generator=generator)[:k]
        cost, labels = lloyd(x, x[start], iterations)
        if cost < best_cost:
            best_cost = cost
            best_labels = labels
    return best_labels


def lloyd(x, centre, iterations):
    """x [n, D] and the first centres [k, D] -> (sum of squared distances to the nearest centre, labels [n])."""
    k = len(centre)
    labels = None
    for _ in range(iterations):
        distance, nearest = torch.cdist(x, centre).min(1)
        if labels is not None and torch.equal(nearest, labels):
            break
        labels = nearest
        count = torch.bincount(labels, minlength=k)
        centre = torch.zeros_like(centre).index_add_(0, labels, x) / count.clamp(min=1)[:, None]
        # a cluster that has become empty starts again at one of the points that lie worst
        empty = count == 0
        centre[empty] = x[distance.topk(int(empty.sum())).indices]
    return float(distance.square().sum()), labels


def entropy(ids):
    """Unigram entropy of token ids in nats: repetition shows as a low value."""
    _, count = np.unique(ids, return_counts=True)
    p = count / count.sum()
    return float(-(p * np.log(p)).sum())


def text_facts(sampled):
    """How varied samples [n, T] are: unigram entropy in nats, and the share of their n-grams that are distinct."""
    of_samples = [entropy(row) for row in sampled]
    facts = dict(n=len(sampled), entropy=float(np.mean(of_samples)), entropy_set=entropy(sampled))
    # a k-gram is one number: three ids below 2^20 fit into 63 bits
    grams = sampled.astype(np.int64)
    for k in range(1, 1 + min(3, sampled.shape[1])):
        facts[f"distinct_{k}"] = len(np.unique(grams)) / grams.size
        grams = grams[:, :-1] * 2**20 + sampled[:, k:]
    return facts
