"""The student transformer, and masked diffusion (MDLM) on it: loss and samplers, with or without Gumbel noise.

Masked diffusion in four lines: mask each token independently with probability t, predict the masked tokens all at once,
weight the cross-entropy by 1/t, average over t ~ U(0, 1]: an upper bound on -log p(x) (the NELBO). To sample, start
from all [MASK] and reveal a few positions per network call. Tokens revealed together are drawn independently: that
is the error that Gumbel Distillation removes, by giving each masked position the noise that decides its token.

Shapes: B batch, L length, V vocabulary (without [MASK], whose id is V), D width, H heads, N rows (masked positions).
"""
import math
from functools import lru_cache

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint

from gumbel import CHUNK, GumbelEmbedding, gumbel_max

T_MIN = 1e-3                                  # t lives in [T_MIN, 1]: bounds the weight 1/t of a rarely masked row


# ---------------------------------------------------------------------------------------------------------------------
# the transformer (shared: MDLM and BD3-LM bidirectional, the AR model causal)

class KVCache:
    """Preallocated keys and values of all layers, [layers, 2, B, H, max_length, head_dim]; `length` of it is filled.

    `crop` and `batch_select_indices` are those of the caches of `transformers`, which can stand in.
    """

    def __init__(self, model, batch, max_length):
        w, h = model.blocks[0].qkv.weight, model.n_head
        device = w.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else w.dtype
        self.kv = w.new_zeros(len(model.blocks), 2, batch, h, max_length, w.shape[1] // h, dtype=dtype)
        self.length = 0

    def update(self, layer, k, v):
        a, b = self.length, self.length + k.shape[2]
        assert b <= self.kv.shape[4], f"KV cache holds {self.kv.shape[4]} positions, {b} wanted"
        self.kv[layer, 0, :, :, a:b], self.kv[layer, 1, :, :, a:b] = k, v
        return self.kv[layer, 0, :, :, :b], self.kv[layer, 1, :, :, :b]

    def crop(self, n):
        self.length += n                                   # crop(-3) forgets the last three positions

    def batch_select_indices(self, rows):
        self.kv = self.kv[:, :, rows]


compiled_flex = lru_cache(lambda: torch.compile(flex_attention))      # uncompiled, it would hold all attention scores


def rope_tables(positions, head_dim):
    """RoPE's cos and sin, base 10^4, laid out for `apply_rope`. positions [L] -> two [L, 1, 1, head_dim], float32."""
    freq = 10000.0 ** (-torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)
    angle = (positions.float()[:, None] * freq)[:, None, None]
    return torch.cat([angle.cos()] * 2, -1), torch.cat([-angle.sin(), angle.sin()], -1)


def apply_rope(x, cos, sin):
    """Rotate each head's halves (a, b), not interleaved: (a cos - b sin, b cos + a sin). x [B, L, 2, H, head_dim]."""
    return (x * cos + x.roll(x.shape[-1] // 2, -1) * sin).to(x.dtype)


class Block(nn.Module):
    """Pre-LN attention (`bias`: GPT-2's) and MLP x 4 with tanh-GELU; dropout on both residual branches, as in DiT."""

    def __init__(self, n_embd, n_head, dropout, bias=False):
        super().__init__()
        self.n_head, self.dropout = n_head, dropout
        self.norm1 = nn.LayerNorm(n_embd)
        self.qkv = nn.Linear(n_embd, 3 * n_embd, bias=bias)
        self.attn_out = nn.Linear(n_embd, n_embd, bias=bias)
        self.norm2 = nn.LayerNorm(n_embd)
        self.fc = nn.Linear(n_embd, 4 * n_embd)
        self.proj = nn.Linear(4 * n_embd, n_embd)

    def forward(self, x, rope, mask, causal, cache=None, layer=0, at=None):
        B, L, D = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, L, 3, self.n_head, -1)
        qk = apply_rope(qkv[:, :, :2], *rope) if rope else qkv[:, :, :2]
        q, k = qk.permute(2, 0, 3, 1, 4)                                                           # each (B, H, L, D/H)
        v = qkv[:, :, 2].transpose(1, 2)
        if cache is not None:
            k, v = cache.update(layer, k, v)
        if isinstance(mask, BlockMask):
            y = compiled_flex()(q, k, v, block_mask=mask)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        y = y.transpose(1, 2).reshape(B, L, D)
        if at is not None:
            x, y = x[at], y[at]
        y = self.attn_out(y)
        x = x + F.dropout(y, self.dropout, self.training)
        y = self.proj(F.gelu(self.fc(self.norm2(x)), approximate="tanh"))
        return x + F.dropout(y, self.dropout, self.training)


class Transformer(nn.Module):
    """Token ids or embeddings in, hidden states out; the output layer `head` is applied by the caller, where needed.

    Residual output projections and the output layer start at zero: the network starts as the identity and predicts
    the uniform distribution, as the published networks do through their zero gates (adaLN driven by a constant).
    `learned`, GPT-2's variant: that many learned positions in place of RoPE, biases in attention, a tied head.
    """

    def __init__(self, vocab_in, vocab_out, n_layer, n_embd, n_head, dropout, causal=False, learned=0):
        super().__init__()
        if n_embd % (2 * n_head):
            raise ValueError(f"n_embd={n_embd} must be a multiple of 2 * n_head={2 * n_head} (RoPE rotates pairs)")
        self.n_head, self.causal = n_head, causal
        self.embed = nn.Embedding(vocab_in, n_embd)
        self.positions = nn.Embedding(learned, n_embd) if learned else None
        self.blocks = nn.ModuleList(Block(n_embd, n_head, dropout, bias=bool(learned)) for _ in range(n_layer))
        self.norm = nn.LayerNorm(n_embd)
        self.head = nn.Linear(n_embd, vocab_out, bias=not learned)
        nn.init.normal_(self.embed.weight, std=0.02)
        for layer in [self.head, *(layer for block in self.blocks for layer in (block.attn_out, block.proj))]:
            for p in layer.parameters():
                nn.init.zeros_(p)
        if learned:
            self.head.weight = self.embed.weight

    def forward(self, h, cache=None, positions=None, mask=None, at=None):
        """Input embeddings h [B, L, D] -> hidden states [B, L, D]. With a cache, h continues what the cache holds.

        positions [L]: default, those that follow the cache. mask: who sees whom, boolean [L, keys] or a BlockMask.
        at [B, L]: return those positions' states only, [N, D]; the last block's MLP is then not computed elsewhere.
        """
        L, start = h.shape[1], cache.length if cache else 0
        if positions is None:
            positions = torch.arange(start, start + L, device=h.device)
        if self.positions is None:
            rope = rope_tables(positions, h.shape[2] // self.n_head)
        else:
            rope, h = None, h + self.positions(positions)
        if self.causal and start and L > 1:   # queries start .. start + L - 1 against keys 0 .. start + L - 1
            mask = torch.ones(L, start + L, dtype=torch.bool, device=h.device).tril(start)
        for i, block in enumerate(self.blocks):
            h = block(h, rope, mask, self.causal and not start, cache, i, at if i == len(self.blocks) - 1 else None)
        if cache:
            cache.length += L
        return self.norm(h)


def row_losses(logits, h, x, vocab_size, teacher=None):
    """-log p(x) per row, and KL(teacher || p): h [N, D], x [N] -> [N], [N], where logits(h) is [N, vocab_size] and
    teacher(a, b) are the teacher's logits of rows a to b (None: KL 0). In chunks, which the backward pass computes
    again, so that [N, V] is never held.
    """
    def f(a, h, x):
        z = logits(h)
        nll = F.cross_entropy(z, x, reduction="none")
        if teacher is None:
            return nll, torch.zeros_like(nll)
        with torch.no_grad():
            q = teacher(a, a + len(h)).log_softmax(-1)
        # a token impossible for both contributes 0, not inf - inf
        return nll, ((q - z.log_softmax(-1)).masked_fill(q == -math.inf, 0) * q.exp()).sum(-1)
    rows = max(1, 4 * CHUNK // vocab_size)
    if len(h) <= rows:
        return f(0, h, x)
    parts = [checkpoint(f, a, h[a:a + rows], x[a:a + rows], use_reentrant=False, preserve_rng_state=False)
             for a in range(0, len(h), rows)]
    return tuple(torch.cat(p) for p in zip(*parts))


# ---------------------------------------------------------------------------------------------------------------------
# noise levels

def stratified_t(n, rng, t_one=0.0, low=T_MIN, high=1.0):
    """Noise levels of one global batch: n values in [low, high], float32 [n] (low-discrepancy, as in MDLM).

    t_j = (u + j) / n with one random shift u, assigned to rows (BD3-LM: to blocks) at random. `t_one`: this fraction is
    fully masked instead (t = 1); the loss is then no NELBO. `rng` is a numpy Generator.
    """
    ones = round(t_one * n)
    t = (rng.random() + torch.arange(n - ones, dtype=torch.float64)) / max(1, n - ones) % 1
    t = torch.cat([low + (high - low) * t, torch.ones(ones, dtype=torch.float64)])
    return t[torch.from_numpy(rng.permutation(n))].float()


# ---------------------------------------------------------------------------------------------------------------------
# samplers: a table of reveal steps, and one loop

SAMPLERS, ORDERS = ("ancestral", "fixed", "first_hitting"), ("random", "left_to_right", "confidence")


def reveal_steps(masked, steps, sampler="ancestral", order="random", generator=None):
    """When each position is revealed. masked [B, L] bool -> step [B, L] long: 1 .. steps, 0 where nothing is masked.

    Without time conditioning this does not depend on the network, so it is drawn beforehand.
    ancestral      each masked position draws its step uniformly from 1 .. steps: exactly the (t - s)/t rule of
                   ancestral sampling on a uniform grid of t.
    fixed          a permutation (`order`), cut evenly into `steps` parts; no part is empty while tokens last.
    first_hitting  one token a step in random order, whatever `steps` is: exact continuous time (Zheng et al. 2024).
    """
    if sampler not in SAMPLERS or order not in ORDERS:
        raise ValueError(f"unknown sampler {sampler!r} or order {order!r}: {SAMPLERS}, {ORDERS}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if sampler != "fixed" and order != "random":
        raise ValueError(f"sampler {sampler!r} reveals at random: order {order!r} goes with sampler 'fixed'")
    if sampler == "ancestral":
        return torch.randint(1, steps + 1, masked.shape, generator=generator, device=masked.device) * masked
    key = torch.rand(masked.shape, generator=generator, device=masked.device, dtype=torch.float64)
    if order == "left_to_right":
        key = torch.arange(masked.shape[1], device=masked.device).expand(masked.shape).double()
    rank = key.masked_fill(~masked, math.inf).argsort(-1).argsort(-1)          # 0 .. n - 1 among the masked
    n = masked.sum(-1, keepdim=True)
    steps = n if sampler == "first_hitting" else n.clamp(max=steps)
    return (rank * steps // n.clamp(min=1) + 1) * masked


def own_pace(step):
    """Renumber each row's steps 1, 2, 3 .. without gaps, so that no step of any row is empty. [B, L] -> [B, L]."""
    s, where = step.sort(-1)
    new = torch.cat([s[:, :1] > 0, s[:, 1:] != s[:, :-1]], 1)
    return torch.zeros_like(step).scatter_(-1, where, new.cumsum(-1))


def nucleus(logits, top_p):
    """logits [N, V] -> log p with -inf outside the smallest set whose mass reaches top_p (crossing token kept)."""
    p, where = logits.softmax(-1).sort(-1, descending=True)
    outside = p.cumsum(-1) - p >= top_p
    return logits.masked_fill(torch.zeros_like(outside).scatter_(-1, where, outside), -math.inf)


def check_draws(tau, top_p):
    """ValueError for a temperature or nucleus that no sampler can use."""
    if not tau > 0:
        raise ValueError(f"tau must be positive, got {tau}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p}")


def draw_tokens(logits, top_p=1.0, greedy=False, noise=None, generator=None):
    """One token per row of logits [N, V] -> [N]: Gumbel-max with `noise` [N, V] if given, else inversion; in float64.

    On a CPU the nucleus is drawn from without sorting: tokens are drawn until one lies in it, which it does if those
    more probable have less than top_p of the mass; a share of top_p or more does. CUDA sorts fast, and never waits.
    """
    if greedy:
        return logits.argmax(-1)
    if noise is not None:
        return gumbel_max(nucleus(logits.double(), top_p) if top_p < 1 else logits, noise)
    if top_p < 0.5 or top_p < 1 and logits.is_cuda:        # (below a half it would take many draws)
        logits, top_p = nucleus(logits.double(), top_p), 1.0
    p = logits.softmax(-1)
    cdf, rows, out = p.cumsum(-1, dtype=torch.float64), slice(None), p.new_empty(len(p), dtype=torch.long)
    while len(c := cdf[rows]):
        u = torch.rand(len(c), 1, generator=generator, device=c.device, dtype=torch.float64) * c[:, -1:]
        x = torch.searchsorted(c, u, right=True).clamp_(max=c.shape[1] - 1)                      # the first with c > u
        out[rows] = x.squeeze(1)
        if top_p == 1:
            break
        q = p[rows]
        p_x, ids = q.gather(1, x), torch.arange(q.shape[1], device=q.device)
        before = (q * ((q > p_x) | (q == p_x) & (ids < x))).sum(-1, dtype=torch.float64)
        rows = torch.arange(len(p), device=p.device)[rows][before >= top_p]
    return out


def unmask(x, step, mask_id, hidden, logits, order="random", top_p=1.0, greedy=False, generator=None):
    """The sampler loop. x [B, L] with [MASK]s, step [B, L] from `reveal_steps` -> (x, nfe [B]).

    hidden(x, rows, at) is one network call on x [b, L], those rows of the batch -> its states [N, D] at the positions
    `at` [b, L]; logits(h [N, D]) -> [N, V] runs there only, in chunks. Rows that have nothing left are not computed.
    nfe: calls.
    `order="confidence"` keeps only how many tokens a step reveals and takes those drawn with the highest probability.
    """
    x, step, confidence = x.clone(), own_pace(step), order == "confidence"
    nfe = step.amax(-1)

    def draw(h):                                           # [n, D] -> tokens [n], their log p [n] where it is asked for
        z = logits(h)
        new = draw_tokens(z, top_p, greedy, generator=generator)
        return new, z.float().log_softmax(-1).gather(-1, new[:, None]).squeeze(1) if confidence else new
    for k in range(1, int(nfe.max()) + 1):
        rows = (nfe >= k).nonzero().squeeze(1)
        now = step[rows] == k
        if confidence:
            count, now = now.sum(-1, keepdim=True), x[rows] == mask_id
        h = hidden(x[rows], rows, now)
        new, logp = map(torch.cat, zip(*map(draw, h.split(max(1, CHUNK // mask_id)))))
        if confidence:
            score = torch.full(now.shape, -math.inf, device=x.device).masked_scatter(now, logp)
            keep = (score.argsort(-1, descending=True).argsort(-1) < count) & now
            new, now = new[keep[now]], keep
        x[rows] = x[rows].masked_scatter(now, new)
    return x, nfe


# ---------------------------------------------------------------------------------------------------------------------
# MDLM

def scatter(masked, rows):
    """Rows [N, D] for the masked positions [B, L] -> [B, L, D], zero elsewhere."""
    return rows.new_zeros(*masked.shape, rows.shape[1]).masked_scatter(masked[:, :, None], rows)


class MDLM(nn.Module):
    """Masked diffusion language model (Sahoo et al. 2024); with `noise`, conditioned on Gumbel noise (Section 4.2).

    h_i = (1 - M_i) Emb(z_i) + M_i g_i: the embedding of a masked position is its noise embedding, in place of that of
    [MASK] ("replace") or on top of it ("add"). Nothing else changes: no noise is the baseline, on the same path.
    Position 0 is BOS: given, never masked, no noise, no loss. `shift`: the output for position i is read at i - 1, as
    in an AR model, for students that start from one's weights (train.py's --init_from).
    """

    def __init__(self, vocab_size, length, bos, n_layer=12, n_embd=768, n_head=12, dropout=0.1, noise=None,
                 inject="replace", predict_bos=True, shift=False):
        super().__init__()
        if inject not in ("replace", "add"):
            raise ValueError(f"unknown inject {inject!r}: 'replace' or 'add'")
        self.config = dict(vocab_size=vocab_size, length=length, bos=bos, n_layer=n_layer, n_embd=n_embd, n_head=n_head,
                           dropout=dropout, noise=noise, inject=inject, predict_bos=predict_bos, shift=shift)
        self.mask_id, self.length, self.bos, self.inject, self.predict_bos, self.shift = (
            vocab_size, length, bos, inject, predict_bos, shift)
        self.transformer = Transformer(vocab_size + 1, vocab_size, n_layer, n_embd, n_head, dropout)
        self.noise_embed = GumbelEmbedding(vocab_size, n_embd, noise) if noise else None
        self.n_blocks = 1                                     # noise levels per row

    # the network in two halves: all positions, then the output layer where it is needed

    def embed(self, z, g=None):
        """z [B, L] with [MASK]s, g [B, L, D] noise embeddings (read at masked positions only) -> h [B, L, D]."""
        h = self.transformer.embed(z)
        if (g is None) != (self.noise_embed is None):
            raise ValueError("this model was built " + ("with noise: give it some" if g is None else "without noise"))
        if g is not None:
            masked = (z == self.mask_id)[:, :, None]
            h = torch.where(masked, g.to(h.dtype), h) if self.inject == "replace" else h + masked * g
        return h

    def hidden(self, z, g=None, clean=None, at=None):
        """z, g as in `embed` -> [B, L, D], or [N, D] at positions `at` [B, L]. `clean`: for BD3-LM, not used here."""
        if self.shift and at is not None:
            at = at.roll(-1, 1)
        h = self.transformer(self.embed(z, g), at=at)
        return h.roll(1, 1) if self.shift and at is None else h          # only column 0 wraps around: BOS, never read

    def logits(self, h):
        """h [N, D] -> float32 [N, V]. [MASK] has no entry (SUBS: logit -inf); BOS is -inf where it never occurs."""
        logits = self.transformer.head(h).float()
        if not self.predict_bos:
            logits[..., self.bos] = -math.inf
        return logits

    # training

    def loss(self, tokens, t, *args, **kw):
        """NELBO per predicted token, in nats: mean over rows of (1/t) sum_{masked i} -log p(x_i | z, noise) / (L - 1).

        Arguments as in `losses`. Returns (loss, {"nll_masked": unweighted cross-entropy per masked token [,
        "kl_masked"]}). Divided by a constant count, not a local one: the same for any micro-batch.
        """
        losses, _, parts = self.losses(tokens, t, *args, **kw)
        return (losses.sum() / (tokens.shape[0] * (tokens.shape[1] - 1)),
                {k: v.detach().sum().item() / max(1, len(v)) for k, v in parts.items()})

    forward = loss                                        # what DDP calls

    def losses(self, tokens, t, teacher=None, z=None, noise=None, kd=0.0, weight=None, generator=None):
        """The loss of each masked token, weighted, [N] in the order of the mask; the mask [B, L]; unweighted parts [N].

        tokens [B, L], t [B] noise levels, or one per block [B, n_blocks]; `weight`, of the same shape, replaces 1/t.
        Randomness can be given: z [B, L] noised tokens, noise [B, L, V]. A student with noise draws it from its
        posterior under `teacher`, in one teacher pass, at the masked positions only. `kd` adds
        kd * KL(teacher's p(x_i | x_<i) || p(x_i | z)) with the same weights: token-level distillation (Table 4).
        """
        B, L = tokens.shape

        def per_token(v):
            return v.view(B, -1).repeat_interleave(L // v[0].numel(), 1)
        if z is None:
            masked = torch.rand(B, L, generator=generator, device=tokens.device) < per_token(t)
            masked[:, 0] = False
            z = tokens.masked_fill(masked, self.mask_id)
        masked = z == self.mask_id
        x = tokens[masked]                                                      # (N)
        drawn = self.noise_embed is not None and noise is None and self.noise_embed.kind != "unpaired"
        if teacher is None and (kd or drawn):
            raise ValueError("token distillation needs a teacher, and a student with noise a teacher or the noise")
        logits = teacher.posterior_logits(tokens, masked) if kd or drawn else None
        g = None
        if noise is not None:
            g = scatter(masked, self.noise_embed(noise[masked]))
        elif self.noise_embed is not None:
            g = scatter(masked, self.noise_embed.from_posterior(logits, x, generator))
        nll, kl = row_losses(self.logits, self.hidden(z, g, tokens)[masked], x, self.mask_id, logits if kd else None)
        weight = per_token(1 / t if weight is None else weight)[masked]
        return weight * (nll + kd * kl), masked, {"nll_masked": nll, "kl_masked": kl} if kd else {"nll_masked": nll}

    def log_probs(self, tokens, noise=None, clean=None):
        """The plain forward after SUBS: tokens [B, L] with [MASK]s, noise [B, L, V] -> [B, L, V + 1] log-probabilities.

        An unmasked position copies its token: 0 there, -inf elsewhere. `clean`: see `hidden`.
        """
        g = noise if noise is None or self.noise_embed is None else self.noise_embed(noise)      # (`embed` checks)
        logp = F.pad(self.logits(self.hidden(tokens, g, clean)).log_softmax(-1), (0, 1), value=-math.inf)
        copy = torch.full_like(logp, -math.inf).scatter_(-1, tokens[:, :, None], 0.0)
        return torch.where((tokens == self.mask_id)[:, :, None], logp, copy)

    # sampling

    @torch.no_grad()
    def generate(self, tokens, steps, sampler="ancestral", order="random", tau=1.0, top_p=1.0, greedy=False,
                 noise=None, resample_noise=False, reveal=None, generator=None):
        """Fill in the [MASK]s of tokens [B, L] (BOS first) -> (tokens [B, L], nfe [B], network calls per row).

        Noise is tau * Gumbel(0, 1), drawn once per sample and kept for all steps (`resample_noise`: anew at each).
        `noise` [B, L, V] and `reveal` [B, L] (see `reveal_steps`) replace the draws. Given tokens are never changed.
        """
        self.check_sampling(tokens, tau, top_p, noise, resample_noise)
        masked = tokens == self.mask_id
        g = self.noise_source(masked, tau, noise, resample_noise, generator)
        step = reveal_steps(masked, steps, sampler, order, generator) if reveal is None else reveal * masked
        return unmask(tokens, step, self.mask_id, lambda x, rows, at: self.hidden(x, g(rows), at=at), self.logits,
                      order, top_p, greedy, generator)

    def check_sampling(self, tokens, tau, top_p, noise, resample_noise):
        """ValueError for what a sampler cannot be given."""
        check_draws(tau, top_p)
        if noise is not None and (self.noise_embed is None or resample_noise):
            raise ValueError("noise is given, but the model was built without it, or is told to resample it")
        if (tokens[:, 0] != self.bos).any():
            raise ValueError(f"position 0 must hold BOS (id {self.bos})")

    def embed_noise(self, masked, tau, noise, generator):
        """Noise embeddings for sampling, [B, L, D]: of `noise` [B, L, V], or of fresh noise where masked [B, L]."""
        if self.noise_embed is None:
            return None
        if noise is not None:
            return self.noise_embed(noise, tau)
        return scatter(masked, self.noise_embed.from_prior(int(masked.sum()), tau, generator))

    def noise_source(self, masked, tau, noise, resample, generator):
        """-> g(rows), asked once per network call: the noise embeddings of these rows of the batch, or None."""
        kept = self.embed_noise(masked, tau, noise, generator)               # (B, L, D); the noise is thrown away

        def g(rows):
            now = self.embed_noise(masked, tau, None, generator) if resample else kept
            return None if now is None else now[rows]
        return g


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints of the authors' networks


def load_published(src, n_heads=None, length=None, bos=50256, inject=None, make=MDLM):
    """The authors' MDLM, with or without Gumbel noise, as our `MDLM` with equal outputs. `src`: path or state dict."""
    from extra.published import fold_published
    state, sizes, src, settings = fold_published(src, n_heads)
    length, inject = length or settings.get("model_length", 1024), inject or settings.get("inject", "replace")
    w = src.get("gumbel_noise_embed.linear.weight")
    model = make(length=length, bos=bos, noise=None if w is None else "gumbel", inject=inject, **sizes)
    if w is not None:
        state["noise_embed.weight"] = w
    model.load_state_dict(state)
    return model.eval()
