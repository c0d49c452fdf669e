"""Block diffusion (BD3-LM, Arriola et al. 2025) on MDLM's transformer, with or without Gumbel noise.

Blocks of K tokens: autoregressive over blocks, masked diffusion inside one,

    -log p(x) <= sum_b E_t (1/t) sum_{masked i in block b} -log p(x_i | z_b, clean blocks before b, noise).

K = L is MDLM, K = 1 an AR model. What blocks add: text of any length, a KV cache of the clean blocks, a noise level for
each block. What they cost: a training row is seen twice, noised and clean, in one pass over [z ; x].

Shapes: B batch, L length of a row, K block size, n_blocks = L / K, T length of a sample, V vocabulary, D width.
"""
import math
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask

import mdlm
from gumbel import sample_gumbel
from mdlm import MDLM, T_MIN, KVCache, reveal_steps, unmask


# ---------------------------------------------------------------------------------------------------------------------
# who attends to whom

def training_rule(length, block_size):
    """The three-part mask over [z ; x] as a function of (query, key), for flex_attention or plain broadcasting:
    a noised block sees itself and the clean blocks before it; a clean block itself and the clean blocks before it.
    """
    def rule(b, h, q, k):
        block_q, block_k = q % length // block_size, k % length // block_size
        noised_q, noised_k = q < length, k < length
        return ((noised_q & noised_k & (block_q == block_k))
                | (noised_q & ~noised_k & (block_q > block_k))
                | (~noised_q & ~noised_k & (block_q >= block_k)))
    return rule


@lru_cache(maxsize=8)
def training_mask(length, block_size, device, sparse=False):
    """That rule as the transformer takes it: a boolean matrix or, `sparse`, what flex_attention takes, on CUDA."""
    rule = training_rule(length, block_size)
    if sparse:
        return create_block_mask(rule, None, None, 2 * length, 2 * length, device)
    i = torch.arange(2 * length, device=device)
    return rule(None, None, i[:, None], i)


class BlockCache(KVCache):
    """Keys and values of the clean tokens that a block sees, the last `reach` before it: for any sample length.

    `length` positions have gone in, the buffer holds those from `start` on. `rows`: the rows of the batch that the
    network is being called for, None for all. `last`: hidden states of the last clean token, for `shift`.
    """

    def __init__(self, model, batch, size, reach):
        super().__init__(model, batch, size)
        self.reach, self.start, self.rows, self.last = reach, 0, None, None

    def make_room(self, n):
        """Before n more positions go in: forget what no block to come sees, if the buffer is full."""
        self.seen_from = max(self.start, self.length - self.reach)
        if self.length + n - self.start > self.kv.shape[4]:
            kept = self.kv[:, :, :, :, self.seen_from - self.start:self.length - self.start].clone()
            self.kv[:, :, :, :, :kept.shape[4]] = kept
            self.start = self.seen_from

    def update(self, layer, k, v):
        a, held = self.seen_from - self.start, self.length - self.seen_from
        kv = self.kv[layer, :, :, :, a:a + held + k.shape[2]]  # (2, B, H, keys, D/H)
        if self.rows is not None:
            kv = kv[:, self.rows]                              # a copy: only a call for all rows leaves anything behind
        kv[0, :, :, held:], kv[1, :, :, held:] = k, v
        return kv[0], kv[1]


# ---------------------------------------------------------------------------------------------------------------------
# clipped noise schedules

def windows(block_size):
    """The windows of noise levels that `--clip_search` compares: all levels, and widths 0.5 to 0.9 in steps of 0.05."""
    if block_size == 1:
        return [(T_MIN, 1.0), (1.0, 1.0)]
    return [(T_MIN, 1.0)] + [(max(T_MIN, low / 100), (low + width) / 100)
                             for width in range(50, 95, 5) for low in range(0, 105 - width, 5)]


def clipped_mask(t, length, clip, generator=None):
    """Masks [B, L] at noise levels t [B, n_blocks], given that the masked fraction of each block lies in `clip`.

    The ancestors redraw a block until it does. The same law in one draw: the number of masked tokens m is binomial
    (n, t) restricted to the window, which ones is uniform. BOS is never masked and does not count. A block in which no
    m / n lies in the window, and a bound at the end of [T_MIN, 1], are not restricted.
    """
    B, n_blocks = t.shape
    K = length // n_blocks
    n = torch.full((n_blocks, 1), K, dtype=torch.float64, device=t.device)
    n[0] -= 1                                                                                    # (n_blocks, 1): BOS
    m = torch.arange(K + 1, device=t.device).double()                                            # (K + 1)
    p = t.double()[:, :, None]
    rest, share, possible = (n - m).clamp(min=0), m / n.clamp(min=1), m <= n                     # (n_blocks, K + 1)
    choose = torch.lgamma(n + 1) - torch.lgamma(m + 1) - torch.lgamma(rest + 1)
    logp = choose + torch.special.xlogy(m, p) + torch.special.xlog1py(rest, -p)                  # (B, n_blocks, K + 1)
    fits = possible & (share >= clip[0] * (clip[0] > T_MIN) - 1e-9) & (share <= clip[1] + 1e-9)
    logp = logp.masked_fill(~torch.where(fits.any(-1, keepdim=True), fits, possible), -math.inf)
    count = (logp + sample_gumbel(logp.shape, generator, t.device)).argmax(-1, keepdim=True)     # (B, n_blocks, 1)
    u = torch.rand(B, length, generator=generator, device=t.device, dtype=torch.float64)
    u[:, 0] = 2
    return (u.view(B, n_blocks, K).argsort(-1).argsort(-1) < count).view(B, length)


# ---------------------------------------------------------------------------------------------------------------------
# the model

class BD3LM(MDLM):
    """Block diffusion language model: an MDLM whose rows are made of blocks of `block_size` tokens (BOS in the first).

    The same parameters as MDLM's, so either starts from the other's weights. With noise, the masked positions of the
    noised half read it, as in MDLM; clean blocks have none. `shift` (see MDLM): at the start of a block, position i - 1
    is the clean token before it; so with K = 1 and an AR model's weights this is that AR model.
    """

    def __init__(self, vocab_size, length, bos, block_size=4, **kw):
        if length % block_size:
            raise ValueError(f"block_size {block_size} does not divide the row length {length}")
        super().__init__(vocab_size, length, bos, **kw)
        self.config |= dict(block_size=block_size)
        self.block_size, self.n_blocks = block_size, length // block_size

    def hidden(self, z, g=None, clean=None, at=None):
        """Noised rows z [B, L], noise embeddings g [B, L, D], clean rows [B, L] -> hidden states of z [B, L, D], or
        [N, D] at positions `at` [B, L]."""
        L, device = z.shape[1], z.device
        if clean is None or L % self.block_size:
            raise ValueError(f"BD3-LM takes noised and clean rows, of a multiple of {self.block_size} tokens")
        h = torch.cat([self.embed(z, g), self.transformer.embed(clean)], 1)                               # (B, 2L, D)
        # flex_attention has no backward on a CPU, wants heads of 16, and skips tiles of 128
        sparse = device.type == "cuda" and h.shape[2] >= 16 * self.transformer.n_head and L >= 128
        h = self.transformer(h, positions=torch.arange(L, device=device).repeat(2),
                             mask=training_mask(L, self.block_size, device, sparse))
        h, clean = h.split(L, 1)
        if self.shift:
            first = torch.arange(L, device=device)[:, None] % self.block_size == 0
            h = torch.where(first, clean.roll(1, 1), h.roll(1, 1))
        return h if at is None else h[at]

    def log_probs(self, noised, clean, noise=None):
        """The training pass after SUBS: noised and clean rows [B, L], noise [B, L, V] -> [B, L, V + 1]."""
        return super().log_probs(noised, noise, clean)

    def losses(self, tokens, t, teacher=None, z=None, clip=None, generator=None, **kw):
        """As MDLM's, with a noise level per block, t [B, n_blocks]. `clip` (low, high): t was drawn in this window, the
        masks are kept in it, and with low > 0.5 the weight is 1 in place of 1/t, as the ancestors have it: no NELBO.
        """
        weight = None
        if clip is not None:
            if z is None:
                z = tokens.masked_fill(clipped_mask(t, tokens.shape[1], clip, generator), self.mask_id)
            weight = torch.ones_like(t) if clip[0] > 0.5 else None
        return super().losses(tokens, t, teacher, z, weight=weight, generator=generator, **kw)

    # sampling

    def call(self, cache, before, z, g=None):
        """One network call of the sampler: clean tokens `before` [b, n] that follow what the cache holds, and the
        noised block after them, z [b, K], g [b, K, D] -> its hidden states [b, K, D]. The clean ones stay in the cache.
        """
        n, K = before.shape[1], self.block_size
        h = torch.cat([self.transformer.embed(before), self.embed(z, g)], 1)                           # (b, n + K, D)
        cache.make_room(n + K)
        block = torch.arange(cache.seen_from, cache.length + n + K, device=z.device) // K              # of the keys
        query = block[-(n + K):, None]                        # sees its own block and those before it, L positions
        h = self.transformer(h, cache, mask=(block <= query) & (block > query - self.n_blocks) if n else None)
        cache.length -= K                                     # the noised block leaves the cache again
        if self.shift:
            if n:
                cache.last = h[:, n - 1:n]                    # (b, 1, D): the clean token before the block
            last = h[:, :1] if cache.last is None else cache.last if cache.rows is None else cache.last[cache.rows]
            h = torch.cat([last, h[:, n:-1]], 1)
        return h[:, -K:]

    def new_cache(self, batch, size):
        return BlockCache(self.transformer, batch, size, self.length - self.block_size)

    @torch.no_grad()
    def generate(self, tokens, steps, sampler="ancestral", order="random", tau=1.0, top_p=1.0, greedy=False,
                 noise=None, resample_noise=False, reveal=None, stop_at_eos=False, cached=True, generator=None):
        """Fill in the [MASK]s of tokens [B, T] (BOS first), block by block -> (tokens [B, T], nfe [B]). T is free.

        As MDLM's `generate`, with `steps` per block; `noise` [B, T, V], `reveal` [B, T]. A block sees the last L - K
        tokens before it; a prompt, or given text between [MASK]s, has at most L. A clean block enters the KV cache in
        the first call for the next one, so the cache costs no call of its own; `cached=False` computes all of it anew
        each time. `stop_at_eos`: a row ends with the first EOS (= BOS) that it draws, what is masked after it becomes
        EOS too, and is not computed.
        """
        self.check_sampling(tokens, tau, top_p, noise, resample_noise)
        T, K, device = tokens.shape[1], self.block_size, tokens.device
        masked, position = tokens == self.mask_id, torch.arange(T, device=device)
        before = F.pad(torch.where(masked, position, -1).cummax(1)[0][:, :-1], (1, 0), value=-1)
        if ((position - before - 1) * masked > self.length).any():
            raise ValueError(f"a given text must fit into the window of {self.length} tokens")
        end = int((masked * (position + 1)).max())             # nothing is drawn beyond
        end += -end % K
        extra = max(0, end - T)                                # whole blocks; what is drawn beyond T is cut off
        last = masked[:, end - K:].any(1, keepdim=True)
        x = torch.cat([tokens, torch.where(last, self.mask_id, self.bos).expand(-1, extra)], 1)
        if noise is not None:
            noise = torch.cat([noise, sample_gumbel((len(x), extra, self.mask_id), generator, device)], 1)
        if reveal is not None:
            reveal = torch.cat([reveal, reveal[:, end - K:].amax(1, keepdim=True).expand(-1, extra)], 1)
        nfe = torch.zeros(len(x), dtype=torch.long, device=device)
        alive = torch.arange(len(x), device=device)            # rows that have not ended
        cache = self.new_cache(len(x), min(end, 2 * self.length + K)) if cached else None
        for a in range(0, end, K):
            block = x[alive, a:a + K]                                                                         # (b, K)
            masked = block == self.mask_id
            if not masked.any():
                continue
            noise_now = None if noise is None else noise[alive, a:a + K]
            g = self.noise_source(masked, tau, noise_now, resample_noise, generator)
            step = (reveal[alive, a:a + K] * masked if reveal is not None else
                    reveal_steps(masked, steps, sampler, order, generator))

            def hidden(z, rows, at):
                if not cached:
                    h = self.call(self.new_cache(len(z), a + K), x[alive[rows], :a], z, g(rows))
                elif cache.length < a:                         # the first call for this block: all rows
                    cache.rows = None
                    h = self.call(cache, x[alive, cache.length:a], block, g(slice(None)))[rows]
                else:
                    cache.rows = rows if len(rows) < len(alive) else None
                    h = self.call(cache, x[alive[rows], :0], z, g(rows))
                return h[at]
            new, calls = unmask(block, step, self.mask_id, hidden, self.logits, order, top_p, greedy, generator)
            x[alive, a:a + K] = new
            nfe[alive] += calls
            after = (masked & (new == self.bos)).cumsum(1).bool()                        # from the first drawn EOS on
            if stop_at_eos and (ended := after[:, -1]).any():
                x[alive, a:a + K] = torch.where(masked & after, self.bos, new)
                gone, alive = alive[ended], alive[~ended]
                x[gone] = x[gone].masked_fill(x[gone] == self.mask_id, self.bos)
                if cached:
                    cache.batch_select_indices(~ended)
        return x[:, :T], nfe


def load_published(src, block_size, n_heads=None, **kw):
    """The authors' BD3-LM, with or without noise, as our `BD3LM` with equal outputs. See `mdlm.load_published`."""
    return mdlm.load_published(src, n_heads, make=partial(BD3LM, block_size=block_size), **kw)
