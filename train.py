"""Train a teacher or a student.

    python train.py --model=mdlm --gumbel --data=maze                        # minutes on 2 CPU cores, prints a table
    torchrun --nproc_per_node=8 train.py --model=mdlm --gumbel               # the paper: OpenWebText, GPT-2-large

Rerun the same command to continue an interrupted run: on a CPU the result is the same, bit for bit. The row order and
noise levels of a global batch are functions of (seed, step, row), its masks, noise and dropout of (seed, step, rank,
micro-step), so nothing but the step needs to be restored.
"""
import copy
import json
import math
import os
import signal
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import evaluate
from bd3lm import windows
from data.prepare import BadInput, Parser, Shards, make_maze, number, optional, run_main
from gumbel import KINDS
from mdlm import T_MIN, stratified_t
from medusa import Medusa, backbone_hash
from sample import (MODELS, build, default_teacher, device_and_dtype, load_ar, load_checkpoint, load_model,
                    torch_seed)
from teacher import CausalLM, LogitsTable, body_to_bfloat16

SIZES = dict(tiny=(8, 256, 8), small=(12, 768, 12), medium=(24, 1024, 16))      # n_layer, n_embd, n_head

# what a dataset brings; explicit flags override. The other defaults are the paper's (Appendix C.1).
MAZE = dict(length=None, n_embd=128, dropout=0.0, warmup=100, schedule="cosine", eval_every=500,
            save_every=200, log_every=20)
MAZE_STUDENT = dict(MAZE, n_layer=4, n_head=4, batch_size=128, lr=1e-3, steps=1600)
PRESETS = {("maze", "ar"): dict(MAZE, n_layer=8, n_head=8, batch_size=64, lr=2e-3, steps=1200),
           ("maze", "mdlm"): MAZE_STUDENT,
           ("maze", "mdlm+noise"): dict(MAZE_STUDENT, t_one=0.5),
           ("maze", "bd3lm"): dict(MAZE_STUDENT, length=12),                    # 11 is prime: rows get one more PAD
           ("maze", "bd3lm+noise"): dict(MAZE_STUDENT, length=12, t_one=0.5),
           ("maze", "medusa"): dict(MAZE, batch_size=128, lr=1e-3, steps=1600),
           ("lm1b", None): dict(length=128)}
MEDUSA = dict(dropout=0.0, batch_size=256, lr=1e-3, schedule="cosine", steps=20_000)           # the paper's (C.2)

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
    group = parser.add_argument_group("what to train")
    group.add_argument("--model", choices=list(MODELS), default="mdlm", help="ar: a teacher, or the AR baseline")
    group.add_argument("--gumbel", action="store_true", help="condition the student on the teacher's noise: the method")
    group.add_argument("--noise", choices=KINDS,
                       help="implies --gumbel; the others are Table 5's ablations and a control")
    group.add_argument("--inject", choices=["replace", "add"], default="replace",
                       help="noise in place of, or added to, [MASK]")
    group.add_argument("--kd", choices=["token"],
                       help="a baseline without noise: NELBO + KL from the teacher's next-token distribution (Table 4)")
    group.add_argument("--teacher", help="AR checkpoint, gpt2[-medium|-large|-xl], a GPT-2 folder, or hf:NAME (medusa: "
                       "the backbone); default: gpt2-large (medusa: gpt2) for its vocabulary; on the maze found, or "
                       "trained first, by itself")
    group.add_argument("--init_from", help="start from these weights: a checkpoint of the same model, a published MDLM,"
                       " or an AR checkpoint of the same shape (the student reads its outputs shifted by one, as AR)")
    group.add_argument("--data", default="openwebtext",
                       help="folder of shards, or a name: maze, maze_skewed, or data/NAME")
    group.add_argument("--length", type=number(int, 2), default=1024, help="tokens of a row, BOS included")
    group = parser.add_argument_group("block diffusion (--model=bd3lm)")
    group.add_argument("--block_size", type=number(int, 1), help="tokens of a block, a divisor of --length; default 4")
    group.add_argument("--clip", type=window, metavar="LOW,HIGH",
                       help="train on noise levels in this window only; validation stays the NELBO")
    group.add_argument("--clip_search", action="store_true",
                       help="at the start and at each validation, take the window in which the loss varies least")
    group = parser.add_argument_group("multi-token prediction (--model=medusa)")
    group.add_argument("--heads", type=number(int, 1), help="heads beside the backbone's own; default 3")
    group = parser.add_argument_group("network")
    group.add_argument("--size", choices=SIZES, help="tiny 8/256/8, small 12/768/12 (default), medium 24/1024/16")
    group.add_argument("--n_layer", type=number(int, 1), help="overrides --size; medusa: layers that read the noise, 1")
    group.add_argument("--n_embd", type=number(int, 1), help="overrides --size")
    group.add_argument("--n_head", type=number(int, 1), help="overrides --size")
    group.add_argument("--dropout", type=number(float, 0, 1), default=0.1, help="on both residual branches")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--steps", type=number(int, 1), default=1_000_000, help="optimizer steps")
    group.add_argument("--batch_size", type=number(int, 1), default=512, help="rows per step, over all processes")
    group.add_argument("--micro_batch_size", type=number(int, 1),
                       help="rows per forward pass and process; default: all (CUDA: the largest divisor up to 32)")
    group.add_argument("--lr", type=number(float, above=0), default=3e-4, help="AdamW's peak learning rate")
    group.add_argument("--warmup", type=number(int, 0), default=2500, help="steps of linear warm-up")
    group.add_argument("--schedule", choices=["constant", "cosine"], default="constant",
                       help="after the warm-up; cosine ends at 0")
    group.add_argument("--clip_norm", type=number(float, above=0), default=1.0, help="gradient norm is clipped to this")
    group.add_argument("--ema", type=number(float, 0, 0.999999), default=0.9999,
                       help="decay of the averaged weights, after its warm-up")
    group.add_argument("--t_one", type=number(float, 0, 1), default=0.0,
                       help="fraction of rows fully masked; the loss is then no NELBO")
    group.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0,
                       help="initial weights, data order, masks, noise, dropout")
    group = parser.add_argument_group("running")
    group.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto",
                       help="autocast; auto: bfloat16 on CUDA")
    group.add_argument("--compile", action="store_true", help="torch.compile the transformer")
    group.add_argument("--out", help="run directory; default out/<data>-<model>[-gumbel]")
    group.add_argument("--log_every", type=number(int, 1), default=50, help="steps between lines of log.jsonl")
    group.add_argument("--eval_every", type=number(int, 1), default=5000,
                       help="steps between validations (EMA weights)")
    group.add_argument("--eval_rows", type=number(int, 1), default=2000, help="validation rows, the same each time")
    group.add_argument("--save_every", type=number(int, 1), default=1000, help="steps between checkpoints")
    group.add_argument("--report", type=number(int, 0), default=1000,
                       help="maze: samples per row of the final table; 0: no table")
    group.add_argument("--wandb", help="also log to this Weights & Biases project (pip install wandb)")

    first = parser.parse_args(argv)
    name = os.path.basename(first.data.rstrip("/"))
    family = "maze" if name in ("maze", "maze_skewed") else name
    kind = first.model + "+noise" * bool(first.gumbel or first.noise)
    if first.model == "medusa":
        parser.set_defaults(**MEDUSA)
    parser.set_defaults(**next((PRESETS[key] for key in ((family, kind), (family, first.model), (family, None))
                                if key in PRESETS), {}))
    args = parser.parse_args(argv)
    for key, value in zip(("n_layer", "n_embd", "n_head"), SIZES[args.size or "small"]):
        if getattr(first, key) is None and (args.size or getattr(args, key) is None):       # --size overrides a preset
            setattr(args, key, value)
    if args.model == "medusa":
        if first.size or first.n_embd or first.n_head:
            parser.error("--size, --n_embd and --n_head are not for --model=medusa: its heads have the width of their "
                         "backbone, which --teacher names")
        if args.t_one:
            parser.error("--t_one is for masked models, not for --model=medusa")
        if (first.n_layer or args.dropout) and not (args.gumbel or args.noise):
            parser.error("--n_layer and --dropout are read by --model=medusa with --gumbel only: its heads have one "
                         "layer each")
        args.size, args.n_layer, args.n_embd, args.n_head = None, first.n_layer or 1, None, None
        args.heads = args.heads or 3
    elif args.heads:
        parser.error("--heads is for --model=medusa: add it, or leave --heads out")
    args.noise = args.noise or ("gumbel" if args.gumbel else None)
    args.gumbel = args.noise is not None
    if args.data == name:
        args.data = os.path.join("data", name)
    if args.gumbel and args.model == "ar":
        parser.error("--gumbel and --noise are for students: --model=ar is the teacher")
    if args.t_one and args.model == "ar":
        parser.error("--t_one is for masked models, not for --model=ar")
    if args.kd and (args.gumbel or args.model in ("ar", "medusa")):
        parser.error("--kd is a baseline of masked models without noise: leave out --gumbel and --noise, or --kd")
    if args.teacher and args.noise in (None, "unpaired") and not args.kd and args.model != "medusa":
        parser.error("--teacher is read with --gumbel (not with --noise=unpaired), --kd and --model=medusa only: add "
                     "one, or leave --teacher out")
    if args.inject == "add" and (not args.gumbel or args.model == "medusa"):
        parser.error("--inject is read by masked models with --gumbel only: add it, or leave --inject out")
    if args.model != "bd3lm" and (args.block_size or args.clip or args.clip_search):
        parser.error("--block_size, --clip and --clip_search are for --model=bd3lm: add it, or leave them out")
    if args.model == "bd3lm":
        args.block_size = args.block_size or 4
        if args.length % args.block_size:
            parser.error(f"--block_size={args.block_size} does not divide --length={args.length}: choose a divisor")
        if bool(args.clip) + args.clip_search + (args.t_one > 0) > 1:
            parser.error("--clip, --clip_search and --t_one (a default of --gumbel on the maze) exclude each other: "
                         "give one, and --t_one=0 with the first two")
    if args.n_embd and args.n_embd % (2 * args.n_head):
        parser.error(f"--n_embd={args.n_embd} must be a multiple of 2 * --n_head = {2 * args.n_head}")
    args.out = args.out or os.path.join("out", f"{name}-{args.model}" + f"-{args.noise}" * args.gumbel
                                    + f"-{args.kd}-kd" * bool(args.kd))
    return args


# ---------------------------------------------------------------------------------------------------------------------
# randomness: everything is a function of the seed and of where it is used

def rng(*key):
    return np.random.default_rng([int(k) for k in key])


ROWS, LEVELS, NOISE, EVAL = range(4)                        # what a draw is for, part of its key


class RowOrder:
    """Row numbers of each global batch: an epoch visits all rows in a seeded permutation; batches run across epochs."""

    def __init__(self, n, batch_size, seed):
        self.n, self.batch_size, self.seed, self.epoch, self.order = n, batch_size, seed, None, None

    def __call__(self, step):
        out = []
        for i in range(step * self.batch_size, (step + 1) * self.batch_size):
            if i // self.n != self.epoch:
                self.epoch = i // self.n
                self.order = rng(self.seed, ROWS, self.epoch).permutation(self.n)
            out.append(self.order[i % self.n])
        return np.array(out)


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

    def say(self, text):
        if self.master:
            tqdm.write(text, file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints

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
    changed = [f"--{k}: {old.get(k)} there, {v} now" for k, v in vars(args).items()
               if k not in FREE and k != "steps" and old.get(k) != v]
    if args.schedule == "cosine" and ckpt["args"]["steps"] != args.steps:
        changed.append(f"--steps: {ckpt['args']['steps']} there, {args.steps} now, under a cosine schedule")
    if ckpt["meta"] != meta:
        changed.append("the data")
    if changed:
        raise BadInput(f"{args.out} holds a run with other settings ({'; '.join(changed)}): choose another --out, or "
                       "repeat its command to continue it")
    return ckpt


def restart_log(path, step):
    """Keep what log.jsonl says up to `step`: lines of steps to be run again are dropped, as is a broken last line."""
    kept = []
    if os.path.exists(path) and step:
        with open(path) as f:
            for line in f:
                try:
                    if json.loads(line).get("step", 0) <= step:
                        kept.append(line)
                except ValueError:
                    continue
    with open(path, "w") as f:
        f.writelines(kept)


# ---------------------------------------------------------------------------------------------------------------------
# teacher

def find_teacher(args, meta, world):
    """The model of --teacher; on the maze, the one that `--model=ar` with the same data trains, trained if absent."""
    path = args.teacher or default_teacher(meta, args.length)
    if args.teacher is None and args.model == "medusa" and path == "gpt2-large":
        path = "gpt2"                                      # the paper's backbone is the small one
    if args.teacher is None and os.path.basename(args.data) in ("maze", "maze_skewed"):
        teacher_args = parse(["--model=ar", f"--data={args.data}", f"--out={path}", f"--dtype={args.dtype}",
                              "--report=0"] + [f"--length={args.length}"] * bool(args.length))
        there = load_checkpoint(path) if os.path.exists(os.path.join(path, "ckpt.pt")) else None
        if there is None or there["step"] < there["args"]["steps"]:
            world.say(f"teacher: {path} is {'not finished' if there else 'not there'}, training it first")
            train(teacher_args, world)
            world.barrier()
    if path is None:
        raise BadInput("--gumbel, --kd and --model=medusa need --teacher: an AR checkpoint of this vocabulary; train "
                       f"one with `python train.py --model=ar --data={args.data}`")
    if not world.master:                                   # one process downloads
        world.barrier()
    try:
        return load_ar("--teacher", path, meta, args.length, world.device)
    finally:
        if world.master:
            world.barrier()


def initial_weights(model, source, args):
    """--init_from: the weights of `source` into `model`; BadInput where they do not fit. A noise embedding that the
    source lacks stays new, one that the model lacks is left out; the row of [MASK] that an AR model lacks is new."""
    own = model.state_dict()
    of_noise = ("noise_embed.", "accumulator.")
    state = {k: v for k, v in source.state_dict().items() if k in own or not k.startswith(of_noise)}
    embed = "transformer.embed.weight"
    if isinstance(source, CausalLM) and args.model in ("mdlm", "bd3lm") and embed in state \
            and state[embed][0].shape == own[embed][0].shape:
        state[embed] = torch.cat([state[embed], own[embed][-1:]])
    state = {k: v for k, v in own.items() if k.startswith(of_noise)} | state
    wrong = [k for k in own if k not in state or state[k].shape != own[k].shape] + [k for k in state if k not in own]
    if wrong:
        raise BadInput(f"--init_from={args.init_from} is another kind or shape of network (they differ in {wrong[0]}): "
                       "give the same flags of the network and vocabulary, or leave --init_from out")
    model.load_state_dict(state)


# ---------------------------------------------------------------------------------------------------------------------
# training

def flops_per_row(model, teacher, L, masked=0.5):
    """Useful FLOPs of one row, forward and backward: 6 per weight and token, 12 L D per layer for attention;
    output layer, teacher's head and noise projection at the masked positions only (half of them, on average)."""
    def network(net, share, passes):
        blocks = sum(p.numel() for p in net.blocks.parameters())
        D = net.embed.weight.shape[1]
        twice = 1 + (getattr(model, "n_blocks", 1) > 1 and net is model.transformer)             # BD3-LM's [z ; x]
        return L * passes * (twice * (2 * blocks + 4 * len(net.blocks) * L * D) + 2 * share * net.head.weight.numel())
    if isinstance(model, Medusa):                          # the noise and a row of K + 1 places at every position
        masked, total = float(model.noise_embed is not None), 6 * L * sum(p.numel() for p in model.heads.parameters())
        if model.accumulator is not None:
            total += 6 * L * (len(model.heads) + 1) * sum(p.numel() for p in model.accumulator.parameters())
    else:
        total = network(model.transformer, 1.0 if model.transformer.causal else masked, 3)
    if getattr(model, "noise_embed", None) is not None:
        total += L * masked * 4 * model.noise_embed.weight.numel()
    if teacher is not None and hasattr(teacher, "transformer"):
        total += network(teacher.transformer, masked, 1)
    elif teacher is not None:                             # a Hugging Face model: 2 FLOPs per weight and token
        total += 2 * L * sum(p.numel() for p in teacher.parameters())
    return total


def validation_batches(model, teacher, data, n, args, world, window=()):
    """n fixed validation rows with fixed draws, the share of this process: tokens, arguments of `model.loss`."""
    micro = 32                                             # rows that share a seed: not a flag, so that values compare
    n, n_blocks = min(n, len(data)), getattr(model, "n_blocks", 1)
    order = rng(args.seed, EVAL).permutation(len(data))[:n]
    levels = stratified_t(n * n_blocks, rng(args.seed, EVAL, 1), 0.0, *window).view(n, n_blocks)
    for i, a in enumerate(range(0, n, micro)):
        if i % world.size == world.rank:
            generator = torch.Generator(world.device).manual_seed(torch_seed(args.seed, EVAL, 2, i))
            yield torch.from_numpy(data.rows(order[a:a + micro])).to(world.device), dict(
                t=levels[a:a + micro].to(world.device), teacher=teacher, generator=generator)


def loss_arguments(args):
    """Which of the arguments of `MDLM.loss` this kind of model takes."""
    return dict(ar=(), medusa=("generator",)).get(args.model, ("t", "teacher", "generator"))


@torch.no_grad()
def validate(model, teacher, data, args, world):
    """Validation loss in nats per predicted token, on fixed rows with fixed draws, shared out over the processes.

    Same value whatever their number. For students with noise it is the loss given the posterior's noise: no likelihood.
    """
    total = count = 0.0
    for tokens, kw in validation_batches(model, teacher, data, args.eval_rows, args, world):
        with world.autocast:
            total += model.loss(tokens, **{k: kw[k] for k in loss_arguments(args)})[0].item() * len(tokens)
        count += len(tokens)
    total, count = world.sum(total, count)
    return total / count


@torch.no_grad()
def search_clip(model, teacher, data, args, world):
    """For each window of noise levels, the variance of a block's loss when trained in it, in (nats per token)^2: over
    blocks, rows (256, the same with the same draws) and processes (BD3-LM, Section 5). -> {(low, high): variance}.
    """
    out = {}
    for window in tqdm(windows(model.block_size), desc="clip search", leave=False, disable=not world.master):
        sums = np.zeros(3)
        for tokens, kw in validation_batches(model, teacher, data, min(256, args.eval_rows), args, world, window):
            with world.autocast:
                losses, masked, _ = model.losses(tokens, clip=window, **kw)
            v = torch.zeros(tokens.shape, dtype=torch.float64, device=tokens.device).masked_scatter(
                masked, losses.double()).view(-1, model.block_size).mean(1)
            sums += len(v), v.sum().item(), v.square().sum().item()
        count, total, squares = world.sum(*sums)
        out[window] = squares / count - (total / count) ** 2
    return out


def train(args, world):
    """One run: args -> out/.../ckpt.pt. The loop that everything else here serves. Returns the dataset's meta."""
    if args.batch_size % world.size:
        raise BadInput(f"--batch_size={args.batch_size} must be a multiple of the number of processes, {world.size}")
    local = args.batch_size // world.size
    micro = args.micro_batch_size or (
        max(m for m in range(1, 33) if local % m == 0) if "cuda" in world.device else local)
    if local % micro:
        raise BadInput(f"--micro_batch_size={micro} must divide the {local} rows that each process has of a batch")
    wandb = optional("wandb", "--wandb") if args.wandb else None
    there = os.path.abspath(args.out)
    while not os.path.exists(there):
        there = os.path.dirname(there)
    if not os.path.isdir(there) or not os.access(there, os.W_OK):
        raise BadInput(f"--out={args.out} cannot be a run directory, {there} is a file or read-only: choose another")

    # data, teacher, model
    data = Shards(args.data, "train", args.length)
    val = Shards(args.data, "val", args.length)
    meta = data.meta
    ckpt = resume(args, meta)
    medusa = args.model == "medusa"
    teacher = find_teacher(args, meta, world) if medusa or args.kd or args.noise not in (None, "unpaired") else None
    torch.manual_seed(args.seed)
    config = dict(vocab_size=meta["vocab_size"], bos=meta["bos"], predict_bos=meta["predict_bos"], length=data.length,
                  n_layer=args.n_layer, dropout=args.dropout)
    if medusa:
        layer = teacher.output_layer()
        config |= dict(n_embd=layer.weight.shape[1], heads=args.heads, noise=args.noise, bias=layer.bias is not None,
                       backbone=teacher.path, sha256=backbone_hash(teacher))
        if ckpt and ckpt["config"]["sha256"] != config["sha256"]:
            raise BadInput(f"{args.out} holds heads of another backbone than {teacher.path} is now: choose another "
                           "--out, or put that backbone back")
    else:
        config |= dict(n_embd=args.n_embd, n_head=args.n_head)
    source = load_model(args.init_from) if args.init_from and not ckpt else None
    if args.model in ("mdlm", "bd3lm"):
        shift = ckpt["config"].get("shift", False) if ckpt else source is not None and source.config.get(
            "shift", isinstance(source, CausalLM))
        config |= dict(noise=args.noise, inject=args.inject, shift=shift)
    if args.model == "bd3lm":
        config["block_size"] = args.block_size
        if source is not None and source.config.get("block_size", args.block_size) != args.block_size:
            world.say(f"--init_from={args.init_from} has block size {source.config['block_size']}, this run "
                      f"{args.block_size}: the weights fit any")
    model = build(args.model, config)
    if medusa:
        try:
            model.attach(teacher, start=True)
        except ValueError as e:
            raise BadInput(f"--teacher={teacher.path} cannot be a backbone: {e}") from None
        if source is not None and source.config.get("sha256", config["sha256"]) != config["sha256"]:
            raise BadInput(f"--init_from={args.init_from} holds heads of another backbone than {teacher.path}")
    if source is not None:
        initial_weights(model, source, args)
        del source
    model.to(world.device)
    averaged = copy.deepcopy(model, {id(teacher): teacher}).eval().requires_grad_(False)  # EMA; shares the backbone
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.999), eps=1e-8,
                                  weight_decay=0.0, fused=True)
    step, tokens_seen, clip = 0, 0, args.clip
    if ckpt:
        model.load_state_dict(ckpt["model"])
        averaged.load_state_dict(ckpt["ema"])
        optimizer.load_state_dict(ckpt["optimizer"])
        step, tokens_seen, clip = ckpt["step"], ckpt["tokens_seen"], ckpt.get("clip")
        torch.set_rng_state(ckpt["rng"])
        world.say(f"{args.out}: "
                  + (f"complete at step {step}" if step >= args.steps else f"continuing at step {step}"))
        if step >= args.steps:
            return meta
    if args.compile:
        for net in ([getattr(teacher, "transformer", None) or teacher.lm.base_model]
                    + [model.accumulator] * bool(args.noise) if medusa else [model.transformer]):
            net.compile()
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True) if world.size > 1 else model
    table = None
    if teacher is not None and not medusa and len(data) * data.length * meta["vocab_size"] <= 1 << 24:
        table = LogitsTable(teacher, data)                                     # small dataset: one teacher pass for all
    elif teacher is not None and world.dtype == "bfloat16":
        body_to_bfloat16(teacher)

    # log
    flops, peak = flops_per_row(model, None if table else teacher, data.length), None
    if "cuda" in world.device:
        name = torch.cuda.get_device_name()
        peak = next((v for k, v in PEAKS.items() if k in name), None)
    log = None
    if world.master:
        os.makedirs(args.out, exist_ok=True)
        restart_log(os.path.join(args.out, "log.jsonl"), step)
        log = open(os.path.join(args.out, "log.jsonl"), "a", buffering=1)
    board = None
    if args.wandb and world.master:
        board = wandb.init(project=args.wandb, name=os.path.basename(args.out), config=vars(args))

    def record(**kw):
        if log:
            log.write(json.dumps(kw) + "\n")
        if board and "step" in kw:
            board.log(kw, step=kw["step"])
    if step == 0:
        record(args=vars(args), config=config, device=world.device, dtype=world.dtype, processes=world.size,
               micro_batch_size=micro, parameters=sum(p.numel() for p in model.parameters()),
               threads=torch.get_num_threads(), torch=torch.__version__, git=evaluate.git_commit(),
               rows=len(data), meta=meta)
    world.say(f"{args.out}: {args.model}{', ' + args.noise + ' noise' if args.gumbel else ''}, {args.n_layer} layers "
              f"x {config['n_embd']}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, "
              f"{len(data)} rows of {data.length}, {world.device}, {world.dtype}, "
              f"{world.size} process{'es' * (world.size > 1)}, micro-batch {micro} of {args.batch_size}")

    def checkpoint():
        if world.master:
            save(os.path.join(args.out, "ckpt.pt"), dict(
                model=model.state_dict(), ema=averaged.state_dict(), optimizer=optimizer.state_dict(), step=step,
                tokens_seen=tokens_seen, rng=torch.get_rng_state(), args=vars(args), config=config, meta=meta,
                git=evaluate.git_commit(), clip=clip))

    def lr_at(step):
        if step < args.warmup:
            return args.lr * (step + 1) / args.warmup
        if args.schedule == "constant":
            return args.lr
        return args.lr * 0.5 * (1 + math.cos(math.pi * (step - args.warmup) / max(1, args.steps - args.warmup)))

    def choose_clip():
        found = search_clip(averaged, teacher, val, args, world)
        best = min(found, key=found.get)
        record(step=step, clip=best, clip_search={f"{a:g},{b:g}": v for (a, b), v in found.items()})
        world.say(f"{args.out} step {step}: clip {best[0]:g},{best[1]:g}, variance of a block's loss {found[best]:.4f} "
                  f"(unclipped {found[T_MIN, 1.0]:.4f})")
        return best

    # SIGTERM and SIGINT: finish the step, save, stop
    stop = []
    handlers = {s: signal.signal(s, lambda signum, frame: stop.append(signum)) for s in (signal.SIGTERM, signal.SIGINT)}

    order, n_blocks = RowOrder(len(data), args.batch_size, args.seed), getattr(model, "n_blocks", 1)
    accumulate, bad, began, tokens_then = local // micro, 0, time.time(), tokens_seen
    bar = tqdm(total=args.steps, initial=step, desc=args.out, unit="step", disable=not world.master, mininterval=1)
    try:
        if args.clip_search and step == 0:
            clip = choose_clip()
        while step < args.steps:
            rows, levels = order(step), stratified_t(args.batch_size * n_blocks, rng(args.seed, LEVELS, step),
                                                     args.t_one, *clip or ()).view(-1, n_blocks)
            loss_sum, extra = 0.0, {}
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step)
            for m in range(accumulate):
                a = (m * world.size + world.rank) * micro
                tokens = torch.from_numpy(data.rows(rows[a:a + micro])).to(world.device)
                generator = torch.Generator(world.device).manual_seed(torch_seed(args.seed, NOISE, step, world.rank, m))
                torch.manual_seed(torch_seed(args.seed, NOISE, step, world.rank, m, 1))           # dropout
                kw = dict(t=levels[a:a + micro].to(world.device), generator=generator,
                          teacher=table.at(rows[a:a + micro]) if table else teacher)
                kw = {k: kw[k] for k in loss_arguments(args)} | ({"kd": 1.0} if args.kd else {})
                if clip:
                    kw["clip"] = tuple(clip)
                if world.size > 1:
                    ddp.require_backward_grad_sync = m == accumulate - 1       # before the forward pass, as DDP wants
                with world.autocast:
                    loss, parts = ddp(tokens, **kw)
                (loss / accumulate).backward()
                loss_sum += loss.item()
                for k, v in parts.items():
                    extra[k] = extra.get(k, 0.0) + v / accumulate
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_norm)
            loss, stopping, *rest = world.sum(loss_sum / accumulate, len(stop), *extra.values())
            loss, extra = loss / world.size, {k: v / world.size for k, v in zip(extra, rest)}
            if math.isfinite(loss) and torch.isfinite(norm):
                bad = 0
                optimizer.step()
                decay = min(args.ema, (1 + step) / (10 + step))
                with torch.no_grad():
                    torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - decay)
            else:
                bad += 1
                world.say(f"step {step}: loss {loss} and gradient norm {norm.item()} are not both finite, step skipped")
                if bad == 20:
                    raise BadInput(f"the loss was not finite for 20 steps in a row, up to step {step}: start again "
                                   f"with a lower --lr (now {args.lr}) and another --out; {args.out} keeps its weights")
            optimizer.zero_grad(set_to_none=True)
            step += 1
            tokens_seen += args.batch_size * data.length
            rate = (tokens_seen - tokens_then) / max(1e-9, time.time() - began)
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}", tokens_per_s=f"{rate:,.0f}", refresh=False)
            if step % args.log_every == 0 or step == args.steps or bad:
                line = dict(step=step, loss=loss, **extra, lr=lr_at(step - 1), grad_norm=norm.item(),
                            tokens=tokens_seen, tokens_per_s=round(rate), skipped=bool(bad))
                if peak:
                    line["mfu"] = round(rate / data.length * flops / (peak * world.size), 4)
                record(**line)
                began, tokens_then = time.time(), tokens_seen
            if step % args.eval_every == 0 or step == args.steps:
                name = {"ar": "val_nll", "medusa": "val_nll_heads"}.get(args.model, "val_nelbo")
                if args.noise not in (None, "unpaired"):
                    name = name.replace("nelbo", "nll") + "_given_noise"
                value = validate(averaged, teacher, val, args, world)
                record(step=step, **{name: value})
                world.say(f"{args.out} step {step}: {name} {value:.4f}")
                if args.clip_search and step % args.eval_every == 0:
                    clip = choose_clip()
                began, tokens_then = time.time(), tokens_seen
            if step % args.save_every == 0 or step == args.steps or stopping:
                checkpoint()
            if stopping:
                world.say(f"{args.out}: stopped at step {step}, saved; the same command continues")
                world.barrier()                            # the others wait for the checkpoint
                sys.exit(128 + (stop[0] if stop else signal.SIGTERM))
        if stop:                                           # too late for the loop: done, but go no further
            sys.exit(128 + stop[0])
    finally:
        bar.close()
        for s, handler in handlers.items():
            signal.signal(s, handler)
        if log:
            log.close()
        if board:
            board.finish()
    return meta


def main():
    args = parse(sys.argv[1:])
    world = World(args.dtype)
    name = os.path.basename(args.data)
    if name in ("maze", "maze_skewed") and args.data == os.path.join("data", name):
        if world.master and not os.path.exists(args.data):
            make_maze(name)
        world.barrier()
    meta = train(args, world)
    if world.size > 1:
        dist.destroy_process_group()
    if meta["tokenizer"] == "maze" and args.report and world.master:
        ckpts = ([args.teacher or default_teacher(meta, args.length)] * (args.noise not in (None, "unpaired"))
                 + [args.out])
        what = ["acceptance", "--ckpt", args.out] if args.model == "medusa" else ["maze", "--ckpt", *ckpts]
        evaluate.main(what + [f"--n={args.report}", f"--dtype={args.dtype}"])


if __name__ == "__main__":
    run_main(main)
