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
    """The rows of these files, each with the order of its file's flags. Raises BadInput."""
    rows = []
    for path in paths:
        try:
            content = read_json(path)
            order = content["meta"]["args"]["order"]
            found = [row | dict(order=order) for row in content["rows"]]
            rows += [row for row in found if row[SCORE] >= 0 <= row[ENTROPY]]
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise BadInput(f"{path} is no file of `evaluate.py success --json` ({type(e).__name__}): name one") \
                from None
    return rows


def curves_of(rows, recipe, nfe):
    """How a recipe decodes at a number of steps -> {(run, order): its curve}, from top_p 1 down, the argmax last."""
    curves = {}
    for row in rows:
        if recipe_of(row["model"]) == recipe and row["nfe"] == nfe and not row.get("verifier_calls"):
            sharpness = 2.0 if row["decode"] == "greedy" else 1 - row["top_p"]
            point = (sharpness, row[ENTROPY], row[SCORE])
            curves.setdefault((row["model"], row["order"]), set()).add(point)
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
    """For each number of steps, and order of revealing: the greedy rows of a recipe, and the highest score of the other
    recipe at an entropy not below theirs, over both orders; of each run of the one against all runs of the other, which
    are averaged. -> rows of a table.
    """
    table = []
    greedy = [row for row in rows if recipe_of(row["model"]) == recipe and row["decode"] == "greedy"]
    for nfe, order in sorted({(row["nfe"], row["order"]) for row in greedy}):
        mine = [row for row in greedy if (row["nfe"], row["order"]) == (nfe, order)]
        entropy = np.mean([row[ENTROPY] for row in mine])
        score = np.mean([row[SCORE] for row in mine])
        best = {}                                          # of each run of the other, over its curves
        for (run, _), curve in curves_of(rows, other, nfe).items():
            best[run] = max(best.get(run, -math.inf), best_at(curve, entropy))
        if not best:
            continue
        theirs = float(np.mean(list(best.values())))
        row = dict(nfe=nfe, order=order, entropy=float(entropy), score=float(score), other=theirs,
                   ratio=float(score / theirs) if theirs > 0 else None, runs=len(mine))
        if len(mine) > 1:
            row["score_stderr"] = float(np.std([r[SCORE] for r in mine], ddof=1))
        if len(best) > 1:
            row["other_stderr"] = float(np.std(list(best.values()), ddof=1))
        for name in ("theory", "theory_teacher"):
            scores = [r[SCORE] for r in rows if (r["model"], r["nfe"]) == (name, nfe)]
            if scores:
                row[name] = max(scores)
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
    columns = dict(nfe="NFE", order="order", entropy="entropy", score="score", other="other, at its entropy",
                   ratio="ratio", theory="theory", theory_teacher="theory of the teacher", runs="runs")
    print_table(table, columns, dict(entropy=2, ratio=2))
    print(f"\nscore: distinct successes per 1000 samples of {args.model}, greedy; other: the highest of {args.other} "
          "at an entropy not below, both orders, interpolated between its points; ±: standard deviation over runs.")


if __name__ == "__main__":
    run_main(main)
