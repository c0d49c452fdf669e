"""How good samples are under a judge, an AR model: generative perplexity, and MAUVE.
"""
import math

import numpy as np
import torch

from data.cli import BadInput


def ratio_with_error(a, b):
    """sum a / sum b over independent samples, with its standard error (linearised: samples differ in both)."""
    n, total = len(a), b.sum()
    if not total:
        return None, None
    r = a.sum() / total
    return float(r), float(np.sqrt(n / max(1, n - 1) * ((a - r * b) ** 2).sum()) / total)


def by_length(samples, batch, pad):
    """Samples (id arrays) in batches of similar lengths: yields (their indices [b], LongTensor [b, T])."""
    order = sorted(range(len(samples)), key=lambda i: len(samples[i]))
    for a in range(0, len(order), batch):
        ids = [torch.as_tensor(np.asarray(samples[i], dtype=np.int64)) for i in order[a:a + batch]]
        yield order[a:a + batch], torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad)


@torch.no_grad()
def judge_nll(judge, samples, device, batch=32, scored=None):
    """-log p of each sample (id arrays, without BOS) under an AR judge -> (nats [n], counted tokens [n]).

    EOS targets (the judge's BOS id) are left out, and those where `scored` [n, T] is False. Samples longer than the
    judge's rows: windows, stride half of one.
    """
    if (top := max(np.max(sample) for sample in samples)) >= judge.vocab_size:
        raise BadInput(f"the judge knows {judge.vocab_size} ids, but a sample holds id {top}: a [MASK], or another "
                       "vocabulary")
    nll, count = np.zeros(len(samples)), np.zeros(len(samples), dtype=int)
    for some, ids in by_length(samples, batch, judge.bos):
        x = torch.nn.functional.pad(ids, (1, 0), value=judge.bos).to(device)
        start = done = 0                                   # row entries before `done + 1` are scored
        while done < x.shape[1] - 1:
            part = x[:, start:start + judge.length]
            h, target = judge.hidden(part[:, :-1])[:, done - start:], part[:, 1 + done - start:]
            logp = torch.stack([judge.logits(r).log_softmax(-1).gather(-1, t[:, None]).squeeze(1)
                                for r, t in zip(h, target)])                 # row by row: [L, V] at a time
            keep = target != judge.bos                     # EOS, and the padding after a shorter sample
            if scored is not None:
                keep &= torch.as_tensor(scored[some][:, done:done + keep.shape[1]], device=device)
            nll[some] -= logp.double().masked_fill(~keep, 0).sum(1).cpu().numpy()
            count[some] += keep.sum(1).cpu().numpy()
            done = start + part.shape[1] - 1
            start += judge.length // 2
    return nll, count


def gen_ppl(judge, samples, device, scored=None):
    """exp of the judge's mean nats over all tokens of all samples, with its standard error over samples."""
    nats, error = ratio_with_error(*judge_nll(judge, samples, device, scored=scored))
    return {} if nats is None else dict(gen_ppl=math.exp(nats), gen_ppl_stderr=math.exp(nats) * error)


@torch.no_grad()
def last_hidden(judge, samples, device, batch=32):
    """MAUVE's features: an AR model's hidden state at the last token of each sample (id arrays) -> [n, D] float32."""
    samples, out = [sample[:judge.length] for sample in samples], [None] * len(samples)
    for some, ids in by_length(samples, batch, judge.bos):
        for i, h in zip(some, judge.hidden(ids.to(device))):
            out[i] = h[len(samples[i]) - 1].float().cpu()
    return torch.stack(out)


def kmeans(x, k, generator, redo=5, iterations=500):
    """Lloyd's algorithm from k random points, the best of `redo` runs: x [N, d] -> labels [N]."""
    best = (math.inf, None)
    for _ in range(redo):
        centre, labels = x[torch.randperm(len(x), generator=generator)[:k]], None
        for _ in range(iterations):
            nearest, new = torch.cdist(x, centre).min(1)
            if labels is not None and torch.equal(new, labels):
                break
            labels = new
            count = torch.bincount(labels, minlength=k)
            centre = torch.zeros_like(centre).index_add_(0, labels, x) / count.clamp(min=1)[:, None]
            centre[count == 0] = x[nearest.topk(int((count == 0).sum())).indices]      # an empty one: the worst point
        best = min(best, (float(nearest.square().sum()), labels), key=lambda run: run[0])
    return best[1]


def mauve_scores(p, q, seeds=5):
    """MAUVE (Pillutla et al. 2021) of features p, q [n, D], for several seeds of k-means -> [seeds]. As mauve-text:
    unit rows, joint PCA to 90 % of the variance, n / 10 clusters, the area under exp(-5 KL), no smoothing.
    """
    x = torch.nn.functional.normalize(torch.cat([p, q]).double())
    x = x - x.mean(0)
    _, s, v = torch.linalg.svd(x, full_matrices=False)
    kept = 1 + int(((s ** 2).cumsum(0) / (s ** 2).sum() >= 0.9).nonzero()[0])
    x, k, scores = x @ v[:kept].T, max(2, round(min(len(p), len(q)) / 10)), []
    w = torch.linspace(1e-6, 1 - 1e-6, 25).double()[:, None]
    for seed in range(seeds):
        labels = kmeans(x.float(), k, torch.Generator().manual_seed(seed))
        a, b = (torch.bincount(part, minlength=k).double() / len(part) for part in labels.split([len(p), len(q)]))
        mix = w * a + (1 - w) * b                                                                            # (25, k)
        curve = [torch.exp(-5 * (torch.xlogy(d, d) - torch.xlogy(d, mix)).sum(1)) for d in (b, a)]
        curve = torch.cat([torch.eye(2).double(), torch.stack(curve, 1)])           # with its ends, (1, 0) and (0, 1)
        scores.append(sum(float(torch.trapezoid(c[o, 1], c[o, 0])) / 2
                          for c in (curve, curve.flip(1)) for o in [c[:, 0].argsort()]))
    return np.array(scores)
