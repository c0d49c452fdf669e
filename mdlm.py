"""Masked diffusion (MDLM): loss and sampler, with or without Gumbel noise, and the transformer of all students.

Masked diffusion in four lines: mask each token independently with probability t, predict the masked tokens all at once,
weight the cross-entropy by 1/t, average over t ~ U(0, 1]: an upper bound on -log p(x) (the NELBO). To sample, start
from all [MASK] and reveal a few positions per network call. Tokens revealed together are drawn independently: that
is the error that Gumbel Distillation removes, by giving each masked position the noise that decides its token.

In this order:
    stratified_t      how much of each row is masked in training
    Model, MDLM       the model: `loss` is training, `generate` is sampling
    reveal_steps ..   when each position is revealed: a table that is drawn before the network is called
    unmask            the sampler loop
    Transformer       the network, which BD3-LM and the AR model share

"Noised" tokens have [MASK]s, "clean" ones none; "noise" is Gumbel noise, "noise level" the probability of a [MASK].

Shapes: B batch, L length, V vocabulary (without [MASK], whose id is V), D width, H heads, N masked positions. Noise of
kind "quantile" is [B, L], not [B, L, V].
"""
import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint

from gumbel import DEVICE, GumbelEmbedding, check_draws, draw_tokens, needs_teacher, sample_gumbel, to_logits

T_MIN = 1e-3  # t lives in [T_MIN, 1]: bounds the weight 1/t of a rarely masked row
SAMPLERS = ("ancestral", "fixed", "first_hitting")  # what `reveal_steps` knows
ORDERS = ("random", "left_to_right", "confidence")  # of "fixed"; a new one is a key for each position there


# ---------------------------------------------------------------------------------------------------------------------
# noise levels

def stratified_t(n, rng, t_one=0.0, low=T_MIN, high=1.0):
    """Noise levels of one global batch: n values in [low, high], float32 [n] (low-discrepancy, as in MDLM).

    t_j = (u + j) / n with one random shift u, assigned to rows (BD3-LM: to blocks) at random. `t_one`: this fraction is
    fully masked instead (t = 1); the loss is then no NELBO. `rng` is a numpy Generator.
    """
    n_ones = round(t_one * n)
    n_spread = n - n_ones
    t = (rng.random() + torch.arange(n_spread, dtype=torch.float64)) / max(1, n_spread) % 1
    t = torch.cat([low + (high - low) * t, torch.ones(n_ones, dtype=torch.float64)])
    shuffled = torch.from_numpy(rng.permutation(n))
    return t[shuffled].float()


# ---------------------------------------------------------------------------------------------------------------------
# the model

class Model(nn.Module):
    """What every model here answers: commands ask it these, and never which class it is.

    A subclass has a `Config`, a dataclass (a checkpoint holds its values), whose fields its constructor takes;
    `loss(tokens, ...) -> (scalar, {floats to log})` and `generate(tokens, ...) -> (tokens, nfe)`; `networks()`, the
    modules that are worth compiling; `flops_per_row(length)`.
    """
    fills_masks = False                       # a sample starts from [MASK]s, anywhere; False: it continues a prompt
    can_teach = False                         # gives p(x_i | x_<i) exactly: a teacher, a verifier, a judge
    drafts = False                            # drafts tokens that its `backbone` verifies
    pretrained = False                        # others trained it: GPT-2, a model of Hugging Face
    loss_name = "nll"                         # what the mean of `loss` is
    loss_reads = ()                           # what `loss` takes besides the tokens: t, teacher, generator, kd, clip
    generate_reads = ("length", "tau", "top_p", "greedy")  # what `generate` takes besides them
    samplers = ()                             # those of --sampler's choices that it has
    n_blocks = 1                              # noise levels of a training row: block_count(self.length)

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        self.length = config.length
        self.longest = config.length          # a sample's length, at most: that of the rows of training
        self.bos = config.bos
        self.noise_embed = None               # a GumbelEmbedding in students that read noise
        kind = getattr(config, "noise", None)
        self.paired = needs_teacher(kind)     # it reads noise that tells it its tokens
        self.quantile = kind == "quantile"    # and of that, one number a token: extra/quantile.py

    def start(self, n, length):
        """n samples to begin with: BOS -> [n, 1]."""
        return torch.full((n, 1), self.bos)

    def fresh_noise(self, shape, generator=None, device=None):
        """Noise for places of this shape: standard Gumbel [*shape, V], or, of kind quantile, uniform [*shape]."""
        if self.quantile:
            return torch.rand(shape, generator=generator, device=device, dtype=torch.float64)
        return sample_gumbel((*shape, self.vocab_size), generator, device)

    def block_count(self, length):
        """Over how many blocks the steps of a sample of this length are spread."""
        return 1

    def default_steps(self, length):
        """`generate`'s steps where nobody says: one per token."""
        return length

    def default_tau(self):
        """The temperature of sampling on text."""
        return 1.0

    def networks(self):
        return [module for module in (self.transformer, self.noise_embed) if module is not None]

    def matrices(self):
        """The layers of the body: those that autocast casts at each pass."""
        return [layer for layer in self.transformer.blocks.modules() if isinstance(layer, nn.Linear)]


@dataclass
class MDLMConfig:
    """What describes an MDLM. A checkpoint holds it as a dict."""
    vocab_size: int                           # V; the id V itself is [MASK]
    length: int                               # tokens of a row, BOS included
    bos: int                                  # the id at position 0, which is always given
    n_layer: int = 12
    n_embd: int = 768
    n_head: int = 12
    dropout: float = 0.1                      # on both residual branches
    noise: str | None = None                  # the kind of noise that the student reads, of gumbel.KINDS; None: none
    inject: str = "replace"                   # the noise embedding stands in place of that of [MASK], or "add": on top
    predict_bos: bool = True                  # False: BOS never occurs within a row, and is never predicted
    shift: bool = False                       # the output for position i is read at i - 1, as in an AR model
    positions: int = 0                        # how many a pretrained start has: learned ones, but for a `body`
    body: dict | None = None                  # the config of a Hugging Face network that takes the Transformer's place


class MDLM(Model):
    """Masked diffusion language model (Sahoo et al. 2024); with `noise`, conditioned on Gumbel noise (Section 4.2).

    h_i = (1 - M_i) Emb(z_i) + M_i g_i: the embedding of a masked position is its noise embedding, in place of that of
    [MASK] ("replace") or on top of it ("add"). Nothing else changes: no noise is the baseline, on the same path.
    Position 0 is BOS: given, never masked, no noise, no loss. `shift` is for students that start from an AR model's
    weights (train.py's --init_from).

    MDLM(vocab_size, length, bos, ...) takes the fields of `MDLMConfig`.
    """
    Config = MDLMConfig
    fills_masks = True
    loss_name = "nelbo"
    loss_reads = ("t", "teacher", "generator", "kd")
    generate_reads = ("steps", "sampler", "order", "remask", "resample_noise", "tau", "top_p", "greedy")
    samplers = (*SAMPLERS, "remdm", "apd", "exact")  # the last two: extra/verified.py

    def __init__(self, *args, **kw):
        super().__init__(self.Config(*args, **kw))
        config = self.config
        if config.inject not in ("replace", "add"):
            raise ValueError(f"unknown inject {config.inject!r}: 'replace' or 'add'")
        self.mask_id = config.vocab_size
        if config.body:
            from extra.hf import Body
            self.transformer = Body(config.body)
        else:
            self.transformer = Transformer(config.vocab_size + 1, config.vocab_size, config.n_layer, config.n_embd,
                                           config.n_head, config.dropout, learned=config.positions)
        if self.quantile:
            from extra.quantile import QuantileEmbedding
            self.noise_embed = QuantileEmbedding(config.vocab_size, config.n_embd)
        elif config.noise:
            self.noise_embed = GumbelEmbedding(config.vocab_size, config.n_embd, config.noise)

    # the network in two halves: all positions, then the output layer where it is needed

    def embed(self, z, g=None):
        """z [B, L] with [MASK]s, g [B, L, D] noise embeddings (read at masked positions only) -> h [B, L, D]."""
        self.check_noise(g is not None)
        h = self.transformer.embed(z)
        if g is None:
            return h
        masked = (z == self.mask_id)[:, :, None]
        if self.config.inject == "add":
            return h + masked * g
        return torch.where(masked, g.to(h.dtype), h)

    def check_noise(self, given):
        """ValueError where noise is given to a model without it, or missing for one with it."""
        if self.noise_embed is None and given:
            raise ValueError("this model was built without noise")
        if self.noise_embed is not None and not given:
            raise ValueError("this model was built with noise: give it some")

    def hidden(self, z, g=None, clean=None, wanted=None):
        """z, g as in `embed` -> hidden states [B, L, D], or [N, D]: those at the positions `wanted` [B, L] only.

        `clean`: the rows without [MASK]s, which BD3-LM reads as well; not read here.
        """
        h = self.embed(z, g)
        if not self.config.shift:
            return self.transformer(h, wanted=wanted)
        # the state for position i stands at i - 1; position 0, which wraps around, is BOS's and never wanted
        if wanted is not None:
            return self.transformer(h, wanted=wanted.roll(-1, 1))
        return self.transformer(h).roll(1, 1)

    def logits(self, h):
        """h [N, D] -> float32 [N, V]. [MASK] has no entry (SUBS: logit -inf); BOS is -inf where it never occurs."""
        logits = self.transformer.logits(h, exact=not self.training)
        if not self.config.predict_bos:
            logits[..., self.bos] = -math.inf
        return logits

    def log_probs(self, tokens, noise=None, clean=None):
        """The plain forward after SUBS: tokens [B, L] with [MASK]s, noise [B, L, V] -> [B, L, V + 1] log-probabilities.

        An unmasked position copies its token: 0 there, -inf elsewhere. `clean`: see `hidden`.
        """
        self.check_noise(noise is not None)
        g = None if noise is None else self.noise_embed(noise)
        logp = self.logits(self.hidden(tokens, g, clean)).log_softmax(-1)  # (B, L, V)
        logp = F.pad(logp, (0, 1), value=-math.inf)
        copied = torch.full_like(logp, -math.inf).scatter_(-1, tokens[:, :, None], 0.0)
        masked = (tokens == self.mask_id)[:, :, None]
        return torch.where(masked, logp, copied)

    # training

    def loss(self, tokens, t, teacher=None, z=None, noise=None, kd=0.0, generator=None, **kw):
        """NELBO per predicted token, in nats: mean over rows of (1/t) sum_{masked i} -log p(x_i | z, noise) / (L - 1).

        Arguments as in `losses` (kw: what a subclass's takes besides). Returns (loss, {"nll_masked": unweighted
        cross-entropy per masked token [, "kl_masked"]}). Divided by a constant count, not a local one: the same for any
        micro-batch.
        """
        losses, _, parts = self.losses(tokens, t, teacher, z, noise, kd, generator, **kw)
        B, L = tokens.shape
        means = {name: v.detach().sum().item() / max(1, len(v)) for name, v in parts.items()}
        return losses.sum() / (B * (L - 1)), means

    forward = loss                                            # what DDP calls

    def losses(self, tokens, t, teacher=None, z=None, noise=None, kd=0.0, generator=None, weight=None):
        """The loss of each masked token, weighted, [N] in the order of the mask; the mask [B, L]; unweighted parts [N].

        tokens [B, L], t [B] noise levels, or one per block [B, n_blocks]; `weight`, of the same shape, replaces 1/t.
        Randomness can be given: z [B, L] noised tokens, noise [B, L, V]. A student with noise draws it from its
        posterior under `teacher`, in one teacher pass, at the masked positions only. `kd` adds
        kd * KL(teacher's p(x_i | x_<i) || p(x_i | z)) with the same weights: token-level distillation (Table 4).
        """
        # 1. mask every token with probability t; BOS stays
        if z is None:
            z = self.noised(tokens, t, generator)
        masked = z == self.mask_id  # (B, L)
        x = tokens[masked]  # (N)

        # 2. what the teacher says at the masked positions, and the noise behind their tokens
        draws_noise = self.noise_embed is not None and noise is None
        draws_posterior = draws_noise and self.paired
        teacher_logits = None                                 # a function: (a, b) -> logits of masked tokens a to b
        if kd or draws_posterior:
            if teacher is None:
                raise ValueError("a loss with kd, or of a student with noise that is not given, needs a teacher")
            # (without gradients logits are exact on a GPU, too: the errors of all tokens add up in u)
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.quantile):
                teacher_logits = teacher.posterior_logits(tokens, masked)
        g = None
        if draws_noise:
            g = scatter(masked, self.noise_embed.from_posterior(teacher_logits, x, generator))
        elif noise is not None:
            g = scatter(masked, self.noise_embed(noise[masked]))  # (B, L, D)

        # 3. predict the masked tokens from the rest and their noise; the weight 1/t makes the sum a NELBO.
        # (`wanted` would save 3 % of a step, and break the compiled graph: its size differs from step to step)
        h = self.hidden(z, g, clean=tokens)[masked]  # (N, D)
        if weight is None:
            weight = 1 / t
        weight = self.per_token(weight, tokens)[masked]
        if not kd:
            nll = row_losses(self.logits, h, x, self.vocab_size)
            return weight * nll, masked, {"nll_masked": nll}
        nll, kl = row_losses(self.logits, h, x, self.vocab_size, teacher_logits)
        return weight * (nll + kd * kl), masked, {"nll_masked": nll, "kl_masked": kl}

    def noised(self, tokens, t, generator=None):
        """Mask tokens [B, L], each with the probability t of its row (or block), but for BOS -> z [B, L]."""
        u = torch.rand(tokens.shape, generator=generator, device=tokens.device)
        masked = u < self.per_token(t, tokens)
        masked[:, 0] = False
        return tokens.masked_fill(masked, self.mask_id)

    def per_token(self, v, tokens):
        """Values of rows [B], or of blocks [B, n_blocks] -> of each of their tokens [B, L]."""
        v = v.view(len(tokens), -1)
        return v.repeat_interleave(tokens.shape[1] // v.shape[1], 1)

    # sampling

    @torch.no_grad()
    def generate(self, tokens, steps, sampler="ancestral", order="random", remask=0.0, tau=1.0, top_p=1.0,
                 greedy=False, noise=None, resample_noise=False, generator=None):
        """Fill in the [MASK]s of tokens [B, L] (BOS first) -> (tokens [B, L], nfe [B], network calls per row).

        Noise is tau * Gumbel(0, 1), drawn once per sample and kept for all steps (`resample_noise`: anew at each).
        `noise` [B, L, V], standard Gumbel, replaces the draw; tau multiplies it too. `sampler`, `order`: see
        `reveal_steps`; "remdm", with `remask`: extra/remdm.py. Given tokens are never changed.
        """
        self.check_sampling(tokens, tau, top_p, noise, resample_noise)
        denoiser = Denoiser(self, tokens == self.mask_id, tau, noise, resample_noise, generator)
        return self.fill(tokens, denoiser, steps, sampler, order, remask, top_p, greedy, generator)

    def fill(self, x, denoiser, steps, sampler, order, remask, top_p, greedy, generator):
        """Draw when each position is revealed, then reveal: x [B, L] with [MASK]s -> (x, nfe [B])."""
        masked = x == self.mask_id
        if sampler == "remdm":
            from extra.remdm import remasked_path
            path = remasked_path(masked, steps, remask, order, generator)
            return unmask(x, path, self.mask_id, denoiser, top_p, greedy, generator)
        step = self.reveal_steps(masked, steps, sampler, order, generator)
        if order == "confidence":
            from extra.confidence import unmask_by_confidence
            return unmask_by_confidence(x, step, self.mask_id, denoiser, top_p, greedy, generator)
        return unmask(x, revealing_path(step), self.mask_id, denoiser, top_p, greedy, generator)

    def reveal_steps(self, masked, steps, sampler, order, generator):
        """The function of that name; a subclass may reveal otherwise."""
        return reveal_steps(masked, steps, sampler, order, generator)

    def check_sampling(self, tokens, tau, top_p, noise, resample_noise):
        """ValueError for what a sampler cannot be given."""
        check_draws(tau, top_p)
        if noise is not None and self.noise_embed is None:
            raise ValueError("noise is given, but the model was built without it")
        if noise is not None and resample_noise:
            raise ValueError("noise is given, and to be resampled (resample_noise): one of the two")
        if (tokens[:, 0] != self.bos).any():
            raise ValueError(f"position 0 must hold BOS (id {self.bos})")

    def start(self, n, length):
        """n samples to begin with: BOS, then [MASK]s -> [n, length]."""
        tokens = torch.full((n, length), self.mask_id)
        tokens[:, 0] = self.bos
        return tokens

    def default_tau(self):
        """0.85 for noise, as the authors released it (training reads noise at 1); lower makes likelier text."""
        if self.noise_embed is None or self.quantile:
            return 1.0
        return 0.85

    def flops_per_row(self, length, passes=1):
        """Useful FLOPs of a row of training, forward and backward: 6 per weight and token, 12 L D per layer for
        attention. Output layer and noise projection at the masked positions only: half of them, on average.
        """
        masked = 0.5
        total = 3 * self.transformer.forward_flops(length, masked, passes)
        if self.noise_embed is not None:      # W is trained, its input is not: 4 per weight
            total += 4 * masked * length * self.noise_embed.weight.numel()
        return total


def scatter(masked, rows):
    """Rows [N, D] for the masked positions [B, L] -> [B, L, D], zero elsewhere."""
    return rows.new_zeros(*masked.shape, rows.shape[1]).masked_scatter(masked[:, :, None], rows)


def row_losses(logits, h, x, vocab_size, teacher=None):
    """-log p(x) per row: hidden states h [N, D], tokens x [N] -> [N], where logits(h) is [N, vocab_size].

    With `teacher`, whose logits of rows a to b are teacher(a, b): also KL(teacher || p) -> ([N], [N]). In chunks, which
    the backward pass computes again, so that [N, V] is never held.
    """
    chunk = max(1, 4 * DEVICE.chunk // vocab_size)
    if len(h) <= chunk:
        return _chunk_losses(logits, teacher, 0, h, x)
    parts = []
    for a in range(0, len(h), chunk):
        parts.append(checkpoint(_chunk_losses, logits, teacher, a, h[a:a + chunk], x[a:a + chunk],
                                use_reentrant=False, preserve_rng_state=False))
    if teacher is None:
        return torch.cat(parts)
    nll, kl = zip(*parts)
    return torch.cat(nll), torch.cat(kl)


def _chunk_losses(logits, teacher, a, h, x):
    z = logits(h)
    nll = F.cross_entropy(z, x, reduction="none")
    if teacher is None:
        return nll
    with torch.no_grad():
        log_q = teacher(a, a + len(h)).log_softmax(-1)
    # a token impossible for both contributes 0, not inf - inf
    difference = (log_q - z.log_softmax(-1)).masked_fill(log_q == -math.inf, 0)
    return nll, (difference * log_q.exp()).sum(-1)


# ---------------------------------------------------------------------------------------------------------------------
# samplers: when each position is revealed, and the loop

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
    check_steps(sampler, steps, order)
    if sampler == "ancestral":
        return torch.randint(1, steps + 1, masked.shape, generator=generator, device=masked.device) * masked
    # key: who comes first; no two of a row are equal
    key = torch.rand(masked.shape, generator=generator, device=masked.device, dtype=torch.float64)
    if order == "left_to_right":
        key = torch.arange(masked.shape[1], device=masked.device).expand(masked.shape).double()
    rank = key.masked_fill(~masked, math.inf).argsort(-1).argsort(-1)  # 0 .. n - 1 among the masked
    n = masked.sum(-1, keepdim=True)
    parts = n.clamp(max=steps)
    if sampler == "first_hitting":
        parts = n
    return (rank * parts // n.clamp(min=1) + 1) * masked


def check_steps(sampler, steps, order):
    """ValueError for a number of steps that is none, or an order that this sampler does not have."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if sampler != "fixed" and order != "random":
        raise ValueError(f"order {order!r} is read by sampler 'fixed' only, not by {sampler!r}")


def close_gaps(step):
    """Renumber each row's steps 1, 2 .. without gaps, so that none is empty: 0 3 5 3 -> 0 1 2 1. [B, L] -> [B, L]."""
    ascending, where = step.sort(-1)
    is_first = torch.cat([ascending[:, :1] > 0, ascending[:, 1:] != ascending[:, :-1]], 1)
    return torch.zeros_like(step).scatter_(-1, where, is_first.cumsum(-1))


def revealing_path(step):
    """The network calls of a table of reveal steps [B, L], each row at its own pace: for each call yields what is
    masked before it, and what it reveals, both [B, L] bool.
    """
    step = close_gaps(step)
    for k in range(1, int(step.max()) + 1):
        yield step >= k, step == k


class Denoiser:
    """A model as the sampler loop calls it, with the noise of every row of the batch."""

    def __init__(self, model, masked, tau=1.0, noise=None, resample=False, generator=None):
        """masked [B, L]: where noise is needed; noise [B, L, V], or None: drawn, and with `resample` at each call."""
        self.model = model
        self.masked = masked
        self.tau = tau
        self.resample = resample
        self.generator = generator
        self.g = None  # noise embeddings (B, L, D); the noise is thrown away
        if noise is not None:
            self.g = model.noise_embed(noise, tau)
        elif model.noise_embed is not None:
            self.draw_noise()

    def draw_noise(self):
        rows = self.model.noise_embed.from_prior(int(self.masked.sum()), self.tau, self.generator)
        self.g = scatter(self.masked, rows)

    def noise_of(self, rows):
        """The noise embeddings of these rows of the batch for one network call, [b, L, D], or None."""
        if self.g is None:
            return None
        if self.resample:
            self.draw_noise()
        return self.g[rows]

    def hidden(self, z, rows, wanted):
        """One network call: z [b, L], which are these rows of the batch -> its states [N, D] at `wanted` [b, L]."""
        return self.model.hidden(z, self.noise_of(rows), wanted=wanted)

    def logits(self, h):
        """h [N, D] -> [N, V]."""
        return self.model.logits(h)


def unmask(x, path, mask_id, denoiser, top_p=1.0, greedy=False, generator=None):
    """The sampler loop. x [B, L] with [MASK]s, `path` its network calls -> (x, nfe [B], the calls of each row).

    path: for each call what is masked before it and what it reveals, [B, L]: `revealing_path`, and ReMDM's path.
    denoiser: a `Denoiser`, or whatever has its `hidden` and `logits`.
    """
    x = x.clone()
    nfe = torch.zeros(len(x), dtype=torch.long, device=x.device)
    for masked, now in path:
        rows = now.any(1).nonzero().squeeze(1)  # a row that has nothing left is not computed
        z = x.masked_fill(masked, mask_id)[rows]  # ReMDM masks revealed tokens again
        h = denoiser.hidden(z, rows, now[rows])  # (N, D): only what is revealed needs the output layer
        chunks = h.split(max(1, DEVICE.chunk // mask_id))  # [N, V], V = mask_id, is never held
        x[now] = torch.cat([draw_tokens(denoiser.logits(c), top_p, greedy, generator=generator) for c in chunks])
        nfe[rows] += 1
    return x, nfe


# ---------------------------------------------------------------------------------------------------------------------
# the transformer (shared: MDLM and BD3-LM bidirectional, the AR model causal)

@lru_cache(maxsize=1)
def compiled_flex():
    """flex_attention, compiled when it is first needed: uncompiled, it would hold all attention scores."""
    return torch.compile(flex_attention)


def rope_tables(position_ids, head_dim):
    """RoPE's cos and sin, base 10^4, for `apply_rope`. position_ids [L] -> two [L, 1, 1, head_dim], float32."""
    freq = 10000.0 ** (-torch.arange(0, head_dim, 2, device=position_ids.device).float() / head_dim)
    angle = (position_ids.float()[:, None] * freq)[:, None, None]
    cos = torch.cat([angle.cos(), angle.cos()], -1)
    sin = torch.cat([-angle.sin(), angle.sin()], -1)
    return cos, sin


def apply_rope(x, cos, sin):
    """Rotate each head's halves (a, b), not interleaved: (a cos - b sin, b cos + a sin). x [B, L, 2, H, head_dim]."""
    return (x * cos + x.roll(x.shape[-1] // 2, -1) * sin).to(x.dtype)


class Block(nn.Module):
    """Pre-LN attention (`bias`: GPT-2's) and MLP x 4 with tanh-GELU; dropout on both residual branches, as in DiT."""

    def __init__(self, n_embd, n_head, dropout, bias=False):
        super().__init__()
        self.n_head = n_head
        self.dropout = dropout
        self.norm1 = nn.LayerNorm(n_embd)
        self.qkv = nn.Linear(n_embd, 3 * n_embd, bias=bias)
        self.attn_out = nn.Linear(n_embd, n_embd, bias=bias)
        self.norm2 = nn.LayerNorm(n_embd)
        self.fc = nn.Linear(n_embd, 4 * n_embd)
        self.proj = nn.Linear(4 * n_embd, n_embd)

    def forward(self, x, rope, mask, causal, cache=None, layer=0, wanted=None):
        """x [B, L, D] -> [B, L, D], or [N, D] at the positions `wanted` [B, L]; the others are keys and values only."""
        y = self.attention(self.norm1(x), rope, mask, causal, cache, layer)
        if wanted is not None:
            x = x[wanted]
            y = y[wanted]
        x = x + F.dropout(self.attn_out(y), self.dropout, self.training)
        y = self.proj(F.gelu(self.fc(self.norm2(x)), approximate="tanh"))
        return x + F.dropout(y, self.dropout, self.training)

    def attention(self, x, rope, mask, causal, cache, layer):
        B, L, D = x.shape
        qkv = self.qkv(x).view(B, L, 3, self.n_head, -1)
        qk = qkv[:, :, :2]
        if rope is not None:
            qk = apply_rope(qk, *rope)
        q, k = qk.permute(2, 0, 3, 1, 4)  # each (B, H, L, D / H)
        v = qkv[:, :, 2].transpose(1, 2)
        if cache is not None:
            k, v = cache.update(layer, k, v)
        if isinstance(mask, BlockMask):
            y = compiled_flex()(q, k, v, block_mask=mask)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return y.transpose(1, 2).reshape(B, L, D)


class Transformer(nn.Module):
    """Token ids or embeddings in, hidden states out; the output layer `head` is applied by the caller, where needed.

    Residual output projections and the output layer start at zero: the network starts as the identity and predicts
    the uniform distribution, as the published networks do through their zero gates (adaLN driven by a constant).
    `learned`, GPT-2's variant: that many learned positions in place of RoPE, biases in attention, a head without one,
    which is the embedding where both have as many ids.
    """

    def __init__(self, vocab_in, vocab_out, n_layer, n_embd, n_head, dropout, causal=False, learned=0):
        super().__init__()
        if n_embd % (2 * n_head):
            raise ValueError(f"n_embd={n_embd} must be a multiple of 2 * n_head={2 * n_head} (RoPE rotates pairs)")
        self.n_head = n_head
        self.causal = causal
        self.embed = nn.Embedding(vocab_in, n_embd)
        self.positions = nn.Embedding(learned, n_embd) if learned else None
        self.blocks = nn.ModuleList(Block(n_embd, n_head, dropout, bias=bool(learned)) for _ in range(n_layer))
        self.norm = nn.LayerNorm(n_embd)
        self.head = nn.Linear(n_embd, vocab_out, bias=not learned)
        nn.init.normal_(self.embed.weight, std=0.02)
        for block in self.blocks:
            zero(block.attn_out)
            zero(block.proj)
        zero(self.head)
        if learned and vocab_in == vocab_out:
            self.head.weight = self.embed.weight

    def forward(self, h, cache=None, position_ids=None, mask=None, wanted=None):
        """Input embeddings h [B, L, D] -> hidden states [B, L, D]. With a cache, h continues what the cache holds.

        position_ids [L]: by default those that follow the cache. mask: who sees whom, boolean [L, keys] or a BlockMask.
        wanted [B, L]: return the states at these positions only, [N, D]; the last block's attention output and MLP are
        then computed there alone.
        """
        L = h.shape[1]
        start = cache.length if cache else 0
        if position_ids is None:
            position_ids = torch.arange(start, start + L, device=h.device)
        rope = None
        if self.positions is None:
            rope = rope_tables(position_ids, h.shape[2] // self.n_head)
        else:
            h = h + self.positions(position_ids)
        if self.causal and start and L > 1:  # queries start .. start + L - 1 against keys 0 .. start + L - 1
            mask = torch.ones(L, start + L, dtype=torch.bool, device=h.device).tril(start)
        causal = self.causal and not start
        *first, last = self.blocks
        for i, block in enumerate(first):
            h = block(h, rope, mask, causal, cache, i)
        h = last(h, rope, mask, causal, cache, len(first), wanted)
        if cache:
            cache.length += L
        return self.norm(h)

    def logits(self, h, exact):
        """h [N, D] -> float32 [N, vocab_out]; `exact`: see `to_logits`."""
        return to_logits(self.head, h, exact)

    def forward_flops(self, length, head_share, passes=1):
        """FLOPs of a row's forward pass: 2 per weight and token, 4 L D per layer for attention; the output layer sees
        `head_share` of the positions, the blocks all of them, `passes` times.
        """
        weights = sum(p.numel() for p in self.blocks.parameters())
        attention = 4 * len(self.blocks) * length * self.embed.weight.shape[1]
        per_token = passes * (2 * weights + attention) + 2 * head_share * self.head.weight.numel()
        return length * per_token


def zero(layer):
    for p in layer.parameters():
        nn.init.zeros_(p)


def load_published(src, n_heads=None, length=None, bos=50256, inject=None, make=MDLM, **kw):
    """The authors' MDLM, with or without Gumbel noise, as our `MDLM` with equal outputs. `src`: path or state dict."""
    from extra.published import fold_published
    state, sizes, noise_weight, settings = fold_published(src, n_heads)
    if noise_weight is not None:
        kw.setdefault("noise", "gumbel")
        state["noise_embed.weight"] = noise_weight
    model = make(length=length or settings.get("model_length", 1024), bos=bos,
                 inject=inject or settings.get("inject", "replace"), **sizes, **kw)
    model.load_state_dict(state)
    return model.eval()
