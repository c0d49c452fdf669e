"""The maze: 2000 paths of at most 10 moves, every one of them known, so that success is membership.

Ids: U D L R PAD BOS = 0 .. 5; a row is a path of 10 tokens, padded with PAD.
"""
import functools

import numpy as np

MAZE = ["......",
        "......",
        "#S..#.",
        "......",
        "....T.",
        "..#..."]
FREE = {(r, c) for r, line in enumerate(MAZE) for c, cell in enumerate(line) if cell != "#"}
START, TARGET = (2, 1), (4, 4)
MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1))
PAD, MAZE_BOS, MAZE_LENGTH = 4, 5, 10


@functools.cache                                         # half a second, and every table row asks for it
def maze_paths():
    """All valid sequences, [2000, 10] uint16, sorted by length: free cells only, target first reached at the end."""
    paths, frontier = [], [((), START)]
    for m in range(1, MAZE_LENGTH + 1):
        steps = [(path + (k,), (r + dr, c + dc)) for path, (r, c) in frontier for k, (dr, dc) in enumerate(MOVES)]
        paths += [path + (PAD,) * (MAZE_LENGTH - m) for path, at in steps if at == TARGET]
        frontier = [(path, at) for path, at in steps if at in FREE and at != TARGET]
    paths = np.array(paths, dtype=np.uint16)
    paths.setflags(write=False)
    return paths


def maze_keys(rows):
    """Rows [N, 10 or more] -> one integer each, to compare and count; -1: not of U D L R PAD, or no PAD in the tail."""
    path, tail = np.split(np.asarray(rows, dtype=np.int64), [MAZE_LENGTH], axis=1)
    fits = (path <= PAD).all(1) & (path >= 0).all(1) & (tail == PAD).all(1)
    return np.where(fits, path @ 5 ** np.arange(MAZE_LENGTH), -1)


def maze_valid(rows):
    """Rows [N, 10 or more] (without BOS) -> [N] bool: membership in the 2000 valid sequences, the task's success."""
    return np.isin(maze_keys(rows), maze_keys(maze_paths()))


def maze_dataset(name):
    """The rows of `maze` (the 2000 sequences) or `maze_skewed` (2000 draws that favour short ones)."""
    paths = maze_paths()
    if name == "maze":
        return paths
    weight = np.exp(-5 * ((paths != PAD).sum(1) - 5) / 2)
    return paths[np.random.default_rng(0).choice(len(paths), 2000, p=weight / weight.sum())]


def draw_maze(row):
    """A path on the grid, for the terminal: digits are the visiting order (latest at a cell); how it ends."""
    grid, at, note = [list(line) for line in MAZE], START, "does not reach T"
    for i, k in enumerate(row, 1):
        if k >= PAD:
            break
        at = at[0] + MOVES[k][0], at[1] + MOVES[k][1]
        if at not in FREE:
            note = f"move {i} leaves the free cells"
            break
        if at == TARGET:
            note = f"reaches T in {i} moves" if all(k == PAD for k in row[i:]) else "goes on after T"
            break
        grid[at[0]][at[1]] = str(i % 10)
    moves = "".join("UDLR.?"[min(k, 5)] for k in row)
    return "\n".join(" ".join(line) for line in grid) + f"\n{moves}: {note}\n"


class ExactDenoiser:
    """The perfect plain MDLM of an enumerable language: true conditionals, from its rows [M, L] (repeats are weights).

    Stands in for a network in `mdlm.unmask`: hidden(x) is the log-probability of every token at every position, or at
    those in `at`, given what is revealed; uniform on a context that no row fits (several tokens a step get there).
    """

    def __init__(self, rows, vocab_size):
        import torch                                       # here alone: making datasets needs none
        self.V, self.one_hot = vocab_size, torch.nn.functional.one_hot
        self.rows = self.one_hot(torch.as_tensor(rows).long(), vocab_size).double().flatten(1)     # (M, L V), exact

    def hidden(self, x, rows=None, at=slice(None)):
        given = self.one_hot(x, self.V + 1)[..., :self.V].double().flatten(1)                       # [MASK] -> zeros
        fits = (given @ self.rows.T == (x < self.V).sum(1, keepdim=True)).double()                  # (B, M)
        count = (fits @ self.rows).view(*x.shape, self.V)
        count[fits.sum(1) == 0] = 1
        return (count / count.sum(-1, keepdim=True)).log()[at]

    def logits(self, h):
        return h
