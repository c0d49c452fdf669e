"""Decoding with an autoregressive verifier: adaptive parallel decoding (APD, Israel et al. 2025).

The student drafts several tokens in one call, the verifier reads the draft in one call, and the part on which both
agree is kept. Both use the same Gumbel noise zeta, so that they agree more often than two independent draws would.

Shapes: B batch, b rows that are not finished, L length, V vocabulary, N drafted tokens of all rows.
"""
import math

import torch

from gumbel import nucleus, sample_gumbel
from mdlm import Denoiser


@torch.no_grad()
def generate_apd(model, tokens, verifier, ratio=0.5, max_lookahead=10, tau=1.0, top_p=1.0, greedy=False, noise=None,
                 resample_noise=False, generator=None):
    """Fill in the [MASK]s of tokens [B, L], left to right -> (tokens [B, L], nfe [B], verifier calls [B]).

    model: an MDLM. verifier: an AR model of the same vocabulary; nfe does not count its calls. ratio: the weight of the
    student's logits beside the verifier's. max_lookahead: a round drafts the masked ones of that many positions.
    greedy: zeta = 0. The other arguments are those of `MDLM.generate`. Raises ValueError for values out of range.
    """
    model.check_sampling(tokens, tau, top_p, noise, resample_noise)
    if not 0 <= ratio <= 1 or max_lookahead < 1:
        raise ValueError(f"ratio must lie in [0, 1] and max_lookahead be at least 1, got {ratio}, {max_lookahead}")
    denoiser = Denoiser(model, tokens == model.mask_id, tau, noise, resample_noise, generator)
    x = tokens.clone()
    nfe = torch.zeros(len(x), dtype=torch.long, device=x.device)
    rows = unfinished(x, model.mask_id)
    while len(rows):
        # 1. draft the next masked positions, each by itself: x_i = argmax(student_i + zeta_i)
        z = x[rows]
        drafted = next_masked(z == model.mask_id, max_lookahead)  # (b, L)
        student = denoiser.logits(denoiser.hidden(z, rows, drafted)).double()  # (N, V)
        if top_p < 1:
            student = nucleus(student, top_p)
        zeta = torch.zeros_like(student)
        if not greedy:
            zeta = sample_gumbel(student.shape, generator, x.device)
        draft = (student + zeta).argmax(-1)  # (N)
        filled = z.masked_scatter(drafted, draft)

        # 2. verify, in one call: y_i = argmax(ratio student_i + (1 - ratio) AR_i + the same zeta_i)
        ar = verify(verifier, filled, drafted, model.mask_id)  # (N, V)
        target = ratio * student + (1 - ratio) * ar.double()
        target = torch.where(student == -math.inf, student, target)           # ratio 0 would make it 0 * inf = nan
        agrees = (target + zeta).argmax(-1) == draft

        # 3. accept the longest prefix of the draft with x_i = y_i, and its first token in any case
        accepted = leading(drafted, agrees)
        x[rows] = torch.where(accepted, filled, z)
        nfe[rows] += 1
        rows = unfinished(x, model.mask_id)
    verifier_calls = nfe.clone()                           # one with each network call
    return x, nfe, verifier_calls


def unfinished(x, mask_id):
    """The rows of x [B, L] that hold a [MASK] -> their indices [b]."""
    return (x == mask_id).any(1).nonzero().squeeze(1)


def next_masked(masked, n):
    """Of masked [b, L], what lies among the n positions from each row's first masked one on -> [b, L]."""
    position = torch.arange(masked.shape[1], device=masked.device)
    first = masked.int().argmax(1, keepdim=True)
    return masked & (position < first + n)


def verify(verifier, filled, drafted, mask_id):
    """The verifier's logits of the drafted tokens [N, V]: filled [b, L] with the draft in place, drafted [b, L] bool.

    It reads what precedes a token, so the [MASK]s after a row's draft do not matter: they become BOS, an id it knows.
    """
    end = int(drafted.nonzero()[:, 1].max())               # what stands there or beyond is read for no drafted token
    text = filled[:, :end]
    h = verifier.hidden(text.masked_fill(text == mask_id, verifier.bos))
    return verifier.logits(h[drafted[:, 1:end + 1]])       # position i is predicted at i - 1


def leading(drafted, agrees):
    """Which drafted positions [b, L] are accepted: agrees [N], in their order -> [b, L]."""
    first = drafted.int().argmax(1, keepdim=True)
    no_objection = torch.ones_like(drafted).masked_scatter(drafted, agrees)
    no_objection.scatter_(1, first, True)
    so_far = no_objection.cumprod(1).bool()
    return drafted & so_far
