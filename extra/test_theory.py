"""The tests of extra/theory.py and of the exact denoiser: both against enumeration."""
import itertools

import numpy as np
import pytest
import torch

from data.maze import PAD, ExactDenoiser, maze_dataset, maze_paths, maze_valid
from extra import theory
from extra.theory import TeacherDenoiser, effective_number, systematic, theory_rows
from mdlm import reveal_steps, revealing_path, unmask
from test_gumbel import gen, slow

# ten of the 27 rows of three tokens, one of them twice: no product of marginals
TOY = np.array([[0, 0, 1], [0, 1, 2], [0, 1, 2], [1, 0, 0], [1, 2, 2], [1, 2, 0], [2, 0, 2], [2, 1, 1], [2, 2, 1],
                [0, 2, 0], [2, 1, 0]])


# ---------------------------------------------------------------------------------------------------------------------
# by brute force

def conditionals(law, x, otherwise):
    """{row: probability}, a context with None for what is masked -> the law of each position's token, [L][V]; where no
    row fits, that of `otherwise`."""
    fits = {row: p for row, p in law.items() if all(given in (None, k) for given, k in zip(x, row))}
    mass = sum(fits.values())
    if mass == 0:
        return otherwise
    return [[sum(p for row, p in fits.items() if row[i] == k) / mass for k in range(3)] for i in range(len(x))]


def law_of_samples(law, step, otherwise):
    """The exact law of what the sampler writes from the true conditionals of `law`, call by call, where position i is
    revealed at step step[i]: {row: probability}."""
    states = {(None,) * len(step): 1.0}
    for k in range(1, max(step) + 1):
        now = [i for i, s in enumerate(step) if s == k]
        after = {}
        for x, mass in states.items():
            p = conditionals(law, x, otherwise)
            for tokens in itertools.product(range(3), repeat=len(now)):
                written = list(x)
                share = mass
                for i, token in zip(now, tokens):
                    written[i] = token
                    share *= p[i][token]
                written = tuple(written)
                after[written] = after.get(written, 0) + share
        states = after
    return states


def tables(steps, sampler, order):
    """All tables of reveal steps of three positions, with their probabilities."""
    if sampler == "ancestral":
        found = list(itertools.product(range(1, steps + 1), repeat=3))
    else:
        first = [(0, 1, 2)] if order == "left_to_right" else list(itertools.permutations(range(3)))
        found = [tuple(rank * min(3, steps) // 3 + 1 for rank in ranks) for ranks in first]
    return [(table, 1 / len(found)) for table in found]


def brute_force_law(law, steps, sampler, order, otherwise):
    total = np.zeros(27)
    for table, share in tables(steps, sampler, order):
        for row, p in law_of_samples(law, table, otherwise).items():
            total[np.dot(row, (9, 3, 1))] += share * p
    assert abs(total.sum() - 1) < 1e-9
    return total


def law_of_rows(rows):
    rows, count = np.unique(rows, axis=0, return_counts=True)
    return {tuple(map(int, row)): c / count.sum() for row, c in zip(rows, count)}


def agrees(found, law):
    """Samples [n, 3] have this law [27]: chi^2 within five standard deviations, and nothing impossible."""
    n = len(found)
    count = np.bincount(found @ (9, 3, 1), minlength=27)
    possible = law > 0
    chi2 = ((count - n * law)[possible] ** 2 / (n * law[possible])).sum()
    k = possible.sum() - 1
    return count[~possible].sum() == 0 and abs(chi2 - k) < 5 * (2 * k) ** 0.5 + 5


UNIFORM = [[1 / 3] * 3] * 3
ROUTES = [(1, "ancestral", "random"), (2, "ancestral", "random"), (3, "ancestral", "random"), (2, "fixed", "random"),
          (2, "fixed", "left_to_right"), (3, "fixed", "left_to_right")]


@pytest.mark.parametrize("otherwise", ["uniform", "marginals"])
@pytest.mark.parametrize("steps,sampler,order", ROUTES)
def test_theory_of_rows_is_the_enumeration_of_all_tables_and_draws(steps, sampler, order, otherwise):
    law = law_of_rows(TOY)
    no_fit = UNIFORM
    if otherwise == "marginals":
        no_fit = conditionals(law, (None,) * 3, None)
    want = brute_force_law(law, steps, sampler, order, no_fit)
    found, calls = theory_rows(ExactDenoiser(TOY, 3, otherwise), 60_000, steps, 1, sampler, order)
    assert agrees(found, want)
    mean_calls = sum(share * len(set(table)) for table, share in tables(steps, sampler, order))
    assert abs(calls - mean_calls) < 0.02


def test_one_position_at_a_time_gives_the_rows_themselves():
    found, calls = theory_rows(ExactDenoiser(TOY, 3), 40_000, 3, 1, "fixed")
    want = np.zeros(27)
    for row, p in law_of_rows(TOY).items():
        want[np.dot(row, (9, 3, 1))] = p
    assert calls == 3 and agrees(found, want)


def counted_by_products(rows, x, V):
    """The counts of rows that fit, as products of one-hot rows: float64 [B, L, V]."""
    one_hot = torch.nn.functional.one_hot
    table = one_hot(torch.as_tensor(rows.astype(np.int64)), V).double().flatten(1)
    revealed = one_hot(x, V + 1)[..., :V].double().flatten(1)
    fits = (revealed @ table.T == (x < V).sum(1, keepdim=True)).double()
    return (fits @ table).view(*x.shape, V), fits.sum(1)


@pytest.mark.parametrize("name", ["maze", "maze_skewed"])
@pytest.mark.parametrize("otherwise", ["uniform", "marginals"])
def test_counts_by_index_are_those_by_products(name, otherwise):
    """Bit by bit, for contexts of rows with 0 to 10 tokens revealed, and for random ones, which few rows fit."""
    rows = maze_dataset(name)
    x = torch.as_tensor(rows.astype(np.int64))
    random = torch.randint(5, (2000, 10), generator=gen(1))
    x = torch.cat([x, random])
    x = x.masked_fill(torch.rand(x.shape, generator=gen()) < torch.rand(len(x), 1, generator=gen(2)), 5)
    count, n_fits = counted_by_products(rows, x, 5)
    assert (n_fits == 0).sum() > 100 and (n_fits > 1).sum() > 100
    if otherwise == "uniform":
        count[n_fits == 0] = 1
    else:
        blank = torch.full((1, 10), 5)
        count[n_fits == 0] = counted_by_products(rows, blank, 5)[0]
    want = (count / count.sum(-1, keepdim=True)).log()
    exact = ExactDenoiser(rows, 5, otherwise)
    assert torch.equal(exact.hidden(x), want)
    masked = x == 5
    assert torch.equal(exact.hidden(x, None, masked), want[masked])


def test_exact_denoiser_refuses_an_unknown_fallback():
    with pytest.raises(ValueError, match="unknown otherwise 'none'"):
        ExactDenoiser(TOY, 3, "none")


# ---------------------------------------------------------------------------------------------------------------------
# of a teacher

@pytest.fixture(autouse=True)
def all_contexts_at_once(monkeypatch):
    """What networks on a CPU are chunked for, memory, teachers without a network do not need."""
    monkeypatch.setattr(theory, "PARTICLES_AT_ONCE", 1 << 18)


class Pasts:
    """The cache of a teacher without a network: the tokens that it has read."""

    def __init__(self, batch):
        self.tokens = torch.zeros(batch, 0, dtype=torch.long)

    def batch_select_indices(self, rows):
        self.tokens = self.tokens[rows]


class ExactTeacher:
    """The exact AR model of weighted rows: p(x_i | x_<i) is a sum over the rows that begin with x_<i, uniform where
    none does. BOS is an id of its own, as on the maze."""
    device = torch.device("cpu")

    def __init__(self, rows, V, weights=None):
        rows = torch.as_tensor(rows.astype(np.int64))
        self.vocab_size = V + 1
        self.bos = V
        self.length = rows.shape[1] + 1
        weights = torch.ones(len(rows), dtype=torch.float64) if weights is None else weights
        self.next = [{} for _ in range(rows.shape[1])]      # by position: what was before -> weights of tokens
        for row, weight in zip(rows.tolist(), weights.tolist()):
            for i, token in enumerate(row):
                found = self.next[i].setdefault(tuple(row[:i]), torch.zeros(V + 1, dtype=torch.float64))
                found[token] += weight
        self.anything = torch.tensor([1.0] * V + [0.0]).double()

    def new_cache(self, batch, length):
        return Pasts(batch)

    def hidden(self, new, cache):
        cache.tokens = torch.cat([cache.tokens, new], 1)
        assert (cache.tokens[:, 0] == self.bos).all()
        i = cache.tokens.shape[1] - 1
        found = [self.next[i].get(tuple(past), self.anything) for past in cache.tokens[:, 1:].tolist()]
        return torch.stack(found)[:, None]

    def logits(self, h):
        return h.log().float()


def clamped_marginals(denoiser, context, n):
    """The weighted histogram of the particles of n runs, [L, V], and its standard error from run to run."""
    tokens, w, _ = denoiser.particles(torch.tensor(context).repeat(n, 1))
    one_hot = torch.nn.functional.one_hot(tokens, denoiser.mask_id).double()
    p = torch.einsum("bk,bklv->blv", w, one_hot)
    return p.mean(0), p.std(0) / n ** 0.5


def largest_miss(denoiser, exact, context, n=64):
    """How far the clamped marginals lie from the exact ones at masked positions, in absolute probability."""
    found, error = clamped_marginals(denoiser, context, n)
    masked = torch.tensor(context) == denoiser.mask_id
    blank = torch.tensor(context).masked_fill(masked, exact.mask_id)
    want = exact.hidden(blank[None])[0].exp()
    miss = (found[:, :exact.mask_id] - want)[masked].abs()
    return float(miss.max()), float((miss / (error[:, :exact.mask_id][masked] + 0.002)).max())


MAZE_CONTEXTS = [
    [6, 6, 6, 6, 6, 6, 6, 6, 6, 6],
    [6, 6, 6, 3, 6, 6, 6, 6, 6, PAD],
    [6, 6, 0, 6, 6, 6, 6, 3, 6, 6],
    [3, 6, 6, 6, 1, 6, 6, 6, PAD, 6],
    [6, 6, 6, 6, 6, 6, 6, 6, 1, 6],
    [6, 6, 6, 6, 6, 6, 6, PAD, 6, 6]]


@pytest.mark.parametrize("context", MAZE_CONTEXTS)
def test_clamped_particles_have_the_exact_conditionals_of_the_maze(context):
    """64 runs of 256 particles; their mean differs from the enumeration by the error that they show."""
    denoiser = TeacherDenoiser(ExactTeacher(maze_paths(), 5), 256, gen())
    miss, in_errors = largest_miss(denoiser, ExactDenoiser(maze_paths(), 5), context)
    assert miss < 0.03 and in_errors < 4.5


def test_without_weights_the_conditionals_are_wrong(monkeypatch):
    """So that the test above can see a missing weight."""
    monkeypatch.setattr(TeacherDenoiser, "weigh", lambda self, logw, *args: logw)
    denoiser = TeacherDenoiser(ExactTeacher(maze_paths(), 5), 256, gen())
    for context in MAZE_CONTEXTS[1:]:
        miss, in_errors = largest_miss(denoiser, ExactDenoiser(maze_paths(), 5), context)
        assert miss > 0.05 and in_errors > 10, context


def skewed_toy():
    """The toy with weights that differ by up to e^5, and their law."""
    weights = torch.linspace(-2.5, 2.5, len(TOY), dtype=torch.float64).exp()
    weights = weights[torch.randperm(len(TOY), generator=gen(3))]
    law = {}
    for row, weight in zip(TOY.tolist(), (weights / weights.sum()).tolist()):
        law[tuple(row)] = law.get(tuple(row), 0) + weight
    return ExactTeacher(TOY, 3, weights), law


@pytest.mark.parametrize("steps,sampler,order", [(2, "fixed", "random"), (2, "fixed", "left_to_right"),
                                                 (3, "fixed", "random"), (2, "ancestral", "random")])
def test_theory_of_a_skewed_teacher_is_the_enumeration(steps, sampler, order):
    """In total variation, of 4000 samples: 0.035."""
    teacher, law = skewed_toy()
    want = brute_force_law(law, steps, sampler, order, UNIFORM)
    found, _ = theory_rows(TeacherDenoiser(teacher, 200, gen()), 4000, steps, 1, sampler, order)
    assert found.max() <= 2
    reachable = np.bincount(found @ (9, 3, 1), minlength=27) / len(found)
    # where no row fits, particles go on from what the teacher says of an unknown past: rows outside the law, as one
    inside = np.array([row in law for row in itertools.product(range(3), repeat=3)])
    miss = np.abs(reachable - want)[inside].sum() / 2 + abs(reachable[~inside].sum() - want[~inside].sum()) / 2
    assert miss < 0.035


def test_theory_of_a_skewed_teacher_needs_its_weights(monkeypatch):
    monkeypatch.setattr(TeacherDenoiser, "weigh", lambda self, logw, *args: logw)
    teacher, law = skewed_toy()
    want = brute_force_law(law, 3, "fixed", "random", UNIFORM)
    found, _ = theory_rows(TeacherDenoiser(teacher, 200, gen()), 1000, 3, 1, "fixed", "random")
    assert np.abs(np.bincount(found @ (9, 3, 1), minlength=27) / len(found) - want).sum() / 2 > 0.1


@pytest.mark.parametrize("steps", [1, 2, pytest.param(4, marks=slow)])
def test_success_on_the_maze_is_the_same_by_particles_and_by_counting(steps):
    """The fair bound of an exact teacher is the bound of its rows, within four standard errors of 1000 samples."""
    denoiser = TeacherDenoiser(ExactTeacher(maze_paths(), 5), 64, gen())
    n = 1000
    found, calls = theory_rows(denoiser, n, steps, 1, "fixed")
    counted, same_calls = theory_rows(ExactDenoiser(maze_paths(), 5), 20_000, steps, 1, "fixed")
    assert calls == same_calls == steps
    p = maze_valid(counted).mean()
    assert abs(maze_valid(found).mean() - p) < 4 * (p * (1 - p) / n) ** 0.5
    mean, smallest = denoiser.effective()
    if steps == 1:
        assert (mean, smallest) == (64, 64)
    else:
        assert 0.999 < smallest < 10 < mean < 64


def test_positions_of_a_call_take_different_particles():
    """Of two tokens that are equal in each row, no call writes equal ones more often than independent draws do: with
    four particles, a shared one would make it 1/8 + 1/4 * 7/8 of the cases."""
    K = 8
    teacher = ExactTeacher(np.stack([np.arange(K)] * 2, 1), K)
    found, _ = theory_rows(TeacherDenoiser(teacher, 4, gen()), 8000, 1, 1)
    assert abs((found[:, 0] == found[:, 1]).mean() - 1 / K) < 4 * (1 / K * (1 - 1 / K) / 8000) ** 0.5


def test_resampling_keeps_whole_particles(monkeypatch):
    """At a PAD most particles die, 92 %: what goes on are whole rows, with a past that the cache has as well."""
    teacher = ExactTeacher(maze_paths(), 5)
    cache = Pasts(1)
    monkeypatch.setattr(teacher, "new_cache", lambda *args: cache)
    resampled = []
    resample = TeacherDenoiser.resample

    def record(self, logw):
        which, after = resample(self, logw)
        resampled.append(bool((which != torch.arange(len(which))).any()))
        return which, after

    monkeypatch.setattr(TeacherDenoiser, "resample", record)
    context = torch.tensor([6, 6, 6, 6, 6, 6, 6, PAD, 6, 6]).repeat(8, 1)
    denoiser = TeacherDenoiser(teacher, 128, gen())
    tokens, w, origin = denoiser.particles(context)
    assert resampled == [False] * 7 + [True, False]    # after the last token there is nothing to go on with
    assert (tokens[:, :, 7:] == PAD).all()
    assert maze_valid(tokens.flatten(0, 1).numpy()).all()
    # particles with the same past share a row of the cache
    pasts = tokens[:, :, :9].flatten(0, 1).unique(dim=0)
    assert torch.equal(cache.tokens[:, 1:].unique(dim=0), pasts) and len(cache.tokens) == len(pasts)
    # resampling leaves fewer different draws behind the earlier positions than behind the later ones
    n = effective_number(w, origin)
    assert (n[:, :8] < 32).all() and (n[:, 8:] == 128).all()


def test_particles_of_rows_without_a_revealed_token_have_no_weights():
    denoiser = TeacherDenoiser(ExactTeacher(maze_paths(), 5), 16, gen())
    x = torch.full((3, 10), 6)
    x[1, 4] = 3
    _, w, origin = denoiser.particles(x)
    assert (w[0] == 1 / 16).all() and (w[2] == 1 / 16).all() and (w[1] != 1 / 16).any()
    assert (effective_number(w, origin)[[0, 2]] == 16).all()


def test_a_token_that_no_particle_can_have_leaves_the_weights():
    teacher = ExactTeacher(np.array([[0, 1, 1], [0, 0, 2], [1, 1, 0]]), 3)
    denoiser = TeacherDenoiser(teacher, 64, gen())
    tokens, w, _ = denoiser.particles(torch.tensor([[2, 4, 4], [0, 4, 0]]))
    assert w.isfinite().all() and torch.allclose(w.sum(1), torch.ones(2).double())
    assert (tokens[0, :, 0] == 2).all() and (tokens[1, :, 2] == 0).all()


def test_chunks_do_not_matter(monkeypatch):
    """To the law: one context at a time, or all at once."""
    teacher, law = skewed_toy()
    want = brute_force_law(law, 2, "fixed", "left_to_right", UNIFORM)
    monkeypatch.setattr(theory, "PARTICLES_AT_ONCE", 100)
    found, _ = theory_rows(TeacherDenoiser(teacher, 60, gen()), 400, 2, 1, "fixed", "left_to_right")
    inside = [i for i, row in enumerate(itertools.product(range(3), repeat=3)) if row in law]
    share = (np.bincount(found @ (9, 3, 1), minlength=27) / 400)[inside].sum()
    assert abs(share - want[inside].sum()) < 0.1


def test_systematic_draws_are_as_many_as_the_weights_say():
    w = torch.rand(50, 40, dtype=torch.float64, generator=gen()) ** 4
    drawn = systematic(w, torch.arange(40), 40, gen(1))
    assert (drawn.diff() >= 0).all()
    count = torch.zeros_like(w).scatter_add_(1, drawn, torch.ones_like(w))
    want = 40 * w / w.sum(1, keepdim=True)
    assert (count >= want.floor() - 1e-6).all() and (count <= want.ceil() + 1e-6).all()
    # the tick of rank r lies in the r-th of 40 equal parts of the weight
    drawn = systematic(w[:1].expand(2000, -1), torch.tensor([7, 30]), 40, gen(2))
    for rank, found in zip((7, 30), drawn.T):
        cdf = w[0].cumsum(0) / w[0].sum()
        assert (found >= torch.searchsorted(cdf, torch.tensor(rank / 40).double())).all()
        assert (found <= torch.searchsorted(cdf, torch.tensor((rank + 1) / 40).double())).all()


@pytest.mark.parametrize("sampler,order", [("ancestral", "random"), ("fixed", "random"), ("fixed", "left_to_right")])
def test_rows_of_theory_are_those_of_the_sampler_loop(sampler, order):
    """Seeded samples, batch by batch: the tables of the maze stay as they were."""
    exact = ExactDenoiser(TOY, 3)
    found, calls = theory_rows(exact, 1500, 2, 7, sampler, order)
    g = gen(7)
    want = []
    total = 0
    for n in (1000, 500):
        x = torch.full((n, 3), 3)
        x, nfe = unmask(x, revealing_path(reveal_steps(x == 3, 2, sampler, order, g)), 3, exact, generator=g)
        want.append(x)
        total += int(nfe.sum())
    assert np.array_equal(found, torch.cat(want)) and calls == total / 1500
