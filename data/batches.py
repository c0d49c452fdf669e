"""Which rows a process reads in which micro-step, its reading of them ahead, and what a loss reads besides.

Everything random in a run is a function of where it is used: the row order and noise levels of a global batch of (seed,
step, row), its masks, noise and dropout of (seed, step, rank, micro-step). So nothing but the step has to be restored
to continue a run, and the order of the data is the same for any number of processes.
"""
import itertools
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch

from data.cli import BadInput, number
from mdlm import T_MIN

ROWS = 0                                                    # what a draw is for, part of its key
LEVELS = 1
NOISE = 2
EVAL = 3


def rng(*key):
    """A numpy generator of its own for what these whole numbers name."""
    return np.random.default_rng(key)


@lru_cache(maxsize=1)                                      # of the epoch that the run is in
def permutation(n, seed, epoch):
    return rng(seed, ROWS, epoch).permutation(n)


def rows_of_step(step, n, batch_size, seed):
    """Row numbers of a global batch: an epoch visits all n rows in a seeded permutation; batches run across epochs."""
    places = range(step * batch_size, (step + 1) * batch_size)
    return np.array([permutation(n, seed, i // n)[i % n] for i in places])


def parse_clip(text):
    """--clip's value, a window of noise levels: "0.3,0.8" -> (0.3, 0.8)."""
    level = number(float, 0, 1)
    parts = text.split(",")
    if len(parts) == 2:
        low = max(level(parts[0]), T_MIN)
        high = level(parts[1])
        if low < high or low == high == 1:
            return low, high
    raise BadInput(f"--clip={text}: two noise levels, 0 <= LOW < HIGH <= 1, as in 0.3,0.8")


def mask_suffixes(levels, share, length, rng):
    """Noise levels of rows [B, n_blocks] -> of tokens [B, length], where this share of the rows, drawn at random, has
    everything from a uniform place to its end masked, and nothing before: what a decoder from left to right sees.
    """
    B = len(levels)
    levels = levels.repeat_interleave(length // levels.shape[1], 1)
    chosen = torch.from_numpy(rng.permutation(B) < round(share * B))
    first = torch.from_numpy(rng.integers(1, length, B))               # (position 0 is BOS)
    suffix = (torch.arange(length) >= first[:, None]).to(levels.dtype)
    return torch.where(chosen[:, None], suffix, levels)


def part_of_batch(m, micro, world):
    """The places in the global batch of this process's rows in micro-step m."""
    first = (m * world.size + world.rank) * micro
    return slice(first, first + micro)


def micro_batches(data, answers, args, micro, world, step):
    """This process's rows of each micro-step from `step` on, without end: yields (tokens [micro, L], what `answers`,
    a `teacher_of_rows`, knows of them, or None), on the host.
    """
    for s in itertools.count(step):
        batch = rows_of_step(s, len(data), args.batch_size, args.seed)
        for m in range(args.batch_size // world.size // micro):
            rows = batch[part_of_batch(m, micro, world)]
            tokens = torch.from_numpy(data.rows(rows))
            known = None
            if answers is not None:
                known = answers.load(rows)
            if world.cuda:                                 # pinned: nothing waits for the copy
                tokens = tokens.pin_memory()
                if known is not None:
                    known = known.pin_memory()
            yield tokens, known


def read_ahead(items):
    """The items of an endless iterator, each made in a thread while the one before it is used. `close` ends it."""
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(next, items)
        while True:
            item = ahead.result()                          # what went wrong in the thread is raised here
            ahead = pool.submit(next, items)
            yield item


def loss_inputs(model, device, t, teacher, seed, **more):
    """What `model.loss` reads besides the tokens, of all that there is: noise levels t, the teacher, a seed's draws,
    and `more`. Every model is offered everything.
    """
    generator = torch.Generator(device).manual_seed(seed)
    known = dict(more, t=t.to(device), teacher=teacher, generator=generator)
    return {name: known[name] for name in model.loss_reads if name in known}
