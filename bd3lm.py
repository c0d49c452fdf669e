"""Block diffusion (BD3-LM, Arriola et al. 2025) on MDLM's transformer, with or without Gumbel noise.

Blocks of K tokens: autoregressive over blocks, masked diffusion inside one,

    -log p(x) <= sum_b E_t (1/t) sum_{masked i in block b} -log p(x_i | z_b, clean blocks before b, noise).

K = L is MDLM, K = 1 an AR model. What blocks add: text of any length, a KV cache of the clean blocks, a noise level for
each block. What they cost: a training row is seen twice, noised and clean, in one pass over [z ; x].

In this order: who attends to whom in training; the model with its loss and sampler; the sampler's KV cache; clipped
noise levels and the search for them.

Shapes: B batch, L length of a row, K block size, n_blocks = L / K, T length of a sample, V vocabulary, D width.
"""
import math
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask

import mdlm
from gumbel import DEVICE, sample_gumbel
from mdlm import MDLM, SAMPLERS, T_MIN, Denoiser, MDLMConfig
from teacher import KVCache


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


# ---------------------------------------------------------------------------------------------------------------------
# the model

@dataclass
class BD3LMConfig(MDLMConfig):
    """What describes a BD3LM: an MDLM, and the size of its blocks."""
    block_size: int = 4                       # tokens of a block; BOS is the first of the first block


class BD3LM(MDLM):
    """Block diffusion language model: an MDLM whose rows are made of blocks of `block_size` tokens (BOS in the first).

    The same parameters as MDLM's, so either starts from the other's weights. With noise, the masked positions of the
    noised half read it, as in MDLM; clean blocks have none. `shift` (see MDLM): at the start of a block, position i - 1
    is the clean token before it; so with K = 1 and an AR model's weights this is that AR model.
    """
    Config = BD3LMConfig
    loss_reads = MDLM.loss_reads + ("clip",)
    generate_reads = MDLM.generate_reads + ("stop_at_eos", "cached")
    samplers = (*SAMPLERS, "remdm", "exact")

    def __init__(self, *args, **kw):
        super().__init__(*args, **kw)
        self.block_size = self.config.block_size
        if self.length % self.block_size:
            raise ValueError(f"block_size {self.block_size} does not divide the row length {self.length}")
        self.n_blocks = self.length // self.block_size
        self.longest = math.inf                            # the window moves on
        if self.config.positions:
            self.longest = self.config.positions // self.block_size * self.block_size

    def hidden(self, z, g=None, clean=None, wanted=None):
        """The training pass over [z ; x]: noised rows z [B, L], noise embeddings g [B, L, D], clean rows [B, L] ->
        hidden states of z [B, L, D], or [N, D]: those at the positions `wanted` [B, L] only.
        """
        L = z.shape[1]
        if clean is None or L % self.block_size:
            raise ValueError(f"BD3-LM takes noised and clean rows, of a multiple of {self.block_size} tokens")
        h = torch.cat([self.embed(z, g), self.transformer.embed(clean)], 1)  # (B, 2L, D)
        # flex_attention has no backward on a CPU, wants heads of 16, and skips tiles of 128
        sparse = DEVICE.is_gpu(z) and h.shape[2] >= 16 * self.transformer.n_head and L >= 128
        mask = training_mask(L, self.block_size, z.device, sparse)
        position_ids = torch.arange(L, device=z.device).repeat(2)  # the same for a token's two copies
        h = self.transformer(h, position_ids=position_ids, mask=mask)
        h, h_clean = h.split(L, 1)
        if self.config.shift:
            starts_block = torch.arange(L, device=z.device)[:, None] % self.block_size == 0
            h = torch.where(starts_block, h_clean.roll(1, 1), h.roll(1, 1))
        if wanted is None:
            return h
        return h[wanted]

    def log_probs(self, noised, clean, noise=None):
        """The training pass after SUBS: noised and clean rows [B, L], noise [B, L, V] -> [B, L, V + 1]."""
        return super().log_probs(noised, noise, clean)

    # training

    def losses(self, tokens, t, teacher=None, z=None, noise=None, kd=0.0, generator=None, clip=None):
        """As MDLM's, with a noise level per block, t [B, n_blocks]. `clip` (low, high): t was drawn in this window, and
        the masked fraction of each block is kept in it.
        """
        if clip is None:
            return super().losses(tokens, t, teacher, z, noise, kd, generator)
        if z is None:
            z = tokens.masked_fill(clipped_mask(t, tokens.shape[1], clip, generator), self.mask_id)
        weight = None
        if clip[0] > 0.5:
            weight = torch.ones_like(t)  # as the authors of BD3-LM have it, in place of 1/t: this is no NELBO
        return super().losses(tokens, t, teacher, z, noise, kd, generator, weight)

    # sampling

    @torch.no_grad()
    def generate(self, tokens, steps, sampler="ancestral", order="random", remask=0.0, tau=1.0, top_p=1.0,
                 greedy=False, noise=None, resample_noise=False, stop_at_eos=False, cached=True, generator=None):
        """Fill in the [MASK]s of tokens [B, T] (BOS first), block by block -> (tokens [B, T], nfe [B]). T is free.

        As MDLM's `generate`, with `steps` per block; `noise` [B, T, V]. A block sees the last L - K tokens before it; a
        prompt, or given text between [MASK]s, has at most L. A clean block enters the KV cache in the first call for
        the next one, so the cache costs no call of its own; `cached=False` computes all of it anew each time.
        `stop_at_eos`: a row ends with the first EOS (= BOS) that it draws, what is masked after it becomes EOS too, and
        is not computed.
        """
        self.check_sampling(tokens, tau, top_p, noise, resample_noise)
        self.check_given_text(tokens)
        B, T = tokens.shape
        K = self.block_size
        x, noise, end = self.whole_blocks(tokens, noise, generator)
        nfe = torch.zeros(B, dtype=torch.long, device=x.device)
        alive = torch.arange(B, device=x.device)               # rows that have not ended
        cache = None
        if cached:
            # room for what a block sees (L - K), a prompt that comes at once (L + K at most) and the noised block (K)
            cache = self.new_cache(B, min(end, 2 * self.length + K))
        for a in range(0, end, K):
            block = x[alive, a:a + K]  # (b, K)
            masked = block == self.mask_id
            if not masked.any():
                continue
            noise_of_block = None
            if noise is not None:
                noise_of_block = noise[alive, a:a + K]
            denoiser = BlockDenoiser(self, x[alive, :a], block, cache, tau, noise_of_block, resample_noise, generator)
            block, calls = self.fill(block, denoiser, steps, sampler, order, remask, top_p, greedy, generator)
            x[alive, a:a + K] = block
            nfe[alive] += calls
            if not stop_at_eos:
                continue
            after_eos = (masked & (block == self.bos)).cumsum(1).bool()  # from the first drawn EOS on
            ended = after_eos[:, -1]
            if ended.any():
                x[alive, a:a + K] = torch.where(masked & after_eos, self.bos, block)
                gone = alive[ended]
                x[gone] = x[gone].masked_fill(x[gone] == self.mask_id, self.bos)
                alive = alive[~ended]
                if cached:
                    cache.batch_select_indices(~ended)  # (before_block comes anew with the next block)
        return x[:, :T], nfe

    def check_given_text(self, tokens):
        """ValueError where more than L tokens are given in a row, before a [MASK] that is to be drawn: one network call
        takes them all into the cache. (The block that is drawn then sees the last L - K of them.)
        """
        masked = tokens == self.mask_id
        position = torch.arange(tokens.shape[1], device=tokens.device)
        last_masked = torch.where(masked, position, -1).cummax(1)[0]  # at or before each position
        last_masked = F.pad(last_masked[:, :-1], (1, 0), value=-1)  # before it
        given = (position - last_masked - 1) * masked
        if (given > self.length).any():
            raise ValueError(f"a given text must fit into the window of {self.length} tokens")

    def whole_blocks(self, tokens, noise, generator):
        """The last block that has a [MASK], made whole -> (tokens, noise, the end of that block).

        Where it reaches beyond T, [MASK]s (BOS in rows that draw nothing there) and fresh noise fill it; what is drawn
        there is cut off in the end.
        """
        T = tokens.shape[1]
        K = self.block_size
        masked = tokens == self.mask_id
        position = torch.arange(T, device=tokens.device)
        end = int((masked * (position + 1)).max())
        end += -end % K
        extra = max(0, end - T)
        draws_there = masked[:, end - K:].any(1, keepdim=True)  # (B, 1)
        filling = torch.where(draws_there, self.mask_id, self.bos).expand(-1, extra)
        x = torch.cat([tokens, filling], 1)
        if noise is not None and extra:                     # (a copy of [B, L, V] otherwise, for nothing)
            fresh = self.fresh_noise((len(x), extra), generator, tokens.device)
            noise = torch.cat([noise, fresh], 1)
        return x, noise, end

    def new_cache(self, batch, size):
        return BlockCache(self.transformer, batch, size, reach=self.length - self.block_size)

    def block_hidden(self, cache, clean, z, g=None):
        """One network call of the sampler: clean tokens [b, n] that follow what the cache holds, and the noised block
        after them, z [b, K], g [b, K, D] -> hidden states [b, K, D]. The clean tokens stay in the cache, z does not.
        """
        n = clean.shape[1]
        K = self.block_size
        h = torch.cat([self.transformer.embed(clean), self.embed(z, g)], 1)  # (b, n + K, D)
        cache.make_room(n + K)
        mask = None  # z alone sees all that the cache holds and itself
        if n:
            block_of_key = torch.arange(cache.seen_from, cache.length + n + K, device=z.device) // K
            block_of_query = block_of_key[-(n + K):, None]
            # its own block and those before it, L positions in all
            mask = (block_of_key <= block_of_query) & (block_of_key > block_of_query - self.n_blocks)
        h = self.transformer(h, cache, mask=mask)
        cache.length -= K  # the transformer has appended the noised block, too: it leaves the cache again
        if not self.config.shift:
            return h[:, -K:]
        # the first state of a block is that of the clean token before it; in later calls of the block, where n = 0,
        # it is the one kept from the first call
        if n:
            cache.before_block = h[:, n - 1:n]
        before_block = cache.state_before_block()
        if before_block is None:
            before_block = h[:, :1]  # the first block: its first token is BOS, never read
        return torch.cat([before_block, h[:, n:-1]], 1)

    # what commands ask

    def block_count(self, length):
        return -(-length // self.block_size)

    def default_steps(self, length):
        return self.block_size

    def flops_per_row(self, length):
        """As MDLM's; a row is seen twice, noised and clean."""
        return super().flops_per_row(length, passes=2)


# ---------------------------------------------------------------------------------------------------------------------
# the sampler's network calls, with a KV cache of the clean blocks

class BlockCache(KVCache):
    """Keys and values of the clean tokens that a block sees, the last `reach` before it: for any length of a sample.

        position in the text    0 .... start ......... seen_from ......... length
        in the buffer           (gone) | kept, unread  | what a block sees | free, the noised block's for a call
                                       ^ 0             ^ seen_from - start ^ length - start

    Clean tokens are appended until the buffer is full; then what no block to come sees is dropped, and the rest moves
    to the buffer's beginning.
    """

    def __init__(self, model, batch, size, reach):
        super().__init__(model, batch, size)
        self.reach = reach
        self.start = 0  # the position of the first that the buffer holds
        self.seen_from = 0
        self.rows = None  # the rows that the network is called for; None: all
        self.before_block = None  # hidden states of the last clean token [B, 1, D]

    def make_room(self, n):
        """Before a call that brings n more positions."""
        self.seen_from = max(self.start, self.length - self.reach)
        capacity = self.kv.shape[4]
        if self.length + n - self.start > capacity:
            kept = self.kv[:, :, :, :, self.seen_from - self.start:self.length - self.start].clone()
            self.kv[:, :, :, :, :kept.shape[4]] = kept
            self.start = self.seen_from

    def update(self, layer, k, v):
        """k, v [b, H, n, head_dim] of a call, after what the rows see already -> all keys, all values."""
        first = self.seen_from - self.start
        seen = self.length - self.seen_from
        kv = self.kv[layer, :, :, :, first:first + seen + k.shape[2]]  # (2, B, H, keys, head_dim)
        if self.rows is not None:
            kv = kv[:, self.rows]  # a copy: only a call for all rows leaves anything behind
        kv[0, :, :, seen:] = k
        kv[1, :, :, seen:] = v
        return kv[0], kv[1]

    def state_before_block(self):
        """Hidden states of the last clean token, of the rows that the network is called for [b, 1, D], or None."""
        if self.before_block is None or self.rows is None:
            return self.before_block
        return self.before_block[self.rows]


class BlockDenoiser(Denoiser):
    """The network as the sampler loop calls it for one block: clean tokens [b, a], the block [b, K] after them."""

    def __init__(self, model, clean, block, cache, tau, noise, resample, generator):
        super().__init__(model, block == model.mask_id, tau, noise, resample, generator)
        self.clean = clean
        self.block = block
        self.cache = cache  # of all rows; None: everything is computed anew

    def hidden(self, z, rows, wanted):
        """One network call: the block z [b, K] of these rows -> its states [N, D] at the positions `wanted` [b, K]."""
        model, cache = self.model, self.cache
        if cache is None:
            empty = model.new_cache(len(z), self.clean.shape[1] + z.shape[1])
            h = model.block_hidden(empty, self.clean[rows], z, self.noise_of(rows))
        elif cache.length < self.clean.shape[1]:
            # the first call for this block: clean tokens since the last block have to enter the cache, in every row.
            # So all are run, with the block as it was at first (nothing is revealed yet), and the result cut to `rows`;
            # rows that reveal nothing in this block are computed once, and not counted
            new = self.clean[:, cache.length:]
            cache.rows = None
            everything = slice(None)
            h = model.block_hidden(cache, new, self.block, self.noise_of(everything))[rows]
        else:
            cache.rows = None if len(rows) == len(self.block) else rows
            h = model.block_hidden(cache, self.clean[rows, :0], z, self.noise_of(rows))
        return h[wanted]


# ---------------------------------------------------------------------------------------------------------------------
# clipped noise levels

def clipped_mask(t, length, clip, generator=None):
    """Masks [B, L] at noise levels t [B, n_blocks], given that the masked fraction of each block lies in `clip`.

    The original code redraws a block until its masked fraction lies in the window. The same law in one draw, of bounded
    work: the number of masked tokens m is binomial (n, t), restricted to the window; which tokens is uniform. BOS is
    never masked and does not count. low = T_MIN or high = 1 is no bound on that side; a block in which no m / n lies in
    the window is not restricted.
    """
    B, n_blocks = t.shape
    K = length // n_blocks
    low, high = clip
    if low <= T_MIN:
        low = 0.0
    # n: tokens of a block that can be masked; m: how many are
    n = torch.full((n_blocks, 1), K, dtype=torch.float64, device=t.device)
    n[0] -= 1  # (n_blocks, 1): BOS
    m = torch.arange(K + 1, device=t.device).double()  # (K + 1)
    rest = (n - m).clamp(min=0)  # (n_blocks, K + 1)
    share = m / n.clamp(min=1)
    possible = m <= n
    fits = possible & (share >= low - 1e-9) & (share <= high + 1e-9)
    allowed = torch.where(fits.any(-1, keepdim=True), fits, possible)
    # log binomial probability of each m, up to a constant, and a draw by Gumbel-max
    p = t.double()[:, :, None]
    log_choose = torch.lgamma(n + 1) - torch.lgamma(m + 1) - torch.lgamma(rest + 1)
    logp = log_choose + torch.special.xlogy(m, p) + torch.special.xlog1py(rest, -p)  # (B, n_blocks, K + 1)
    logp = logp.masked_fill(~allowed, -math.inf)
    count = (logp + sample_gumbel(logp.shape, generator, t.device)).argmax(-1, keepdim=True)  # (B, n_blocks, 1)
    # the `count` tokens of a block with the smallest u are masked
    u = torch.rand(B, length, generator=generator, device=t.device, dtype=torch.float64)
    u[:, 0] = 2                                                # BOS comes last
    rank = u.view(B, n_blocks, K).argsort(-1).argsort(-1)
    return (rank < count).view(B, length)


def clip_windows(block_size):
    """The windows of noise levels that `search_clip` compares: all levels, and widths 0.5 to 0.9 in steps of 0.05; for
    blocks of one token, all levels and t = 1.
    """
    windows = [(T_MIN, 1.0)]
    if block_size == 1:
        return windows + [(1.0, 1.0)]
    for width in range(50, 95, 5):
        for low in range(0, 105 - width, 5):
            windows.append((max(T_MIN, low / 100), (low + width) / 100))
    return windows


@torch.no_grad()
def search_clip(model, batches, sum_over_processes):
    """The window of noise levels in which a block's loss varies least (BD3-LM, Section 5).

    batches(window) yields (tokens [B, L], what `loss` reads besides), the same rows and draws for every window;
    sum_over_processes(*floats) -> their sums. -> (the best window, {window: variance over blocks, (nats per token)^2}).
    """
    variance = {}
    for window in clip_windows(model.block_size):
        count = total = squares = 0.0
        for tokens, kw in batches(window):
            losses, masked, _ = model.losses(tokens, clip=window, **kw)
            per_token = torch.zeros(tokens.shape, dtype=torch.float64, device=tokens.device)
            per_token = per_token.masked_scatter(masked, losses.double())
            per_block = per_token.view(-1, model.block_size).mean(1)
            count += len(per_block)
            total += per_block.sum().item()
            squares += per_block.square().sum().item()
        count, total, squares = sum_over_processes(count, total, squares)
        variance[window] = squares / count - (total / count) ** 2
    return min(variance, key=variance.get), variance


def load_published(src, block_size, n_heads=None, **kw):
    """The authors' BD3-LM, with or without noise, as our `BD3LM` with equal outputs. See `mdlm.load_published`."""
    return mdlm.load_published(src, n_heads, make=partial(BD3LM, block_size=block_size), **kw)
