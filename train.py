"""Train a teacher or a student.

    python train.py --model=mdlm --gumbel --data=maze                        # minutes on 2 CPU cores, prints a table
    torchrun --nproc_per_node=8 train.py --model=mdlm --gumbel               # the paper: OpenWebText, GPT-2-large

Rerun the same command to continue an interrupted run: on a CPU the result is the same, bit for bit. The row order and
noise levels of a global batch are functions of (seed, step, row), its masks, noise and dropout of (seed, step, rank,
micro-step), so nothing but the step needs to be restored.
"""
import argparse
import copy
import json
import math
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import evaluate
from bd3lm import windows
from data.cli import BadInput, Parser, git_commit, number, optional, run_main
from data.prepare import make_maze
from data.shards import Shards
from data.teacher_cache import LogitsTable, TeacherCache
from gumbel import KINDS
from mdlm import T_MIN, stratified_t
from medusa import Medusa
from sample import (MODELS, build, default_teacher, device_and_dtype, load_ar, load_checkpoint, load_model,
                    torch_seed)
from teacher import CausalLM, body_to_bfloat16, model_hash

SIZES = dict(tiny=(8, 256, 8), small=(12, 768, 12), medium=(24, 1024, 16))      # n_layer, n_embd, n_head

# what flags bring; later lines override earlier ones, explicit flags override all. The other defaults are the paper's
# (Appendix C.1).
PRESETS = {
    "--model=bd3lm": dict(block_size=4),
    "--model=medusa": dict(heads=3, dropout=0.0, batch_size=256, lr=1e-3, schedule="cosine", steps=20_000),       # C.2
    "--data=lm1b": dict(length=128),
    "--data=maze": dict(length=None, n_layer=4, n_embd=128, n_head=4, dropout=0.0, batch_size=128, lr=1e-3, steps=1600,
                        warmup=100, schedule="cosine", eval_every=500, save_every=200, log_every=20),
    "--data=maze --model=ar": dict(n_layer=8, n_head=8, batch_size=64, lr=2e-3, steps=1200),
    "--data=maze --model=bd3lm": dict(length=12),                               # 11 is prime: rows get one more PAD
    "--data=maze --model=mdlm --gumbel": dict(t_one=0.5),
    "--data=maze --model=bd3lm --gumbel": dict(t_one=0.5)}
MASKED, MAZES = ("mdlm", "bd3lm"), ("maze", "maze_skewed")

# torch's bf16 peak per device without sparsity, FLOP/s, for MFU
PEAKS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L40": 181e12,
         "L4": 121e12, "4090": 165e12}

# flags that may differ when a run is continued: they do not change what is computed (compile: but for rounding)
FREE = {"out", "log_every", "eval_every", "eval_rows", "save_every", "wandb", "compile", "report"}


def window(text):
    """--clip: "0.3,0.8" -> (0.3, 0.8)."""
    low, high = (number(float, 0, 1)(part) for part in text.split(",")) if text.count(",") == 1 else (1, 0)
    if not (max(low, T_MIN) < high or low == high == 1):
        raise BadInput(f"--clip={text}: two noise levels, 0 <= LOW < HIGH <= 1, as in 0.3,0.8")
    return max(low, T_MIN), high


def parse(argv):
    parser = Parser(description="Train an AR teacher, or a parallel student with or without Gumbel Distillation.")
    count, fraction, positive = number(int, 1), number(float, 0, 1), number(float, above=0)

    def group(title):
        return parser.add_argument_group(title).add_argument
    add = group("what to train")
    add("--model", choices=list(MODELS), default="mdlm", help="ar: a teacher, or the AR baseline")
    add("--gumbel", action="store_true", help="condition the student on the teacher's noise: the method")
    add("--noise", choices=KINDS, help="implies --gumbel; the others are Table 5's ablations and a control")
    add("--inject", choices=["replace", "add"], default="replace", help="noise in place of, or added to, [MASK]")
    add("--kd", choices=["token"], help="a baseline without noise: NELBO + KL from the teacher's next token (Table 4)")
    add("--teacher", help="AR checkpoint, gpt2[-medium|-large|-xl], a GPT-2 folder, or hf:NAME (medusa: the backbone); "
        "default: gpt2-large (medusa: gpt2) for its vocabulary; on the maze found, or trained first, by itself")
    add("--teacher_cache", type=count, metavar="K", help="the teacher reads all rows once, its K best tokens at each "
        "place are kept beside the shards: noise is then drawn without it (OpenWebText: 307 GB at K = 8)")
    add("--init_from", help="start from these weights: a checkpoint of the same model, a published MDLM, or an AR "
        "checkpoint of the same shape (the student reads its outputs shifted by one, as AR)")
    add("--data", default="openwebtext", help="folder of shards, or a name: maze, maze_skewed, or data/NAME")
    add("--length", type=number(int, 2), default=1024, help="tokens of a row, BOS included")
    add = group("block diffusion (--model=bd3lm)")
    add("--block_size", type=count, help="tokens of a block, a divisor of --length; default 4")
    add("--clip", type=window, metavar="LOW,HIGH", help="train on noise levels in this window; validation stays as is")
    add("--clip_search", action="store_true", help="find the window of least variance at the start and each validation")
    add = group("multi-token prediction (--model=medusa)")
    add("--heads", type=count, help="heads beside the backbone's own; default 3")
    add = group("network")
    add("--size", choices=SIZES, help="tiny 8/256/8, small 12/768/12 (default), medium 24/1024/16")
    add("--n_layer", type=count, default=12, help="overrides --size; medusa: layers that read the noise, 1")
    add("--n_embd", type=count, default=768, help="overrides --size")
    add("--n_head", type=count, default=12, help="overrides --size")
    add("--dropout", type=fraction, default=0.1, help="on both residual branches")
    add = group("optimisation")
    add("--steps", type=count, default=1_000_000, help="optimizer steps")
    add("--batch_size", type=count, default=512, help="rows per step, over all processes")
    add("--micro_batch_size", type=count, help="rows per forward pass and process; default: all, on CUDA at most 32")
    add("--lr", type=positive, default=3e-4, help="AdamW's peak learning rate")
    add("--warmup", type=number(int, 0), default=2500, help="steps of linear warm-up")
    add("--schedule", choices=["constant", "cosine"], default="constant", help="after the warm-up; cosine ends at 0")
    add("--clip_norm", type=positive, default=1.0, help="gradient norm is clipped to this")
    add("--ema", type=number(float, 0, 0.999999), default=0.9999, help="decay of the averaged weights, once warmed up")
    add("--t_one", type=fraction, default=0.0, help="fraction of rows fully masked; the loss is then no NELBO")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="initial weights, data order, masks, noise, dropout")
    add = group("running")
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="autocast; auto: bfloat16 on CUDA")
    add("--compile", action="store_true", help="torch.compile the transformer")
    add("--out", help="run directory; default out/<data>-<model>[-gumbel]")
    add("--log_every", type=count, default=50, help="steps between lines of log.jsonl")
    add("--eval_every", type=count, default=5000, help="steps between validations (EMA weights)")
    add("--eval_rows", type=count, default=2000, help="validation rows, the same each time")
    add("--save_every", type=count, default=1000, help="steps between checkpoints")
    add("--report", type=number(int, 0), default=1000, help="maze: samples per row of the final table; 0: no table")
    add("--wandb", help="also log to this Weights & Biases project (pip install wandb)")

    first = parser.parse_args(argv)
    given = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(first)))))   # None where no flag says
    name = os.path.basename(first.data.rstrip("/"))
    data, model = f"--data={'maze' if name in MAZES else name}", f"--model={first.model}"
    gumbel = " --gumbel" * bool(first.gumbel or first.noise)
    for key in (model, data, f"{data} {model}", f"{data} {model}{gumbel}"):
        parser.set_defaults(**PRESETS.get(key, {}))
    if first.size:
        parser.set_defaults(**dict(zip(("n_layer", "n_embd", "n_head"), SIZES[first.size])))
    args = parser.parse_args(argv)
    args.noise = args.noise or ("gumbel" if args.gumbel else None)
    args.gumbel = args.noise is not None
    medusa, masked = args.model == "medusa", args.model in MASKED
    for flags, read, by in (
            ("gumbel noise", args.model != "ar", "for students, and --model=ar is the teacher"),
            ("inject", masked and args.gumbel, "read by masked models (mdlm, bd3lm) with --gumbel only"),
            ("teacher_cache", masked and paired(args), "for masked models (mdlm, bd3lm) with noise from a teacher"),
            ("kd", masked and not args.gumbel, "a baseline of masked models (mdlm, bd3lm) without noise"),
            ("teacher", paired(args) or args.kd or medusa,
             "read with --gumbel (not with --noise=unpaired), --kd and --model=medusa only"),
            ("t_one", masked, "for masked models (mdlm, bd3lm)"),
            ("block_size clip clip_search", args.model == "bd3lm", "for --model=bd3lm"),
            ("heads", medusa, "for --model=medusa"),
            ("size n_embd n_head", not medusa, "not for --model=medusa, as wide as its backbone"),
            ("n_layer dropout", not medusa or args.gumbel,
             "read by --model=medusa with --gumbel only (a head is one layer)")):
        for flag in flags.split():
            if given[flag] and not read:
                parser.error(f"--{flag} is {by}: leave --{flag} out, or change the other flags")
    if medusa:
        args.n_layer, args.n_embd, args.n_head = given["n_layer"] or 1, None, None
    elif args.n_embd % (2 * args.n_head):
        parser.error(f"--n_embd={args.n_embd} must be a multiple of 2 * --n_head = {2 * args.n_head}")
    if args.model == "bd3lm":
        if args.length % args.block_size:
            parser.error(f"--block_size={args.block_size} does not divide --length={args.length}: choose a divisor")
        if bool(args.clip) + args.clip_search + (args.t_one > 0) > 1:
            parser.error("--clip, --clip_search and --t_one (a default of --gumbel on the maze) exclude each other: "
                         "give one, and --t_one=0 with the first two")
    if args.data == name:
        args.data = os.path.join("data", name)
    args.out = args.out or os.path.join("out", f"{name}-{args.model}" + f"-{args.noise}" * args.gumbel
                                        + f"-{args.kd}-kd" * bool(args.kd))
    return args


def paired(args):
    """Whether the student reads the noise behind its text, drawn from the teacher's posterior."""
    return args.noise not in (None, "unpaired")


# ---------------------------------------------------------------------------------------------------------------------
# randomness: everything is a function of the seed and of where it is used

def rng(*key):
    return np.random.default_rng(key)


ROWS, LEVELS, NOISE, EVAL = range(4)                        # what a draw is for, part of its key


class RowOrder:
    """Row numbers of each global batch: an epoch visits all rows in a seeded permutation; batches run across epochs."""

    def __init__(self, n, batch_size, seed):
        self.n, self.batch_size = n, batch_size
        self.permutation = lru_cache(maxsize=1)(lambda epoch: rng(seed, ROWS, epoch).permutation(n))

    def __call__(self, step):
        first = step * self.batch_size
        return np.array([self.permutation(i // self.n)[i % self.n] for i in range(first, first + self.batch_size)])


# ---------------------------------------------------------------------------------------------------------------------
# processes

class World:
    """The processes of this run: one, or those of torchrun (nccl on CUDA, gloo on CPU)."""

    def __init__(self, dtype):
        self.device, self.dtype, self.autocast = device_and_dtype(dtype)
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ.get("RANK", 0))
        if self.device == "cuda":
            self.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
            torch.cuda.set_device(self.device)
        if self.size > 1:
            dist.init_process_group("nccl" if "cuda" in self.device else "gloo")
        self.master = self.rank == 0

    def sum(self, *values):
        """Floats, summed over the processes."""
        x = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.size > 1:
            dist.all_reduce(x)
        return x.tolist()

    def barrier(self):
        if self.size > 1:
            dist.barrier()

    @contextmanager
    def in_turn(self, first):
        """The processes that are `first` go through the body before the others do."""
        if not first:
            self.barrier()
        try:
            yield
        finally:
            if first:
                self.barrier()

    def say(self, text):
        if self.master:
            tqdm.write(text, file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# where a run starts and continues: checkpoint, log, teacher, weights

def save(path, state):
    """Written beside, synced, renamed: a crash leaves the old checkpoint or the new one."""
    with open(path + ".tmp", "wb") as f:
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".tmp", path)


def resume(args, meta):
    """The checkpoint in --out if this command continues it, None if there is none; BadInput if it is another run's."""
    if not os.path.exists(os.path.join(args.out, "ckpt.pt")):
        return None
    ckpt = load_checkpoint(args.out)
    old = {k: v for k, v in vars(args).items() if v is None or v is False} | ckpt["args"]  # new flags, off: no change
    free = FREE | ({"steps"} if args.schedule == "constant" else set())            # the cosine depends on --steps
    changed = [f"--{k}: {old.get(k)} there, {v} now" for k, v in vars(args).items()
               if k not in free and old.get(k) != v] + ["the data"] * (ckpt["meta"] != meta)
    if changed:
        raise BadInput(f"{args.out} holds a run with other settings ({'; '.join(changed)}): choose another --out, or "
                       "repeat its command to continue it")
    return ckpt


def open_log(out, step):
    """log.jsonl, to append to: lines of steps to be run again are dropped, as is a broken last line."""
    os.makedirs(out, exist_ok=True)
    path, kept = os.path.join(out, "log.jsonl"), []
    if step and os.path.exists(path):
        with open(path) as f:
            kept = [line for line in f if line.endswith("\n") and json.loads(line).get("step", 0) <= step]
    log = open(path, "w", buffering=1)
    log.writelines(kept)
    return log


def find_teacher(args, meta, world):
    """The model of --teacher; on the maze, the one that `--model=ar` with the same data trains, trained if absent."""
    path = args.teacher or default_teacher(meta, args.length)
    if args.teacher is None and args.model == "medusa" and path == "gpt2-large":
        path = "gpt2"                                      # the paper's backbone is the small one
    if args.teacher is None and os.path.basename(args.data) in MAZES:
        there = load_checkpoint(path) if os.path.exists(os.path.join(path, "ckpt.pt")) else None
        if there is None or there["step"] < there["args"]["steps"]:
            world.say(f"teacher: {path} is {'not finished' if there else 'not there'}, training it first")
            train(parse(["--model=ar", f"--data={args.data}", f"--out={path}", f"--dtype={args.dtype}"]
                        + [f"--length={args.length}"] * bool(args.length)), world)
            world.barrier()
    if path is None:
        raise BadInput("--gumbel, --kd and --model=medusa need --teacher: an AR checkpoint of this vocabulary; train "
                       f"one with `python train.py --model=ar --data={args.data}`")
    with world.in_turn(world.master):                      # one process downloads
        return load_ar("--teacher", path, meta, args.length, world.device)


def initial_weights(model, source, args):
    """--init_from: the weights of `source` into `model`; BadInput where they do not fit. A noise embedding that the
    source lacks stays new, one that the model lacks is left out; the row of [MASK] that an AR model lacks is new."""
    own, embed, noise = model.state_dict(), "transformer.embed.weight", ("noise_embed.", "accumulator.")
    state = {k: v for k, v in own.items() if k.startswith(noise)} | {
        k: v for k, v in source.state_dict().items() if k in own or not k.startswith(noise)}
    if embed in state and embed in own and state[embed].shape == own[embed][:-1].shape:
        state[embed] = torch.cat([state[embed], own[embed][-1:]])
    try:
        model.load_state_dict(state)
    except RuntimeError as e:
        why = str(e).splitlines()[1].strip("\t .").split(": copying")[0].split(", ")[0]           # the first difference
        raise BadInput(f"--init_from={args.init_from} is another kind or shape of network ({why}): give the same flags "
                       "of the network and vocabulary, or leave --init_from out") from None


def new_model(args, data, teacher, ckpt, world):
    """The model of this run, initialised; `ckpt`, of the same run or None, has what cannot be seen from the flags."""
    torch.manual_seed(args.seed)
    meta, source = data.meta, load_model(args.init_from) if args.init_from and not ckpt else None
    old = ckpt["config"] if ckpt else source.config if source else {}
    config = dict(vocab_size=meta["vocab_size"], bos=meta["bos"], predict_bos=meta["predict_bos"], length=data.length,
                  n_layer=args.n_layer, dropout=args.dropout)
    if args.model == "medusa":
        layer, sha256 = teacher.output_layer(), model_hash(teacher)
        if old.get("sha256", sha256) != sha256:
            raise BadInput(f"{args.out if ckpt else args.init_from} holds heads of another backbone than "
                           f"{teacher.path} is now: put that one back, or choose another --out and --init_from")
        config |= dict(n_embd=layer.weight.shape[1], heads=args.heads, noise=args.noise, bias=layer.bias is not None,
                       backbone=teacher.path, sha256=sha256)
    else:
        config |= dict(n_embd=args.n_embd, n_head=args.n_head)
    if args.model in MASKED:
        config |= dict(noise=args.noise, inject=args.inject, shift=old.get("shift", isinstance(source, CausalLM)))
    if args.model == "bd3lm":
        config["block_size"] = args.block_size
        if (there := old.get("block_size", args.block_size)) != args.block_size:
            world.say(f"--init_from={args.init_from} has block size {there}, this run {args.block_size}: the weights "
                      "fit any")
    model = build(args.model, config)
    if args.model == "medusa":
        model.attach(teacher, start=True)
    if source:
        initial_weights(model, source, args)
    return model.to(world.device)


# ---------------------------------------------------------------------------------------------------------------------
# training

def flops_per_row(model, teacher, L):
    """Useful FLOPs of one row, forward and backward: 6 per weight and token, 12 L D per layer for attention (a teacher:
    2 and 4). Output layer, teacher's head and noise projection at the masked positions only: half, on average."""
    def weights(module):
        return sum(p.numel() for p in module.parameters()) if module else 0

    def forward(net, share, twice=False):                  # share: of the positions, that the output layer sees
        blocks = 2 * weights(net.blocks) + 4 * len(net.blocks) * L * net.embed.weight.shape[1]
        return L * ((1 + twice) * blocks + 2 * share * net.head.weight.numel())
    noise = getattr(model, "noise_embed", None)
    if isinstance(model, Medusa):                          # the noise and a row of K + 1 places at every position
        masked = 1.0 if noise else 0.0
        total = 6 * L * (weights(model.heads) + (len(model.heads) + 1) * weights(model.accumulator))
    else:
        masked, net = 0.5, model.transformer
        total = 3 * forward(net, 1.0 if net.causal else masked, getattr(model, "n_blocks", 1) > 1)    # BD3-LM: [z ; x]
    total += L * masked * 4 * weights(noise)
    if teacher is not None:                                # of a Hugging Face model, attention is not counted
        total += forward(teacher.transformer, masked) if hasattr(teacher, "transformer") else 2 * L * weights(teacher)
    return total


def lr_at(step, args):
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    if args.schedule == "constant":
        return args.lr
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - args.warmup) / max(1, args.steps - args.warmup)))


def on_device(tokens, t, teacher, seed, args, world):
    """Tokens on the device, and what `model.loss` takes besides, at noise levels t, of a seed's draws."""
    kw = dict(t=t.to(world.device), teacher=teacher, generator=torch.Generator(world.device).manual_seed(seed))
    read = dict(ar=(), medusa=("generator",)).get(args.model, kw)
    return tokens.to(world.device, non_blocking=True), {k: kw[k] for k in read}


def validation_batches(model, teacher, data, n, args, world, window=()):
    """n fixed validation rows with fixed draws, the share of this process: tokens, arguments of `model.loss`."""
    micro = 32                                             # rows that share a seed: not a flag, so that values compare
    n, n_blocks = min(n, len(data)), getattr(model, "n_blocks", 1)
    order = rng(args.seed, EVAL).permutation(len(data))[:n]
    levels = stratified_t(n * n_blocks, rng(args.seed, EVAL, 1), 0.0, *window).view(n, n_blocks)
    for i in range(world.rank, math.ceil(n / micro), world.size):
        part = slice(i * micro, (i + 1) * micro)
        yield on_device(torch.from_numpy(data.rows(order[part])), levels[part], teacher,
                        torch_seed(args.seed, EVAL, 2, i), args, world)


@torch.no_grad()
def validate(model, teacher, data, args, world):
    """Validation loss in nats per predicted token, on fixed rows with fixed draws, shared out over the processes.

    Same value whatever their number. For students with noise it is the loss given the posterior's noise: no likelihood.
    """
    total = count = 0.0
    for tokens, kw in validation_batches(model, teacher, data, args.eval_rows, args, world):
        with world.autocast:
            total += model.loss(tokens, **kw)[0].item() * len(tokens)
        count += len(tokens)
    total, count = world.sum(total, count)
    return total / count


@torch.no_grad()
def search_clip(model, teacher, data, args, world):
    """The window of noise levels in which a block's loss varies least, and the variances, {(low, high): (nats per
    token)^2}: over blocks, rows (256, the same with the same draws) and processes (BD3-LM, Section 5).
    """
    found = {}
    for window in tqdm(windows(model.block_size), desc="clip search", leave=False, disable=not world.master):
        sums = np.zeros(3)
        for tokens, kw in validation_batches(model, teacher, data, min(256, args.eval_rows), args, world, window):
            with world.autocast:
                losses, masked, _ = model.losses(tokens, clip=window, **kw)
            v = torch.zeros(tokens.shape, dtype=torch.float64, device=tokens.device).masked_scatter(
                masked, losses.double()).view(-1, model.block_size).mean(1)
            sums += len(v), v.sum().item(), v.square().sum().item()
        count, total, squares = world.sum(*sums)
        found[window] = squares / count - (total / count) ** 2
    best = min(found, key=found.get)
    world.say(f"clip {best[0]:g},{best[1]:g}: a block's loss has variance {found[best]:.4f} (unclipped "
              f"{found[T_MIN, 1.0]:.4f})")
    return best, found


def train(args, world):
    """One run: args -> out/.../ckpt.pt. The loop that everything else here serves. Returns the dataset's meta."""
    local = args.batch_size // world.size
    if args.batch_size % world.size:
        raise BadInput(f"--batch_size={args.batch_size} must be a multiple of the number of processes, {world.size}")
    micro = args.micro_batch_size or (
        max(m for m in range(1, 33) if local % m == 0) if "cuda" in world.device else local)
    if local % micro:
        raise BadInput(f"--micro_batch_size={micro} must divide the {local} rows that each process has of a batch")
    wandb = optional("wandb", "--wandb") if args.wandb and world.master else None
    there = os.path.abspath(args.out)
    while not os.path.exists(there):
        there = os.path.dirname(there)
    if not os.path.isdir(there) or not os.access(there, os.W_OK):
        raise BadInput(f"--out={args.out} cannot be a run directory, {there} is a file or read-only: choose another")

    # data, teacher, model
    data, val = Shards(args.data, "train", args.length), Shards(args.data, "val", args.length)
    meta, medusa = data.meta, args.model == "medusa"
    ckpt = resume(args, meta)
    teacher = find_teacher(args, meta, world) if medusa or args.kd or paired(args) else None
    model = new_model(args, data, teacher, ckpt, world)
    averaged = copy.deepcopy(model, {id(teacher): teacher}).eval().requires_grad_(False)  # EMA; shares the backbone
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.999), eps=1e-8,
                                  weight_decay=0.0, fused=True)
    step, clip = 0, args.clip
    if ckpt:
        model.load_state_dict(ckpt["model"])
        averaged.load_state_dict(ckpt["ema"])
        optimizer.load_state_dict(ckpt["optimizer"])
        step, clip = ckpt["step"], ckpt.get("clip")
        torch.set_rng_state(ckpt["rng"])
        world.say(f"{args.out}: {'complete' if step >= args.steps else 'continuing'} at step {step}")
        if step >= args.steps:
            return meta
    if args.compile:
        for net in ([getattr(teacher, "transformer", None) or teacher.lm.base_model]
                    + [model.accumulator] * bool(args.noise) if medusa else [model.transformer]):
            net.compile()
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True) if world.size > 1 else model
    table = None
    if args.teacher_cache:
        first = os.environ.get("LOCAL_RANK", "0") == "0"   # of this machine, whose disk may be its own: makes the files
        with world.in_turn(first):
            table = TeacherCache(teacher, model_hash(teacher), data, args.teacher_cache, first, world.dtype)
    elif teacher and not medusa and len(data) * data.length * meta["vocab_size"] <= 1 << 24:
        table = LogitsTable(teacher, data)                                     # small dataset: one teacher pass for all
    if teacher and not isinstance(table, LogitsTable) and world.dtype == "bfloat16":
        body_to_bfloat16(teacher)
    if args.teacher_cache:
        with world.autocast:
            table.fill(teacher, data, world.rank, world.size)
        world.barrier()

    # log
    gpu = torch.cuda.get_device_name() if "cuda" in world.device else ""
    peak = next((v for k, v in PEAKS.items() if k in gpu), None)
    flops = flops_per_row(model, None if table else teacher, data.length)
    parameters = sum(p.numel() for p in model.parameters())
    log = open_log(args.out, step) if world.master else open(os.devnull, "w")
    board = wandb.init(project=args.wandb, name=os.path.basename(args.out), config=vars(args)) if wandb else None

    def record(**line):
        log.write(json.dumps(line) + "\n")
        if board and "step" in line:
            board.log(line, step=line["step"])
    if step == 0:
        record(args=vars(args), config=model.config, device=world.device, dtype=world.dtype, processes=world.size,
               micro_batch_size=micro, parameters=parameters, threads=torch.get_num_threads(), torch=torch.__version__,
               git=git_commit(), rows=len(data), meta=meta)
    world.say(f"{args.out}: {args.n_layer} layers x {model.config['n_embd']}, {parameters / 1e6:.1f}M parameters, "
              f"{len(data)} rows of {data.length}, {world.size} x {world.device}, {world.dtype}, "
              f"micro-batch {micro} of {args.batch_size}")

    accumulate, pool = local // micro, ThreadPoolExecutor(1)

    def mine(m):                                           # this process's part of the batch in micro-step m
        a = (m * world.size + world.rank) * micro
        return slice(a, a + micro)

    def fetch(step, m):
        """The rows of this process's micro-step, and what the table knows of them, on the host; pinned for CUDA."""
        rows = order(step)[mine(m)]
        read = [torch.from_numpy(data.rows(rows))] + ([table.load(rows)] if table else [])
        return [x.pin_memory() for x in read] if "cuda" in world.device else read

    def choose_clip():
        best, found = search_clip(averaged, teacher, val, args, world)
        record(step=step, clip=best, clip_search={f"{a:g},{b:g}": v for (a, b), v in found.items()})
        return best

    # SIGTERM and SIGINT: finish the step, save, stop
    stop = []
    handlers = {s: signal.signal(s, lambda signum, frame: stop.append(signum)) for s in (signal.SIGTERM, signal.SIGINT)}

    order = lru_cache(maxsize=1)(RowOrder(len(data), args.batch_size, args.seed))           # asked at each micro-step
    n_blocks = getattr(model, "n_blocks", 1)
    val_name = {"ar": "val_nll", "medusa": "val_nll_heads"}.get(args.model, "val_nll" if paired(args) else "val_nelbo")
    val_name += "_given_noise" * paired(args)
    per_step = args.batch_size * data.length
    bad, began, step_then = 0, time.time(), step
    bar = tqdm(total=args.steps, initial=step, desc=args.out, unit="step", disable=not world.master, mininterval=1)
    try:
        if args.clip_search and step == 0:
            clip = choose_clip()
        fetched = pool.submit(fetch, step, 0)
        while step < args.steps:
            levels = stratified_t(args.batch_size * n_blocks, rng(args.seed, LEVELS, step), args.t_one,
                                  *clip or ()).view(-1, n_blocks)
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step, args)
            means = {}
            for m in range(accumulate):
                key = (args.seed, NOISE, step, world.rank, m)
                tokens, *known = fetched.result()
                fetched = pool.submit(fetch, *divmod(step * accumulate + m + 1, accumulate))     # while this one runs
                tokens, kw = on_device(tokens, levels[mine(m)], table.at(*known) if table else teacher,
                                       torch_seed(*key), args, world)
                kw |= ({"kd": 1.0} if args.kd else {}) | ({"clip": clip} if clip else {})
                torch.manual_seed(torch_seed(*key, 1))                         # dropout
                if world.size > 1:
                    ddp.require_backward_grad_sync = m == accumulate - 1       # before the forward pass, as DDP wants
                with world.autocast:
                    loss, parts = ddp(tokens, **kw)
                (loss / accumulate).backward()
                for k, v in dict(loss=loss.item(), **parts).items():
                    means[k] = means.get(k, 0.0) + v / accumulate / world.size
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_norm)
            stopping, *sums = world.sum(len(stop), *means.values())
            means = dict(zip(means, sums))
            if math.isfinite(means["loss"]) and torch.isfinite(norm):
                bad = 0
                optimizer.step()
                decay = min(args.ema, (1 + step) / (10 + step))
                with torch.no_grad():
                    torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - decay)
            else:
                bad += 1
                world.say(f"step {step}: loss {means['loss']} and gradient norm {norm.item()} are not both finite, "
                          "step skipped")
                if bad == 20:
                    raise BadInput(f"the loss was not finite for 20 steps in a row, up to step {step}: start again "
                                   f"with a lower --lr (now {args.lr}) and another --out; {args.out} keeps its weights")
            optimizer.zero_grad(set_to_none=True)
            step += 1
            rate = (step - step_then) * per_step / max(1e-9, time.time() - began)
            bar.update()
            bar.set_postfix(loss=f"{means['loss']:.3f}", tokens_per_s=f"{rate:,.0f}", refresh=False)
            if step % args.log_every == 0 or step == args.steps or bad:
                mfu = {"mfu": round(rate / data.length * flops / (peak * world.size), 4)} if peak else {}
                record(step=step, **means, lr=lr_at(step - 1, args), grad_norm=norm.item(), tokens=step * per_step,
                       tokens_per_s=round(rate), skipped=bool(bad), **mfu)
                began, step_then = time.time(), step
            if step % args.eval_every == 0 or step == args.steps:
                value = validate(averaged, teacher, val, args, world)
                record(step=step, **{val_name: value})
                world.say(f"{args.out} step {step}: {val_name} {value:.4f}")
                if args.clip_search and step % args.eval_every == 0:
                    clip = choose_clip()
                began, step_then = time.time(), step
            if world.master and (step % args.save_every == 0 or step == args.steps or stopping):
                save(os.path.join(args.out, "ckpt.pt"), dict(
                    model=model.state_dict(), ema=averaged.state_dict(), optimizer=optimizer.state_dict(), step=step,
                    tokens_seen=step * per_step, rng=torch.get_rng_state(), args=vars(args), config=model.config,
                    meta=meta, git=git_commit(), clip=clip))
            if stopping:
                world.say(f"{args.out}: stopped at step {step}, saved; the same command continues")
                world.barrier()                            # the others wait for the checkpoint
                sys.exit(128 + (stop[0] if stop else signal.SIGTERM))
        if stop:                                           # too late for the loop: done, but go no further
            sys.exit(128 + stop[0])
    finally:
        bar.close()
        pool.shutdown(cancel_futures=True)
        for s, handler in handlers.items():
            signal.signal(s, handler)
        log.close()
        if board:
            board.finish()
    return meta


def main():
    args = parse(sys.argv[1:])
    world = World(args.dtype)
    name = os.path.basename(args.data)
    if name in MAZES and args.data == os.path.join("data", name):
        if world.master and not os.path.exists(args.data):
            make_maze(name)
        world.barrier()
    meta = train(args, world)
    if world.size > 1:
        dist.destroy_process_group()
    if meta["tokenizer"] == "maze" and args.report and world.master:
        teacher = [args.teacher or default_teacher(meta, args.length)] * paired(args)
        what = ["acceptance", "--ckpt"] if args.model == "medusa" else ["maze", "--ckpt", *teacher]
        evaluate.main([*what, args.out, f"--n={args.report}", f"--dtype={args.dtype}"])


if __name__ == "__main__":
    run_main(main)
