"""The tables: one function each. Results go to stdout as Markdown, and with --json=FILE to a file.

    python evaluate.py maze --ckpt out/maze-ar out/maze-mdlm-gumbel              # success with diversity, row by row
    python evaluate.py nfe  --ckpt out/maze-mdlm-gumbel out/maze-mdlm            # success against NFE, a row per model
"""
import json
import math
import os
import subprocess
import sys
import time

import numpy as np
import torch
from tqdm import tqdm

from data.prepare import (BadInput, Parser, check_output, maze_dataset, maze_keys, maze_paths, maze_valid, number,
                          optional, run_main)
from mdlm import reveal_steps, unmask
from sample import device_and_dtype, generate, load_model, resolve_sampling, sampling_flags
from teacher import AR, extract_sequential


# ---------------------------------------------------------------------------------------------------------------------
# results

def git_commit():
    """The commit of this code, with + when it was changed since, or "" outside a checkout."""
    def git(*a):
        return subprocess.run(["git", "-C", os.path.dirname(os.path.abspath(__file__)), *a],
                              capture_output=True, text=True).stdout
    try:
        return git("rev-parse", "--short", "HEAD").strip() + "+" * bool(git("status", "--porcelain", "-uno"))
    except OSError:
        return ""


PERCENT = {"success", "stderr", "validity_mass", "agree", "agree_position"}


def print_table(rows, columns):
    """Flat dicts as a Markdown table, `columns` {key: title}; a column no row has is left out. Fractions become %."""
    def cell(row, c):
        v = row.get(c)
        if v is None:
            return ""
        if c in PERCENT:
            return f"{100 * v:.1f}"
        return f"{v:.1f}" if isinstance(v, float) else str(v)
    columns = {c: title for c, title in columns.items() if any(row.get(c) is not None for row in rows)}
    print("| " + " | ".join(columns.values()) + " |\n|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(cell(row, c) for c in columns) + " |")
    sys.stdout.flush()


def write_json(path, rows, args, began, dtype, device):
    if path:
        meta = dict(n=args.n, seed=args.seed, seconds=round(time.time() - began, 1), precision=dtype, device=device,
                    git=git_commit(), args=vars(args))
        with open(path, "w") as f:
            json.dump(dict(meta=meta, rows=rows), f, indent=1)


# ---------------------------------------------------------------------------------------------------------------------
# the maze

class ExactDenoiser:
    """The perfect plain MDLM of an enumerable language: true conditionals, from its rows [M, L] (repeats are weights).

    Stands in for a network in `mdlm.unmask`: hidden(x) is the log-probability of every token at every position given
    what is revealed. On a context that no row fits (a sampler that reveals several tokens gets there) it is uniform.
    """

    def __init__(self, rows, vocab_size):
        # float64: exact counts, also under autocast
        self.V, self.one_hot = vocab_size, torch.nn.functional.one_hot(
            torch.as_tensor(rows).long(), vocab_size).double().flatten(1)

    def hidden(self, x, rows=None):
        given = torch.nn.functional.one_hot(x, self.V + 1)[..., :self.V].double().flatten(1)       # [MASK] -> zeros
        fits = (given @ self.one_hot.T == (x < self.V).sum(1, keepdim=True)).double()               # (B, M)
        count = (fits @ self.one_hot).view(*x.shape, self.V)
        p = count / count.sum(-1, keepdim=True)
        return torch.where(count.sum(-1, keepdim=True) > 0, p, torch.full_like(p, 1 / self.V)).log()

    def logits(self, h):
        return h


def maze_statistics(rows):
    """Samples [n, 10] -> success, its standard error, distinct valid paths, effective number n(n-1) / sum c(c-1)."""
    valid = maze_valid(rows)
    p, (_, c) = valid.mean(), np.unique(maze_keys(rows[valid]), return_counts=True)
    pairs, n = (c * (c - 1)).sum(), valid.sum()
    return dict(success=float(p), stderr=math.sqrt(p * (1 - p) / len(rows)), distinct=len(c),
                effective=float(n * (n - 1) / pairs) if pairs else None)


def sample_maze(model, n, steps, greedy, args, device, batch=1000):
    """n samples -> (rows [n, 10] without BOS, mean network calls)."""
    tau, top_p = (1.0, 1.0) if isinstance(model, AR) else resolve_sampling(args, model)       # the reference, as it is
    generator, out, calls = torch.Generator(device).manual_seed(args.seed), [], 0
    for a in range(0, n, batch):
        b = min(batch, n - a)
        start = torch.full((b, 1 if isinstance(model, AR) else model.length), getattr(model, "mask_id", model.bos),
                           device=device)
        start[:, 0] = model.bos
        tokens, nfe = generate(model, start, steps, tau, top_p, greedy, args.sampler, args.order, generator=generator)
        out.append(tokens[:, 1:].cpu().numpy())
        calls += int(nfe.sum())
    return np.concatenate(out), calls / n


def maze_theory(name, n, steps, seed):
    """What a perfect noise-blind MDLM reaches at `steps` ancestral steps: the sampler with the true conditionals."""
    exact, generator, out, calls = (ExactDenoiser(maze_dataset(name).astype(np.int64), 5),
                                    torch.Generator().manual_seed(seed), [], 0)
    for a in range(0, n, 1000):
        x = torch.full((min(1000, n - a), 10), 5)
        x, nfe = unmask(x, reveal_steps(x == 5, steps, generator=generator), 5, exact.hidden, exact.logits,
                        generator=generator)
        out.append(x.numpy())
        calls += int(nfe.sum())
    return np.concatenate(out), calls / n


def validity_mass(model, device):
    """The exact probability that an AR model writes a valid path: a sum over all 2000, in one pass."""
    rows = torch.from_numpy(maze_paths().astype(np.int64)).to(device)
    rows = torch.cat([torch.full_like(rows[:, :1], model.bos), rows], 1)
    logp = model.log_probs(rows[:, :-1]).gather(-1, rows[:, 1:, None]).squeeze(-1)
    return float(logp.double().sum(-1).exp().sum())


def map_agreement(student, teacher, n, seed, device):
    """With fresh noise and everything masked: how often the student's argmax is what the teacher writes from it.

    -> (fraction of sequences, fraction of positions).
    """
    generator = torch.Generator(device).manual_seed(seed)
    tokens, noise = extract_sequential(teacher, n, generator=generator)
    start = torch.full_like(tokens, student.mask_id)
    start[:, 0] = student.bos
    same = (student.generate(start, 1, greedy=True, noise=noise)[0] == tokens)[:, 1:]
    return float(same.all(1).float().mean()), float(same.float().mean())


MAZE_COLUMNS = dict(model="model", decode="decode", nfe="NFE", nfe_counted="calls", success="success %", stderr="±",
                    distinct="distinct", effective="effective", validity_mass="validity mass %",
                    agree="map agreement, paths %", agree_position="positions %")


def maze_rows(models, args, device, theory=True):
    """Every row of the maze table for these models; an AR model among them is `teacher`, and the map's reference."""
    names = {model.meta["name"] for model in models}
    if len(names) > 1 or not names <= {"maze", "maze_skewed"}:
        raise BadInput(f"--ckpt: these were trained on {', '.join(sorted(names))}: give checkpoints of one maze")
    teacher = next((m for m in models if isinstance(m, AR)), None)
    jobs = [(m, d, k) for m in models for d in (["sample"] if isinstance(m, AR) else args.decode)
            for k in ([10] if isinstance(m, AR) else args.nfe)]
    jobs += [("theory", "sample", k) for k in args.nfe] * theory
    rows = []
    for model, decode, k in tqdm(jobs, desc="maze", unit="row", disable=not sys.stderr.isatty()):
        if model == "theory":
            sampled, calls = maze_theory(next(iter(names)), 10 * args.n, k, args.seed)
            rows.append(dict(model="theory", decode=decode, nfe=k, nfe_counted=calls, **maze_statistics(sampled)))
            continue
        sampled, calls = sample_maze(model, args.n, k, decode == "greedy", args, device)
        row = dict(model="teacher" if model is teacher else model.name, decode=decode, nfe=k, nfe_counted=calls,
                   **maze_statistics(sampled))
        if isinstance(model, AR):
            row["validity_mass"] = validity_mass(model, device)
        elif teacher and model.noise_embed is not None and (decode, k) == ("greedy", 1):
            row["agree"], row["agree_position"] = map_agreement(model, teacher, args.n, args.seed, device)
        rows.append(row)
    return rows


def sampling_note(args, models):
    """What the numbers depend on besides the checkpoints, for a table's footer."""
    tau, top_p = resolve_sampling(args, models[-1])
    return (f"{args.sampler} sampler, {args.order} order, tau {tau}, top_p {top_p}, {args.weights} weights, "
            f"seed {args.seed}.")


def maze(args, models, device):
    """Success ± standard error per NFE, with diversity (so that success bought by collapse shows). Appendix E.1."""
    rows = maze_rows(models, args, device)
    print_table(rows, MAZE_COLUMNS)
    print(f"\nn = {args.n} samples a row ({10 * args.n} for theory: the perfect noise-blind MDLM). effective: "
          "number of equally likely paths that would repeat as often.\nStudents: " + sampling_note(args, models))
    return rows


def nfe(args, models, device):
    """Success against NFE, one line per model and decoding; runs that differ in nothing but their seed are averaged."""
    if args.plot:
        optional("matplotlib", "--plot")
    rows = maze_rows(models, args, device)
    recipe = {m.name: {k: v for k, v in m.args.items() if k not in ("seed", "out")} for m in models}
    first = {name: next(other for other in recipe if recipe[other] == recipe[name]) for name in recipe}
    if len({(first[m.name], m.args["seed"]) for m in models}) < len(models):
        first = {}                                         # the same run twice is no second seed
    groups = {}                                            # (model, decode) -> {nfe: [row of each seed]}
    for row in rows:
        line = groups.setdefault((first.get(row["model"], row["model"]), row["decode"]), {})
        line.setdefault(row["nfe"], []).append(row)
    table, points = [], []
    for (model, decode), line in groups.items():
        seeds = len(next(iter(line.values())))
        label = model + f" and {seeds - 1} other seed{'s' * (seeds > 2)}" * (seeds > 1)
        means = {k: 100 * np.mean([r["success"] for r in rs]) for k, rs in line.items()}
        errors = {k: 100 * (np.std([r["success"] for r in rs], ddof=1) if seeds > 1 else rs[0]["stderr"])
                  for k, rs in line.items()}
        table.append(dict(model=label, decode=decode) | {k: f"{means[k]:.1f} ± {errors[k]:.1f}" for k in line})
        points.append((f"{label}, {decode}", list(line), [means[k] for k in line], [errors[k] for k in line]))
    print_table(table, dict(model="success %", decode="decode") | {k: f"NFE {k}" for k in sorted({10, *args.nfe})})
    print(f"\n± standard error over {args.n} samples ({10 * args.n} for theory), or standard deviation over seeds.\n"
          f"Students: {sampling_note(args, models)}")
    if args.plot:
        plot_nfe(args.plot, points)
    return rows


def plot_nfe(path, points):
    """points: (label, [nfe], [success %], [error]) per line; written to a .png or .svg."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    for label, ks, ys, errors in points:
        plt.errorbar(ks, ys, errors, label=label, marker="o", capsize=2, linestyle=":" if "theory" in label else "-")
    plt.xscale("log", base=2)
    plt.xlabel("NFE")
    plt.ylabel("success %")
    plt.legend(fontsize="small")
    plt.savefig(path, dpi=150, bbox_inches="tight")


# ---------------------------------------------------------------------------------------------------------------------

def steps_list(text):
    return sorted({number(int, 1)(part) for part in text.split(",")})


def decodes(text):
    values = text.split(",")
    if not set(values) <= {"sample", "greedy"}:
        raise BadInput(f"--decode={text}: a comma list of sample, greedy")
    return values


def main(argv=None):
    parser = Parser(description="Evaluate checkpoints.")
    sub = parser.add_subparsers(dest="what", required=True, metavar="maze|nfe", parser_class=Parser)
    for name, function in (("maze", maze), ("nfe", nfe)):
        p = sub.add_parser(name, help=function.__doc__.splitlines()[0])
        p.add_argument("--ckpt", nargs="+", required=True, help="checkpoints or run directories")
        p.add_argument("--nfe", type=steps_list, default=[1, 2, 4, 8, 16],
                       help="numbers of steps, as in 1,2,4")
        p.add_argument("--n", type=number(int, 2), default=1000, help="samples per row")
        p.add_argument("--decode", type=decodes, default=["sample", "greedy"],
                       help="sample, greedy (argmax)")
        p.add_argument("--json", help="also write the rows to this file")
        if name == "nfe":
            p.add_argument("--plot", help="also draw them into this .png or .svg (needs matplotlib)")
        sampling_flags(p)
    args = parser.parse_args(argv)
    began = time.time()
    for flag in ("json", "plot"):
        if getattr(args, flag, None):
            check_output("--" + flag, getattr(args, flag))
    device, dtype, autocast = device_and_dtype(args.dtype)
    models = [load_model(path, args.weights, device) for path in args.ckpt]
    if len({m.name for m in models}) < len(models):
        for path, m in zip(args.ckpt, models):
            m.name = path                                  # run directories of the same name
    with autocast, torch.no_grad():
        rows = {"maze": maze, "nfe": nfe}[args.what](args, models, device)
    write_json(args.json, rows, args, began, dtype, device)


if __name__ == "__main__":
    run_main(main)
