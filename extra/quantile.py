"""Noise of constant width: one uniform u a token in place of a V-vector (`--noise=quantile`).

A token is the first one with F(x) > u, F the teacher's cumulative distribution over ascending ids, which needs no sort
and is known to whoever knows the vocabulary. Given a token, u = F(x - 1) + v p(x), v uniform, is the noise that drew
it. A student reads sines and cosines of u; nothing grows with V but the teacher's logits. After PTP (arXiv:2512.21323).

Between two networks that nearly agree, a shared u is a weaker coupling than shared Gumbel noise, with which both write
the same token with probability (1 - TV) / (1 + TV) or more (extra/exact.py). Of u there is no such bound: what one of
them adds to the first id shifts the intervals of all others, and where these are shorter than the shift, u lies in
other ones. So a verifier and a student that was not told u agree less, and rounding changes some draws. In a nucleus,
whose tokens share all of [0, 1), u means another token than in training.

Shapes: N positions, V vocabulary, D width.
"""
import math

import torch
import torch.nn as nn

from gumbel import DEVICE

OCTAVES = 16                                # u is read in steps of 2^-16 and, by the lowest, as a whole


def cumulative(logits):
    """F of each row: logits [N, V] -> [N, V], float64, ascending to exactly 1 (on a GPU but for rounding)."""
    F = logits.float().softmax(-1).cumsum(-1, dtype=torch.float64)
    return F.div_(F[:, -1:].clone())


def draw_by_quantile(logits, u):
    """The first token with F(x) > u: logits [N, V], u [N] in [0, 1), float64 -> [N]. Of a uniform u, an exact draw."""
    return torch.searchsorted(cumulative(logits), u[:, None].contiguous(), right=True).squeeze(1)


def interval_of(logits, tokens):
    """Where the u of drawn tokens lies, [F(x - 1), F(x)): logits [N, V], tokens [N] -> its beginning [N], float64, and
    its length [N], float32, rounded so that beginning + v * length lies in it for every v in [0, 1].

    Where p(x) < 2^-52 or so, float64 cannot tell the ends apart, and the length is 0. A token whose logit is -inf
    cannot have been drawn: its beginning is nan, which shows in whatever is computed from it.
    """
    F = cumulative(logits)
    x = tokens[:, None]
    zero = F.new_zeros(())
    before = F.gather(1, (x - 1).clamp(min=0))
    beginning = torch.where(x == 0, zero, before).clamp(max=1 - 2**-53)
    last = F.gather(1, x).nextafter(zero)                  # the largest number below F(x)
    exact = (last - beginning).clamp(min=0)
    length = exact.float()
    length = torch.where(length.double() > exact, length.nextafter(zero.float()), length)
    impossible = logits.gather(1, x) == -math.inf
    return beginning.masked_fill(impossible, math.nan).squeeze(1), length.squeeze(1)


def features(u):
    """Sine and cosine of 2 pi 2^k u, k = 0 .. 15: u [...], float64 -> [..., 32] float32. The phases are exact."""
    octaves = 2.0 ** torch.arange(OCTAVES, device=u.device, dtype=torch.float64)
    angle = 2 * math.pi * (u[..., None] * octaves % 1)
    return torch.cat([angle.sin(), angle.cos()], -1).float()


class QuantileEmbedding(nn.Linear):
    """g = W features(u) + b, W [D, 32]: stands in for a `GumbelEmbedding`, whose methods it has. Noise is u [..].

    There is no temperature: a tau other than 1 is a ValueError.
    """
    kind = "quantile"

    def __init__(self, vocab_size, n_embd, std=0.02):
        super().__init__(2 * OCTAVES, n_embd)
        nn.init.normal_(self.weight, std=std / math.sqrt(OCTAVES))      # sin^2 + cos^2 = 1: g starts with this std
        nn.init.zeros_(self.bias)
        self.vocab_size = vocab_size
        self.interval = interval_of

    def forward(self, u, tau=1.0):
        """Given u [...], float64 -> [..., D], float32."""
        if tau != 1:
            raise ValueError(f"quantile noise has no temperature, got tau {tau}")
        with torch.autocast(u.device.type, enabled=False):
            return super().forward(features(u))

    def from_prior(self, n, tau=1.0, generator=None):
        """Fresh noise for n rows -> [n, D]."""
        u = torch.rand(n, generator=generator, device=self.weight.device, dtype=torch.float64)
        return self(u, tau)

    def from_posterior(self, logits, tokens, generator=None):
        """Noise drawn from its posterior given tokens [N] -> [N, D]. `logits`: see `posterior`."""
        return self(self.posterior(logits, tokens, generator))

    @torch.no_grad()
    def posterior(self, logits, tokens, generator=None):
        """The u that would have drawn these tokens, uniform in its interval: tokens [N] -> [N], float64, in [0, 1).

        `logits` is a function: logits(a, b) are the teacher's, float32 [b - a, V], behind tokens a to b. Or a pair:
        what `interval_of` says of all these tokens, where a cache has stored it.
        """
        if callable(logits):
            chunk = max(1, DEVICE.chunk // self.vocab_size)
            parts = []
            for a in range(0, len(tokens), chunk):
                b = min(a + chunk, len(tokens))
                parts.append(self.interval(logits(a, b), tokens[a:b]))
            if not parts:
                return torch.zeros(0, dtype=torch.float64, device=tokens.device)
            beginning, length = map(torch.cat, zip(*parts))
        else:
            beginning, length = logits
        v = torch.rand(len(tokens), generator=generator, device=tokens.device, dtype=torch.float64)
        return beginning + v * length

    def compile(self, **kw):
        """torch.compile the interval. The number of its rows may differ from call to call."""
        self.interval = torch.compile(interval_of, **kw)
