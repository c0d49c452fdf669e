"""Gumbel noise: draws, the Gumbel-max trick, its posterior (Theorem 4.1, Algorithm 1), and the embedding of the noise.

Read this file first. The whole method rests on one fact: sampling a token from p = softmax(logits) is a
deterministic function of Gumbel noise,

    x = argmax_k (logits_k + noise_k),

and for a token that was already drawn, the noise that would have drawn it can itself be drawn exactly.

Everything is computed in "exponential time" T = exp(-noise), where Gumbel-max is a race: runner k arrives at time
T_k / p_k with T_k ~ Exp(1), and the first arrival wins. The winning time is Exp(1) whoever wins, so, given the
winner w and p, the posterior is (E_0, E_1 .. E_V iid Exp(1))

    T_w = p_w E_0            T_k = E_k + p_k E_0   (k != w: a loser arrives E_k after the winner, in its own clock)

which is Algorithm 1 with noise = -log T. Race and reciprocals need no exp and no log of a large number.

Shapes: N rows (positions), V vocabulary, D width. The noise of a position is one V-vector. Nothing here holds more
than `CHUNK` noise values at a time, except the functions whose result is itself the full noise.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

# noise values held at once: 83 rows of a GPT-2 vocabulary on a CPU (64 MB with all temporaries), 667 where a GPU is
CHUNK = 1 << (25 if torch.cuda.is_available() else 22)
TINY = 1e-37           # arrival times are clamped here: below it float32's reciprocal overflows
KINDS = ("gumbel", "gaussian", "uniform", "unpaired")    # Table 5's noises, and the control that carries no information


# ---------------------------------------------------------------------------------------------------------------------
# draws

def sample_exponential(shape, generator=None, device=None):
    """iid Exp(1), float32, with an exact lower tail: the small values decide an argmax over a large vocabulary.

    U is drawn in float64. float32 `rand` lies on a grid of 2^-24 with exact zeros (no Gumbel above 16.6), and CUDA's
    float32 `exponential_` has the same grid near 0. From u the small values are -log1p(-u) ~ u, on a grid of 2^-53.
    """
    u = torch.rand(shape, dtype=torch.float64, generator=generator, device=device)
    return u.neg_().log1p_().float().neg_().clamp_(min=TINY)


def sample_gumbel(shape, generator=None, device=None):
    """iid standard Gumbel noise -log Exp(1), float32; mean 0.5772, variance pi^2 / 6."""
    return sample_exponential(shape, generator, device).log_().neg_()


def gumbel_max(logits, noise):
    """argmax_k (logits_k + noise_k), an exact draw from softmax(logits). [..., V], [..., V] -> [...] (Section 3)."""
    return (logits.double() + noise.double()).argmax(-1)


# ---------------------------------------------------------------------------------------------------------------------
# the posterior

def _posterior_times(logits, tokens, e):
    """Arrival times of the posterior race. logits [N, V], tokens [N], e [N, V] iid Exp(1) (overwritten) -> T [N, V].

    e_w, not needed by the posterior, serves as E_0. A p_k of 0 gives T_k = E_k. p_w may underflow (T_w is clamped),
    but a token with logit -inf cannot have been drawn: its T is nan, which shows in whatever is computed from it.
    """
    w = tokens.unsqueeze(-1)
    p = logits.float().softmax(-1)
    e0 = e.gather(-1, w)
    t_w = torch.where(logits.gather(-1, w) == -math.inf, math.nan, p.gather(-1, w) * e0)
    return e.addcmul_(p, e0).scatter_(-1, w, t_w).clamp_(min=TINY)


def _truncated_posterior_times(p, ids, p_w, frequency, tokens, e):
    """The same where only the k largest p [N, k], of ids [N, k], and p_w [N, 1] are known: what is left of the mass is
    spread over the other tokens by their frequency [V]. See `teacher.TeacherCache`.
    """
    w = tokens.unsqueeze(-1)
    missing = (ids != w).all(-1, keepdim=True)                                                              # [N, 1]
    rest = (1 - p.sum(-1, keepdim=True) - p_w * missing).clamp_(min=0)
    others = (1 - frequency[ids].sum(-1, keepdim=True) - frequency[w] * missing).clamp_(min=1e-9)
    e0 = e.gather(-1, w)
    known = e.gather(-1, ids).addcmul_(p, e0)
    return e.addcmul_(rest / others * e0, frequency).scatter_(-1, ids, known).scatter_(-1, w, p_w * e0).clamp_(min=TINY)


def posterior_gumbel(logits, tokens, generator=None):
    """Algorithm 1: noise that makes Gumbel-max over `logits` return `tokens`, drawn from its exact posterior.

    logits [..., V], tokens [...] -> noise [..., V], float32; `logits` is not modified. If tokens ~ softmax(logits), the
    noise is iid standard Gumbel. argmax(logits + noise) in float64 is `tokens` in every row: float32 rounding, which
    breaks a few rows in 10^6, is repaired by raising noise_w to just above the runner-up.
    Raises ValueError for a token out of range, or whose logit is not finite.
    """
    V = logits.shape[-1]
    shape, logits, w = logits.shape, logits.reshape(-1, V), tokens.reshape(-1, 1)
    if w.shape[0] != logits.shape[0]:
        raise ValueError(f"tokens {tuple(tokens.shape)} do not match logits {tuple(shape)}")
    if w.numel() and not (0 <= w.min() and w.max() < V):
        raise ValueError(f"token id out of range: {w.min().item()}..{w.max().item()}, the logits have {V} entries")
    noise = torch.empty_like(logits, dtype=torch.float32)
    rows = max(1, CHUNK // V)
    for l, w, out in zip(logits.split(rows), w.split(rows), noise.split(rows)):      # noqa: E741
        logp_w = l.float().log_softmax(-1).gather(-1, w)
        if not logp_w.isfinite().all():
            raise ValueError("a token whose logit is -inf (or a row of logits that holds inf or nan) has no posterior")
        e = sample_exponential(l.shape, generator, l.device)
        # exact where p_w underflows: noise_w = -log E_0 - log p_w, not -log T_w
        noise_w = -e.gather(-1, w).log() - logp_w
        torch.neg(_posterior_times(l, w.squeeze(-1), e).log_(), out=out)
        best = (l.double() + out.double()).scatter_(-1, w, -math.inf).amax(-1, keepdim=True)
        l_w = l.gather(-1, w).double()
        just_above = (best - l_w).float().nextafter(torch.tensor(math.inf, device=l.device))
        out.scatter_(-1, w, torch.where(l_w + noise_w.double() > best, noise_w, just_above))
    return noise.reshape(shape)


# ---------------------------------------------------------------------------------------------------------------------
# the embedding: g = W softmax(tau * noise)

def to_uniform(T):
    """The uniform variate behind the Gumbel, u = exp(-T), float64; -log(-log u) gives the Gumbel back (Table 5)."""
    return torch.exp(-T.double())


def to_gaussian(T):
    """The standard normal with the same quantile as the Gumbel: Phi^-1(u), float64, finite for every T >= 0 (Table 5).

    Each half is computed from the tail that float64 resolves: -Phi^-1(1 - u) with 1 - u = -expm1(-T) for small T (large
    noise), Phi^-1(exp(-T)) for large T, where 1 - u would round to 1.
    """
    T = T.double().clamp(TINY, 700)
    return torch.where(T < math.log(2), -torch.special.ndtri(-torch.expm1(-T)), torch.special.ndtri(torch.exp(-T)))


def noise_features(T, kind="gumbel", tau=1.0):
    """Arrival times T [N, V] -> what W reads, [N, V] float32: softmax(tau * noise), the noise transformed to `kind`."""
    if kind in ("gumbel", "unpaired"):
        # softmax(noise)_k = (1/T_k) / sum_j (1/T_j); T^-tau may leave float32, so tau goes through log space
        if tau != 1:
            return (-tau * T.log()).softmax(-1)
        s = T.reciprocal()
        return s.div_(s.sum(-1, keepdim=True))
    return (tau * {"uniform": to_uniform, "gaussian": to_gaussian}[kind](T)).softmax(-1).float()


class _ChunkedProjection(torch.autograd.Function):
    """rows of `draw` @ weight^T without holding them: drawn chunk by chunk, drawn again in the backward pass.

    torch's checkpoint would restore only the global generators; this saves the state of the one that is used.
    """

    @staticmethod
    def forward(ctx, weight, n, draw, generator):
        ctx.n, ctx.draw, ctx.state, ctx.device = n, draw, generator.get_state(), weight.device
        kind = weight.device.type
        ctx.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        ctx.chunk = max(1, CHUNK // weight.shape[1])
        ctx.shape = weight.shape
        w = weight.to(ctx.dtype).t()
        out = weight.new_empty(n, weight.shape[0])
        for a in range(0, n, ctx.chunk):
            b = min(a + ctx.chunk, n)
            out[a:b] = draw(a, b, generator).to(ctx.dtype) @ w
        return out

    @staticmethod
    def backward(ctx, grad_out):
        generator = torch.Generator(ctx.device)
        generator.set_state(ctx.state)
        grad = torch.zeros(ctx.shape, device=ctx.device)
        grad_out = grad_out.to(ctx.dtype)
        for a in range(0, ctx.n, ctx.chunk):
            b = min(a + ctx.chunk, ctx.n)
            f = ctx.draw(a, b, generator).to(ctx.dtype)
            if ctx.dtype == torch.float32:
                grad.addmm_(grad_out[a:b].t(), f)      # in place: no second [D, V]
            else:
                grad += grad_out[a:b].t() @ f
        return grad, None, None, None


class GumbelEmbedding(nn.Module):
    """g = W softmax(tau * noise), W [D, V], no bias: the one module that Gumbel Distillation adds to a student.

    Noise can be given (`forward`), drawn from the prior (`from_prior`, at inference), or drawn from the posterior of
    observed tokens under the teacher's logits (`from_posterior`, in training). The last two never hold [N, V].
    `kind`: "gumbel"; "gaussian" or "uniform", the same noise with other marginals; "unpaired", Gumbel noise that is
    independent of the text even in training, a control that must behave like no noise.
    """

    def __init__(self, vocab_size, n_embd, kind="gumbel", std=0.02):
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"unknown noise {kind!r}: one of {', '.join(KINDS)}")
        self.kind = kind
        self.weight = nn.Parameter(torch.empty(n_embd, vocab_size))
        # softmax of the noise is diffuse: scale W so that an entry of g starts with the std of a token embedding's,
        # using E ||softmax(noise)||^2 measured on a few draws
        s = noise_features(sample_exponential((256, vocab_size), torch.Generator().manual_seed(0)), kind)
        nn.init.normal_(self.weight, std=std / s.square().sum(-1).mean().sqrt().item())

    def forward(self, noise, tau=1.0):
        """Given Gumbel noise [..., V] -> [..., D]."""
        T = torch.exp(-noise.float()).clamp(min=TINY)
        return F.linear(noise_features(T, self.kind, tau), self.weight)

    def from_prior(self, n, tau=1.0, generator=None):
        """Fresh noise, tau * Gumbel(0, 1), for n rows -> [n, D]."""
        def draw(a, b, generator):
            e = sample_exponential((b - a, self.weight.shape[1]), generator, self.weight.device)
            return noise_features(e, self.kind, tau)
        return _ChunkedProjection.apply(self.weight, n, draw, self._generator(generator))

    def from_posterior(self, logits, tokens, generator=None):
        """Noise drawn from its posterior given tokens [N] -> [N, D], with gradient to W.

        `logits(a, b)` returns the teacher's float32 logits [b - a, V], rows a to b, or what a `TeacherCache` knows of
        them, (p, ids, p_w, frequency); it is called again in the backward pass and must return the same values.
        `posterior_gumbel`'s argmax repair is skipped: W reads softmax(noise).
        """
        if self.kind == "unpaired":
            return self.from_prior(len(tokens), generator=generator)

        def draw(a, b, generator):
            e = sample_exponential((b - a, self.weight.shape[1]), generator, self.weight.device)
            with torch.no_grad():
                known = logits(a, b)
                T = (_truncated_posterior_times(*known, tokens[a:b], e) if isinstance(known, tuple) else
                     _posterior_times(known, tokens[a:b], e))
                return noise_features(T, self.kind)
        return _ChunkedProjection.apply(self.weight, len(tokens), draw, self._generator(generator))

    def _generator(self, generator):
        if generator is not None:
            return generator
        device = self.weight.device
        return torch.default_generator if device.type == "cpu" else torch.cuda.default_generators[
            torch.cuda.current_device() if device.index is None else device.index]
