"""What a run needs around its loop: a device, its processes, its log, its checkpoint's file, its signals.
"""
import json
import os
import signal
import sys
import time
from contextlib import contextmanager

import torch
import torch.distributed as dist
from tqdm import tqdm

from data.cli import git_commit, optional

# torch's bf16 peak per device without sparsity, FLOP/s, for the log's MFU
PEAKS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
         "L40": 181e12, "L4": 121e12, "4090": 165e12}


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
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ.get("RANK", 0))
        self.master = self.rank == 0
        self.cuda = self.device == "cuda"
        if self.cuda:
            self.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
            torch.cuda.set_device(self.device)
        if self.size > 1:
            dist.init_process_group("nccl" if self.cuda else "gloo")

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
    """log.jsonl in the run directory, a bar on stderr and, with --wandb, a board; written by the first process only."""

    def __init__(self, args, world, step, tokens_per_step, flops_per_token):
        self.file = open_log(args.out, step) if world.master else open(os.devnull, "w")
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
        self.file.write(json.dumps(line) + "\n")
        if self.board is not None and "step" in line:
            self.board.log(line, step=line["step"])

    def describe(self, args, world, model, data, micro, step):
        """What the run is, on stderr and as the first line."""
        parameters = sum(p.numel() for p in model.parameters())
        world.say(f"{args.out}: {args.n_layer} layers x {model.config.n_embd}, {parameters / 1e6:.1f}M "
                  f"parameters, {len(data)} rows of {data.length}, {world.size} x {world.device}, {world.dtype}, "
                  f"micro-batch {micro} of {args.batch_size}")
        if step == 0:
            self.record(args=vars(args), config=vars(model.config), device=world.device, dtype=world.dtype,
                        processes=world.size, micro_batch_size=micro, parameters=parameters,
                        threads=torch.get_num_threads(), torch=torch.__version__, git=git_commit(),
                        rows=len(data), meta=data.meta)

    def show(self, step, loss):
        """Move the bar by one step."""
        self.bar.update()
        rate = self.tokens_per_second(step)
        self.bar.set_postfix(loss=f"{loss:.3f}", tokens_per_s=f"{rate:,.0f}", refresh=False)

    def close(self):
        self.bar.close()
        self.file.close()
        if self.board is not None:
            self.board.finish()


def open_log(out, step):
    """log.jsonl, to append to: lines of steps to be run again are dropped, as is a broken last line."""
    os.makedirs(out, exist_ok=True)
    path = os.path.join(out, "log.jsonl")
    kept = []
    if step and os.path.exists(path):
        with open(path) as f:
            kept = [line for line in f if line.endswith("\n") and json.loads(line).get("step", 0) <= step]
    log = open(path, "w", buffering=1)                     # by line: a crash loses none
    log.writelines(kept)
    return log


def peak_flops(world):
    """The bf16 peak of the run's devices together, FLOP/s; None where it is not known."""
    device = torch.cuda.get_device_name() if world.cuda else ""
    for name, peak in PEAKS.items():
        if name in device:
            return peak * world.size
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

def save(path, state):
    """Written beside, synced, renamed: a crash leaves the old checkpoint or the new one."""
    with open(path + ".tmp", "wb") as f:
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".tmp", path)
