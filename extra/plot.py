"""Figures, drawn with matplotlib.
"""



def plot_nfe(path, lines, steps, title):
    """lines: label -> {nfe: (value, error)}, {None: ...} for what has no NFE; drawn into a .png or .svg."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 4.5))
    axes = figure.subplots()
    for label, line in lines.items():
        if None in line:
            axes.axhline(line[None][0], label=label, linestyle="--", color="gray")
        else:
            axes.errorbar(list(line), *zip(*line.values()), label=label, marker="o", capsize=2,
                          linestyle="-:"["theory" in label])
    axes.set_xscale("log", base=2)
    axes.set_xticks(steps, steps)
    axes.set(xlabel="NFE", ylabel=title, yscale="log" if title == "GenPPL" else "linear")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.13))             # below the axes
    figure.savefig(path, dpi=150, bbox_inches="tight")
