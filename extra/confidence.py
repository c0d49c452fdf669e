"""Revealing the most probable tokens first (--order=confidence), as many users expect of masked diffusion.

It is no sampler of the model's distribution: on the maze it is clearly harmful. Shapes: as in mdlm.py.
"""
import math

import torch

from gumbel import DEVICE, draw_tokens
from mdlm import close_gaps


def unmask_by_confidence(x, step, mask_id, denoiser, top_p=1.0, greedy=False, generator=None):
    """`mdlm.unmask`, where the table step [B, L] only says how many tokens a call reveals: of the tokens drawn at all
    masked positions, those that were drawn with the highest probability. -> (x [B, L], nfe [B]).
    """
    x = x.clone()
    step = close_gaps(step)
    nfe = step.amax(-1)
    for k in range(1, int(nfe.max()) + 1):
        rows = (nfe >= k).nonzero().squeeze(1)
        z = x[rows]
        masked = z == mask_id
        h = denoiser.hidden(z, rows, masked)  # (N, D)
        new, logp = draw_with_logp(h, denoiser, mask_id, top_p, greedy, generator)
        # rank every position by the probability of its token; what is not masked comes last
        score = torch.full(masked.shape, -math.inf, device=x.device).masked_scatter(masked, logp)
        rank = score.argsort(-1, descending=True).argsort(-1)
        count = (step[rows] == k).sum(-1, keepdim=True)  # (b, 1)
        best = (rank < count) & masked
        x[rows] = z.masked_scatter(best, new[best[masked]])
    return x, nfe


def draw_with_logp(h, denoiser, vocab_size, top_p, greedy, generator):
    """Tokens [N] for hidden states h [N, D], and their log-probabilities [N]; in chunks, as in `mdlm.unmask`."""
    tokens = []
    logps = []
    for part in h.split(max(1, DEVICE.chunk // vocab_size)):
        logits = denoiser.logits(part)
        new = draw_tokens(logits, top_p, greedy, generator=generator)
        tokens.append(new)
        logps.append(logits.float().log_softmax(-1).gather(-1, new[:, None]).squeeze(1))
    return torch.cat(tokens), torch.cat(logps)
