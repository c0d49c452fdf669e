"""What will my run cost? Time by part of a step and peak memory on a card, from the code itself and without the card.

    python -m extra.bench plan --gumbel                     # the default job
    python -m extra.bench plan --gumbel --teacher_cache=8 --compile --card=a100

Forward, backward and update of the real models run on *fake* tensors, which have shapes and no data. Every op is
counted as it passes: its FLOPs, the bytes that it reads and writes, and the storages that are alive. A product takes
max(FLOPs / speed, bytes / bandwidth), everything else bytes / bandwidth, at the shares of a card's peaks that kernels
reach on an H100. What decides by device is told that it is on a GPU (`gumbel.DEVICE`).

Not in it: gaps between launches, waits for data and the other processes, and what kernels hold for themselves (the 2 GB
in "with the rest" stand for that). --compile is a model: no traffic between the ops of a part, but for what enters a
group of them between two products, and what outlives it.

Shapes: B rows of a micro-batch, L length, V vocabulary, N masked positions.
"""
import copy
import dataclasses
import math
import weakref
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import bd3lm
import gumbel
import mdlm
import medusa
import teacher as ar
import train
from data.batches import loss_inputs
from data.cli import BadInput, add_flags
from data.report import print_table
from data.run import CARDS, flops_per_row
from data.teacher_cache import TeacherCache

# flags of a run that a plan reads, named and read as train.py's
RUN_FLAGS = ("model", "gumbel", "kd", "teacher", "teacher_cache", "size", "length", "block_size", "heads",
             "micro_batch_size", "batch_size", "steps", "dtype", "compile")
MICRO_BATCHES = (4, 8, 16, 32, 64)
OVERHEAD = 2e9                                             # context, buffers of libraries, fragmentation

# the shares of a card's peaks that kernels reach on an H100: products in bf16 600 TFLOP/s (a third of it where rows are
# no multiple of 16 bytes), attention 400, TF32 300, float32 50; 2.8 TB/s
REACHED = dict(bf16=0.607, unaligned=0.202, attention=0.404, tf32=0.606, float32=0.746, bandwidth=0.836)

BODY = "teacher, body"
ANSWER = "teacher, head"
DRAW = "noise, posterior, features, projection: forward"
REDRAW = "the same again in the backward"
STUDENT = "student, forward"
HEAD = "head + cross-entropy, forward"
BACKWARD = "student, head, cross-entropy: backward"
UPDATE = "clipping, AdamW, EMA: once a step"
PARTS = (BODY, ANSWER, DRAW, REDRAW, STUDENT, HEAD, BACKWARD, UPDATE)
COMPILED = {BODY, DRAW, REDRAW, STUDENT, BACKWARD}


# ---------------------------------------------------------------------------------------------------------------------
# counting

LOOKUPS = {"gather", "index", "embedding", "index_select"}       # read as much as they write
SCATTERS = {"scatter_", "index_put_"}                            # write as much as they are given
OVERWRITES = SCATTERS | {"copy_", "fill_", "zero_", "uniform_", "normal_", "bernoulli_"}  # do not read what they change
ATTENTION = {"_scaled_dot_product_flash_attention_for_cpu": 4,   # FLOPs per query, key and channel
             "_scaled_dot_product_flash_attention_for_cpu_backward": 8}


def size(tensor):
    """The bytes of a tensor; what is expanded lies in memory once."""
    return tensor.itemsize * math.prod(n for n, stride in zip(tensor.shape, tensor.stride()) if stride or n == 0)


def identity(tensor):
    return tensor.untyped_storage()._cdata


def tensors_in(values):
    return [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]


@dataclass
class Cost:
    flops: float = 0.0
    traffic: float = 0.0                                   # bytes
    seconds: float = 0.0


class Ledger(TorchDispatchMode):
    """Books every op that runs in it: its cost on a `Card` by part of the step, and the memory that is alive.

    `compiled`: the parts in which only what enters and leaves a group of ops counts. `seen`: {number of queries: the
    share of the keys' tiles that attention over them does not skip}.
    """

    def __init__(self, card, compiled=()):
        super().__init__()
        self.card = card
        self.compiled = compiled
        self.seen = {}
        self.parts = [STUDENT]                             # the one that runs is the last
        self.live = {}                                     # storage -> bytes
        self.current = 0
        self.group = 0
        self.unread = {}                                   # storage -> (group, bytes, part) of what a group has written
        self.start_group()
        self.start()

    def start(self):
        """Count from here on."""
        self.costs = defaultdict(Cost)
        self.peak = self.current

    # parts

    @contextmanager
    def part(self, name):
        self.start_group()
        self.parts.append(name)
        yield
        self.start_group()
        self.parts.pop()

    def call(self, name, function, *args, **kw):
        """Call a function as this part of the step -> its result."""
        with self.part(name):
            return function(*args, **kw)

    # memory, as the allocator of CUDA cuts it

    def hold(self, tensor):
        """Whether this tensor's storage is new; it counts from now until nobody refers to it."""
        key = identity(tensor)
        if key in self.live:
            return False
        storage = tensor.untyped_storage()
        self.live[key] = -(-storage.nbytes() // 512) * 512
        self.current += self.live[key]
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self.release, key).atexit = False
        return True

    def release(self, key):
        self.current -= self.live.pop(key)
        self.entered.pop(key, None)
        self.unread.pop(key, None)

    # groups of ops that one kernel would fuse: in a compiled part, those between two products

    def start_group(self):
        self.group += 1
        self.entered = {}                                  # storage -> bytes that the group reads from outside

    def read_in_group(self, key, n):
        """What the group itself has written costs nothing; of what it has not, all is read at most once."""
        if key in self.unread and self.unread[key][0] == self.group:
            return
        self.settle(key)
        before = self.entered.get(key, 0)
        self.entered[key] = min(before + n, self.live.get(key, n))
        self.book(self.entered[key] - before)

    def write_in_group(self, key, n):
        """It is booked when something outside the group reads it: a compiler leaves out what nobody reads."""
        before = 0
        if key in self.unread and self.unread[key][0] == self.group:
            before = self.unread[key][1]
        else:
            self.settle(key)
        self.unread[key] = (self.group, min(before + n, self.live[key]), self.parts[-1])

    def settle(self, key):
        if key in self.unread:
            _, n, part = self.unread.pop(key)
            self.book(n, part=part)

    # ops

    def book(self, traffic, flops=0, seconds=None, part=None):
        cost = self.costs[part or self.parts[-1]]
        cost.flops += flops
        cost.traffic += traffic
        cost.seconds += seconds or traffic / (REACHED["bandwidth"] * self.card.bandwidth)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._opname
        arguments = func._schema.arguments
        written = {a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write}
        given = dict(zip((a.name for a in arguments), args)) | kwargs
        result = func(*args, **kwargs)
        made = [tensor for tensor in tensors_in(result) if self.hold(tensor)]
        changed = tensors_in([given[a] for a in written if a in given])
        if "empty" in name or not (made or changed):       # memory, or a view: nothing moves
            return result
        read = tensors_in([value for a, value in given.items() if a != "out"])
        if name in OVERWRITES:
            read = read[1:]
        reads = [(identity(tensor), size(tensor)) for tensor in read]
        writes = [(identity(tensor), size(tensor)) for tensor in made + changed]
        if name in LOOKUPS:
            reads = [(key, min(n, writes[0][1])) for key, n in reads]
        if name in SCATTERS and reads:
            writes = [(writes[0][0], reads[-1][1])]

        is_product = getattr(torch.ops.aten, name.rstrip("_"), None) in flop_registry or name in ATTENTION
        if self.parts[-1] in self.compiled and not is_product:
            for key, n in reads:
                self.read_in_group(key, n)
            for key, n in writes:
                self.write_in_group(key, n)
            return result
        self.start_group()
        for key, _ in reads + writes:
            self.settle(key)
        traffic = sum(n for _, n in reads + writes)
        if is_product:
            flops = self.flops(name, args, kwargs, result)
            speed = self.speed(name, read + made + changed)
            moving = traffic / (REACHED["bandwidth"] * self.card.bandwidth)
            self.book(traffic, flops, max(moving, flops / speed))
        else:
            self.book(traffic)
        return result

    def flops(self, name, args, kwargs, result):
        if name not in ATTENTION:
            return flop_registry[getattr(torch.ops.aten, name.rstrip("_"))](*args, **kwargs, out_val=result)
        q, k = args[:2]
        if "backward" in name:                             # its first argument is the gradient
            q, k = args[1:3]
        *batch, queries, channels = q.shape
        pairs = math.prod(batch) * queries * k.shape[-2]
        return ATTENTION[name] * pairs * channels * self.seen.get(queries, 1.0)

    def speed(self, name, tensors):
        """FLOP/s of a product of these tensors, the result among them."""
        if tensors[0].dtype == torch.float32:
            if torch.get_float32_matmul_precision() == "high":
                return REACHED["tf32"] * self.card.tf32
            return REACHED["float32"] * self.card.float32
        if name in ATTENTION:
            return REACHED["attention"] * self.card.bf16
        unaligned = any(max(x.stride()) * x.itemsize % 16 for x in tensors if x.dim() > 1)
        return REACHED["unaligned" if unaligned else "bf16"] * self.card.bf16


# ---------------------------------------------------------------------------------------------------------------------
# what fake tensors cannot answer

class Answers(TorchFunctionMode):
    """Answers where data is asked for, or where a GPU takes another op than a CPU."""
    masked_positions = 1                                   # N

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.item:
            return 1.0
        if func is F.scaled_dot_product_attention:
            return attention(*args, is_causal=kwargs["is_causal"])
        if func is F.dropout and kwargs["training"] and kwargs["p"]:
            return torch.native_dropout(args[0], kwargs["p"], True)[0]
        if func is torch.Tensor.__getitem__ and isinstance(args[1], torch.Tensor) and args[1].dtype == torch.bool:
            x, mask = args
            index = torch.empty(self.masked_positions, dtype=torch.long)
            return x.flatten(0, mask.dim() - 1)[index]
        return func(*args, **kwargs)


def attention(q, k, v, is_causal=False):
    """Flash attention, [B, H, L, head_dim]: it keeps q, k, v, the result and a number per row for the backward."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal)[0]


def flex_attention(q, k, v, block_mask):
    return attention(q, k, v)


def to(module, what):
    """In place of nn.Module.to, which cannot swap fake parameters: a dtype; a device is the one that it is on."""
    if isinstance(what, torch.dtype):
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(p.to(what), requires_grad=p.requires_grad))
    return module


# ---------------------------------------------------------------------------------------------------------------------
# a run

class Run:
    """A training run on fake tensors: made as train.py makes it, its parts labelled for the ledger."""

    def __init__(self, args, vocab_size, ledger, answers):
        self.args = args
        self.ledger = ledger
        self.answers = answers
        data = SimpleNamespace(length=args.length)
        data.meta = dict(vocab_size=vocab_size, bos=vocab_size - 1, predict_bos=True, tokenizer="gpt2")
        self.teacher = None
        if train.asks_teacher(args):
            name = train.teacher_path(args, data.meta)
            self.teacher = ar.GPT2(vocab_size, 1024, vocab_size - 1, *ar.GPT2_SIZES[name], dropout=0.0)
            self.teacher.eval().requires_grad_(False)
            self.teacher.path = name
            self.teacher.sha256 = ""                       # nobody's weights
        self.model = train.new_model(args, data, self.teacher, None, SimpleNamespace(device="cpu"))
        fake_mode = next(self.model.parameters()).fake_mode
        shared = {id(x): x for x in (self.teacher, fake_mode)}
        self.averaged = copy.deepcopy(self.model, shared).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=args.lr, fused=True)
        if self.teacher is not None and args.dtype == "bfloat16":
            self.teacher.body_to_bfloat16()
        self.cache = None
        if args.teacher_cache:
            self.cache = TeacherCache.__new__(TeacherCache)     # without its files
            self.cache.k = args.teacher_cache
            self.cache.frequency = torch.ones(vocab_size)
        self.label()
        # from now on the optimizer holds its moments
        for p in self.model.parameters():
            p.grad = torch.zeros_like(p)
        self.update()

    def label(self):
        """Methods book what they do as a part of the step."""
        call = self.ledger.call
        if self.teacher is not None:
            self.teacher.hidden = partial(call, BODY, self.teacher.hidden)
            self.teacher.logits = partial(call, ANSWER, self.teacher.logits)
        if self.cache is not None:
            self.cache.posterior_logits = partial(call, DRAW, self.cache.posterior_logits)
        noise_embed = self.model.noise_embed
        if noise_embed is not None:
            noise_embed.from_posterior = partial(call, DRAW, noise_embed.from_posterior)

    def micro_step(self, rows, masked):
        """Forward and backward of so many rows, with this share of positions masked, as in train.train."""
        L = self.args.length
        self.answers.masked_positions = round(masked * rows * (L - 1))
        tokens = torch.zeros(rows, L, dtype=torch.long)
        t = torch.full((rows, self.model.n_blocks), masked)
        source = self.teacher
        if self.cache is not None:
            stored = torch.zeros(rows, L - 1, 2 * self.cache.k + 1, dtype=torch.int16)
            source = self.cache.for_rows(stored)
        kd = 1.0 if self.args.kd else 0.0
        kw = loss_inputs(self.model, torch.device("cpu"), t, source, 0, kd=kd, clip=None)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.args.dtype == "bfloat16"):
            loss, _ = self.model(tokens, **kw)
        self.ledger.call(BACKWARD, loss.backward)

    def update(self):
        """What a step does besides its micro-steps."""
        with self.ledger.part(UPDATE):
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip_norm)
            self.optimizer.step()
            train.update_average(self.averaged, self.model, self.args.ema)
            self.optimizer.zero_grad(set_to_none=True)


@contextmanager
def pretending(ledger, answers):
    """Fake tensors, booked by the ledger; code that decides by device is told that it is on a GPU."""
    on_a_gpu = vars(dataclasses.replace(gumbel.GPU, planned=True))
    redraw = partial(ledger.call, REDRAW, gumbel._ChunkedProjection.backward)
    losses = partial(ledger.call, HEAD, mdlm.row_losses)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(vars(gumbel.DEVICE), on_a_gpu))
        stack.enter_context(mock.patch.object(gumbel._ChunkedProjection, "backward", staticmethod(redraw)))
        for module in (mdlm, medusa, ar):
            stack.enter_context(mock.patch.object(module, "row_losses", losses))
        stack.enter_context(mock.patch.object(mdlm, "compiled_flex", lambda: flex_attention))
        stack.enter_context(mock.patch.object(nn.Module, "to", to))
        for mode in (FakeTensorMode(), ledger, answers):
            stack.enter_context(mode)
        yield


def training_flags(args):
    """The flags of this plan as train.py's: a Namespace with its defaults and presets. BadInput where they do not fit."""
    argv = []
    for name in RUN_FLAGS:
        value = getattr(args, name)
        if value is True:
            argv.append(f"--{name}")
        elif value:
            argv.append(f"--{name}={value}")
    run = train.parse(argv)
    if run.dtype == "auto":
        run.dtype = "bfloat16"                             # as on CUDA
    if run.teacher and run.teacher not in ar.GPT2_SIZES:
        raise BadInput(f"--teacher={run.teacher}: a plan knows the shapes of {', '.join(ar.GPT2_SIZES)}")
    if train.asks_teacher(run) and run.length > 1024:
        raise BadInput(f"--length={run.length} is more than the 1024 tokens that GPT-2 reads: choose a smaller one")
    share, rest = divmod(run.batch_size, args.processes)
    if rest:
        raise BadInput(f"--batch_size={run.batch_size} must be a multiple of --processes={args.processes}")
    if run.micro_batch_size is None:                       # train.py's on CUDA
        run.micro_batch_size = max(m for m in range(1, 33) if share % m == 0)
    if share % run.micro_batch_size:
        raise BadInput(f"--micro_batch_size={run.micro_batch_size} must divide the {share} rows that each of "
                       f"{args.processes} processes has of a batch")
    return run


def plan(args):
    """`bench plan`: the parts of a micro-step, the step, and which micro-batches fit, as tables."""
    run_args = training_flags(args)
    card = CARDS[args.card.upper()]
    ledger = Ledger(card, COMPILED if run_args.compile else ())
    answers = Answers()
    if run_args.block_size:                                # computed with data, and kept by bd3lm
        shape = (run_args.length, run_args.block_size, torch.device("cpu"))
        bd3lm.training_mask(*shape, False)
        ledger.seen[2 * run_args.length] = 1 - bd3lm.training_mask(*shape, True).sparsity() / 100
    peaks = {}
    with pretending(ledger, answers):
        run = Run(run_args, args.vocab_size, ledger, answers)
        static = ledger.current
        for rows in sorted({*MICRO_BATCHES, run_args.micro_batch_size}):
            ledger.start()
            run.micro_step(rows, args.masked)
            run.update()
            peaks[rows] = ledger.peak
            if rows == run_args.micro_batch_size:
                costs = ledger.costs
    show_time(args, run, costs, card)
    show_memory(args, run, peaks, static, card)


def show_time(args, run, costs, card):
    """The table of parts, and what follows for the step."""
    rows = []
    for name in PARTS:
        if name in costs:
            rows.append(row_of(name, costs[name]))
    micro_step = [cost for name, cost in costs.items() if name != UPDATE]
    rows.append(row_of("sum of a micro-step", Cost(*(sum(getattr(cost, field.name) for cost in micro_step)
                                                     for field in dataclasses.fields(Cost)))))
    titles = dict(part="part", flops="TFLOP", traffic="GB moved", ms="ms")
    print_table(rows, titles, dict(traffic=0, ms=0))
    accumulate = run.args.batch_size // args.processes // run.args.micro_batch_size
    seconds = accumulate * sum(cost.seconds for cost in micro_step) + costs[UPDATE].seconds
    asked = None if run.cache is not None else run.teacher
    flops = run.args.batch_size * flops_per_row(run.model, asked, run.args.length)
    mfu = flops / seconds / (args.processes * card.bf16)
    tokens = run.args.batch_size * run.args.length / seconds
    print(f"\nA step, {args.processes} x {args.card}, {accumulate} micro-steps of {run.args.micro_batch_size} rows: "
          f"{1e3 * seconds:.0f} ms, {tokens:,.0f} tokens/s, MFU {mfu:.1%}; {run.args.steps:,} steps: "
          f"{run.args.steps * seconds / 86400:.2f} days\n")


def row_of(name, cost):
    return dict(part=name, flops=cost.flops / 1e12, traffic=cost.traffic / 1e9, ms=1e3 * cost.seconds)


def show_memory(args, run, peaks, static, card):
    """The table of micro-batches, and those that fit."""
    parameters = sum(size(p) for p in run.model.parameters())
    share = run.args.batch_size // args.processes
    rows = []
    fitting = []
    for micro, peak in peaks.items():
        whole = peak + OVERHEAD
        if args.processes > 1 or share > micro:            # gradients wait for those of other rows
            whole += parameters
        fits = "no"
        if whole <= card.memory:
            fits = "yes"
            fitting.append(str(micro))
        rows.append(dict(micro=micro, peak=peak / 1e9, whole=whole / 1e9, fits=fits))
    titles = dict(micro="micro-batch", peak="peak GB", whole="with the rest", fits=f"fits {card.memory / 1e9:.0f} GB")
    print_table(rows, titles)
    print(f"\n{static / 1e9:.1f} GB of it are weights, moments, averages and the teacher. On the {args.card} fit: "
          f"{', '.join(fitting) or 'none of these'}")


def add_command(commands, parser_class):
    """The subcommand `plan`; flags of the run are those of train.py."""
    sub = commands.add_parser("plan")
    of_run = [flag for flags in train.FLAGS.values() for flag in flags if flag[0] in RUN_FLAGS]
    add_flags(sub, {"the run, as train.py's": of_run})
