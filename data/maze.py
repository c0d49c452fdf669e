"""The maze: 2000 paths of at most 10 moves, every one of them known, so that success is membership.

Ids: U D L R PAD BOS = 0 .. 5; a row is a path of 10 tokens, padded with PAD.
"""
import functools
import math

import numpy as np

MAZE = ["......",
        "......",
        "#S..#.",
        "......",
        "....T.",
        "..#..."]
FREE = {(r, c) for r, line in enumerate(MAZE) for c, cell in enumerate(line) if cell != "#"}
START = (2, 1)                                             # row, column
TARGET = (4, 4)
MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1))                 # U D L R
PAD = 4
MAZE_LENGTH = 10


@functools.cache                                           # every table row asks for it
def maze_paths():
    """All valid sequences, [2000, 10] uint16, sorted by length: free cells only, the target first reached at the end.

    A path may visit a cell more than once.
    """
    paths = []
    walk((), START, paths)
    paths.sort(key=len)                                    # stable: among equals, the order of the walk
    rows = np.full((len(paths), MAZE_LENGTH), PAD, dtype=np.uint16)
    for row, path in zip(rows, paths):
        row[:len(path)] = path
    rows.setflags(write=False)                             # all callers share it
    return rows


def walk(path, cell, paths):
    """Add to `paths` every way to go on from `path` (moves, a tuple), which has led to `cell`, to the target."""
    if cell == TARGET:
        paths.append(path)
    elif cell in FREE and len(path) < MAZE_LENGTH:
        r, c = cell
        for move, (dr, dc) in enumerate(MOVES):
            walk((*path, move), (r + dr, c + dc), paths)


def maze_keys(rows):
    """Rows [N, 10 or more] -> one integer each, to compare and count; -1: not of U D L R PAD, or no PAD in the tail."""
    path, tail = np.split(np.asarray(rows, dtype=np.int64), [MAZE_LENGTH], axis=1)
    path_fits = (path >= 0).all(1) & (path <= PAD).all(1)
    tail_fits = (tail == PAD).all(1)
    digits = 5 ** np.arange(MAZE_LENGTH)                   # a path is a number of 10 digits to the base of 5
    return np.where(path_fits & tail_fits, path @ digits, -1)


def maze_valid(rows):
    """Rows [N, 10 or more] (without BOS) -> [N] bool: membership in the 2000 valid sequences, the task's success."""
    return np.isin(maze_keys(rows), maze_keys(maze_paths()))


def maze_dataset(name):
    """The rows of `maze` (the 2000 sequences) or `maze_skewed` (2000 draws that favour short ones)."""
    paths = maze_paths()
    if name == "maze":
        return paths
    moves = (paths != PAD).sum(1)
    weight = np.exp(-5 * (moves - 5) / 2)                  # two moves more: e^5 times as rare
    draws = np.random.default_rng(0).choice(len(paths), 2000, p=weight / weight.sum())
    return paths[draws]


def follow(row):
    """A path's cells, START first, up to where it fails or ends -> (cells, what becomes of it)."""
    cells = [START]
    for i, move in enumerate(row, 1):
        if move >= PAD:
            break
        r, c = cells[-1]
        dr, dc = MOVES[move]
        cells.append((r + dr, c + dc))
        if cells[-1] not in FREE:
            return cells, f"move {i} leaves the free cells"
        if cells[-1] == TARGET:
            if any(k != PAD for k in row[i:]):
                return cells, "goes on after T"
            return cells, f"reaches T in {i} moves"
    return cells, "does not reach T"


def draw_maze(row):
    """A path on the grid, as text: digits are the visiting order (the latest at a cell); below, its moves, and how it
    ends.
    """
    grid = [list(line) for line in MAZE]
    cells, note = follow(row)
    for i, cell in enumerate(cells[1:], 1):
        if cell in FREE and cell != TARGET:
            grid[cell[0]][cell[1]] = str(i % 10)
    picture = "\n".join(" ".join(line) for line in grid)
    moves = "".join("UDLR.?"[min(k, 5)] for k in row)
    return f"{picture}\n{moves}: {note}\n"


def maze_statistics(rows):
    """Samples [n, 10] -> success, its standard error, distinct valid paths, effective number n(n-1) / sum c(c-1)."""
    valid = maze_valid(rows)
    p = valid.mean()
    n = valid.sum()
    _, c = np.unique(maze_keys(rows[valid]), return_counts=True)    # how often each path occurs
    pairs = (c * (c - 1)).sum()             # of samples that are the same path
    effective = None                        # where no two are the same
    if pairs:
        effective = float(n * (n - 1) / pairs)
    error = math.sqrt(p * (1 - p) / len(rows))
    return dict(n=len(rows), success=float(p), stderr=error, distinct=len(c), effective=effective)


def validity_mass(model, device):
    """The exact probability that an AR model writes a valid path: a sum over all 2000, in one pass."""
    import torch                                           # here alone: making datasets needs none
    rows = torch.from_numpy(maze_paths().astype(np.int64)).to(device)
    rows = torch.nn.functional.pad(rows, (1, 0), value=model.bos)
    logp = model.log_probs(rows[:, :-1]).gather(-1, rows[:, 1:, None]).squeeze(-1)     # (2000, 10)
    return float(logp.double().sum(-1).exp().sum())


class ExactDenoiser:
    """The perfect plain MDLM of an enumerable language: the true conditionals, counted from its rows.

    Stands in for a network in `mdlm.unmask`. 120,000 rows of 23 tokens take 70 MB. Shapes: B contexts at once, L
    length, V vocabulary, M rows of the language.
    """

    def __init__(self, rows, vocab_size, otherwise="uniform"):
        """rows [M, L] of ids below vocab_size; a row that stands there twice is twice as likely.

        otherwise: the law of a position where no row fits what is revealed (several tokens a step get there): "uniform"
        or "marginals", that of the position in all rows.
        """
        if otherwise not in ("uniform", "marginals"):
            raise ValueError(f"unknown otherwise {otherwise!r}: 'uniform' or 'marginals'")
        rows = np.asarray(rows, dtype=np.int64)
        M, self.length = rows.shape
        self.mask_id = vocab_size
        self.cells = rows + np.arange(self.length) * vocab_size    # (M, L): where a table [L, V] counts these tokens
        self.marginals = self.count(np.arange(M))          # (L, V)
        # an index: the rows that have token k at position i are order[i, begin[i, k]:][:marginals[i, k]]
        self.columns = np.ascontiguousarray(rows.T)        # (L, M)
        self.order = self.columns.argsort(1, kind="stable")
        self.begin = self.marginals.cumsum(1) - self.marginals
        self.no_fit = self.marginals if otherwise == "marginals" else np.ones_like(self.marginals)

    def hidden(self, x, rows=None, wanted=slice(None)):
        """x [B, L] with [MASK]s (id V) -> log-probabilities [B, L, V] of the tokens, given what x reveals.

        Of these `[wanted]`: a mask [B, L] gives [N, V]. `rows`, the numbers of x's rows in their batch, is not read: it
        is there for networks with noise.
        """
        import torch                                       # here alone: making datasets needs none
        contexts, which = x.unique(dim=0, return_inverse=True)
        count = np.stack([self.count_given(context) for context in contexts.numpy()])
        count = torch.from_numpy(count).double()           # exact
        return (count / count.sum(-1, keepdim=True)).log()[which][wanted]

    def count_given(self, context):
        """How often each token stands at each position of the rows that agree with a context [L] -> [L, V]."""
        revealed = (context < self.mask_id).nonzero()[0]
        if not len(revealed):
            return self.marginals
        candidates = self.marginals[revealed, context[revealed]]
        rarest, *others = revealed[candidates.argsort()]   # few rows are left to compare after the rarest token
        begin = self.begin[rarest, context[rarest]]
        fits = self.order[rarest, begin:begin + candidates.min()]  # numbers of rows
        for i in others:
            fits = fits[self.columns[i][fits] == context[i]]
        return self.count(fits) if len(fits) else self.no_fit

    def count(self, fits):
        """Numbers of rows -> how often each token stands at each position of these rows, [L, V]."""
        cells = self.cells.take(fits, axis=0).ravel()
        return np.bincount(cells, minlength=self.length * self.mask_id).reshape(self.length, -1)

    def logits(self, h):
        return h
