"""The autoregressive teacher, and stage 1: extracting the noise behind a text (Section 4.1).

Row i of an AR model's output is the distribution of token i + 1, so the noise of position i (the noise that decided the
token there) comes from the teacher's logits at position i - 1.

Shapes: B batch, L length, V vocabulary, D width, N rows.
"""
import math
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from gumbel import posterior_gumbel, sample_gumbel
from mdlm import KVCache, Transformer, draw_tokens, fold_published, nll_rows


class AR(nn.Module):
    """The student's transformer made causal: a teacher, a baseline of student size, a verifier or a judge."""

    def __init__(self, vocab_size, length, bos, n_layer=12, n_embd=768, n_head=12, dropout=0.1, predict_bos=True):
        super().__init__()
        self.config = dict(vocab_size=vocab_size, length=length, bos=bos, n_layer=n_layer, n_embd=n_embd, n_head=n_head,
                           dropout=dropout, predict_bos=predict_bos)
        self.vocab_size, self.length, self.bos, self.predict_bos = vocab_size, length, bos, predict_bos
        self.transformer = Transformer(vocab_size, vocab_size, n_layer, n_embd, n_head, dropout, causal=True)

    def hidden(self, tokens, cache=None):
        """tokens [B, L] -> [B, L, D]; with a KVCache, the tokens that follow what it holds."""
        return self.transformer(self.transformer.embed(tokens), cache)

    def logits(self, h, exact=True):
        """h [N, D] -> [N, V], in float32 even under autocast: a bf16 logit near -60 is off by up to a quarter.

        `exact=False` (in training, where the error averages out) follows autocast.
        """
        with torch.autocast(h.device.type, enabled=False) if exact else nullcontext():
            logits = self.transformer.head(h.float()).float()
        if not self.predict_bos:
            logits[..., self.bos] = -math.inf
        return logits

    def log_probs(self, tokens):
        """tokens [B, L] -> [B, L, V]; row i is the distribution of token i + 1."""
        return self.logits(self.hidden(tokens)).log_softmax(-1)

    def loss(self, tokens):
        """Mean negative log-likelihood in nats over the L - 1 tokens after BOS. Returns (loss, {})."""
        h = self.hidden(tokens[:, :-1]).flatten(0, 1)
        return nll_rows(partial(self.logits, exact=False), h, tokens[:, 1:].flatten(), self.vocab_size).mean(), {}

    forward = loss                                        # what DDP calls

    def posterior_logits(self, tokens, masked):
        """One teacher pass over clean rows: (a, b) -> float32 logits [b - a, V] that produced masked tokens a to b.

        What `GumbelEmbedding.from_posterior` asks for: parallel extraction, chunk by chunk. tokens, masked [B, L].
        """
        with torch.no_grad():
            h = self.hidden(tokens[:, :-1])[masked[:, 1:]]               # (N, D): the position before each masked one
        return lambda a, b: self.logits(h[a:b])

    @torch.no_grad()
    def generate(self, tokens, length=None, tau=1.0, top_p=1.0, greedy=False, noise=None, generator=None):
        """Continue tokens [B, P] (BOS first) to `length` -> (tokens [B, length], nfe [B]), by Gumbel-max.

        x_i = argmax(logits + tau * noise_i), tau the sampling temperature. `noise` [B, length, V], drawn unless given.
        """
        length = length or self.length
        B, P = tokens.shape
        if not tau > 0 or not 0 < top_p <= 1:
            raise ValueError(f"tau must be positive and top_p in (0, 1], got {tau} and {top_p}")
        if not 1 <= P <= length:
            raise ValueError(f"the prompt has {P} tokens, the sample {length}")
        cache, x, new = KVCache(self.transformer, B, length), tokens, tokens
        for i in range(P, length):
            logits = self.logits(self.hidden(new, cache)[:, -1]) / tau
            new = draw_tokens(logits, top_p, greedy, None if noise is None else noise[:, i], generator)[:, None]
            x = torch.cat([x, new], 1)
        return x, torch.full((B,), length - P, device=tokens.device)


class LogitsTable:
    """The teacher's logits on every row of a small dataset, computed once: [rows, L - 1, V] float32 on the device.

    In place of the teacher in `MDLM.loss`: `table.at(rows)` says which rows the batch holds. Always float32.
    """

    def __init__(self, teacher, data, batch=1024):
        device = teacher.transformer.embed.weight.device
        with torch.no_grad():
            self.table = torch.cat([teacher.logits(teacher.hidden(
                torch.from_numpy(data.rows(range(a, min(a + batch, len(data))))).to(device)[:, :-1]))
                for a in range(0, len(data), batch)])

    def at(self, rows):
        self.rows = torch.as_tensor(rows, device=self.table.device)
        return self

    def posterior_logits(self, tokens, masked):
        logits = self.table[self.rows][masked[:, 1:]]
        return lambda a, b: logits[a:b]


def extract_parallel(teacher, tokens, generator=None):
    """The noise that would have made the teacher write `tokens` [B, L] -> [B, L, V], float32; row 0 (BOS) is zero.

    One forward pass and Algorithm 1 at each position. For study and small vocabularies: training uses
    `GumbelEmbedding.from_posterior` with `posterior_logits`, the same draws without the [B, L, V] tensor.
    """
    with torch.no_grad():
        logits = teacher.logits(teacher.hidden(tokens[:, :-1]))
    return F.pad(posterior_gumbel(logits, tokens[:, 1:], generator), (0, 0, 1, 0))


def extract_sequential(teacher, n, length=None, generator=None):
    """n texts by the teacher with the noise that produced them: tokens [n, L], noise [n, L, V]; row 0 (BOS) is zero."""
    length = length or teacher.length
    device = teacher.transformer.embed.weight.device
    noise = sample_gumbel((n, length, teacher.vocab_size), generator, device)
    noise[:, 0] = 0
    tokens, _ = teacher.generate(torch.full((n, 1), teacher.bos, device=device), length, noise=noise)
    return tokens, noise


def load_published(src, n_heads=None, length=1024, bos=50256):
    """The authors' AR model as our `AR` with equal outputs. `src`: a path or a state dict; a [MASK] row is dropped."""
    state, sizes, _ = fold_published(src, n_heads)
    state["transformer.embed.weight"] = state["transformer.embed.weight"][:sizes["vocab_size"]]
    model = AR(length=length, bos=bos, **sizes)
    model.load_state_dict(state)
    return model.eval()
