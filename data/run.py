"""What a run needs around its loop: a device, its processes, its log, its checkpoint's file, its signals.
"""
import json
import math
import os
import signal
import sys
import time
import zipfile
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

import torch
import torch.distributed as dist
from tqdm import tqdm

from data.cli import BadInput, environment_number, git_commit, optional
from data.files import check_archive, check_fields, maybe, naming, replacing, share, whole, writing
from data.shards import changed_meta, check_meta


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


class World:
    """The processes of this run: one, or those of torchrun (nccl on CUDA, gloo on CPU)."""

    def __init__(self, dtype):
        self.device, self.dtype, self.autocast = device_and_dtype(dtype)
        self.size = environment_number("WORLD_SIZE", 1)
        self.rank = environment_number("RANK", 0)
        if self.rank >= self.size:
            raise BadInput(f"the environment has RANK={self.rank} and WORLD_SIZE={self.size}: start with torchrun, or "
                           "unset both")
        self.master = self.rank == 0
        self.cuda = self.device == "cuda"
        if self.cuda:
            self.device = f"cuda:{environment_number('LOCAL_RANK', 0)}"
            torch.cuda.set_device(self.device)
        if self.size > 1:
            try:
                dist.init_process_group("nccl" if self.cuda else "gloo")
            except (ValueError, RuntimeError) as e:
                why = str(e).splitlines()[0]
                raise BadInput(f"WORLD_SIZE={self.size}, MASTER_ADDR and MASTER_PORT of the environment bring no "
                               f"processes together ({why}): start with torchrun, or unset them") from None

    def sum(self, *values):
        """Floats, summed over the processes."""
        # float64: a sum over processes is to differ from that of one process by rounding only
        x = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.size > 1:
            dist.all_reduce(x)
        return x.tolist()

    def barrier(self):
        if self.size > 1:
            dist.barrier()

    def once_a_machine(self, function):
        """What `function` returns, called by the first process of each machine, in every process. BadInput where the
        machines differ.
        """
        if self.size == 1:
            return function()
        found = None
        if environment_number("LOCAL_RANK", 0) == 0:
            found = function()
        of_all = [None] * self.size
        dist.all_gather_object(of_all, found)
        found, *others = {value for value in of_all if value is not None}
        if others:
            raise BadInput("the machines of this run hold different weights under one path: copy one to all")
        return found

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
        """A line on stderr, from the first process, that leaves the bars whole."""
        if self.master:
            tqdm.write(text, file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# what a run tells, and hears

class Log:
    """log.jsonl in the run directory, a bar on stderr and, with --wandb, a board; written by the first process only.

    It takes the run directory: as long as it is open, no other run writes there.
    """

    def __init__(self, args, world, ckpt, step, tokens_per_step, flops_per_token):
        self.lock = ExitStack()
        self.path = os.devnull
        if world.master:
            self.path = os.path.join(args.out, "log.jsonl")
            self.lock.enter_context(writing(args.out))
            if ckpt and ckpt["written"] != time_written(args.out):
                self.lock.close()
                raise BadInput(f"another run has written {args.out} meanwhile: repeat the command")
            repair_log(self.path, step)
        self.file = open(self.path, "a", buffering=1)          # by line: a crash loses none
        self.board = None
        if world.master and args.wandb:
            wandb = optional("wandb", "--wandb")
            self.board = wandb.init(project=args.wandb, name=os.path.basename(args.out), config=vars(args))
        self.bar = tqdm(total=args.steps, initial=step, desc=args.out, unit="step", disable=not world.master,
                        mininterval=1)
        self.tokens_per_step = tokens_per_step
        self.flops_per_token = flops_per_token
        self.peak = peak_flops(world)
        self.restart_clock(step)

    def restart_clock(self, step):
        """Speed is counted from here: from the last line on, without validation."""
        self.began = time.time()
        self.first_step = step

    def tokens_per_second(self, step):
        return (step - self.first_step) * self.tokens_per_step / max(1e-9, time.time() - self.began)

    def speed(self, step):
        """What a line says of it; MFU: the share of the devices' peak that useful FLOPs take."""
        rate = self.tokens_per_second(step)
        speed = {"tokens_per_s": round(rate)}
        if self.peak:
            speed["mfu"] = round(rate * self.flops_per_token / self.peak, 4)
        return speed

    def record(self, **line):
        for name, value in line.items():
            if isinstance(value, float) and not math.isfinite(value):
                line[name] = None                          # JSON has no nan
        with naming(self.path):
            self.file.write(json.dumps(line) + "\n")
        if self.board is not None and "step" in line:
            self.board.log(line, step=line["step"])

    def describe(self, args, world, model, data, micro, step, changed):
        """What the run is, on stderr and as the first line; of one that is continued, what has `changed`."""
        parameters = sum(p.numel() for p in model.parameters())
        world.say(f"{args.out}: {args.n_layer} layers x {model.config.n_embd}, {parameters / 1e6:.1f}M "
                  f"parameters, {len(data)} rows of {data.length}, {world.size} x {world.device}, {world.dtype}, "
                  f"micro-batch {micro} of {args.batch_size}")
        if step == 0:
            self.record(args=vars(args), config=vars(model.config), device=world.device, dtype=world.dtype,
                        processes=world.size, micro_batch_size=micro, parameters=parameters,
                        threads=torch.get_num_threads(), torch=torch.__version__, git=git_commit(),
                        rows=len(data), meta=data.meta)
        elif changed:
            self.record(step=step, changed=changed)

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


def peak_flops(world):
    """The bf16 peak of the run's devices together, FLOP/s; None where it is not known."""
    device = torch.cuda.get_device_name() if world.cuda else ""
    for name, card in CARDS.items():
        if name in device:
            return card.bf16 * world.size
    return None


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
    ckpt.previous.pt.
    """
    path = os.path.join(args.out, "ckpt.pt")
    previous = os.path.join(args.out, "ckpt.previous.pt")
    state = dict(model=model.state_dict(), ema=averaged.state_dict(), optimizer=optimizer.state_dict(),
                 rng=torch.get_rng_state(), args=vars(args), config=vars(model.config), git=git_commit(), **more)
    with replacing(path, "wb") as f:
        torch.save(state, f)
        with suppress(OSError):                            # the first one has none before it
            os.remove(previous)
        with suppress(OSError):                            # nor has a disk without hard links
            os.link(path, previous)


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
                  conditions=maybe(dict), bad_steps=maybe(whole()))


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
    newer = ("clip", "conditions", "bad_steps")            # than some checkpoints
    missing = [key for key in CHECKPOINT if key not in newer and (not isinstance(ckpt, dict) or key not in ckpt)]
    if missing:
        raise BadInput(f"{path} is not a checkpoint of this project: it lacks {', '.join(missing)}")
    check_fields(path, ckpt, CHECKPOINT, remedy)
    check_fields(path, ckpt["args"], dict(model=str, steps=whole(1), data=str), remedy)
    check_meta(path, ckpt["meta"], remedy)
    return ckpt


def restore(path, ckpt, model, averaged, optimizer):
    """Go back to where a checkpoint was written -> (its step, its window of noise levels or None, how many steps were
    bad). Raises BadInput where it does not fit these.
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
    return ckpt["step"], ckpt.get("clip"), ckpt.get("bad_steps", 0)


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
