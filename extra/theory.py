"""What a perfect noise-blind denoiser reaches: a bound for students without noise, at tau = 1 and top_p 1.

Tokens revealed together are drawn independently, so even the true conditionals fail at few calls. Two languages, two
denoisers for `mdlm.unmask`: of the training rows (`data.maze.ExactDenoiser`, which counts them), and of what the
teacher writes (`TeacherDenoiser`): the fairer one, since no student of it can be better than its teacher. Both hold for
plain draws in the same order of revealing, and bound no sharpened decoding (tau < 1, top_p < 1, greedy).

Shapes: B contexts at once, K particles of each, L length (without BOS), V vocabulary, N wanted positions.
"""
import math

import torch

from gumbel import draw_tokens
from mdlm import reveal_steps, revealing_path, unmask

PARTICLES_AT_ONCE = 2048                                   # of all contexts: the size of the teacher's KV cache


def theory_rows(denoiser, n, steps, seed, sampler="ancestral", order="random"):
    """Samples by a perfect denoiser at `steps` steps -> (samples [n, L] without BOS, mean network calls).

    denoiser: an `ExactDenoiser` or a `TeacherDenoiser`; sampler, order: of `mdlm.reveal_steps`.
    """
    mask_id = denoiser.mask_id
    generator = torch.Generator().manual_seed(seed)
    samples = []
    calls = 0
    for x in torch.full((n, denoiser.length), mask_id).split(1000):
        step = reveal_steps(x == mask_id, steps, sampler, order, generator)
        x, nfe = unmask(x, revealing_path(step), mask_id, denoiser, generator=generator)
        samples.append(x)
        calls += int(nfe.sum())
    return torch.cat(samples).numpy(), calls / n


class TeacherDenoiser:
    """The perfect plain MDLM of the language that an AR teacher writes, by clamped sampling (sequential Monte Carlo).

    K particles of each context are drawn left to right: at a masked position a token from the teacher; at a revealed
    one this token, by whose probability the particle's weight is multiplied. Where the effective number of a context's
    particles, (sum w)^2 / sum w^2, falls below K/2, they are resampled.

    Each position of a call takes its token from a particle of its own, and from no near relative of another's if it
    can: tokens of one particle fit together, which independent draws do not. Exact for K to infinity; with few, success
    comes out too high where positions share their draws, too low where no particle has a past that is rare.
    """

    def __init__(self, teacher, n_particles=64, generator=None):
        """teacher: a `CausalLM`, or whatever has its `hidden`, `logits`, `new_cache`, `length`, `vocab_size`, `bos` and
        `device`. n_particles: K, at least as many as a call reveals positions. generator: on the teacher's device.
        """
        self.teacher = teacher
        self.K = n_particles
        self.generator = generator
        self.mask_id = teacher.vocab_size
        self.length = teacher.length - 1
        self.n_effective = []                              # of each call's positions, where something was revealed

    def hidden(self, x, rows, wanted):
        """x [B, L] with [MASK]s (id V), without BOS -> tokens [N], drawn at the positions `wanted` [B, L], given what x
        reveals. `rows` is not read. Each call draws particles of its own.
        """
        chunk = max(1, PARTICLES_AT_ONCE // self.K)
        parts = []
        for context, where in zip(x.split(chunk), wanted.split(chunk)):
            parts.append(self.draw(context.to(self.teacher.device), where.to(self.teacher.device)))
        return torch.cat(parts).to(x.device)

    def logits(self, tokens):
        """Tokens [N] -> [N, V] for the sampler loop, which can draw nothing but these: 0 there, else -inf."""
        logits = torch.full((len(tokens), self.mask_id), -math.inf, device=tokens.device)
        return logits.scatter_(-1, tokens[:, None], 0)

    def draw(self, x, wanted):
        """A token at each wanted position, from particles that differ where they can: x, wanted [B, L] -> [N]."""
        ends = (wanted | (x < self.mask_id)).any(0).nonzero().max() + 1  # what comes later says nothing
        x = x[:, :ends]
        wanted = wanted[:, :ends]
        tokens, w, origin = self.particles(x)
        # relatives stand side by side. Wanted positions, in a random order, take particles that lie far apart
        key = torch.rand(x.shape, generator=self.generator, device=x.device).masked_fill(~wanted, math.inf)
        rank = key.argsort(-1).argsort(-1)  # (B, ends): 0 .. n - 1 at the wanted ones
        particle = systematic(w, rank, wanted.sum(1, keepdim=True), self.generator)
        drawn = tokens.gather(1, particle[:, None]).squeeze(1)

        weighted = wanted & (x < self.mask_id).any(1, keepdim=True)
        self.n_effective.append(effective_number(w, origin)[weighted].cpu())
        return drawn[wanted]

    @torch.no_grad()
    def particles(self, x):
        """x [B, L] -> tokens [B, K, L], weights [B, K] (float64, of sum 1), and which draw a token was, [B, K, L]:
        particles that were one particle when position i was drawn have the same number there, of 0 .. K - 1.
        """
        B, L = x.shape
        K = self.K
        teacher = self.teacher
        number = torch.arange(K, device=x.device).repeat(B)  # (B K), of a particle among its context's
        tokens = x.repeat_interleave(K, 0)  # (B K, L): [MASK]s are replaced as they are drawn
        given = tokens < self.mask_id
        origin = torch.zeros_like(tokens)
        logw = torch.zeros(B, K, dtype=torch.float64, device=x.device)

        # particles with the same past share a row of the cache, and a pass of the network: P rows, one of BOS at first
        past = torch.zeros_like(number)  # (B K): each particle's row
        last = torch.full((1,), teacher.bos, device=x.device)  # (P): the token that a row ends with
        cache = teacher.new_cache(1, L)
        for i in range(L):
            logits = teacher.logits(teacher.hidden(last[:, None], cache)[:, -1])[past]  # (B K, V)
            drawn = draw_tokens(logits, generator=self.generator)
            tokens[:, i] = torch.where(given[:, i], tokens[:, i], drawn)
            origin[:, i] = number
            logw = self.weigh(logw, logits, tokens[:, i], given[:, i])
            if i == L - 1:
                break
            resampled, logw = self.resample(logw)
            tokens = tokens[resampled]
            origin = origin[resampled]
            longer, past = (past[resampled] * self.mask_id + tokens[:, i]).unique(return_inverse=True)
            cache.batch_select_indices(longer // self.mask_id)
            last = longer % self.mask_id
        return tokens.view(B, K, L), logw.softmax(-1), origin.view(B, K, L)

    def resample(self, logw):
        """Log-weights [B, K] -> (which of all particles go on [B K], their log-weights [B, K]): those of contexts whose
        effective number is low are drawn anew, with equal weights; of others, each.
        """
        B, K = logw.shape
        w = logw.softmax(-1)
        low = 1 / w.square().sum(-1, keepdim=True) < K / 2  # (B, 1)
        each = torch.arange(K, device=w.device)
        which = torch.where(low, systematic(w, each, K, self.generator), each)
        first = K * torch.arange(B, device=w.device)[:, None]  # the number of a context's first particle
        return (first + which).flatten(), logw.masked_fill(low, 0)

    def weigh(self, logw, logits, token, given):
        """Log-weights [B, K] after a token [B K] whose logits are [B K, V]: a given one multiplies by its probability.

        Where it is impossible for all particles of a context, it says nothing of them: their weights stay.
        """
        logp = torch.zeros_like(logw).flatten()
        logp[given] = logits[given].log_softmax(-1).gather(-1, token[given][:, None]).squeeze(1).double()
        after = logw + logp.view_as(logw)
        impossible = (after == -math.inf).all(-1, keepdim=True)
        return torch.where(impossible, logw, after)

    def effective(self):
        """How many different draws were behind a position, in effect: (mean, smallest) over all calls, K at best.

        Of the contexts that reveal something; K where there was none. A draw counts with the sum w of its particles'
        weights, and the number is 1 / sum w^2: resampling, after which all weights are equal, does not raise it.
        """
        n = torch.cat(self.n_effective)
        if not len(n):
            return float(self.K), float(self.K)
        return float(n.mean()), float(n.min())


def systematic(w, rank, n, generator=None):
    """Weights [B, K] -> the particles [B, n] at the ticks (u + rank) / n of their cumulative weights, one u a context.

    Each is one draw by weight; with rank = 0 .. n - 1, a particle of weight w comes n w times, rounded up or down.
    """
    cdf = w.cumsum(-1)
    u = torch.rand(len(w), 1, dtype=torch.float64, generator=generator, device=w.device)
    ticks = (u + rank) / n * cdf[:, -1:]
    return torch.searchsorted(cdf, ticks, right=True).clamp_(max=w.shape[1] - 1)


def effective_number(w, origin):
    """Weights [B, K], numbers of draws origin [B, K, L] -> 1 / sum of the squares of the draws' weights, [B, L]."""
    weight_of_draw = torch.zeros(origin.shape, dtype=w.dtype, device=w.device)
    weight_of_draw.scatter_add_(1, origin, w[:, :, None].expand_as(origin))
    return 1 / weight_of_draw.square().sum(1)
