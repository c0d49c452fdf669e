"""Score against entropy: what a student reaches at the diversity of another, from files of `evaluate.py success`.

    python -m extra.front extra/results/front-molecules-*.json --model=molecules-gumbel --other=molecules-mdlm

Sharper decoding (a smaller nucleus, the argmax) makes more samples right, and all of them alike: two students are
compared where one has the entropy of the other, or more. Runs NAME-s0, NAME-s1, .. are seeds of one recipe.

A point is (entropy of the set in nats, distinct successes per 1000 samples); a curve is a list of points.
"""
import math

import numpy as np

from data.cli import BadInput, Parser, run_main
from data.files import read_json
from data.report import print_table
from extra.plot import recipe_of

SCORE = "distinct_per_1000"
ENTROPY = "entropy_set"


def read_rows(paths):
    """The rows of these files that have a score and an entropy, each once, with `order`: that of the sampler "fixed",
    else the sampler's name. Where files share a row, the last one's. Without those that a verifier has checked or
    chosen: its calls are no NFE. Raises BadInput.
    """
    rows = {}
    for path in paths:
        try:
            content = read_json(path)
            args = content["meta"]["args"]
            order = args["order"] if args["sampler"] == "fixed" else args["sampler"]
            scored = [row for row in content["rows"] if row.get(SCORE) is not None and row.get(ENTROPY) is not None]
            numbers = [row[name] for row in scored for name in (SCORE, ENTROPY)]
            if not numbers or not all(type(number) in (int, float) for number in numbers):
                raise ValueError
            for row in scored:
                key = (row["model"], order, row.get("tau"), row["nfe"], row["decode"], row.get("top_p"))
                if not row.get("verifier_calls"):
                    rows[key] = row | dict(order=order)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise BadInput(f"{path} is no file of `evaluate.py success --json` with 1000 samples a row or more "
                           f"({type(e).__name__}): name one") from None
    return list(rows.values())


def curves_of(rows, recipe, nfe):
    """How a recipe decodes at a number of steps -> {(run, order): its curve}, from top_p 1 down, the argmax last.

    rows: from `read_rows`.
    """
    curves = {}
    for row in rows:
        if recipe_of(row["model"]) == recipe and row["nfe"] == nfe:
            if row["decode"] == "greedy":
                sharpness = 2.0                            # the argmax: sharper than any nucleus, which are below 1
            else:
                sharpness = 1 - (row.get("top_p") or 1.0)  # theory and the teacher have none: they are drawn from whole
            point = (sharpness, row[ENTROPY], row[SCORE])
            curves.setdefault((row["model"], row["order"]), []).append(point)
    return {key: [point[1:] for point in sorted(points)] for key, points in curves.items()}


def best_at(curve, entropy):
    """The highest score of a curve where its entropy is `entropy` or more, between its points by interpolation."""
    best = -math.inf
    for a, b in zip(curve, [*curve[1:], curve[-1]]):
        for point in (a, b):
            if point[0] >= entropy:
                best = max(best, point[1])
        low, high = sorted((a[0], b[0]))
        if low < entropy < high:
            share = (entropy - a[0]) / (b[0] - a[0])
            best = max(best, a[1] + share * (b[1] - a[1]))
    return best


def compare(rows, recipe, other):
    """For each number of steps, order of revealing and tau: the greedy rows of a recipe, and the highest score of the
    other recipe at an entropy not below theirs, in any order; the mean of its runs that reach this entropy, None where
    none does. rows: from `read_rows` -> rows of a table.
    """
    greedy = {}                                            # {(nfe, order, tau): {run: its row}}
    for row in rows:
        if recipe_of(row["model"]) == recipe and row["decode"] == "greedy":
            key = (row["nfe"], row["order"], row.get("tau"))
            greedy.setdefault(key, {})[row["model"]] = row
    table = []
    for nfe, order, tau in sorted(greedy, key=lambda key: (key[0], key[1], key[2] or 0)):      # no noise: no tau
        mine = list(greedy[nfe, order, tau].values())
        entropy = float(np.mean([row[ENTROPY] for row in mine]))
        score = float(np.mean([row[SCORE] for row in mine]))
        best = {}                                          # of each run of the other, over its curves
        for (run, _), curve in curves_of(rows, other, nfe).items():
            best[run] = max(best.get(run, -math.inf), best_at(curve, entropy))
        if not best:
            continue
        reached = [value for value in best.values() if value > -math.inf]
        row = dict(nfe=nfe, order=order, tau=tau, entropy=entropy, score=score, other=None, ratio=None,
                   runs=len(mine), other_runs=len(reached), other_runs_of=len(best))
        if reached:
            row["other"] = float(np.mean(reached))
        if row["other"]:
            row["ratio"] = score / row["other"]
        # standard deviations: `print_table` shows what is called so behind the value
        if len(mine) > 1:
            row["score_stderr"] = float(np.std([r[SCORE] for r in mine], ddof=1))
        if len(reached) > 1:
            row["other_stderr"] = float(np.std(reached, ddof=1))
        for name in ("theory", "theory_teacher"):
            scores = [r[SCORE] for r in rows if (r["model"], r["nfe"], r["order"]) == (name, nfe, order)]
            if scores:
                row[name] = float(np.mean(scores))
        table.append(row)
    return table


def flags():
    parser = Parser(description="Compare two students at equal entropy.")
    parser.add_argument("files", nargs="+", help="written by evaluate.py success --json")
    parser.add_argument("--model", required=True, help="the recipe whose greedy rows are compared (a run, without -s0)")
    parser.add_argument("--other", required=True, help="the recipe whose curves they are compared with")
    return parser


def main(argv=None):
    args = flags().parse_args(argv)
    table = compare(read_rows(args.files), recipe_of(args.model), recipe_of(args.other))
    if not table:
        raise BadInput(f"--model={args.model}, --other={args.other}: these files have no rows to compare of them")
    for row in table:
        row["reached"] = f"{row['other_runs']} of {row['other_runs_of']}"
    columns = dict(nfe="NFE", order="order", tau="τ", entropy="entropy", score="score", runs="runs",
                   other="other, at its entropy", reached="runs that reach it", ratio="ratio", theory="theory",
                   theory_teacher="theory of the teacher")
    if len({row["tau"] for row in table}) == 1:
        del columns["tau"]
    print_table(table, columns, dict(tau=2, entropy=2, ratio=2))
    print(f"\nscore: distinct successes per 1000 samples of {args.model}, greedy; other: the highest of {args.other} "
          "at an entropy not below, in any order, interpolated between its points, over the runs that reach it (empty, "
          "or no column: none does); theory: in the same order; ±: standard deviation over runs.")


if __name__ == "__main__":
    run_main(main)
