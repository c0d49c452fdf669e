"""What will a run cost? Time by part and peak memory on a card, from the code itself: `python -m extra.bench plan`.

Forward, backward and update of the real models run on *fake* tensors, which have a shape and no data. Each op is
counted as it passes: its FLOPs, the bytes that it reads and writes, the storages that are alive. A product takes
max(FLOPs / speed, bytes / bandwidth), all else bytes / bandwidth. Left out: gaps between launches, waits for data and
other processes, what kernels allocate for themselves. --compile is a model: in all parts but EAGER, what passes between
ops from one product to the next costs nothing; the peak stays that of eager ops.
"""
import math
import weakref
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
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
import teacher
import train
from data.batches import loss_inputs
from data.cli import BadInput
from data.report import print_table
from data.run import CARDS, body_to_bfloat16, flops_per_row, rows_that_fit
from data.teacher_cache import QuantileCache, TeacherCache, truncated_logits
from teacher import GPT2, GPT2_SIZES

# the shares of a card's peaks that kernels reach on an H100: products in bf16 600 TFLOP/s (a third of it where rows are
# no multiple of 16 bytes), attention 400, TF32 300, float32 50; 2.8 TB/s
REACHED = dict(bf16=0.607, unaligned=0.202, attention=0.404, tf32=0.606, float32=0.746, bandwidth=0.836)
PEAK = dict(unaligned="bf16", attention="bf16")                  # whose peak, where it is not their own
OVERHEAD = 2e9                                             # context, buffers of libraries, fragmentation
MICRO_BATCHES = (4, 8, 16, 32, 64)

# parts of a step that others than their own call ask for
STUDENT = "student, forward"
UPDATE = "clipping, AdamW, EMA: once a step"
HEAD = "head + cross-entropy, forward"
ANSWER = "teacher, head"
EAGER = {UPDATE, HEAD, ANSWER}                             # not compiled by --compile


def speeds_of(card):
    """What kernels reach on a `Card`, by what they do: FLOP/s, and bytes per second for "bandwidth"."""
    return {kind: share * getattr(card, PEAK.get(kind, kind)) for kind, share in REACHED.items()}


# ---------------------------------------------------------------------------------------------------------------------
# counting

LOOKUPS = {"gather", "index", "embedding"}                       # read as much as they write
SCATTERS = {"scatter_", "index_put_"}                            # write as much as they are given
OVERWRITES = SCATTERS | {"copy_", "fill_", "zero_"}              # do not read what they change
ATTENTION = {"_scaled_dot_product_flash_attention_for_cpu": 4,   # FLOPs per query, key and channel
             "_scaled_dot_product_flash_attention_for_cpu_backward": 8}


def size(tensor):
    """The bytes of a tensor; what is expanded lies in memory once."""
    return tensor.itemsize * math.prod(n for n, stride in zip(tensor.shape, tensor.stride()) if stride)


def tensors_in(values):
    return [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]


class Ledger(TorchDispatchMode):
    """Books every op that runs in it: [FLOPs, bytes, seconds] by part of the step at these speeds, and the live memory.

    compiled: outside EAGER, ops between two products are one group, as one kernel. seen: {number of queries: the share
    of the keys' tiles that attention over them does not skip}.
    """

    def __init__(self, speeds, compiled=False, seen={}):
        super().__init__()
        self.speeds = speeds
        self.bandwidth = speeds["bandwidth"]
        self.compiled = compiled
        self.seen = seen
        self.current = 0                                   # bytes that are alive
        self.live = weakref.WeakSet()                      # their storages
        self.unread = weakref.WeakKeyDictionary()          # storage -> (bytes, part, group) of what a group has written
        self.group = 0                                     # the number of the one that runs
        self.start_group(STUDENT)
        self.restart()

    def restart(self):
        self.costs = defaultdict(lambda: np.zeros(3))
        self.peak = self.current

    def start_group(self, part):
        self.part = part
        self.group += 1
        self.entered = set()                               # what it has read

    def call(self, part, function, *args, **kw):
        """Call a function as a part of the step -> its result."""
        outer = self.part
        self.start_group(part)
        result = function(*args, **kw)
        self.start_group(outer)
        return result

    def hold(self, tensor):
        """Whether this tensor's storage is new: it counts, as CUDA's allocator rounds it, until nobody refers to it."""
        storage = tensor.untyped_storage()
        if storage in self.live:
            return False
        self.live.add(storage)
        n = math.ceil(storage.nbytes() / 512) * 512
        self.current += n
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self.release, n).atexit = False
        return True

    def release(self, n):
        self.current -= n

    def read(self, tensor, limit):
        """The bytes that the group that runs reads of a tensor: all of it once, none of what it has written itself."""
        storage = tensor.untyped_storage()
        n, part, group = self.unread.get(storage, (0, None, None))
        view = (storage._cdata, tensor.storage_offset())
        if group == self.group or view in self.entered:
            return 0
        if part is not None:                               # another group has written it, and not in vain
            del self.unread[storage]
            self.costs[part] += (0, n, n / self.bandwidth)
        self.entered.add(view)
        return min(size(tensor), limit)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._opname
        result = func(*args, **kwargs)
        made = [tensor for tensor in tensors_in(result) if self.hold(tensor)]
        arguments = func._schema.arguments
        given = dict(zip((a.name for a in arguments), args)) | kwargs
        is_written = {a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write}
        written = made + tensors_in([given[a] for a in is_written if a in given])
        if "empty" in name or not written:                 # memory, or a view: nothing moves
            return result
        read = tensors_in([value for a, value in given.items() if a != "out"])
        if name in OVERWRITES:
            read = read[1:]
        is_product = name in ATTENTION or getattr(torch.ops.aten, name.rstrip("_"), None) in flop_registry
        alone = is_product or not self.compiled or self.part in EAGER
        if alone:
            self.start_group(self.part)
        limit = size(written[0]) if name in LOOKUPS else math.inf
        traffic = sum(self.read(tensor, limit) for tensor in read)
        for tensor in written:
            n = size(read[-1] if name in SCATTERS else tensor)
            if alone:
                traffic += n
            else:                                          # (a part of it may be written a second time)
                before, _, group = self.unread.get(tensor.untyped_storage(), (0, None, None))
                n = max(n, before) if group == self.group else n
                self.unread[tensor.untyped_storage()] = (n, self.part, self.group)
        flops = 0
        seconds = traffic / self.bandwidth
        if is_product:
            flops = self.flops(name, args, kwargs, result)
            seconds = max(seconds, flops / self.speed(name, read + written))
        self.costs[self.part] += (flops, traffic, seconds)
        if alone:
            self.start_group(self.part)
        return result

    def flops(self, name, args, kwargs, result):
        if name not in ATTENTION:
            return flop_registry[getattr(torch.ops.aten, name.rstrip("_"))](*args, **kwargs, out_val=result)
        q, k = args[1:3] if "backward" in name else args[:2]     # after the gradient
        return ATTENTION[name] * q.numel() * k.shape[2] * self.seen.get(q.shape[2], 1)

    def speed(self, name, tensors):
        """FLOP/s of a product; `tensors`: its operands and its result."""
        if tensors[0].dtype == torch.float32:
            return self.speeds["tf32" if torch.get_float32_matmul_precision() == "high" else "float32"]
        kind = "bf16"
        if name in ATTENTION:
            kind = "attention"
        elif any(max(x.stride()) * x.itemsize % 16 for x in tensors if x.dim() > 1):
            kind = "unaligned"
        return self.speeds[kind]


# ---------------------------------------------------------------------------------------------------------------------
# a run on fake tensors

class Answers(TorchFunctionMode):
    """What depends on data (of masks, this share is set), and what takes another op on a GPU than on a CPU."""

    def __init__(self, masked, length):
        super().__init__()
        self.masked_of_row = masked * (length - 1)         # BOS never is

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.item:
            return 1.0
        if func is torch.Tensor.__getitem__ and isinstance(args[1], torch.Tensor) and args[1].dtype == torch.bool:
            x, mask = args
            n = max(1, round(len(mask) * self.masked_of_row))
            return x.flatten(0, mask.dim() - 1)[torch.empty(n, dtype=torch.long)]
        if func is F.scaled_dot_product_attention:
            return attention(*args, **kwargs)
        if func is F.dropout and kwargs["training"] and kwargs["p"]:
            return torch.native_dropout(args[0], kwargs["p"], True)[0]
        return func(*args, **kwargs)


def attention(q, k, v, is_causal=False, attn_mask=None, block_mask=None):
    """Flash attention, whatever the mask, [B, H, L, head_dim]: q, k, v, the result and a number a row are kept."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal)[0]


def convert(module, to):
    """In place of nn.Module.to, which cannot swap fake weights. Their device is right already."""
    if isinstance(to, torch.dtype):
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(p.to(to), requires_grad=p.requires_grad))
    return module


@contextmanager
def fake_gpu(ledger, answers):
    """In the body all tensors are fake, the ledger books, and functions are labelled or replaced."""
    losses = partial(ledger.call, HEAD, mdlm.row_losses)
    redraw = partial(ledger.call, "the same in the backward", gumbel._ChunkedProjection.backward)
    with ExitStack() as stack:
        stack.enter_context(patch.dict(vars(gumbel.DEVICE), vars(gumbel.GPU) | {"planned": True}))
        stack.enter_context(patch.object(gumbel._ChunkedProjection, "backward", staticmethod(redraw)))
        for module in (mdlm, teacher, medusa):
            stack.enter_context(patch.object(module, "row_losses", losses))
        stack.enter_context(patch.object(mdlm, "compiled_flex", lambda: attention))
        stack.enter_context(patch.object(nn.Module, "to", convert))
        for mode in (FakeTensorMode(), ledger, answers):
            stack.enter_context(mode)
        yield


class Run:
    """What train.train holds, and its steps; made in `fake_gpu`."""

    def __init__(self, args, vocab_size, ledger):
        self.args = args
        self.ledger = ledger
        meta = dict(vocab_size=vocab_size, bos=vocab_size - 1, predict_bos=True, tokenizer="gpt2")
        self.gpt2 = None
        if train.asks_teacher(args):
            name = train.teacher_path(args, meta)
            self.gpt2 = GPT2(vocab_size, 1024, vocab_size - 1, *GPT2_SIZES[name], dropout=0.0)
            self.gpt2.eval().requires_grad_(False)
            self.gpt2.path = self.gpt2.sha256 = name
        source = None
        if args.init_from:
            source = GPT2(vocab_size, 1024, vocab_size - 1, *GPT2_SIZES[args.init_from], dropout=0.0)
        data = SimpleNamespace(length=args.length, meta=meta)
        world = SimpleNamespace(device="cpu")
        self.model, self.averaged = [train.new_model(args, data, self.gpt2, source, None, world) for _ in range(2)]
        del source                                         # a run lets go of it, too
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=args.lr, fused=True)
        self.cache = None
        if args.teacher_cache and self.model.quantile:
            self.cache = QuantileCache.__new__(QuantileCache)    # without its files
        elif args.teacher_cache:
            self.cache = TeacherCache.__new__(TeacherCache)
            self.cache.k = args.teacher_cache
            self.cache.frequency = torch.ones(vocab_size)
            self.cache.expand = partial(ledger.call, "cache, its logits", truncated_logits)
        if self.gpt2 is not None and args.dtype == "bfloat16":
            body_to_bfloat16(self.gpt2)
        # these calls are booked as parts of the step
        draw = "noise, posterior, features, projection: forward"
        for part, owner, name in (("teacher, body", self.gpt2, "hidden"), (ANSWER, self.gpt2, "logits"),
                                  (draw, self.cache, "posterior_logits"),
                                  (draw, self.model.noise_embed, "from_posterior")):
            if owner is not None:
                setattr(owner, name, partial(ledger.call, part, getattr(owner, name)))
        self.hold_gradients()
        self.update()                                            # the optimizer holds its moments from now on

    def hold_gradients(self):
        for p in self.model.parameters():
            p.grad = torch.zeros_like(p)

    def micro_step(self, rows):
        L = self.args.length
        t = torch.ones(rows, self.model.n_blocks)
        source = self.gpt2
        if self.cache is not None:
            source = self.cache.for_rows(self.loaded(rows, L))
        kw = loss_inputs(self.model, t.device, t, source, 0, kd=float(self.args.kd is not None), clip=None)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.args.dtype == "bfloat16"):
            loss, _ = self.model(torch.zeros(rows, L, dtype=torch.long), **kw)
        self.ledger.call("student, head, cross-entropy: backward", loss.backward)

    def loaded(self, rows, length):
        """As a cache's `load` returns it."""
        if self.model.quantile:
            return torch.zeros(rows, length - 1, 2, dtype=torch.float64)
        dtype = torch.int16 if self.model.vocab_size <= 1 << 16 else torch.int32
        return torch.zeros(rows, length - 1, 2 * self.cache.k + 1, dtype=dtype)

    def update(self):
        self.ledger.call(UPDATE, torch.nn.utils.clip_grad_norm_, self.model.parameters(), self.args.clip_norm)
        self.ledger.call(UPDATE, self.optimizer.step)
        self.ledger.call(UPDATE, train.update_average, self.averaged, self.model, self.args.ema)
        self.optimizer.zero_grad(set_to_none=True)


# ---------------------------------------------------------------------------------------------------------------------
# the command

def flags_of_run(args):
    """The flags as train.py reads them, with its defaults and presets. BadInput where no run has them."""
    given = {name: value for name, value in vars(args).items() if name in train.DEFAULTS}
    flags = train.parse([f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()])
    if flags.teacher not in {None, *GPT2_SIZES}:
        raise BadInput(f"--teacher={flags.teacher} has no known shape: choose one of {', '.join(GPT2_SIZES)}")
    if flags.init_from not in {None, *GPT2_SIZES}:
        raise BadInput(f"--init_from={flags.init_from} has no known shape: choose one of {', '.join(GPT2_SIZES)}")
    if train.asks_teacher(flags) and flags.length > 1024:
        raise BadInput(f"--length={flags.length} is more than the 1024 tokens that GPT-2 reads: choose a smaller one")
    flags.dtype = flags.dtype.replace("auto", "bfloat16")        # as on CUDA
    return flags


@dataclass
class Plan:
    """What `predict` finds: of a micro-batch of so many rows the costs by part, and the peak in bytes."""
    costs: dict
    peaks: dict
    static: int                                                  # bytes of weights, moments, averages, the teacher
    gradients: int                                               # bytes of theirs
    flops: float                                                 # useful ones of a row

    def seconds(self, rows, micro_steps):
        """Of a step."""
        update = self.costs[rows][UPDATE]
        return micro_steps * (sum(self.costs[rows].values()) - update)[2] + update[2]


def predict(flags, speeds, micro_batches, share, vocab_size=50257, masked=0.5):
    """Run a step of train.py's flags on fake tensors, with micro-batches of these sizes, of `share` rows a process."""
    seen = {}
    if flags.block_size:                                         # computed from data, and kept by bd3lm
        shape = (flags.length, flags.block_size, torch.device("cpu"))
        bd3lm.training_mask(*shape, False)
        seen[2 * flags.length] = 1 - bd3lm.training_mask(*shape, True).sparsity() / 100
    ledger = Ledger(speeds, flags.compile, seen)
    costs = {}
    peaks = {}
    with fake_gpu(ledger, Answers(masked, flags.length)):
        run = Run(flags, vocab_size, ledger)
        static = ledger.current
        for rows in micro_batches:
            if share > rows:                                     # a later micro-step: gradients wait
                run.hold_gradients()
            ledger.restart()
            run.micro_step(rows)
            run.update()
            costs[rows] = ledger.costs
            peaks[rows] = ledger.peak
    gradients = sum(size(p) for p in run.model.parameters())
    asked = run.gpt2 if run.cache is None else None
    return Plan(costs, peaks, static, gradients, flops_per_row(run.model, asked, flags.length))


def plan(args):
    """`bench plan`: what a micro-step and a step take, and which micro-batches fit the card."""
    flags = flags_of_run(args)
    share = flags.batch_size // args.processes                   # rows of a process
    card = CARDS[args.card.upper()]
    micro = flags.micro_batch_size
    if not micro and share:
        micro = rows_that_fit(flags, flags.length, args.vocab_size, share, card.memory)
    if share * args.processes != flags.batch_size or share % micro:
        raise BadInput(f"--batch_size={flags.batch_size} must be a multiple of --processes={args.processes} times "
                       f"--micro_batch_size={micro or 1}")
    micro_batches = sorted({*MICRO_BATCHES, micro})
    found = predict(flags, speeds_of(card), micro_batches, share, args.vocab_size, args.masked)

    rows = []
    costs = dict(found.costs[micro])
    update = costs.pop(UPDATE)
    for part, cost in {**costs, "sum of a micro-step": sum(costs.values()), UPDATE: update}.items():
        tflop, gb, ms = cost / (1e12, 1e9, 1e-3)
        rows.append(dict(part=part, tflop=float(tflop), gb=float(gb), ms=float(ms)))
    print_table(rows, dict(part="part", tflop="TFLOP", gb="GB moved", ms="ms"), dict(gb=0, ms=0))
    seconds = found.seconds(micro, share // micro)
    mfu = flags.batch_size * found.flops / seconds / (args.processes * card.bf16)
    print(f"\nA step on {args.processes} x {args.card}, each {share // micro} x {micro} rows: {1e3 * seconds:.0f} ms, "
          f"{flags.batch_size * flags.length / seconds:,.0f} tokens/s, MFU {mfu:.1%}; {flags.steps:,} steps: "
          f"{flags.steps * seconds / 86400:.2f} days\n")

    buckets = found.gradients if args.processes > 1 else 0       # in which processes sum their gradients
    memory = []
    for n, peak in found.peaks.items():
        needed = peak + buckets + OVERHEAD
        fits = "yes" if needed <= card.memory else "no"
        memory.append(dict(rows=n, peak=peak / 1e9, needed=needed / 1e9, fits=fits))
    print_table(memory, dict(rows="micro-batch", peak="peak GB", needed="with overhead", fits="fits"))
    fitting = ", ".join(str(row["rows"]) for row in memory if row["fits"] == "yes") or "none of these"
    print(f"\nWeights, moments, their average and the teacher are {found.static / 1e9:.1f} GB of it. Into the "
          f"{card.memory / 1e9:.0f} GB of {args.card} fit: {fitting}")
