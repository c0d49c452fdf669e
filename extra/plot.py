"""A metric against NFE, the number of network calls (Figure 3): its table and its figure.
"""
import re

import numpy as np


def nfe_table(rows, metric, error, scale, digits):
    """Rows of evaluate.py -> (a row for each line of the figure, with a text for each NFE; the lines themselves,
    {label: {nfe: (value, error)}}, as `plot_nfe` takes them). Values are multiplied by `scale`.
    """
    table = []
    lines = {}
    for (label, decode), line in lines_of(rows).items():
        points = {}
        for k, runs in line.items():
            value, spread = mean_and_error(runs, metric, error)
            points[k] = (scale * value, scale * spread)
        runs = next(iter(line.values()))
        row = dict(model=label, decode=decode, n=runs[0]["n"])
        for k, (value, spread) in points.items():
            text = f"{value:.{digits}f} ± {spread:.{digits}f}"
            if k is None:                   # the data, which have no NFE and so no column
                row["model"] += ": " + text
            row[k] = text
        entropies = [run["entropy"] for runs in line.values() for run in runs if "entropy" in run]
        if entropies:
            row["entropy"] = f"{min(entropies):.2f} to {max(entropies):.2f}"
        table.append(row)
        if decode:
            label = f"{label}, {decode}"
        lines[label] = points
    return table, lines


def recipe_of(name):
    """A run's name without its seed: those of one recipe are called NAME-s0, NAME-s1, .."""
    return re.sub(r"-s\d+$", "", name)


def lines_of(rows):
    """A table's rows by line: {(label, decoding): {nfe: [the row of each seed]}}."""
    groups = {}
    names = {}                              # recipe -> its runs, in their order
    for row in rows:
        recipe = recipe_of(row["model"])
        names.setdefault(recipe, {})[row["model"]] = True
        line = groups.setdefault((recipe, row.get("decode")), {})
        line.setdefault(row.get("nfe"), []).append(row)
    lines = {}
    for (recipe, decode), line in groups.items():
        first, *others = names[recipe]
        label = first
        if len(others) == 1:
            label += " and 1 other seed"
        elif others:
            label += f" and {len(others)} other seeds"
        lines[label, decode] = line
    return lines


def mean_and_error(runs, metric, error):
    """The mean over the runs of a recipe, with their standard deviation; of one run, its own standard error."""
    values = [run[metric] for run in runs]
    if len(values) == 1:
        return values[0], runs[0][error]
    return np.mean(values), np.std(values, ddof=1)


def plot_nfe(path, lines, steps, title):
    """Draw a metric against the number of network calls, into a .png or .svg file.

    lines: label -> {nfe: (value, error)}; {None: (value, error)} for what has no NFE, as the data: a horizontal line.
    steps: the ticks of the axis of NFE. title: the metric's name, for its axis.
    """
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 4.5))
    axes = figure.subplots()
    for label, line in lines.items():
        if None in line:
            value, _ = line[None]
            axes.axhline(value, label=label, linestyle="--", color="gray")
            continue
        style = "-"
        if "theory" in label:                              # dotted: computed, not drawn
            style = ":"
        values, errors = zip(*line.values())
        axes.errorbar(list(line), values, errors, label=label, marker="o", capsize=2, linestyle=style)
    axes.set_xscale("log", base=2)
    axes.set_xticks(steps, steps)
    axes.set_xlabel("NFE")
    axes.set_ylabel(title)
    if title == "GenPPL":                                  # spans orders of magnitude
        axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")                # 20, not 2 x 10^1
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.13))    # below the axes
    figure.savefig(path, dpi=150, bbox_inches="tight")
