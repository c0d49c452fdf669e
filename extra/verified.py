"""Decoding with an autoregressive verifier: APD."""
import math

import torch

from gumbel import sample_gumbel
from mdlm import nucleus


@torch.no_grad()
def generate_apd(model, tokens, verifier, ratio=0.5, max_lookahead=10, tau=1.0, top_p=1.0, greedy=False, noise=None,
                 resample_noise=False, generator=None):
    """Adaptive parallel decoding (Israel et al. 2025) -> (tokens [B, L], nfe [B], verifier calls [B]).

    Left to right. From the first masked position on, for up to `max_lookahead` positions: draft x_i =
    argmax(student logits + zeta_i), run the AR `verifier` once on the draft, and accept the longest prefix with
    x_i = y_i, where y_i = argmax(ratio * student logits + (1 - ratio) * AR logits + the same zeta_i). The first
    drafted token is always accepted. `greedy`: zeta = 0. The rest as in `generate`; nfe leaves out the verifier.
    """
    model.check_sampling(tokens, tau, top_p, noise, resample_noise)
    if not 0 <= ratio <= 1 or max_lookahead < 1:
        raise ValueError(f"ratio must lie in [0, 1] and max_lookahead be at least 1, got {ratio}, {max_lookahead}")
    g = model.noise_source(tokens == model.mask_id, tau, noise, resample_noise, generator)
    x, position = tokens.clone(), torch.arange(tokens.shape[1], device=tokens.device)
    nfe = torch.zeros(len(x), dtype=torch.long, device=x.device)
    while len(rows := (x == model.mask_id).any(1).nonzero().squeeze(1)):
        masked = x[rows] == model.mask_id
        first = masked.int().argmax(1, keepdim=True)                                           # (b, 1)
        draft = masked & (position < first + max_lookahead)                                    # (b, L)
        logits = model.logits(model.hidden(x[rows], g(rows), at=draft)).double()    # (N, V), N <= b * max_lookahead
        if top_p < 1:
            logits = nucleus(logits, top_p)
        zeta = 0 if greedy else sample_gumbel(logits.shape, generator, x.device)
        new = (logits + zeta).argmax(-1)
        filled = x[rows].masked_scatter(draft, new)
        end = int(draft.nonzero()[:, 1].max())
        text = filled[:, :end]                            # what stands beyond a row's draft does not matter: causal
        h = verifier.hidden(text.masked_fill(text == model.mask_id, model.bos))
        ar = verifier.logits(h[draft[:, 1:end + 1]])
        target = torch.where(logits == -math.inf, logits, ratio * logits + (1 - ratio) * ar.double())
        same = torch.ones_like(draft).masked_scatter(draft, (target + zeta).argmax(-1) == new)
        same.scatter_(1, first, True)
        x[rows] = torch.where(draft & same.cumprod(1).bool(), filled, x[rows])
        nfe[rows] += 1
    return x, nfe, nfe.clone()                            # one verifier call with each network call
