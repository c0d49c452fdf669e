"""Gumbel noise: draws, the Gumbel-max trick, its posterior (Theorem 4.1, Algorithm 1), and the embedding of the noise.

Read this file first. The whole method rests on one fact: sampling a token from p = softmax(logits) is a
deterministic function of Gumbel noise,

    x = argmax_k (logits_k + noise_k),

and for a token that was already drawn, the noise that would have drawn it can itself be drawn exactly.

Everything is computed in "exponential time" T = exp(-noise), where Gumbel-max is a race: runner k arrives at time
T_k / p_k with T_k ~ Exp(1), and the first arrival wins. The winning time is Exp(1) whoever wins, so, given the
winner w and p, the posterior is (E_0, E_1 .. E_V iid Exp(1))

    T_w = p_w E_0            T_k = E_k + p_k E_0   (k != w)

(the winner arrives at E_0; Exp(1) is memoryless, so a loser arrives at E_0 + E_k / p_k: times p_k, that is T_k), which
is Algorithm 1 with noise = -log T. argmax(log p + noise) is argmin(T / p), and softmax(noise)_k is (1/T_k) / sum_j
(1/T_j): no logarithm has to be taken and undone. For a text that the teacher did not write, the noise that is drawn
still makes it write that text, but is no longer iid Gumbel: an unlikely token's is larger than prior draws are.

`python gumbel.py` runs the method on two tokens that must agree: the end of this file.

Shapes: N positions, V vocabulary, D width. The noise of a position is one V-vector. What training and sampling call
holds no more than `DEVICE.chunk` noise values at a time.
"""
import dataclasses
import math
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class Device:
    """What is decided by where the code runs; `python -m extra.bench plan` asks, on a CPU, what a GPU would do."""
    chunk: int                                # noise values held at once
    keep: int                                 # of a batch's noise, at most this many values wait for the backward pass
    planned: bool = False                     # as if all tensors were on a GPU

    def is_gpu(self, x):
        """Whether this tensor takes a GPU's kernels."""
        return x.is_cuda or self.planned


CPU = Device(chunk=1 << 22, keep=0)                           # 83 rows of GPT-2's vocabulary, 64 MB with temporaries
GPU = Device(chunk=1 << 25, keep=1 << 31)                     # 667 rows; 4 GB in bf16, where drawing again costs more
DEVICE = dataclasses.replace(GPU if torch.cuda.is_available() else CPU)

TINY = 1e-37           # arrival times are clamped here: below it float32's reciprocal overflows


# ---------------------------------------------------------------------------------------------------------------------
# draws

def sample_exponential(shape, generator=None, device=None):
    """iid Exp(1), float32, with an exact lower tail: the small values decide an argmax over a large vocabulary.

    U is drawn in float64. float32 `rand` lies on a grid of 2^-24 with exact zeros (no Gumbel above 16.6), and CUDA's
    float32 `exponential_` has the same grid near 0. From u the small values are -log1p(-u) ~ u, on a grid of 2^-53.
    """
    return to_exponential(torch.rand(shape, dtype=torch.float64, generator=generator, device=device))


def to_exponential(u):
    """Uniforms, float64, which are overwritten -> Exp(1), float32."""
    # what is compiled would have to write its input back
    u = -u if torch.compiler.is_compiling() else u.neg_()
    return u.log1p_().float().neg_().clamp_(min=TINY)


def sample_gumbel(shape, generator=None, device=None):
    """iid standard Gumbel noise -log Exp(1), float32; mean 0.5772, variance pi^2 / 6."""
    return sample_exponential(shape, generator, device).log_().neg_()


def gumbel_max(logits, noise):
    """argmax_k (logits_k + noise_k), an exact draw from softmax(logits). [..., V], [..., V] -> [...] (Section 3)."""
    return (logits.double() + noise.double()).argmax(-1)


# ---------------------------------------------------------------------------------------------------------------------
# the posterior

def posterior_times(logits, tokens, e):
    """Algorithm 1 in exponential time: the arrival times of a race that `tokens` won.

    logits [N, V], tokens [N], e [N, V] iid Exp(1) -> T [N, V]. This is what training calls. A p_k of 0 gives T_k = e_k.
    p_w may underflow (T_w is then clamped at `TINY`). A token whose logit is -inf cannot have been drawn: its T is nan,
    which shows in whatever is computed from it.
    """
    w = tokens.unsqueeze(-1)  # (N, 1), the winners
    p = logits.float().softmax(-1)
    e0 = e.gather(-1, w)                                   # E_0; what is computed from e_w below is overwritten
    T_w = p.gather(-1, w) * e0                             # the winner
    impossible = logits.gather(-1, w) == -math.inf
    # losers: T = e + p e0. Written into p, since fresh memory would cost more than the arithmetic
    T = torch.addcmul(e, p, e0, out=p)
    T.scatter_(-1, w, T_w.masked_fill(impossible, math.nan))
    return T.clamp_(min=TINY)


def raise_above_runner_up(logits, tokens, noise):
    """Make argmax(logits + noise) return `tokens` after rounding too: noise_w is raised, where needed, to just above
    the runner-up. float32 breaks a few rows in 10^6. logits [N, V], tokens [N], noise [N, V] -> noise [N, V].
    """
    w = tokens.unsqueeze(-1)  # (N, 1)
    score = logits.double() + noise.double()
    runner_up = score.scatter(-1, w, -math.inf).amax(-1, keepdim=True)
    needed = (runner_up - logits.gather(-1, w).double()).float()
    just_above = needed.nextafter(torch.tensor(math.inf, device=noise.device))
    wins = score.gather(-1, w) > runner_up
    return noise.scatter(-1, w, torch.where(wins, noise.gather(-1, w), just_above))


def posterior_gumbel(logits, tokens, generator=None):
    """Algorithm 1: noise that makes Gumbel-max over `logits` return `tokens`, drawn from its exact posterior.

    logits [..., V], tokens [...] -> noise [..., V], float32; `logits` is not modified. If tokens ~ softmax(logits), the
    noise is iid standard Gumbel. argmax(logits + noise) in float64 is `tokens` in every row.
    Raises ValueError for a token out of range, or whose logit is not finite.
    """
    V = logits.shape[-1]
    rows = logits.reshape(-1, V)  # (N, V)
    w = tokens.reshape(-1)  # (N)
    if len(w) != len(rows):
        raise ValueError(f"tokens {tuple(tokens.shape)} do not match logits {tuple(logits.shape)}")
    if len(w) and not (0 <= w.min() and w.max() < V):
        raise ValueError(f"token id out of range: {w.min().item()}..{w.max().item()}, the logits have {V} entries")
    noise = torch.empty_like(rows, dtype=torch.float32)
    chunk = max(1, DEVICE.chunk // V)
    for a in range(0, len(w), chunk):
        noise[a:a + chunk] = _posterior_of_chunk(rows[a:a + chunk], w[a:a + chunk], generator)
    return noise.reshape(logits.shape)


def _posterior_of_chunk(logits, tokens, generator):
    w = tokens.unsqueeze(-1)  # (N, 1)
    logp_w = logits.float().log_softmax(-1).gather(-1, w)
    if not logp_w.isfinite().all():
        raise ValueError("a token whose logit is -inf (or a row of logits that holds inf or nan) has no posterior")
    e = sample_exponential(logits.shape, generator, logits.device)
    noise = -posterior_times(logits, tokens, e).log()
    # T_w = p_w E_0 is clamped where p_w underflows; the sum of logarithms is exact there too
    noise_w = -e.gather(-1, w).log() - logp_w
    return raise_above_runner_up(logits, tokens, noise.scatter(-1, w, noise_w))


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
    upper = -torch.special.ndtri(-torch.expm1(-T))
    lower = torch.special.ndtri(torch.exp(-T))
    return torch.where(T < math.log(2), upper, lower)


# Table 5's noises: arrival times T >= 0, float32, to the same information with another marginal, float64: finite,
# falling in T. A new kind of noise is one entry here
TRANSFORMS = {"gaussian": to_gaussian, "uniform": to_uniform}
# "log" is Gumbel noise as well, of which W reads the logarithm of the softmax: finer where the noise is small, as most
# of it is. "unpaired", a control, carries no information. "quantile" is one number a token: extra/quantile.py
KINDS = ("gumbel", "log", *TRANSFORMS, "unpaired", "quantile")


def needs_teacher(kind):
    """Whether a student that reads this kind of noise (None: no noise) is trained with a teacher's posterior."""
    return kind in KINDS and kind != "unpaired"


def noise_features(T, kind="gumbel", tau=1.0):
    """Arrival times T [N, V] -> what W reads, [N, V] float32: softmax(tau * noise), the noise transformed to `kind`;
    its logarithm for "log".
    """
    if kind in TRANSFORMS:
        return (tau * TRANSFORMS[kind](T)).softmax(-1).float()
    if kind == "log":
        return (-tau * T.log()).log_softmax(-1)
    if tau != 1:  # T^-tau may leave float32: through log space
        return (-tau * T.log()).softmax(-1)
    inverse = T.reciprocal()  # softmax(noise)_k = (1/T_k) / sum_j (1/T_j)
    return inverse.div_(inverse.sum(-1, keepdim=True))


def posterior_features(u, logits, tokens, kind, dtype):
    """Uniforms u [N, V], the teacher's logits [N, V], tokens [N] -> what W reads, [N, V]: the draw of training's noise
    in one function, to be compiled in one piece. Random numbers are an argument: their generator stays outside.
    """
    return noise_features(posterior_times(logits, tokens, to_exponential(u)), kind).to(dtype)


def default_generator(device):
    """The generator that torch draws from where none is given: its state can be saved, and the draws made again."""
    if device.type == "cpu":
        return torch.default_generator
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.cuda.default_generators[index]


class _ChunkedProjection(torch.autograd.Function):
    """features [n, V] @ weight^T -> [n, D] without holding the features: features(a, b, generator, dtype) draws rows a
    to b.

    The backward pass draws every chunk again, from the state that the generator had. (torch's checkpoint would restore
    the global generators only.) On a GPU, where drawing costs more than memory, up to `DEVICE.keep` of them are kept.
    """

    @staticmethod
    def forward(ctx, weight, n, features, generator):
        device = weight.device
        D, V = weight.shape
        ctx.dtype = weight.dtype
        if torch.is_autocast_enabled(device.type):
            ctx.dtype = torch.get_autocast_dtype(device.type)
        ctx.state = generator.get_state()
        ctx.weight = weight.detach()
        ctx.features = features
        ctx.n = n
        ctx.padding = padding(V, weight, ctx.dtype)
        ctx.chunk = max(1, DEVICE.chunk // V)
        kept = None
        if weight.requires_grad and 0 < n * V <= DEVICE.keep:
            kept = weight.new_empty(n, V + ctx.padding, dtype=ctx.dtype)
        w = padded(weight.to(ctx.dtype), ctx.padding).t()  # (V + padding, D)
        out = weight.new_empty(n, D)
        for a in range(0, n, ctx.chunk):
            b = min(a + ctx.chunk, n)
            f = features(a, b, generator, ctx.dtype)
            f = padded(f, ctx.padding, None if kept is None else kept[a:b])
            out[a:b] = f @ w
        ctx.save_for_backward(kept)
        return out

    @staticmethod
    def backward(ctx, grad_out):
        grad_out = grad_out.to(ctx.dtype)
        grad = ctx.weight.new_zeros(ctx.weight.shape)
        V = grad.shape[1]
        (kept,) = ctx.saved_tensors
        if kept is not None:
            grad += (grad_out.t() @ kept)[:, :V]
            return grad, None, None, None
        generator = torch.Generator(grad.device)
        generator.set_state(ctx.state)
        for a in range(0, ctx.n, ctx.chunk):
            b = min(a + ctx.chunk, ctx.n)
            f = padded(ctx.features(a, b, generator, ctx.dtype), ctx.padding)
            if ctx.dtype == torch.float32:
                grad.addmm_(grad_out[a:b].t(), f)          # in place: no second [D, V]
            else:
                grad += (grad_out[a:b].t() @ f)[:, :V]
        return grad, None, None, None


class GumbelEmbedding(nn.Module):
    """g = W softmax(tau * noise), W [D, V], no bias: the one module that Gumbel Distillation adds to a student.

    Noise can be given (`forward`), drawn from the prior (`from_prior`, at inference), or drawn from the posterior of
    observed tokens under the teacher's logits (`from_posterior`, in training). The last two never hold [N, V], but for
    what a GPU keeps (`DEVICE.keep`).
    `kind`: "gumbel"; "log", W reads log softmax(tau * noise); "gaussian" or "uniform", the same noise with other
    marginals; "unpaired", Gumbel noise that is independent of the text even in training, a control that must behave
    like no noise.
    """

    def __init__(self, vocab_size, n_embd, kind="gumbel", std=0.02):
        super().__init__()
        if kind not in KINDS or kind == "quantile":
            raise ValueError(f"noise {kind!r} is not read so: one of {', '.join(KINDS[:-1])}")
        self.kind = kind
        self.draw = posterior_features
        self.weight = nn.Parameter(torch.empty(n_embd, vocab_size))
        # softmax of the noise is diffuse: scale W so that an entry of g starts with the std of a token embedding's,
        # using E ||softmax(noise)||^2 measured on a few draws
        e = sample_exponential((256, vocab_size), torch.Generator().manual_seed(0))
        energy = noise_features(e, kind).square().sum(-1).mean()
        nn.init.normal_(self.weight, std=std / energy.sqrt().item())

    def forward(self, noise, tau=1.0):
        """Given Gumbel noise [..., V] -> [..., D]."""
        D, V = self.weight.shape
        parts = []
        for rows in noise.reshape(-1, V).split(max(1, DEVICE.chunk // V)):
            T = torch.exp(-rows.float()).clamp(min=TINY)
            parts.append(F.linear(noise_features(T, self.kind, tau), self.weight))
        return torch.cat(parts).view(*noise.shape[:-1], D)

    def from_prior(self, n, tau=1.0, generator=None):
        """Fresh noise, tau * Gumbel(0, 1), for n rows -> [n, D]."""
        return self._project(n, partial(self._prior_features, tau), generator)

    def from_posterior(self, logits, tokens, generator=None):
        """Noise drawn from its posterior given tokens [N] -> [N, D], with gradient to W.

        `logits` is a function: logits(a, b) are the teacher's, float32 [b - a, V], behind tokens a to b. It is called
        again in the backward pass and must return the same values. Unpaired noise ignores it: drawn from the prior.
        `raise_above_runner_up` is skipped: W reads softmax(noise), not an argmax.
        """
        if not needs_teacher(self.kind):
            return self.from_prior(len(tokens), generator=generator)
        return self._project(len(tokens), partial(self._posterior_features, logits, tokens), generator)

    def _prior_features(self, tau, a, b, generator, dtype):
        e = sample_exponential((b - a, self.weight.shape[1]), generator, self.weight.device)
        return noise_features(e, self.kind, tau).to(dtype)

    @torch.no_grad()
    def _posterior_features(self, logits, tokens, a, b, generator, dtype):
        device = self.weight.device
        u = torch.rand(b - a, self.weight.shape[1], dtype=torch.float64, generator=generator, device=device)
        with torch.autocast(device.type, enabled=False):  # the same in the backward pass, which knows of no autocast
            return self.draw(u, logits(a, b), tokens[a:b], self.kind, dtype)

    def compile(self, **kw):
        """torch.compile the draw from the posterior. The number of its rows may differ from call to call."""
        self.draw = torch.compile(posterior_features, **kw)

    def _project(self, n, features, generator):
        generator = generator or default_generator(self.weight.device)
        return _ChunkedProjection.apply(self.weight, n, features, generator)


# ---------------------------------------------------------------------------------------------------------------------
# drawing tokens

def check_draws(tau, top_p):
    """ValueError for a temperature or nucleus that no sampler can use."""
    if not tau > 0:
        raise ValueError(f"tau must be positive, got {tau}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p}")


def nucleus(logits, top_p):
    """logits [N, V] -> logits with -inf outside the smallest set whose mass reaches top_p (crossing token kept)."""
    p, where = logits.softmax(-1).sort(-1, descending=True)
    mass_before = p.cumsum(-1) - p
    outside = mass_before >= top_p
    return logits.masked_fill(torch.zeros_like(outside).scatter_(-1, where, outside), -math.inf)


def draw_tokens(logits, top_p=1.0, greedy=False, noise=None, generator=None):
    """A token for each row of logits [N, V] -> [N]: argmax; what `noise` decides, Gumbel [N, V], or of kind "quantile"
    [N]; or, without, a draw by inversion.
    """
    if greedy:
        return logits.argmax(-1)
    if noise is not None:
        if top_p < 1:
            logits = nucleus(logits.double(), top_p)
        if noise.dim() == 1:
            from extra.quantile import draw_by_quantile
            return draw_by_quantile(logits, noise)
        return gumbel_max(logits, noise)
    if top_p == 1:
        return draw_by_inversion(logits.softmax(-1), generator)
    if top_p < 0.5 or logits.is_cuda:  # CUDA sorts fast, and must not wait for the host
        return draw_by_inversion(nucleus(logits.double(), top_p).softmax(-1), generator)
    return draw_from_nucleus_unsorted(logits.softmax(-1), top_p, generator)


def draw_by_inversion(p, generator=None):
    """A draw from each row of p [N, V] (need not sum to 1) -> [N]: the first token whose cumulative mass exceeds u."""
    cdf = p.cumsum(-1, dtype=torch.float64)
    return _invert(cdf, generator)


def _invert(cdf, generator):
    u = torch.rand(len(cdf), 1, generator=generator, device=cdf.device, dtype=torch.float64) * cdf[:, -1:]
    x = torch.searchsorted(cdf, u, right=True)
    return x.clamp_(max=cdf.shape[1] - 1).squeeze(1)


def draw_from_nucleus_unsorted(p, top_p, generator=None):
    """One draw from the nucleus of each row of p [N, V] -> [N], by rejection: tokens are drawn until one lies in it.

    A token lies in the nucleus if those more probable have less than top_p of the mass. So a draw is accepted with
    probability top_p or more, and nothing is sorted: on a CPU, sorting a vocabulary costs as much as a network call.
    """
    cdf = p.cumsum(-1, dtype=torch.float64)
    ids = torch.arange(p.shape[1], device=p.device)
    out = torch.empty(len(p), dtype=torch.long, device=p.device)
    open_rows = torch.arange(len(p), device=p.device)  # rows whose token is still outside their nucleus
    while len(open_rows):
        x = _invert(cdf[open_rows], generator)
        out[open_rows] = x
        q = p[open_rows]
        p_x = q.gather(1, x[:, None])
        before = (q > p_x) | (q == p_x) & (ids < x[:, None])  # what a stable sort would put before x
        mass_before = (q * before).sum(-1, dtype=torch.float64)
        open_rows = open_rows[mass_before >= top_p]
    return out


# ---------------------------------------------------------------------------------------------------------------------
# products with the vocabulary

def to_logits(layer, h, exact):
    """h [N, D] -> layer(h), float32 [N, V]. `exact`: the product too, even under autocast: a bf16 logit near -60 is off
    by up to a quarter. In training, where the error averages out, it follows autocast.
    """
    device = h.device.type
    if exact:
        with torch.autocast(device, enabled=False):
            return layer(h.float()).float()
    V = len(layer.weight)
    n = 0
    if torch.is_autocast_enabled(device):
        n = padding(V, h, torch.get_autocast_dtype(device))
    if n == 0:
        return layer(h).float()
    bias = layer.bias
    if bias is not None:
        bias = F.pad(bias, (0, n))
    weight = F.pad(layer.weight.to(torch.bfloat16), (0, 0, 0, n))
    return F.linear(h, weight, bias)[..., :V].float()


def padding(V, x, dtype):
    """By how many zeros the bf16 copy of a weight is longer than V, where a GPU multiplies x with it: its kernels want
    rows of 16 bytes, and are three times slower without (V = 50257). The weights that are stored have V.
    """
    if dtype != torch.bfloat16 or not DEVICE.is_gpu(x):
        return 0
    return -V % 64


def padded(x, n, out=None):
    """x [N, V] with n zeros behind each row, in `out` [N, V + n] where that is given."""
    if out is None:
        return F.pad(x, (0, n)) if n else x                   # (F.pad copies, even by 0)
    out[:, :x.shape[1]] = x
    out[:, x.shape[1]:] = 0
    return out


@contextmanager
def tf32(wanted):
    """Where `wanted`: a GPU's float32 products with inputs of 10 mantissa bits, six times as fast."""
    if not wanted:
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# ---------------------------------------------------------------------------------------------------------------------
# the method on one screen: two tokens that must agree, written in one network call

if __name__ == "__main__":
    K = 8                                                  # x1 uniform on K values, x2 = x1

    def teacher(x1):
        """Exactly: p(x1) is uniform, p(x2 | x1) is all on x1. x1 [N] -> the logits of both tokens [N, 2, K]."""
        first = torch.zeros(len(x1), K)
        second = torch.full((len(x1), K), -math.inf).scatter(1, x1[:, None], 0.0)
        return torch.stack([first, second], 1)

    def predict(student, features):
        """softmax(noise) of both positions [N, 2, K] -> the student's logits of both [N, 2, K], in one call."""
        return student(features.flatten(1)).view(-1, 2, K)

    def train(reads_noise, steps=2000):
        """Supervised learning of noise -> text. `reads_noise` 0: the same network sees zeros in the noise's place."""
        torch.manual_seed(0)
        student = nn.Sequential(nn.Linear(2 * K, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 2 * K))
        optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
            x1 = torch.randint(K, (256,))
            text = torch.stack([x1, x1], 1)  # what the teacher writes, (N, 2)
            noise = posterior_gumbel(teacher(x1), text)  # stage 1: the noise behind it, (N, 2, K)
            logits = predict(student, reads_noise * noise.softmax(-1))  # stage 2: predict the text from the noise
            loss = F.cross_entropy(logits.flatten(0, 1), text.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return student

    @torch.no_grad()
    def write(student, reads_noise, n=20_000):
        """n texts [n, 2], each from fresh noise and one network call."""
        noise = sample_gumbel((n, 2, K))
        logits = predict(student, reads_noise * noise.softmax(-1))
        if reads_noise:
            return logits.argmax(-1)                       # the noise has decided the text
        return gumbel_max(logits, noise)                   # plain Gumbel-max: independent draws

    def report(name, equal, total_variation):
        print(f"{name:40s}{equal:12.3f}{total_variation:18.3f}")

    print(f"{'two tokens, one network call':40s}{'equal pairs':>12s}{'total variation':>18s}")
    for name, reads_noise in (("student that reads the noise", 1), ("the same network, zeros in its place", 0)):
        x = write(train(reads_noise), reads_noise)
        counts = torch.bincount(x[:, 0] * K + x[:, 1], minlength=K * K) / len(x)
        distance = 0.5 * (counts - torch.eye(K).flatten() / K).abs().sum()  # collapse would show here
        report(name, (x[:, 0] == x[:, 1]).float().mean(), distance)
    report("theory: the teacher", 1, 0)
    report("theory: independent draws", 1 / K, 1 - 1 / K)
