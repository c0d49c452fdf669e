"""The README's figures, drawn from the tables in extra/results, which the commands wrote with --json (pip install
matplotlib). No number stands here.

    python -m extra.figures                                                       # the four .svg files in extra/
    python -m extra.figures --ckpt out/maze-ar out/maze-mdlm out/maze-mdlm-gumbel # first draw figure A's paths anew

Shapes: n samples, L length, V vocabulary.
"""
import glob
import json
import os

import torch

from bd3lm import training_mask
from data.cli import BadInput, Parser, optional, run_main
from data.maze import FREE, MAZE, START, TARGET, follow, maze_valid
from extra.front import curves_of, read_rows
from extra.plot import lines_of, mean_and_error, recipe_of
from gumbel import gumbel_max
from sample import load_model
from teacher import extract_sequential

FOLDER = os.path.dirname(os.path.abspath(__file__))
RESULTS = os.path.join(FOLDER, "results")
DRAWS = 1000                                               # rows of noise, all of them behind the rates
SHOWN = 6                                                  # of these, the first so many
COLORS = dict(teacher="#444444", plain="#d9822b", gumbel="#1f6fb4", theory="#999999",
              valid="#2a9d4a", invalid="#d03030")


# ---------------------------------------------------------------------------------------------------------------------
# A: the same noise, read by three models

def draw_paths(checkpoints):
    """The teacher, the plain student and the Gumbel student write from the same noise, seed 0 -> results/draws.json."""
    teacher, plain, student = [load_model(path) for path in checkpoints]
    if not teacher.can_teach or plain.noise_embed is not None or student.noise_embed is None:
        raise BadInput("--ckpt takes an AR teacher, a plain student and a Gumbel student, in this order")
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        tokens, noise = extract_sequential(teacher, DRAWS, generator=generator)     # (n, L), (n, L, V)
        start = student.start(*tokens.shape)
        # argmax(log p + noise) draws each token from the plain student's distribution of it, with everything masked
        logp = plain.log_probs(start)[..., :plain.vocab_size]
        alone = gumbel_max(logp, noise)
        together, _ = student.generate(start, 1, greedy=True, noise=noise)
    models = [facts(teacher, tokens, tokens, calls=tokens.shape[1] - 1), facts(plain, alone, tokens, calls=1),
              facts(student, together, tokens, calls=1)]
    with open(os.path.join(RESULTS, "draws.json"), "w") as f:
        json.dump(dict(seed=0, models=models), f, indent=1)


def facts(model, tokens, teachers, calls):
    """What the figure says of one model: its tokens [n, L] beside the teacher's."""
    same = (tokens == teachers).all(1).float().mean()
    paths = tokens[:, 1:].numpy()
    return dict(model=model.name, calls=calls, n=len(paths), success=float(maze_valid(paths).mean()),
                same_as_teacher=float(same), paths=paths[:SHOWN].tolist())


def figure_paths(pyplot):
    """Three rows of mazes, a column for each row of noise."""
    models = read("draws.json")["models"]
    captions = ("AR teacher\n", "plain MDLM\nargmax(log p + ξ)\n", "Gumbel student\nargmax log p(· | ξ)\n")
    figure, axes = pyplot.subplots(len(models), SHOWN, figsize=(9.6, 4.9))
    for row, (model, caption) in enumerate(zip(models, captions)):
        calls = f"{model['calls']} calls".replace("1 calls", "1 call")
        rate = f"{100 * model['success']:.1f} % of {model['n']:,}\nare valid"
        first = axes[row][0]
        first.text(-0.02, 0.5, f"{caption}{calls}\n\n{rate}", transform=first.transAxes, ha="right", va="center",
                   linespacing=1.3)
        for column, path in enumerate(model["paths"]):
            draw_path(axes[row][column], path)
    for column, axes in enumerate(axes[0]):
        axes.text(0.5, 1.03, f"noise ξ, draw {column + 1}", transform=axes.transAxes, ha="center")
    figure.subplots_adjust(left=0.155, right=1, top=0.96, bottom=0.035, wspace=0.04, hspace=0.13)
    return figure


def draw_path(axes, path):
    """One path on the grid: green if it is one of the 2000, red, with a cross at its last cell, if not."""
    from matplotlib.patches import Rectangle
    height = len(MAZE)
    width = len(MAZE[0])
    for r in range(height):
        for c in range(width):
            color = "#f2f2f2" if (r, c) in FREE else "#333333"
            axes.add_patch(Rectangle((c - 0.5, r - 0.5), 1, 1, facecolor=color, edgecolor="white"))
    for (r, c), letter in ((START, "S"), (TARGET, "T")):
        axes.text(c, r, letter, ha="center", va="center", fontsize=9, color="#888888", weight="bold")
    cells, what_becomes_of_it = follow(path)
    # a path may visit a cell more than once: each visit stands a little further to the lower right
    xs = []
    ys = []
    for i, (r, c) in enumerate(cells):
        shift = 0.3 * (i / len(path) - 0.5)
        xs.append(c + shift)
        ys.append(r + shift)
    if cells[-1] not in FREE:                              # it ends at the wall
        xs[-1] = (xs[-2] + xs[-1]) / 2
        ys[-1] = (ys[-2] + ys[-1]) / 2
    color = COLORS["invalid"]
    end = "x"
    if maze_valid([path])[0]:
        color = COLORS["valid"]
        end = "o"
    axes.plot(xs, ys, color=color, linewidth=2, solid_joinstyle="round")
    axes.plot(xs[-1], ys[-1], color=color, marker=end, markersize=7, markeredgewidth=2.5)
    axes.set_xlim(-0.8, width - 0.2)
    axes.set_ylim(height - 0.2, -0.8)
    axes.set_aspect("equal")
    axes.axis("off")
    caption = what_becomes_of_it.replace("leaves the free cells", "hits a wall")
    axes.set_title(caption, fontsize=7.5, color=color, y=-0.13)


# ---------------------------------------------------------------------------------------------------------------------
# success against network calls

def figure_maze(pyplot):
    """A panel for each maze: students (mean and standard deviation over seeds), teacher, and theory without noise."""
    figure, panels = pyplot.subplots(1, 2, figsize=(9.6, 3.9), sharey=True)
    languages = {"maze": "2000 paths, equally likely", "maze_skewed": "short paths favoured"}
    for axes, (name, what) in zip(panels, languages.items()):
        for (label, decode), line in lines_of(read(f"nfe-{name}.json")["rows"]).items():
            points = []
            for runs in line.values():
                value, error = mean_and_error(runs, "success", "stderr")
                calls, _ = mean_and_error(runs, "nfe_counted", "stderr")
                points.append((calls, 100 * value, 100 * error))
            axes.errorbar(*zip(*points), capsize=2, **maze_style(label, decode))
        axes.set_xscale("log", base=2)
        axes.set_xticks([1, 2, 4, 8], [1, 2, 4, 8])
        axes.set_title(f"{name}: {what}", fontsize=11)
        axes.set_xlabel("network calls")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("valid paths, %")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, frameon=False, fontsize=9)
    figure.subplots_adjust(left=0.065, right=0.99, top=0.92, bottom=0.27, wspace=0.05)
    return figure


def maze_style(label, decode):
    """Color, line and legend of one line of the maze's figure."""
    if label == "teacher":
        return dict(color=COLORS["teacher"], marker="*", markersize=11, linestyle="none", label="AR teacher")
    if label == "theory":
        return dict(color=COLORS["theory"], linestyle=":", label="theory: a perfect MDLM without noise")
    name, color = student_style(label)
    if decode == "greedy":
        return dict(color=color, marker="o", linestyle="-", label=f"{name}, greedy")
    return dict(color=color, marker="s", markersize=4, linestyle="--", label=f"{name}, sampled")


def student_style(run):
    """The name and color of a student in all figures."""
    if "gumbel" in run:
        return "Gumbel student", COLORS["gumbel"]
    return "plain MDLM", COLORS["plain"]


# ---------------------------------------------------------------------------------------------------------------------
# B: distinct molecules against entropy

def figure_molecules(pyplot):
    """A panel for each number of steps: each run's curves over top_p and the argmax, in both orders, and theory in
    random order.
    """
    rows = read_rows(sorted(glob.glob(os.path.join(RESULTS, "front-molecules-*.json"))))
    steps = [1, 2, 4]
    figure, panels = pyplot.subplots(1, len(steps), figsize=(9.6, 3.9))
    recipes = dict.fromkeys(recipe_of(row["model"]) for row in rows if row["model"].startswith("molecules-"))
    for axes, nfe in zip(panels, steps):
        for recipe in recipes:
            name, color = student_style(recipe)
            for (run, order), curve in curves_of(rows, recipe, nfe).items():
                line = "-" if order == "random" else ":"
                label = f"{name}, {order.replace('_', ' ')}" if run.endswith("-s0") else None
                axes.plot(*zip(*curve), color=color, linestyle=line, marker=".", linewidth=1, label=label)
                axes.plot(*curve[-1], color=color, marker="o", linestyle="none")       # the argmax
        for theory, color in (("theory", COLORS["theory"]), ("theory_teacher", COLORS["teacher"])):
            points = curves_of(rows, theory, nfe)[theory, "random"]                        # its better order
            axes.plot(*zip(*points), color=color, marker="*", markersize=10, linestyle="none",
                      label=theory.replace("_", " of the "))
        axes.set_title(f"{nfe} {'call' if nfe == 1 else 'steps'}", fontsize=11)
        axes.set_xlabel("entropy, nats (more diverse: right)")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("distinct molecules per 1000 samples")
    handles, labels = panels[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, frameon=False, fontsize=9)
    figure.subplots_adjust(left=0.065, right=0.99, top=0.92, bottom=0.27, wspace=0.2)
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# C: generative perplexity against entropy

def figure_entropy(pyplot):
    """A curve for each model, decoding and number of steps: its points differ in top_p, or in the noise's τ."""
    curves = {}
    for path in sorted(glob.glob(os.path.join(RESULTS, "genppl-chars-*.json"))):
        for row in read(os.path.basename(path))["rows"]:
            key = (row["model"], row.get("decode"), row.get("nfe"))
            curves.setdefault(key, []).append((row["entropy"], row["gen_ppl"]))
    figure, axes = pyplot.subplots(figsize=(9.6, 4.6))
    fewest = min(nfe for _, _, nfe in curves if nfe)
    for (model, decode, nfe), points in sorted(curves.items(), key=str):
        entropy, ppl = zip(*sorted(set(points)))           # the text itself is in every file
        axes.plot(entropy, ppl, **entropy_style(model, decode, nfe, few=nfe == fewest))
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel("entropy of a sample, nats (more to the right: more diverse)")
    axes.set_ylabel("GenPPL (lower: more fluent)")
    axes.grid(alpha=0.3, which="both")
    axes.set_ylim(bottom=2)                                # room for the legend
    axes.legend(loc="lower left", ncols=2, fontsize=9)
    figure.subplots_adjust(left=0.065, right=0.99, top=0.97, bottom=0.12)
    return figure


def entropy_style(model, decode, nfe, few):
    """Color, line and legend of one curve: filled marks are greedy, round ones few steps."""
    if model == "data":
        return dict(color="black", marker="X", markersize=9, linestyle="none", label="the text itself")
    if model.endswith("-ar"):
        return dict(color=COLORS["teacher"], marker="*", markersize=12, linestyle="none",
                    label=f"AR teacher, {nfe} calls")
    name, color = student_style(model)
    how = "sampled, top_p falling"
    fill = "white"
    line = "--"
    if decode == "greedy":
        how = "greedy, τ falling"
        fill = color
        line = "-"
    marker = "s"
    if few:
        marker = "o"
    return dict(color=color, marker=marker, linestyle=line, markerfacecolor=fill, label=f"{name}, {how}, NFE {nfe}")


# ---------------------------------------------------------------------------------------------------------------------
# who attends to whom in BD3-LM's training pass

def figure_block_mask(pyplot, length=12, block_size=4):
    """The mask of `bd3lm.training_mask` over [noised ; clean], as a picture: dark where a query sees a key."""
    mask = training_mask(length, block_size, "cpu")
    figure, axes = pyplot.subplots(figsize=(4.6, 4.4))
    axes.imshow(mask, cmap="Blues", vmin=0, vmax=1.4)
    edges = [k - 0.5 for k in range(0, 2 * length + 1)]
    axes.set_xticks(edges, minor=True)
    axes.set_yticks(edges, minor=True)
    axes.grid(which="minor", color="white", linewidth=0.5)
    axes.tick_params(which="both", length=0)
    for k in range(block_size, 2 * length, block_size):
        width = 1.6 if k == length else 0.6
        axes.axhline(k - 0.5, color="black", linewidth=width)
        axes.axvline(k - 0.5, color="black", linewidth=width)
    numbers = range(1, length // block_size + 1)
    blocks = [f"z{k}" for k in numbers] + [f"x{k}" for k in numbers]
    middles = [(k + 0.5) * block_size - 0.5 for k in range(len(blocks))]
    axes.set_xticks(middles, blocks)
    axes.set_yticks(middles, blocks)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_xlabel("keys: noised blocks z, clean blocks x")
    axes.set_ylabel("queries")
    figure.subplots_adjust(left=0.13, right=0.99, top=0.87, bottom=0.01)
    return figure


# ---------------------------------------------------------------------------------------------------------------------

FIGURES = dict(paths=figure_paths, maze=figure_maze, molecules=figure_molecules, entropy=figure_entropy,
               block_mask=figure_block_mask)


def read(name):
    with open(os.path.join(RESULTS, name)) as f:
        return json.load(f)


def main(argv=None):
    parser = Parser(description="Draw the README's figures from extra/results.")
    parser.add_argument("--ckpt", nargs=3, metavar=("TEACHER", "PLAIN", "GUMBEL"),
                        help="draw the paths of figure A anew, from these")
    parser.add_argument("--out", default=FOLDER, help="folder for the .svg files (default: extra)")
    args = parser.parse_args(argv)
    optional("matplotlib", "extra.figures")
    import matplotlib
    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "gumbel", "font.size": 10})     # the same file each time
    from matplotlib import pyplot
    if args.ckpt:
        draw_paths(args.ckpt)
    for name, draw in FIGURES.items():
        figure = draw(pyplot)
        figure.savefig(os.path.join(args.out, f"{name}.svg"), metadata={"Date": None})
        pyplot.close(figure)


if __name__ == "__main__":
    run_main(main)
