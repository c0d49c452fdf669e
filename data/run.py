"""What a run needs around its loop: a device, its processes, its log, its checkpoint's file, its signals.
"""
import hashlib
import json
import math
import os
import signal
import sys
import time
import types
import zipfile
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from tqdm import tqdm

from data.cli import BadInput, environment_number, git_commit, optional
from data.files import check_archive, check_fields, maybe, naming, replacing, share, whole, writing
from data.shards import Shards, changed_meta, check_meta


@dataclass
class Card:
    """A GPU by NVIDIA's data sheet: bytes, FLOP/s of dense products (no sparsity), bytes per second."""
    memory: float
    bf16: float
    tf32: float
    float32: float
    bandwidth: float


# by what torch.cuda.get_device_name holds, from the specific to the general. (An A100 may have 40 GB)
CARDS = {
    "B200": Card(180e9, 2250e12, 1125e12, 75e12, 7.7e12),
    "H200 NVL": Card(141e9, 835e12, 417e12, 60e12, 4.8e12),
    "H200": Card(141e9, 989e12, 494e12, 67e12, 4.8e12),
    "H100 PCIe": Card(80e9, 756e12, 378e12, 51e12, 2.0e12),
    "H100 NVL": Card(94e9, 835e12, 417e12, 60e12, 3.9e12),
    "H100": Card(80e9, 989e12, 495e12, 67e12, 3.35e12),
    "A100": Card(80e9, 312e12, 156e12, 19.5e12, 2.0e12),
    "L40S": Card(48e9, 362e12, 183e12, 91.6e12, 0.864e12),
    "L40": Card(48e9, 181e12, 90.5e12, 90.5e12, 0.864e12),
    "L4": Card(24e9, 121e12, 60e12, 30.3e12, 0.3e12),
    "4090": Card(24e9, 165e12, 82.6e12, 82.6e12, 1.008e12),
}


# ---------------------------------------------------------------------------------------------------------------------
# devices and processes

def device_and_dtype(dtype):
    """-> (device, dtype, autocast context for it); the dtype "auto" is bfloat16 on CUDA and float32 on a CPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    return device, dtype, torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")


def allow_changing_shapes():
    """Keep attention off cuDNN, for samplers: it plans each shape anew, some 30 ms, where with a KV cache every call
    has another. Global to the process: not for training, whose shapes stay.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def body_to_bfloat16(model):
    """The layers of a frozen model's body in bf16: half the memory, no cast at each pass. After its hash is taken."""
    for layer in model.matrices():
        layer.to(torch.bfloat16)


class World:
    """The processes of this run: one, or those of torchrun. They meet when they first have something to compare:
    what takes long, as fetching a teacher, comes before that.
    """
    gradients = None                                       # the group that sums them: nccl on CUDA, gloo on a CPU

    def __init__(self, dtype):
        self.device, self.dtype, self.autocast = device_and_dtype(dtype)
        self.size = environment_number("WORLD_SIZE", 1)
        self.rank = environment_number("RANK", 0)
        if self.rank >= self.size:
            raise BadInput(f"the environment has RANK={self.rank} and WORLD_SIZE={self.size}: start with torchrun, or "
                           "unset both")
        self.master = self.rank == 0
        local_rank = environment_number("LOCAL_RANK", 0)
        self.first = local_rank == 0                       # of the processes of this machine
        self.cuda = self.device == "cuda"
        if self.cuda:
            self.device = f"cuda:{local_rank}"
            torch.cuda.set_device(self.device)

    def connect(self):
        """Bring the processes together, once. Who waits for a file or a teacher's pass waits for hours; who waits for a
        gradient, ten minutes, so that a real hang ends.
        """
        if self.size == 1 or self.gradients is not None:
            return
        try:
            dist.init_process_group("gloo", timeout=timedelta(hours=12))
            self.gradients = dist.new_group(backend="nccl" if self.cuda else "gloo", timeout=timedelta(minutes=10))
        except (ValueError, RuntimeError) as e:
            why = str(e).splitlines()[0]
            raise BadInput(f"WORLD_SIZE={self.size}, MASTER_ADDR and MASTER_PORT of the environment bring no "
                           f"processes together ({why}): start with torchrun, or unset them") from None

    def __enter__(self):
        return self

    def __exit__(self, kind, *error):
        # in all processes alike; without it gloo may abort. Other errors are one process's own: it waits for nobody
        if self.gradients is not None and kind in (None, BadInput, SystemExit):
            dist.destroy_process_group()

    def sum(self, *values):
        """Floats, summed over the processes."""
        if self.size == 1:
            return [float(value) for value in values]
        # float64: a sum over processes is to differ from that of one process by rounding only
        x = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(x, group=self.gradients)
        return x.tolist()

    @contextmanager
    def together(self):
        """All processes end the body together, and what fails in one fails in all.

        Yields a dict for what has to be the same in all: {what: a value, None where this process does not know it}.
        After the body it holds what the others know. BadInput where they differ: a run that is spread over machines
        would train different weights, and nothing would tell.
        """
        known = {}
        error = None
        try:
            yield known
        except Exception as e:
            error = e
        of_all = [(error and (str(error) or type(error).__name__), known)]
        if self.size > 1:
            self.connect()
            of_all *= self.size
            dist.all_gather_object(of_all, of_all[self.rank])
        if error is not None:
            raise error
        for rank, (failure, _) in enumerate(of_all):
            if failure is not None:
                raise BadInput(f"process {rank} of {self.size}: {failure}")
        for what in known:
            said = [(others[what], rank) for rank, (_, others) in enumerate(of_all) if others[what] is not None]
            for value, rank in said:
                known[what], first = said[0]
                if value != known[what]:
                    raise BadInput(f"process {first} of this run sees the {what} {known[what]}, process {rank} "
                                   f"{value}: copy that of one machine to all, or use a disk that all share")

    def say(self, text):
        """A line on stderr, from the first process, that leaves the bars whole."""
        if self.master:
            tqdm.write(text, file=sys.stderr)


@dataclass
class Run:
    """What a run is made of, and what its steps change."""
    data: Shards
    val: Shards
    micro: int                                             # rows of a micro-batch
    teacher: torch.nn.Module | None
    model: torch.nn.Module
    averaged: torch.nn.Module                              # with the weights' average over the steps (EMA)
    optimizer: torch.optim.Optimizer
    conditions: dict                                       # what the result depends on besides the flags
    changed: dict                                          # those that are others than before
    written: int | None                                    # `time_written` of the checkpoint that is continued
    step: int
    clip: tuple | None                                     # the window of noise levels
    bad_steps: int                                         # with a loss or gradient that was not finite
    due: bool                                              # the evaluation after this step is not done yet


# ---------------------------------------------------------------------------------------------------------------------
# what a run tells, and hears

class Log:
    """log.jsonl in the run directory, a bar on stderr and, with --wandb, a board; written by the first process only.

    It takes the run directory: as long as it is open, no other run writes there.
    """

    def __init__(self, args, world, written, step, tokens_per_step, flops_per_token):
        """written: `time_written` of the checkpoint that is continued, or None."""
        self.lock = ExitStack()
        self.path = os.devnull
        if world.master:
            self.path = os.path.join(args.out, "log.jsonl")
            self.lock.enter_context(writing(args.out))
            if written and written != time_written(args.out):
                self.lock.close()
                raise BadInput(f"another run has written {args.out} meanwhile: repeat the command")
            repair_log(self.path, step)
        self.file = open(self.path, "a", buffering=1)          # by line: a crash loses none
        self.board = None
        if world.master and args.wandb:
            wandb = optional("wandb", "--wandb")
            id_file = os.path.join(args.out, "wandb_id")       # a run that is continued goes on with its board
            run_id = None
            if step and os.path.exists(id_file):
                with open(id_file) as f:
                    run_id = f.read()
            self.board = wandb.init(project=args.wandb, name=os.path.basename(args.out), config=vars(args),
                                    id=run_id, resume="allow")
            with replacing(id_file) as f:
                f.write(self.board.id)
        self.bar = tqdm(total=args.steps, initial=step, desc=args.out, unit="step", disable=not world.master,
                        mininterval=1)
        self.tokens_per_step = tokens_per_step
        self.flops_per_token = flops_per_token
        self.peak = peak_flops(world)
        self.cuda = world.cuda
        self.save_seconds = 60 * args.save_minutes
        self.saved = time.time()                               # when the last checkpoint was written
        self.restart_clock(step)

    def restart_clock(self, step):
        """Speed is counted from here: from the last line on, without validation."""
        self.began = time.time()
        self.waited = 0.0                                      # seconds that the loop waited for data
        self.first_step = step

    def tokens_per_second(self, step):
        return (step - self.first_step) * self.tokens_per_step / max(1e-9, time.time() - self.began)

    def speed(self, step):
        """What a line says of it; MFU: the share of the devices' peak that useful FLOPs take."""
        rate = self.tokens_per_second(step)
        speed = {"tokens_per_s": round(rate), "data_wait_s": round(self.waited, 3), "peak_gb": peak_memory(self.cuda)}
        if self.peak:
            speed["mfu"] = round(rate * self.flops_per_token / self.peak, 4)
        return speed

    def next_batch(self, batches):
        began = time.time()
        batch = next(batches)
        self.waited += time.time() - began
        return batch

    def record(self, **line):
        for name, value in line.items():
            if isinstance(value, float) and not math.isfinite(value):
                line[name] = None                          # JSON has no nan
        with naming(self.path):
            self.file.write(json.dumps(line) + "\n")
        if self.board is not None and "step" in line:
            self.board.log(line, step=line["step"])

    def save_is_due(self):
        """Whether the last checkpoint is older than --save_minutes."""
        return time.time() - self.saved > self.save_seconds

    def describe(self, args, world, run):
        """What the run is, on stderr and as the first line; of one that is continued, what has changed."""
        model = run.model
        data = run.data
        parameters = sum(p.numel() for p in model.parameters())
        layers = getattr(model.config, "n_layer", args.n_layer)
        world.say(f"{args.out}: {layers} layers x {model.config.n_embd}, {parameters / 1e6:.1f}M "
                  f"parameters, {len(data)} rows of {data.length}, {world.size} x {world.device}, {world.dtype}, "
                  f"micro-batch {run.micro} of {args.batch_size}")
        if run.step == 0:
            self.record(args=vars(args), config=vars(model.config), device=world.device, dtype=world.dtype,
                        processes=world.size, micro_batch_size=run.micro, parameters=parameters,
                        threads=torch.get_num_threads(), torch=torch.__version__, git=git_commit(),
                        rows=len(data), meta=data.meta)
        elif run.changed:
            self.record(step=run.step, changed=run.changed)

    def show(self, step, loss):
        """Move the bar by one step."""
        self.bar.update()
        rate = self.tokens_per_second(step)
        self.bar.set_postfix(loss=f"{loss:.3f}", tokens_per_s=f"{rate:,.0f}", refresh=False)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.bar.close()
        self.file.close()
        if self.board is not None:
            self.board.finish()
        self.lock.close()


def repair_log(path, step):
    """Make log.jsonl ready to append to after this step: lines of steps to be run again are dropped, as is what is no
    whole line. At step 0 it begins anew.
    """
    lines = []
    if os.path.exists(path):
        with open(path, "rb") as f:
            lines = f.readlines()
    kept = []
    for line in lines:
        try:
            keep = step > 0 and line.endswith(b"\n") and json.loads(line).get("step", 0) <= step
        except (ValueError, AttributeError, TypeError, RecursionError):
            tqdm.write(f"{path}: a damaged line is left out", file=sys.stderr)
            continue
        if keep:
            kept.append(line)
    if kept != lines:
        with replacing(path, "wb") as f:
            f.writelines(kept)


def rows_that_fit(args, length, vocab_size, share, memory=None):
    """How many of a process's `share` of a batch a pass on a GPU takes: at most 32 * 1024 tokens, and not more than its
    `memory` holds, in bytes, this GPU's where none is given. (A rule of thumb; `python -m extra.bench plan` counts.)
    """
    memory = memory or torch.cuda.get_device_properties(0).total_memory
    n_embd = args.n_embd or 768                            # heads: of a backbone that is not known yet
    body = 12 * args.n_layer * n_embd**2
    weights = 16 * (body + 3 * vocab_size * n_embd)        # bytes: themselves, gradients, two moments
    others = 5e9                                           # a teacher, the libraries' own
    per_token = 50 * args.n_layer * n_embd                 # bytes: what waits for the backward pass, half of it bf16
    if args.block_size:
        per_token *= 2                                     # noised and clean
    tokens = min(32 * 1024, (0.9 * memory - weights - others) / per_token)
    return max(rows for rows in range(1, max(1, int(tokens // length)) + 1) if share % rows == 0)


def micro_batch(args, data, start, world):
    """The rows of a forward pass: --micro_batch_size; or all that a process has of a batch, on a GPU those that fit.
    start: the config that the run begins with, or goes on with, where there is one, which may name another shape than
    the flags. BadInput where the rows do not divide the batch.
    """
    share = args.batch_size // world.size
    micro = args.micro_batch_size or share
    if world.cuda and not args.micro_batch_size:
        shape = {name: start[name] for name in ("n_layer", "n_embd") if name in start}
        micro = rows_that_fit(types.SimpleNamespace(**vars(args) | shape), data.length, data.meta["vocab_size"], share)
    if share % micro:
        raise BadInput(f"--micro_batch_size={micro} must divide the {share} rows that each process has of a batch")
    return micro


def card_here(cuda):
    """The `Card` of this process's device; None where it is not known, or no GPU (`cuda`: whether it is one)."""
    device = torch.cuda.get_device_name() if cuda else ""
    for name, card in CARDS.items():
        if name in device:
            return card
    return None


def peak_flops(world):
    """The bf16 peak of the run's devices together, FLOP/s; None where it is not known."""
    card = card_here(world.cuda)
    return card.bf16 * world.size if card else None


def peak_memory(cuda):
    """The most memory that this run has held so far, GB: the device's, or the process's; None where nothing says."""
    if cuda:
        return round(torch.cuda.max_memory_allocated() / 1e9, 2)
    try:
        import resource
    except ImportError:                                    # Windows
        return None
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)


def flops_per_row(model, teacher, length):
    """Useful FLOPs of training on a row; `teacher`: the AR model that is asked for each batch, or None."""
    flops = model.flops_per_row(length)
    if teacher is None:
        return flops
    masked = 0.0                                           # the share of places whose logits are read
    if model.fills_masks:
        masked = 0.5                                       # on average
    elif model.noise_embed is not None:
        masked = 1.0
    return flops + teacher.extraction_flops(length, masked)


class Stopped(Exception):
    """An evaluation is over in all processes, since one of them has been told to stop."""


class StopSignals:
    """While in its body, SIGTERM and SIGINT are only noted: the run finishes its step, saves, stops."""

    def __enter__(self):
        self.received = []
        self.handlers = {s: signal.signal(s, self.note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def note(self, signum, frame):
        self.received.append(signum)

    def exit(self):
        """End the process as the signal would have; without one here, another process has got a SIGTERM."""
        first = [*self.received, signal.SIGTERM][0]
        sys.exit(128 + first)

    def __exit__(self, *error):
        for s, handler in self.handlers.items():
            signal.signal(s, handler)


# ---------------------------------------------------------------------------------------------------------------------
# what it leaves and reads

def save(args, model, averaged, optimizer, **more):
    """Write ckpt.pt in the run directory: a crash leaves the old one or the new one. The one before stays, as
    ckpt.previous.pt; after a step of --keep, this one too, as ckpt.STEP.pt.
    """
    path = os.path.join(args.out, "ckpt.pt")
    previous = os.path.join(args.out, "ckpt.previous.pt")
    state = dict(model=model.state_dict(), ema=averaged.state_dict(), optimizer=optimizer.state_dict(),
                 rng=torch.get_rng_state(), args=vars(args), config=vars(model.config), git=git_commit(), **more)
    if more["step"] in (args.keep or ()):
        with replacing(os.path.join(args.out, f"ckpt.{more['step']}.pt"), "wb") as f:
            torch.save(state, f)
    with replacing(path, "wb") as f:
        torch.save(state, f)
        with suppress(OSError):                            # the first one has none before it
            os.remove(previous)
        with suppress(OSError):                            # nor has a disk without hard links
            os.link(path, previous)


def keep(args, run, streak, log, world):
    """Write the checkpoint: of the last step that changed the weights, since `streak` bad ones are tried again."""
    good = run.step - streak
    with world.together():
        if world.master:
            save(args, run.model, run.averaged, run.optimizer, meta=run.data.meta, conditions=run.conditions,
                 clip=run.clip, step=good, tokens_seen=good * args.batch_size * run.data.length,
                 bad_steps=run.bad_steps - streak, due=run.due and streak == 0)
    log.saved = time.time()


@torch.no_grad()
def update_average(averaged, model, decay):
    """averaged = decay * averaged + (1 - decay) * model, weight by weight."""
    torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - decay)


def leave(args, run, streak, log, stop, world):
    """End the process after a stop; the same command goes on from here."""
    keep(args, run, streak, log, world)
    world.say(f"{args.out}: stopped at step {run.step}, saved; the same command continues")
    stop.exit()


def tell_bad_steps(args, bad_steps, failed, step, world):
    """Say how many steps were skipped; a run that `failed`, all bad from `step` on, ends with exit code 1."""
    if not failed:
        if bad_steps:
            world.say(f"{args.out}: {bad_steps} steps were skipped, their loss or gradient was not finite")
        return
    world.say(f"train.py: error: from step {step} on the loss or its gradient is not finite; {args.out} keeps the "
              "state before that, and the same command tries these steps again: to go on from its weights, use "
              f"--init_from={args.out} --out=NEW and a lower --lr than {args.lr}")
    sys.exit(1)


def is_state(value):
    """A check: weights by name, all of them floating-point."""
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(w, torch.Tensor) and w.is_floating_point() for name, w in value.items())


def is_window(value):
    """A check: two noise levels."""
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(map(share, value))


# what a checkpoint holds (its config: `sample.build`)
CHECKPOINT = dict(model=is_state, ema=is_state, optimizer=dict, step=whole(), tokens_seen=whole(), rng=torch.Tensor,
                  args=dict, config=dict, meta=dict, git=str, clip=maybe(is_window),
                  conditions=maybe(dict), bad_steps=maybe(whole()), due=maybe(bool))


def load_checkpoint(path):
    """A checkpoint of train.py (the file, or its run directory) -> its dict; BadInput if it is none, or damaged."""
    if os.path.isdir(path):
        path = os.path.join(path, "ckpt.pt")
    if not os.path.isfile(path):
        raise BadInput(f"there is no checkpoint {path}: "
                       "train one with train.py, or correct the path")
    remedy = "train it again"
    previous = os.path.join(os.path.dirname(path), "ckpt.previous.pt")
    if os.path.exists(previous) and not os.path.samefile(path, previous):
        remedy = f"{previous} is the one before it, rename that to ckpt.pt"
    try:
        if zipfile.is_zipfile(path):
            check_archive(path)
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:                                 # foreign files fail in a dozen ways
        why = (str(e) or type(e).__name__).splitlines()[0]
        raise BadInput(f"{path} is not a readable checkpoint (truncated, or not a torch file), {why}: "
                       f"{remedy}") from None
    newer = ("clip", "conditions", "bad_steps", "due")            # than some checkpoints
    missing = [key for key in CHECKPOINT if key not in newer and (not isinstance(ckpt, dict) or key not in ckpt)]
    if missing:
        raise BadInput(f"{path} is not a checkpoint of this project: it lacks {', '.join(missing)}")
    check_fields(path, ckpt, CHECKPOINT, remedy)
    check_fields(path, ckpt["args"], dict(model=str, steps=whole(1), data=str), remedy)
    check_meta(path, ckpt["meta"], remedy)
    return ckpt


def restore(path, ckpt, model, averaged, optimizer):
    """Go back to where a checkpoint was written -> (its step, its window of noise levels or None, how many steps were
    bad, whether its evaluation is still due). Raises BadInput where it does not fit these.
    """
    try:
        model.load_state_dict(ckpt["model"])
        averaged.load_state_dict(ckpt["ema"])
        # the settings are those of the flags: only what was averaged is restored
        settings = optimizer.state_dict()["param_groups"]
        (group,) = ckpt["optimizer"]["param_groups"]
        optimizer.load_state_dict(dict(state=ckpt["optimizer"]["state"], param_groups=settings))
        if group["params"] != settings[0]["params"] or ckpt["step"] and not optimizer.state:
            raise ValueError("the optimizer is of other weights")
        for p, state in optimizer.state.items():
            shapes = [state[name].shape for name in ("exp_avg", "exp_avg_sq")]
            if shapes != [p.shape, p.shape] or state["step"].numel() != 1:
                raise ValueError("the optimizer's moments are of other weights")
            if not all(is_finite(w) for w in (p, *state.values())):
                raise ValueError("its numbers are not all finite")
        torch.set_rng_state(ckpt["rng"])
    except Exception as e:                                 # wrong types and sizes fail in a dozen ways
        why = (str(e) or type(e).__name__).splitlines()[-1].strip()
        raise BadInput(f"{path} cannot be continued, {why}: choose another --out") from None
    return ckpt["step"], ckpt.get("clip"), ckpt.get("bad_steps", 0), ckpt.get("due", False)


def memory_bytes():
    """The machine's memory; infinite where the system does not say."""
    if not hasattr(os, "sysconf"):                         # Windows
        return math.inf
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def is_finite(w):
    """Whether all numbers of a tensor are finite; reads it once and allocates nothing of its size."""
    if w.numel() == 0:
        return True
    low, high = torch.aminmax(w.detach())
    return bool(torch.isfinite(low) & torch.isfinite(high))


# ---------------------------------------------------------------------------------------------------------------------
# what a run continues

def time_written(out):
    return os.stat(os.path.join(out, "ckpt.pt")).st_mtime_ns


def checkpoint_seen(out, ckpt):
    """A checkpoint in words that tell it from others, for processes to compare: its step, and its parts' checksums."""
    if ckpt is None:
        return "of no step"
    sums = ""
    path = os.path.join(out, "ckpt.pt")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            parts = repr([part.CRC for part in archive.infolist()])
        sums = f" ({hashlib.sha256(parts.encode()).hexdigest()[:8]})"
    return f"of step {ckpt['step']}{sums}"


def resume(args, meta, may_differ):
    """The checkpoint in --out if this command continues it, None if there is none. BadInput if it is another run's: if
    flags differ, but for those that `may_differ`.
    """
    if not os.path.exists(os.path.join(args.out, "ckpt.pt")):
        return None
    written = time_written(args.out)
    ckpt = load_checkpoint(args.out) | {"written": written}
    if args.schedule == "constant":
        may_differ = may_differ | {"steps"}                # the cosine depends on --steps
    changed = []
    for flag, now in vars(args).items():
        # a flag that is newer than the run, and off, changes nothing
        off = now is None or now is False
        if flag in may_differ or (off and flag not in ckpt["args"]):
            continue
        before = ckpt["args"].get(flag)
        if before != now:
            changed.append(f"--{flag}: {before} there, {now} now")
    if changed_meta(ckpt["meta"], meta):
        changed.append("the data")
    if changed:
        raise BadInput(f"{args.out} holds a run with other settings ({'; '.join(changed)}): choose another --out, or "
                       "repeat its command to continue it")
    return ckpt


def conditions(data, val, teacher, micro, world, random):
    """What a run's result depends on besides its flags, for its checkpoint."""
    sha256 = None if teacher is None else teacher.sha256
    return dict(shards=data.hashes() + val.hashes(), rows=[len(data), len(val)], teacher=sha256,
                processes=world.size, micro_batch_size=micro, device=world.device.partition(":")[0], dtype=world.dtype,
                torch=str(torch.__version__), random=random)


def check_conditions(args, ckpt, now, teacher, world):
    """BadInput where the run in --out would be continued on other data or with another teacher than its checkpoint's.
    Other conditions that differ -> {name: [before, now]}, with a warning; so where it does not say. No checkpoint: {}.
    """
    if not ckpt:
        return {}
    before = ckpt.get("conditions")
    if not before:
        world.say(f"{args.out}: its checkpoint does not say which shards, teacher and number of processes it is of: "
                  "whether these are the same cannot be checked")
        return {}
    changed = {name: [before.get(name), value] for name, value in now.items() if before.get(name) != value}
    wrong = []
    if "shards" in changed or "rows" in changed:
        wrong.append(f"other shards than {args.data} holds now")
    if "teacher" in changed:
        wrong.append(f"another teacher than {teacher.path} is now")
    if wrong:
        raise BadInput(f"{args.out} was trained with {' and '.join(wrong)}: put that back, or choose another --out")
    if changed:
        listed = ", ".join(f"{name} {a} there, {b} now" for name, (a, b) in changed.items())
        world.say(f"{args.out}: continues under other conditions ({listed}): the same law, other draws or rounding")
    return changed
