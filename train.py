"""Train a teacher or a student.

    python train.py --model=mdlm --gumbel --data=maze                        # minutes on 2 CPU cores, prints a table
    torchrun --nproc_per_node=8 train.py --model=mdlm --gumbel               # the paper: OpenWebText, GPT-2-large

Rerun the same command to continue an interrupted run: on a CPU the result is the same, bit for bit (why that takes
nothing but the step: data/batches.py).

In this order:
    FLAGS               the recipe: all flags with their defaults; what data and models change: data/presets.py
    resume, new_model   where it starts: its checkpoint, its teacher, its weights
    Validation          the loss that is compared from step to step, and the search for a window of levels
    train               the loop; processes, log and signals are in data/run.py, batches in data/batches.py

Shapes: tokens [B, L], a row being BOS and L - 1 tokens; noise levels t [B, n_blocks].
"""
import argparse
import copy
import dataclasses
import math
import os
import sys
from contextlib import closing

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import evaluate
from bd3lm import clip_windows, search_clip
from data.batches import (EVAL, LEVELS, NOISE, loss_inputs, mask_suffixes, micro_batches, parse_clip, part_of_batch,
                          read_ahead, rng)
from data.cli import BadInput, Parser, add_flags, number, optional, refuse_unread, run_main
from data.files import check_folder
from data.prepare import make_missing
from data.presets import EMBEDDED, MAZES, PRESETS
from data.run import (Log, Run, StopSignals, Stopped, World, check_conditions, checkpoint_seen, conditions,
                      flops_per_row, keep, leave, load_checkpoint, micro_batch, restore, resume, tell_bad_steps,
                      update_average)
from data.shards import Shards, knows_success, read_meta
from data.teacher_cache import teacher_of_rows
from extra.init_from import SHAPE, config_of_start, initial_weights, known_of
from gumbel import KINDS, needs_teacher
from mdlm import T_MIN, stratified_t
from sample import MODELS, build, check_vocabulary, default_teacher, load_ar, load_model, torch_seed
from teacher import GPT2_SIZES, model_hash


# ---------------------------------------------------------------------------------------------------------------------
# the recipe

# --size: n_layer, n_embd, n_head
SIZES = dict(tiny=(8, 256, 8), small=(12, 768, 12), medium=(24, 1024, 16))

# what flags take, beside text, bool (a switch) and one of several names. Sizes are bounded, so that a slip of the hand
# does not fill the memory
count = number(int, 1, 2**31)
whole = number(int, 0, 2**31)
rows = number(int, 1, 2**20)
width = number(int, 1, 2**16)
fraction = number(float, 0, 1)
positive = number(float, above=0)

# every flag: name, default, what it takes, what it means. The defaults are the paper's (Appendix C.1)
FLAGS = {
    "what to train": [
        ("model", "mdlm", MODELS, "ar: a teacher, or the AR baseline"),
        ("gumbel", False, bool, "condition the student on the teacher's noise: the method"),
        ("noise", None, KINDS, "implies --gumbel; log: W reads log softmax(noise); quantile: one number a token; "
         "the others: Table 5's ablations and a control"),
        ("inject", "replace", ["replace", "add"], "noise in place of [MASK], or added (pretrained --init_from: add)"),
        ("kd", None, ["token"], "baseline without noise: NELBO + KL from the teacher (Table 4)"),
        ("teacher", None, str, "AR checkpoint, gpt2[-medium|-large|-xl], a GPT-2 folder, or hf:NAME "
         "(medusa: the backbone); default: gpt2-large (medusa: gpt2) for its vocabulary; on the maze found, "
         "or trained first, by itself"),
        ("teacher_cache", None, width, "the teacher reads all rows once, and so many of its best tokens at "
         "each place are kept beside the shards: noise is then drawn without it (OpenWebText: 307 GB at 8; quantile "
         "noise: 108 GB whatever the number)"),
        ("init_from", None, str, "start from these weights: a checkpoint of the same model, a published MDLM, an AR "
         "checkpoint of the same shape (whose outputs are read shifted by one), `teacher`: the teacher's; or a "
         "pretrained model, which decides the shape: gpt2[-medium|-large|-xl], a GPT-2 folder, for mdlm hf:NAME"),
        ("data", "openwebtext", str, "a folder of shards, or a name: maze, maze_skewed, words, molecules, data/NAME"),
        ("length", 1024, number(int, 2, 2**20), "tokens of a row, BOS included; rows that are cut bring theirs"),
    ],
    "block diffusion (--model=bd3lm)": [
        ("block_size", 4, rows, "tokens of a block, a divisor of --length"),
        ("clip", None, parse_clip, "LOW,HIGH: train on noise levels in this window; validation does not"),
        ("clip_search", False, bool, "find the window of least variance, at first and each validation"),
    ],
    "multi-token prediction (--model=medusa)": [
        ("heads", 3, number(int, 1, 1000), "heads beside the backbone's own"),
    ],
    "network": [
        ("size", None, SIZES, "tiny 8/256/8, small 12/768/12 (as below), medium 24/1024/16"),
        ("n_layer", 12, number(int, 1, 1000), "overrides --size; medusa: layers that read the noise, 1"),
        ("n_embd", 768, width, "overrides --size"),
        ("n_head", 12, width, "overrides --size"),
        ("dropout", 0.1, fraction, "on both residual branches"),
    ],
    "optimisation": [
        ("steps", 1_000_000, count, "optimizer steps"),
        ("batch_size", 512, rows, "rows per step, over all processes"),
        ("micro_batch_size", None, rows, "rows of a forward pass; default: all, on CUDA those that fit"),
        ("lr", 3e-4, positive, "AdamW's peak learning rate"),
        ("warmup", 2500, whole, "steps of linear warm-up"),
        ("schedule", "constant", ["constant", "cosine"], "after the warm-up; cosine ends at 0"),
        ("clip_norm", 1.0, positive, "gradient norm is clipped to this"),
        ("ema", 0.9999, number(float, 0, 0.999999), "decay of the averaged weights, once warmed up"),
        ("t_one", 0.0, fraction, "fraction of rows fully masked; the loss is then no NELBO"),
        ("mask_suffix", None, fraction, "mdlm: fraction of rows masked from a random place to the end: no NELBO, "
         "and half the loss of a masked token, since half of a row is masked"),
        ("seed", 0, number(int, 0, 2**63 - 1), "of weights, data order, masks, noise, dropout"),
    ],
    "running": [
        ("dtype", "auto", ["auto", "float32", "bfloat16"], "autocast; auto: bfloat16 on CUDA"),
        ("compile", False, bool, "torch.compile the transformer"),
        ("out", None, str, "run directory; default out/<data>-<model>[-gumbel]"),
        ("log_every", 50, count, "steps between lines of log.jsonl"),
        ("eval_every", 5000, count, "steps between validations (EMA weights)"),
        ("eval_rows", 2000, count, "validation rows, the same each time"),
        ("save_every", 1000, count, "steps between checkpoints"),
        ("keep", None, evaluate.steps_list, "steps whose checkpoint stays, as ckpt.STEP.pt: a comma list"),
        ("save_minutes", 10, positive, "at most so long between them"),
        ("report", 1000, whole, "maze, words, molecules: samples per row of the final table; 0: no table"),
        ("wandb", None, str, "also log to this Weights & Biases project (pip install wandb)"),
    ],
}
DEFAULTS = {name: default for flags in FLAGS.values() for name, default, _, _ in flags}

# AdamW's other settings are no flags: the paper's too
BETAS = (0.9, 0.999)
EPSILON = 1e-8
WEIGHT_DECAY = 0.0

# goes up, by one, when a seed draws something else than before: a run that is continued then says so
RANDOM = 1

# flags that may differ when a run is continued: they do not affect the result, or (compile, dtype, micro_batch_size)
# only rounding and which numbers are drawn
MAY_DIFFER = {"out", "log_every", "eval_every", "eval_rows", "save_every", "save_minutes", "keep", "wandb", "report",
              "compile", "dtype", "micro_batch_size"}

# ---------------------------------------------------------------------------------------------------------------------
# flags

def parse(argv):
    """The flags of a run, as a Namespace: DEFAULTS, then PRESETS, then --size, then what is given explicitly."""
    # what is not given is left out of the result, so that presets can tell
    parser = Parser(argument_default=argparse.SUPPRESS,
                    description="Train an AR teacher, or a parallel student with or without Gumbel Distillation.")
    add_flags(parser, FLAGS)
    given = vars(parser.parse_args(argv))
    # the noise's kind and --gumbel say one thing: a preset may ask for either
    values = DEFAULTS | given
    if values["gumbel"] and values["noise"] is None:
        values["noise"] = "gumbel"
    values["gumbel"] = values["noise"] is not None

    name = os.path.basename(values["data"].rstrip("/"))
    # a preset applies if its conditions hold for the flags as given, so that no preset sets off another
    recipe = values | {"data": "maze" if name in MAZES else name}
    for flags, preset in PRESETS:
        if flags.items() <= recipe.items():
            values |= preset
    shape = SIZES.get(values["size"]) or GPT2_SIZES.get(values["init_from"])
    if shape:                                              # over a preset's shape, under explicit flags
        values |= dict(zip(SHAPE, shape))
    args = argparse.Namespace(**values | given)

    # a flag that nothing would read is a mistake; a default that nothing reads is left alone
    for flag, reader in unread_flags(args):
        refuse_unread([flag], (), f"here, it is {reader}")
        if flag in ("block_size", "heads", "n_embd", "n_head"):
            setattr(args, flag, None)                      # so that no checkpoint records what its model does not use
    if args.n_head and args.n_embd % (2 * args.n_head):    # RoPE turns pairs of channels
        parser.error(f"--n_embd={args.n_embd} must be a multiple of 2 * --n_head = {2 * args.n_head}")
    if args.block_size and args.length and args.length % args.block_size:
        parser.error(f"--block_size={args.block_size} does not divide --length={args.length}: choose a divisor")
    # each is another law of the noise levels
    if [args.clip is not None, args.clip_search, args.t_one > 0].count(True) > 1:
        parser.error("--clip, --clip_search and --t_one (a default of --gumbel on the maze) exclude "
                     "each other: give one, and --t_one=0 with the first two")

    if args.data == name:
        args.data = os.path.join("data", name)
    if not args.out:
        parts = [name, args.model, args.noise, f"{args.kd}-kd" if args.kd else None]
        args.out = os.path.join("out", "-".join(part for part in parts if part))
    return args


def config_fields(model):
    """The names in the config of a model class."""
    return {field.name for field in dataclasses.fields(model.Config)}


def unread_flags(args):
    """What this run does not read, as far as its model's class tells: yields (flag, whom the flag is for)."""
    model = MODELS[args.model]
    fields = config_fields(model)
    paired = needs_teacher(args.noise)
    masked = "masked models such as mdlm"
    table = [                                              # flags, whether they are read, by whom
        ("gumbel noise", "noise" in fields, "for students: an AR model reads none"),
        ("noise", args.noise != "quantile" or not model.drafts, f"quantile, for {masked}"),
        ("inject", "inject" in fields and args.gumbel, f"read by {masked} with --gumbel only"),
        ("teacher_cache", "teacher" in model.loss_reads and paired, f"for {masked}, noise from a teacher"),
        ("kd", "kd" in model.loss_reads and not args.gumbel, f"for {masked} without noise"),
        ("teacher", asks_teacher(args) or args.init_from == "teacher",
         "read with --gumbel (not with --noise=unpaired), --kd and --model=medusa only"),
        ("t_one", "t" in model.loss_reads and args.mask_suffix != 1, f"for {masked} on rows masked at random"),
        ("mask_suffix", args.model == "mdlm", "for --model=mdlm"),
        ("block_size", "block_size" in fields, "for models of blocks (--model=bd3lm)"),
        ("clip clip_search", "clip" in model.loss_reads, "for models of blocks (--model=bd3lm)"),
        ("heads", "heads" in fields, "for --model=medusa"),
        ("size n_embd n_head", not model.drafts, "not read by heads, as wide as their backbone"),
        ("n_layer dropout", not model.drafts or args.gumbel,
         "read by heads with --gumbel only (a head is one layer)"),
    ]
    for flags, is_read, reader in table:
        if not is_read:
            for flag in flags.split():
                yield flag, reader


def asks_teacher(args):
    """Whether the run needs an AR model beside the one that it trains: a teacher, or the backbone of heads."""
    return needs_teacher(args.noise) or args.kd is not None or MODELS[args.model].drafts


# ---------------------------------------------------------------------------------------------------------------------
# where a run starts and continues

def open_run(args, world):
    """All that is refused before there is a model -> (data, validation data, checkpoint)."""
    if args.batch_size % world.size:
        raise BadInput(f"--batch_size={args.batch_size} must be a multiple of the number of processes, {world.size}")
    if args.wandb and world.master:
        optional("wandb", "--wandb")
    check_folder("--out", args.out)                        # it is made later
    if not os.path.isdir(args.data):
        from extra.missing import refuse
        refuse(args.data, asks_teacher(args) and teacher_path(args, dict(tokenizer="gpt2")))
    is_default = args.length == DEFAULTS["length"] and "length" not in Parser.given
    if is_default and read_meta(args.data)[0]["row_length"]:
        args.length = None                                 # rows that are cut bring their length
    data = Shards(args.data, "train", args.length)
    if args.report and data.meta["tokenizer"].startswith("smiles:"):
        optional("partialsmiles", "--report above 0 on molecules")
    val = Shards(args.data, "val", args.length)
    micro_batch(args, data, {}, world)
    return data, val, resume(args, data.meta, MAY_DIFFER)


def teacher_path(args, meta):
    """What --teacher names, or the default for data with this meta; None where that has none."""
    if args.teacher:
        return args.teacher
    path = default_teacher(meta, args.length)
    if path == "gpt2-large" and MODELS[args.model].drafts:
        return "gpt2"                                      # the paper's backbone is the small one
    return path


def find_teacher(args, meta, world):
    """The AR model that the run needs, on its device; None where it needs none."""
    if not asks_teacher(args):
        return None
    return load_ar("--teacher", known_teacher(args, meta), meta, args.length, world.device)


def known_teacher(args, meta):
    """The path of the teacher; BadInput where there is none."""
    path = teacher_path(args, meta)
    if path is None:
        raise BadInput("--gumbel, --kd, --model=medusa and --init_from=teacher need --teacher: an AR checkpoint of "
                       f"this vocabulary; train one with `python train.py --model=ar --data={args.data}`")
    return path


def train_missing_teacher(args, world):
    """On embedded data, where a run needs a teacher and none is named: train it, unless it is there, and complete."""
    asks = asks_teacher(args) or args.init_from == "teacher"
    if args.teacher or not asks or os.path.basename(args.data) not in EMBEDDED:
        return
    meta, _ = read_meta(args.data)
    if not knows_success(meta):                            # another dataset of that name
        return
    path = teacher_path(args, meta)
    with world.together() as seen:
        ckpt = load_checkpoint(path) if os.path.exists(os.path.join(path, "ckpt.pt")) else None
        complete = ckpt is not None and ckpt["step"] >= ckpt["args"]["steps"]
        seen["teacher's state"] = "complete" if complete else "not complete"
        if not complete:
            open_run(args, world)                          # a wrong flag of the student is refused first
    if complete:
        return
    world.say(f"teacher: {path} is not there, or not finished: training it first")
    flags = ["--model=ar", f"--data={args.data}", f"--out={path}", f"--dtype={args.dtype}"]
    if args.length:
        flags.append(f"--length={args.length}")
    train(parse(flags), world)


def new_model(args, data, teacher, source, ckpt, world):
    """The model of this run, initialised, from the weights of `source` where there is one; `ckpt`, of the same run or
    None, has what cannot be seen from the flags.
    """
    old = {}                                               # their config, or that of this run
    if ckpt:
        old = ckpt["config"]
    elif source is not None:
        old = vars(source.config)

    # all that is known of the run; the model's config takes what it has a field for
    known = dict(vars(args), vocab_size=data.meta["vocab_size"], bos=data.meta["bos"],
                 predict_bos=data.meta["predict_bos"], length=data.length)
    model_kind = MODELS[args.model]
    if model_kind.fills_masks:
        known |= config_of_start(args, source, old)
    if model_kind.drafts:
        layer = teacher.output_layer()
        known |= dict(n_embd=layer.weight.shape[1], bias=layer.bias is not None, backbone=teacher.path,
                      sha256=teacher.sha256)
        if old.get("sha256", known["sha256"]) != known["sha256"]:
            raise BadInput(f"{args.out if ckpt else args.init_from} holds heads of another backbone than "
                           f"{teacher.path} is now: put that one back, or choose another --out and --init_from")
    old_block = old.get("block_size")
    if old_block and args.block_size and old_block != args.block_size:
        world.say(f"--init_from={args.init_from} has block size {old_block}, this run {args.block_size}: they fit any")
    fields = config_fields(model_kind)
    model = build(args.model, {name: value for name, value in known.items() if name in fields})
    if model_kind.drafts:
        model.attach(teacher, start=True)                  # output layers start as the backbone's
    if source is not None:
        initial_weights(model, source, args.init_from)
    return model.to(world.device)


# ---------------------------------------------------------------------------------------------------------------------
# batches

@dataclasses.dataclass
class Validation:
    """The loss on validation rows: always the same rows with the same draws, shared out over the processes, so that
    its values compare from step to step and whatever the number of processes.

    These have unequal numbers of batches. One that is to stop leaves its loop and says so in the next sum, which all of
    them reach: what was computed is thrown away.
    """
    model: torch.nn.Module                                 # the averaged weights
    teacher: torch.nn.Module | None
    data: Shards
    args: argparse.Namespace
    world: World
    stop: StopSignals
    ROWS_PER_SEED = 32                                     # no flag, so that values compare

    def name(self):
        # told the noise behind the text, or not masked at random, it is no bound on the likelihood any more
        told = needs_teacher(self.args.noise)
        name = self.model.loss_name
        if told or self.args.mask_suffix:
            name = name.replace("nelbo", "nll")
        if self.args.mask_suffix:
            name = f"suffix_{name}"
        return f"val_{name}_given_noise" if told else f"val_{name}"

    def batches(self, n, window=(T_MIN, 1.0)):
        """This process's share of n rows, at noise levels in the window: yields (tokens [B, L], what `loss` reads)."""
        seed = self.args.seed
        n = min(n, len(self.data))
        n_blocks = self.model.n_blocks
        order = rng(seed, EVAL).permutation(len(self.data))[:n]
        levels = stratified_t(n * n_blocks, rng(seed, EVAL, 1), 0.0, *window).view(n, n_blocks)
        if self.args.mask_suffix:
            levels = mask_suffixes(levels, self.args.mask_suffix, self.data.length, rng(seed, EVAL, 3))
        for i in range(self.world.rank, math.ceil(n / self.ROWS_PER_SEED), self.world.size):
            part = slice(i * self.ROWS_PER_SEED, (i + 1) * self.ROWS_PER_SEED)
            if self.stop.received:
                break
            tokens = torch.from_numpy(self.data.rows(order[part])).to(self.world.device)
            seed_of_part = torch_seed(seed, EVAL, 2, i)
            yield tokens, loss_inputs(self.model, self.world.device, levels[part], self.teacher, seed_of_part)

    @torch.no_grad()
    def loss(self):
        """In nats per predicted token. For students with noise, given the posterior's noise: no likelihood."""
        total = 0.0
        n = 0
        for tokens, kw in self.batches(self.args.eval_rows):
            with self.world.autocast:
                loss, _ = self.model.loss(tokens, **kw)
            total += loss.item() * len(tokens)
            n += len(tokens)
        total, n = self.sum(total, n)
        return total / n

    def sum(self, *values):
        """Floats, summed over the processes. Raises Stopped."""
        *sums, stopped = self.world.sum(*values, len(self.stop.received))
        if stopped:
            raise Stopped
        return sums

    def evaluate(self, run, log):
        """The loss after this step, and with --clip_search the window of noise levels from here on (before the first
        step: that only). They stay due where a stop comes between.
        """
        run.due = True
        lines = []
        clip = run.clip
        try:
            if run.step > 0:
                value = self.loss()
                lines.append({self.name(): value})
            if self.args.clip_search and run.step % self.args.eval_every == 0:
                clip, variances = self.choose_clip()
                lines.append(dict(clip=clip, clip_search=variances))
        except Stopped:
            return
        run.due = False
        run.clip = clip
        for line in lines:
            log.record(step=run.step, **line)
        if run.step > 0:
            self.world.say(f"{self.args.out} step {run.step}: {self.name()} {value:.4f}")
        log.restart_clock(run.step)

    def choose_clip(self):
        """The window in which a block's loss varies least, (low, high), by `bd3lm.search_clip` on 256 rows; and what
        there is to log of it.
        """
        windows = clip_windows(self.model.block_size)
        self.bar = tqdm(total=len(windows), desc="clip search", leave=False, disable=not self.world.master)
        with self.bar, self.world.autocast:
            best, variance = search_clip(self.model, self.search_batches, self.sum)
        low, high = best
        self.world.say(f"clip {low:g},{high:g}: a block's loss has variance {variance[best]:.4f} (unclipped "
                       f"{variance[T_MIN, 1.0]:.4f})")
        return best, {f"{a:g},{b:g}": value for (a, b), value in variance.items()}

    def search_batches(self, window):
        self.bar.update()
        return self.batches(min(256, self.args.eval_rows), window)


# ---------------------------------------------------------------------------------------------------------------------
# training

def lr_at(step, args):
    """The learning rate of the step after `step` others."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    if args.schedule == "constant":
        return args.lr
    progress = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr * 0.5 * (1 + math.cos(math.pi * progress))


def start(args, world):
    """Open the files of a run, compare what its processes see of them, and bring its weights where they start."""
    with world.together() as seen:
        data, val, ckpt = open_run(args, world)
        seen["checkpoint"] = checkpoint_seen(args.out, ckpt)
        seen["shards"] = [data.hashes() + val.hashes(), len(data), len(val)]
        teacher = find_teacher(args, data.meta, world)
        seen["teacher"] = None
        if teacher is not None and world.first:            # one process of a machine reads it all
            seen["teacher"] = model_hash(teacher)
        torch.manual_seed(args.seed)                       # of the initial weights
        source = None                                      # a model whose weights this one starts from
        if args.init_from and not ckpt:
            path = args.init_from
            if path == "teacher":
                path = known_teacher(args, data.meta)
            source = load_model(path)
            if source.pretrained:
                check_vocabulary(f"--init_from={args.init_from}", source, data.meta)
        begin = ckpt["config"] if ckpt else known_of(source)
        seen["micro-batch"] = micro = micro_batch(args, data, begin, world)
    if teacher is not None:
        teacher.sha256 = seen["teacher"]
    now = conditions(data, val, teacher, micro, world, RANDOM)
    changed = check_conditions(args, ckpt, now, teacher, world)
    model = new_model(args, data, teacher, source, ckpt, world)
    # for validation and samples; a backbone is shared
    averaged = copy.deepcopy(model, {id(teacher): teacher}).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=BETAS, eps=EPSILON,
                                  weight_decay=WEIGHT_DECAY, fused=True)
    written = None
    progress = 0, args.clip, 0, args.clip_search
    if ckpt:
        written = ckpt["written"]
        progress = restore(args.out, ckpt, model, averaged, optimizer)
    return Run(data, val, micro, teacher, model, averaged, optimizer, now, changed, written, *progress)


def batch_gradients(args, run, ddp, answers, batches, stop, log, world):
    """Forward and backward of the next batch -> (its figures, means over it; whether a signal came; whether
    --save_minutes are over), with the gradients in place. None where a stop came between: the micro-steps so far count
    for nothing.
    """
    model = run.model
    accumulate = args.batch_size // world.size // run.micro    # micro-steps of a step
    kd = 1.0 if args.kd else 0.0                           # Table 4 weighs both terms alike
    # the whole batch's noise levels, of which every process takes its own
    low, high = run.clip or (T_MIN, 1.0)
    levels = stratified_t(args.batch_size * model.n_blocks, rng(args.seed, LEVELS, run.step), args.t_one, low, high)
    levels = levels.view(args.batch_size, model.n_blocks)
    if args.mask_suffix:
        levels = mask_suffixes(levels, args.mask_suffix, run.data.length, rng(args.seed, LEVELS, run.step, 1))
    means = {}
    for m in range(accumulate):
        if m > 0 and sum(world.sum(len(stop.received))):   # one process's signal stops all
            return None
        tokens, known = log.next_batch(batches)
        teacher_of_batch = run.teacher
        if answers is not None:
            teacher_of_batch = answers.for_rows(known)
        t = levels[part_of_batch(m, run.micro, world)]
        key = (args.seed, NOISE, run.step, world.rank, m)
        kw = loss_inputs(model, world.device, t, teacher_of_batch, torch_seed(*key), kd=kd, clip=run.clip)
        torch.manual_seed(torch_seed(*key, 1))             # dropout
        # the last micro-step sums gradients over the processes; DDP wants to know beforehand
        ddp.require_backward_grad_sync = m == accumulate - 1
        with world.autocast:
            loss, parts = ddp(tokens.to(world.device, non_blocking=True), **kw)
        (loss / accumulate).backward()
        for name, value in dict(loss=loss.item(), **parts).items():
            means[name] = means.get(name, 0.0) + value / accumulate / world.size
    # the first process's clock counts for all
    received, late, *sums = world.sum(len(stop.received), world.master and log.save_is_due(), *means.values())
    return dict(zip(means, sums)), received > 0, late > 0


def train(args, world):
    """One run: args -> ckpt.pt and log.jsonl in its directory. Everything above serves it. Returns the data's meta."""
    run = start(args, world)
    meta = run.data.meta
    if run.step >= args.steps and not run.due:
        world.say(f"{args.out}: complete at step {run.step}")
        return meta
    if run.written:
        world.say(f"{args.out}: continuing at step {run.step}")
    model = run.model
    if args.compile:
        others = [] if run.teacher is None or model.drafts else run.teacher.networks()
        for network in [*model.networks(), *others]:
            network.compile()
    ddp = model
    if world.size > 1:
        ddp = DistributedDataParallel(model, process_group=world.gradients, gradient_as_bucket_view=True)
    answers = teacher_of_rows(args, model, run.teacher, run.data, world)
    tokens_per_step = args.batch_size * run.data.length
    flops = flops_per_row(model, run.teacher if answers is None else None, run.data.length)
    batches = read_ahead(micro_batches(run.data, answers, args, run.micro, world, run.step))
    streak = 0                                             # bad steps in a row
    failed = False
    with world.together():                                 # (Log takes the run directory: no other run writes there)
        log = Log(args, world, run.written, run.step, tokens_per_step, flops / run.data.length)
    with log, StopSignals() as stop, closing(batches):
        validation = Validation(run.averaged, run.teacher, run.val, args, world, stop)
        log.describe(args, world, run)
        if run.due:                                        # of the first step, or what a stop interrupted
            validation.evaluate(run, log)
            if run.due:
                leave(args, run, streak, log, stop, world)
            if run.written:                                # or it would be done, and logged, once more
                keep(args, run, streak, log, world)
        while run.step < args.steps:
            lr = lr_at(run.step, args)
            for group in run.optimizer.param_groups:
                group["lr"] = lr

            # forward and backward; gradients and figures are means over the whole batch
            found = batch_gradients(args, run, ddp, answers, batches, stop, log, world)
            if found is None:
                leave(args, run, streak, log, stop, world)
            means, received, late = found
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_norm)

            # the update, or none where a number is not finite
            if math.isfinite(means["loss"]) and torch.isfinite(norm):
                streak = 0
                run.optimizer.step()
                # a short average at first: the weights of the beginning are soon forgotten
                update_average(run.averaged, model, min(args.ema, (1 + run.step) / (10 + run.step)))
            else:
                streak += 1
                run.bad_steps += 1
                world.say(f"step {run.step}: loss {means['loss']} and gradient norm {norm.item()} are not both "
                          "finite, step skipped")
            run.optimizer.zero_grad(set_to_none=True)      # of a skipped step as well
            run.step += 1

            # log, validate, save
            last = run.step == args.steps
            failed = streak == 20 or (last and streak > 0)
            log.show(run.step, means["loss"])
            if run.step % args.log_every == 0 or last or streak:
                log.record(step=run.step, **means, lr=lr, grad_norm=norm.item(), skipped=streak > 0,
                           bad_steps=run.bad_steps, tokens=run.step * tokens_per_step, **log.speed(run.step))
                log.restart_clock(run.step)
            if run.step % args.eval_every == 0 or last:
                validation.evaluate(run, log)
            if received or run.due:
                leave(args, run, streak, log, stop, world)
            if run.step % args.save_every == 0 or run.step in (args.keep or ()) or last or failed or late:
                keep(args, run, streak, log, world)
            if failed:
                break
        if stop.received:                                  # too late for the loop: go no further
            stop.exit()
    tell_bad_steps(args, run.bad_steps, failed, run.step - streak, world)
    return meta


def report(args, meta):
    """The table that a run on the maze, words or molecules ends with; of other data there is none."""
    if not knows_success(meta) or not args.report:
        return
    command = ["maze" if meta["tokenizer"] == "maze" else "success", "--ckpt"]
    if MODELS[args.model].drafts:
        command = ["acceptance", "--ckpt"]
    elif needs_teacher(args.noise) and teacher_path(args, meta):
        command.append(teacher_path(args, meta))           # a row of its own, to compare
    command += [args.out, f"--n={args.report}", f"--dtype={args.dtype}"]
    if args.mask_suffix == 1:
        command += ["--sampler=fixed", "--order=left_to_right"]
    evaluate.main(command)


def main():
    args = parse(sys.argv[1:])
    with World(args.dtype) as world:
        with world.together():
            if world.first:
                make_missing(args.data)
        train_missing_teacher(args, world)
        meta = train(args, world)
    if world.master:
        report(args, meta)


if __name__ == "__main__":
    run_main(main)
