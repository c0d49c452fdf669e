"""Figures, drawn with matplotlib (pip install matplotlib)."""


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
