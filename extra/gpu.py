"""The first hour on a GPU in one command, `python -m extra.bench gpu`: was what was computed on paper right?

Random weights and tokens; each part takes less than eight minutes on an H100. A part is a function that yields
verdicts; one that raises is a verdict, and the others still run. Exit code 1 if one is "not". Without CUDA, or with
--miniature, sizes are tiny, and timings are not judged (but for `authors`). What needs a GPU's kernels is skipped.
"""
import gc
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel

import bd3lm
import gumbel
import mdlm
import train
from data.batches import micro_batches
from data.cli import BadInput
from data.files import check_output
from data.report import report
from data.run import allow_changing_shapes, body_to_bfloat16, card_here
from data.shards import Shards, Writer
from extra import plan
from extra.bench import Case, Sampling, filled, measure
from medusa import Accumulator
from teacher import GPT2, GPT2_SIZES

TOLERANCE = dict(
    bf16=2e-2, steps=1e-2, processes=1e-3,                 # relative: outputs and gradients, losses in bf16, in float32
    memory=0.10, tokens=0.25,                              # relative to the plan
    no_cudnn=1.1, head=1.15, faster=1,                     # seconds, times those of the other way
    deviations=5, repeated=0.01,                           # of a mean or a count; share of a tail that is there twice
    spread=4, epsilon=1e-5)                                # differences of two continued runs, and on top of them
TINY = ["--size=tiny", "--n_layer=2"]                      # of runs whose size does not matter
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


@dataclass
class Shape:
    """Sizes of everything here, and models and rows of these sizes: the same random numbers each time."""
    size: str                                              # of students
    teacher: str
    net: tuple                                             # the teacher's
    V: int
    L: int
    rows: int                                              # of a batch
    micro: int                                             # of the default job's micro-batch
    windows: int                                           # of noise that Medusa's accumulator reads
    draws: int                                             # of noise
    nfe: int
    authors: tuple                                         # V, L, NFE of the authors' loop

    def student(self, kind=mdlm.MDLM, **more):
        torch.manual_seed(0)
        return filled(kind(self.V, self.L, self.V - 1, *train.SIZES[self.size], dropout=0.0, **more)).to(DEVICE)

    def new_teacher(self, *args):
        """Also in place of sample.load_ar, whose arguments it ignores."""
        torch.manual_seed(1)
        with torch.device(DEVICE):                         # made there: faster
            teacher = filled(GPT2(self.V, 1024, self.V - 1, *self.net, dropout=0.0))
        teacher.path = self.teacher
        return teacher.eval().requires_grad_(False)

    def tokens(self):
        return torch.randint(self.V - 1, (self.rows, self.L), generator=seeded(0), device=DEVICE)

    def sampling(self, V, L, nfe):
        args = SimpleNamespace(size=self.size, vocab_size=V, length=L, nfe=nfe, top_p=0.9, batch_size=16)
        return Sampling(args, DEVICE, autocast(CUDA))

    def flags(self, folder, out, *flags):
        """Of train.py, on random ids."""
        return [f"--data={folder}/ids", f"--out={folder}/{out}", f"--length={self.L}", "--warmup=5", "--eval_rows=1",
                "--log_every=1", *flags]


FULL = Shape(size="small", teacher="gpt2-large", net=GPT2_SIZES["gpt2-large"], V=50257, L=1024, rows=8, micro=32,
             windows=32 * 1023, draws=2**31, nfe=64, authors=(50257, 256, 16))
MINIATURE = Shape(size="tiny", teacher="gpt2", net=(2, 128, 2), V=301, L=32, rows=8, micro=2,
                  windows=50, draws=2**25, nfe=4, authors=(6000, 16, 4))


@dataclass
class Verdict:
    what: str
    expected: str
    found: str
    ok: bool | None                                        # None: skipped


def at_most(what, found, bound, judged=True):
    expected = "reported" if bound == math.inf else f"at most {bound:.3g}"
    if not judged:
        return Verdict(what, f"{expected} (skipped: needs a GPU, and full size)", f"{found:.3g}", None)
    return Verdict(what, expected, f"{found:.3g}", bool(found <= bound))                   # (nan is not)


def times(what, seconds, bound, judged):
    """{name: seconds}: the first in terms of the last."""
    first, *_, last = seconds.values()
    listed = ", ".join(f"{name} {s:.3g}" for name, s in seconds.items())
    return at_most(f"{what}: seconds {listed}; first / last", first / last, bound, judged)


def same(what, found, expected):
    """Two pairs, of a loss or output and a gradient: norms of the differences against norms of what is expected."""
    for part, x, y in zip(("output", "gradient"), found, expected):
        yield at_most(f"{what}: {part} off by", ((x - y).norm() / y.norm()).item(), TOLERANCE["bf16"])


def seeded(seed):
    return torch.Generator(DEVICE).manual_seed(seed)


def autocast(enabled=True):
    return torch.autocast(DEVICE, torch.bfloat16, enabled=enabled)


def loss_and_gradient(model, tokens, level=0.5, bf16=True, seed=0, **kw):
    """Of a batch at this noise level."""
    model.zero_grad(set_to_none=True)
    t = torch.full((len(tokens), model.n_blocks), level, device=DEVICE)
    with autocast(bf16):
        loss, _ = model.loss(tokens, t, generator=seeded(seed), **kw)
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


def seconds_of(ways, repeats=3):
    """{name: function} -> {name: median seconds}."""
    measured = measure([Case(name, run) for name, run in ways.items()], repeats)
    return {name: seconds for name, (seconds, _) in zip(ways, measured)}


def free():
    """Forget what was compiled, and what nobody refers to."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


def log_of(out):
    with open(os.path.join(out, "log.jsonl")) as f:
        return [line for line in map(json.loads, f) if "loss" in line]


def run_training(flags):
    """train.py, in this process -> its flags, the lines of its log, its losses."""
    with patch.object(sys, "argv", ["train.py", *flags]):
        train.main()
    args = train.parse(flags)
    lines = log_of(args.out)
    return args, lines, np.array([line["loss"] for line in lines])


# ---------------------------------------------------------------------------------------------------------------------
# the parts

def read_windows(shape, backend, bf16):
    _, D, _ = train.SIZES[shape.size]
    torch.manual_seed(0)
    accumulator = filled(Accumulator(D, 1, 0.0)).to(DEVICE)
    e, weight = torch.randn(2, shape.windows, 4, D, generator=seeded(0), device=DEVICE)
    e.requires_grad_()
    with sdpa_kernel([backend]), autocast(bf16):
        c = accumulator(e).float()
        (c * weight).sum().backward()
    return c.detach(), torch.cat([x.grad.flatten() for x in (e, *accumulator.parameters())])


def attention(shape, folder):
    expected = read_windows(shape, SDPBackend.MATH, False)
    for name in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"):
        try:
            yield from same(name, read_windows(shape, getattr(SDPBackend, name), True), expected)
        except RuntimeError as e:
            if "No available kernel" not in str(e) and "No viable backend" not in str(e):  # CUDA's words, a CPU's
                raise
            yield Verdict(name, "skipped: torch has no such kernel here", "", None)


def flex(shape, folder):
    shape = replace(shape, L=max(128, shape.L))            # shorter rows take the boolean mask
    model = shape.student(bd3lm.BD3LM, block_size=4)
    found = loss_and_gradient(model, shape.tokens())
    boolean = bd3lm.training_mask(shape.L, 4, shape.tokens().device)
    with patch.object(bd3lm, "training_mask", return_value=boolean):
        yield from same("block mask against boolean mask", found, loss_and_gradient(model, shape.tokens()))


def compiled(shape, folder):
    model = shape.student(noise="gumbel")
    teacher = shape.new_teacher()
    body_to_bfloat16(teacher)
    run = partial(loss_and_gradient, model, shape.tokens(), teacher=teacher)
    expected = run()
    counters.clear()
    for network in [*model.networks(), *teacher.networks()]:
        network.compile(backend="inductor" if CUDA else "eager")
    yield from same("compiled against eager", run(), expected)
    graphs = [counters["stats"]["unique_graphs"]]
    for level in (0.4, 0.6, 0.3, 0.7, 0.2):                # other numbers of masked rows
        run(level)
        graphs.append(counters["stats"]["unique_graphs"])
    yield Verdict("graphs that micro-step 1 compiles", "some", str(graphs[0]), graphs[0] > 0)
    yield at_most("graphs that micro-steps 4 to 6 compile", graphs[5] - graphs[2], 0)


def ten_steps(shape, teacher, bf16):
    """From the same weights, rows and draws each time -> losses and gradient norms [10, 2]."""
    model = shape.student(noise="gumbel")
    # a tenth of the paper's rate, which is warmed up, too: Adam's first steps amplify the rounding of small gradients
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-5, fused=True)
    found = []
    for seed in range(10):
        loss, gradient = loss_and_gradient(model, shape.tokens(), bf16=bf16, seed=seed, teacher=teacher)
        optimizer.step()
        found.append([loss.item(), gradient.norm().item()])
    return np.array(found)


def bf16(shape, folder):
    teacher = shape.new_teacher()
    expected = ten_steps(shape, teacher, False)
    body_to_bfloat16(teacher)
    off = abs(ten_steps(shape, teacher, True) / expected - 1).max(0)
    yield at_most("losses of ten steps, bf16 against float32, off by", off[0], TOLERANCE["steps"])
    yield at_most("their gradient norms off by", off[1], TOLERANCE["steps"])


def noise(shape, folder):
    generator = seeded(0)
    logits = 3 * torch.randn(2048, shape.V, generator=generator, device=DEVICE)
    tokens = gumbel.draw_by_inversion(logits.softmax(-1), generator)
    posterior = gumbel.posterior_gumbel(logits, tokens, generator)
    yield at_most("other argmaxes", (gumbel.gumbel_max(logits, posterior) != tokens).sum().item(), 0)
    # the highest score of a row, less its normaliser, is standard Gumbel, too
    highest = (logits + posterior).amax(-1) - logits.logsumexp(-1)
    prior = -gumbel.sample_exponential(logits.shape, generator, DEVICE).log()
    variance = math.pi**2 / 6
    for what, x in dict(prior=prior, posterior=posterior, highest=highest).items():
        error = TOLERANCE["deviations"] * math.sqrt(variance / x.numel())
        yield at_most(f"{what}: mean off by", abs(x.mean(dtype=torch.float64).item() - np.euler_gamma), error)
        error = TOLERANCE["deviations"] * variance * math.sqrt(4.4 / x.numel())         # the kurtosis is 5.4
        yield at_most(f"{what}: variance off by", abs(x.double().var().item() - variance), error)
    tail = []
    for _ in range(shape.draws // 2**24):                  # in parts
        e = gumbel.sample_exponential((2**24,), generator, DEVICE)
        tail.append(e[e < math.exp(-12)].cpu())
    tail = torch.cat(tail)
    for level in (12, 16.6, 18):
        n = (tail < math.exp(-level)).sum().item()
        expected = -shape.draws * math.expm1(-math.exp(-level))
        what = f"draws above {level}: {n}, Poisson with mean {expected:.1f}, off by"
        yield at_most(what, abs(n - expected), TOLERANCE["deviations"] * math.sqrt(expected))
    repeated = 1 - len(tail.unique()) / max(1, len(tail))  # most are, from uniforms on a grid of 2^-24
    yield at_most("share of the draws above 12 that is repeated", repeated, TOLERANCE["repeated"])


def draws(shape):
    """Noise embeddings and the gradient of their weights, which may draw again: of one seed."""
    embed = shape.student(noise="gumbel").noise_embed
    tokens = shape.tokens().flatten()
    logits = torch.randn(len(tokens), shape.V, generator=seeded(0), device=DEVICE)
    g = embed.from_posterior(lambda a, b: logits[a:b], tokens, seeded(train.torch_seed(0, train.NOISE, 10, 0, 0)))
    g.square().sum().backward()
    return torch.cat([g.detach().flatten(), embed.weight.grad.flatten()])


def resume(shape, folder):
    flags = partial(shape.flags, folder)
    run_training(flags("ar", *TINY, "--model=ar", "--steps=1", "--batch_size=2", "--micro_batch_size=2"))
    more = [*TINY, "--gumbel", f"--teacher={folder}/ar", "--steps=20", "--save_every=10", "--batch_size=4",
            "--micro_batch_size=2"]
    _, _, alone = run_training(flags("alone", *more))
    losses = []
    for out in ("first", "second"):                        # both from what that run has written at step 10
        os.mkdir(f"{folder}/{out}")
        shutil.copy(f"{folder}/alone/ckpt.previous.pt", f"{folder}/{out}/ckpt.pt")
        args, lines, values = run_training(flags(out, *more))
        losses.append(values)
    yield Verdict("first step of a continued run", "11", str(lines[0]["step"]), lines[0]["step"] == 11)
    data = Shards(args.data, "train", args.length)
    world = SimpleNamespace(size=1, rank=0, cuda=False)
    whole, continued = [micro_batches(data, None, args, 2, world, step) for step in (0, 10)]
    before = [next(whole) for _ in range(20)]              # two in a step
    different = sum(not torch.equal(next(whole)[0], next(continued)[0]) for _ in before)
    yield at_most("micro-batches with other rows", different, 0)
    yield at_most("noise embeddings and gradients that differ", (draws(shape) != draws(shape)).sum().item(), 0)
    first, second = losses
    bound = TOLERANCE["spread"] * abs(first - second).max() + TOLERANCE["epsilon"]
    yield at_most("losses of the run alone off by", abs(alone[10:] - first).max(), bound)


def ddp(shape, folder):
    processes = torch.cuda.device_count() if CUDA else 2
    if processes == 1:
        yield Verdict("several processes", "skipped: one GPU only", "", None)
        return
    flags = [*TINY, "--model=ar", "--dropout=0", "--steps=5", f"--batch_size={4 * processes}", "--micro_batch_size=2"]
    _, _, one = run_training(shape.flags(folder, "one", *flags))            # (AR: no draws)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    subprocess.run([*command, train.__file__, *shape.flags(folder, "several", *flags)], check=True, timeout=400,
                   stdout=subprocess.DEVNULL)
    several = np.array([line["loss"] for line in log_of(f"{folder}/several")])
    what = f"losses of 5 steps, {processes} processes against one, off by"
    yield at_most(what, abs(several / one - 1).max(), TOLERANCE["bf16" if CUDA else "processes"])


def cudnn(shape, folder):
    bench = shape.sampling(shape.V, shape.L, shape.nfe)
    for name, sample in dict(MDLM=bench.sample_here, AR=bench.sample_ar, BD3LM=bench.sample_blocks).items():
        seconds = {}
        for way in ("warm-up", "without", "with"):         # not by `measure`: cuDNN's plans are to be counted
            torch.backends.cuda.enable_cudnn_sdp(way == "with")
            began = time.perf_counter()
            bench.run(name, sample, 16)                    # (waits for the device)
            seconds[way] = time.perf_counter() - began
        del seconds["warm-up"]
        yield times(name, seconds, TOLERANCE["no_cudnn"], shape is FULL)


def head_step(layer, h, padding):
    with patch.object(gumbel, "padding", padding), autocast():
        gumbel.to_logits(layer, h, exact=False).sum().backward()


def padding(shape, folder):
    layer = torch.nn.Linear(train.SIZES[shape.size][1], shape.V, device=DEVICE)
    h = torch.randn(16 * shape.L, layer.in_features, device=DEVICE, requires_grad=True)
    ways = dict(padded=gumbel.padding, plain=lambda V, x, dtype: 0)
    seconds = seconds_of({name: partial(head_step, layer, h, way) for name, way in ways.items()})
    yield times("the student's head", seconds, TOLERANCE["faster"], shape is FULL)


def head_in(kind, to_logits, layer, h, exact):
    """mdlm.to_logits of samplers, or with products of another kind."""
    with gumbel.tf32(kind == "tf32"):
        return to_logits(layer, h, exact and kind != "bf16")


def sample_with(model, head, nfe):
    with patch.object(mdlm, "to_logits", head), autocast():
        model.generate(model.start(16, model.length).to(DEVICE), nfe, "fixed", generator=seeded(0))


@torch.no_grad()
def heads(shape, folder):
    allow_changing_shapes()
    model = shape.student(noise="gumbel").eval()
    ways = {kind: partial(head_in, kind, mdlm.to_logits) for kind in ("float32", "tf32", "bf16")}
    for nfe in (1, shape.nfe):
        seconds = seconds_of({kind: partial(sample_with, model, head, nfe) for kind, head in ways.items()})
        yield times(f"NFE {nfe}, head in", seconds, math.inf if nfe == 1 else TOLERANCE["head"], shape is FULL)
    layer = model.transformer.head
    h = torch.randn(4 * shape.L, layer.in_features, generator=seeded(0), device=DEVICE)
    expected = layer(h).argmax(-1)
    for kind, head in ways.items():
        with patch.object(mdlm, "to_logits", head), autocast():
            share = (model.logits(h).argmax(-1) != expected).float().mean().item()
        yield at_most(f"share of the argmaxes that differ, head in {kind}", share, 0 if kind == "float32" else math.inf)


def measured_speeds(shape):
    """As plan.speeds_of(card), of this device."""
    n = 8 * shape.L
    x = torch.randn(n, n, device=DEVICE)
    y = x.bfloat16()
    odd = torch.randn(n, shape.V, device=DEVICE, dtype=torch.bfloat16)
    q = torch.randn(32, 12, shape.L, 64, device=DEVICE, dtype=torch.bfloat16)
    works = dict(bf16=(2 * n**3, y.mm, y), unaligned=(2 * n**2 * shape.V, y.mm, odd), float32=(2 * n**3, x.mm, x),
                 attention=(4 * q.numel() * shape.L, partial(F.scaled_dot_product_attention, q, q), q),
                 bandwidth=(2 * plan.size(odd), torch.clone, odd))
    seconds = seconds_of({kind: partial(run, a) for kind, (_, run, a) in works.items()})
    with gumbel.tf32(True):
        seconds |= seconds_of(dict(tf32=partial(x.mm, x)))
    return {kind: works.get(kind, works["float32"])[0] / s for kind, s in seconds.items()}


def step(shape, folder):
    card = card_here(CUDA)
    paper = plan.speeds_of(card) if card else {}
    here = measured_speeds(shape)
    for kind, speed in here.items():
        yield Verdict(f"speed: {kind}, on paper {paper.get(kind, math.nan):.3g}", "reported", f"{speed:.3g}", True)
    batch = 2 * shape.micro
    for more in ("", "--compile", "--teacher_cache=8", "--teacher_cache=8 --compile"):
        job = f"the default job {more}".strip()
        if "compile" in more and not CUDA:
            yield Verdict(job, "skipped: needs a GPU", "", None)
            continue
        flags = shape.flags(folder, f"step{more}", "--gumbel", f"--teacher={shape.teacher}", f"--size={shape.size}",
                            "--steps=9", "--log_every=3", "--dtype=bfloat16", f"--batch_size={batch}",
                            f"--micro_batch_size={shape.micro}", *more.split())
        free()                                             # of the job before
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        with patch.object(train, "load_ar", shape.new_teacher):
            args, lines, _ = run_training(flags)
        rate = lines[-1]["tokens_per_s"]                   # of the last steps, without the warm-up
        gb = lines[-1]["peak_gb"]
        if card is None or shape is not FULL:
            yield Verdict(job, "skipped: needs a known card, and full size", f"{rate} tokens/s, {gb} GB", None)
            continue
        for speeds, bound in ((here, math.inf), (paper, TOLERANCE["tokens"])):
            planned = plan.predict(args, speeds, [shape.micro], batch, shape.V)
            expected = batch * shape.L / planned.seconds(shape.micro, 2)
            source = "paper" if speeds is paper else "this card's speeds"
            what = f"{job}: {rate} tokens/s, {expected:.0f} by {source}, off by"
            yield at_most(what, abs(rate / expected - 1), bound)
        expected = planned.peaks[shape.micro] / 1e9
        yield at_most(f"{job}: {gb} GB, {expected:.2f} by plan, off by", abs(gb / expected - 1), TOLERANCE["memory"])


def authors(shape, folder):
    allow_changing_shapes()
    bench = shape.sampling(*shape.authors)
    for n in (1, 16):
        ways = dict(here=bench.sample_here, authors=bench.sample_as_authors)
        seconds = seconds_of({name: partial(bench.run, name, sample, n) for name, sample in ways.items()})
        yield times(f"{n} samples", seconds, TOLERANCE["faster"], True)


PARTS = dict(attention=attention, flex=flex, compile=compiled, bf16=bf16, noise=noise, resume=resume, ddp=ddp,
             cudnn=cudnn, padding=padding, heads=heads, step=step, authors=authors)
NEED_A_GPU = {"flex", "cudnn", "padding"}


# ---------------------------------------------------------------------------------------------------------------------
# the command

def verdicts(name, shape, folder):
    """Of a part, whatever happens in it; it leaves nothing on the device."""
    if name in NEED_A_GPU and not CUDA:
        yield Verdict("all of it", "skipped: needs a GPU", "", None)
        return
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        yield from PARTS[name](shape, folder)
    except (Exception, SystemExit) as e:
        traceback.print_exc()
        yield Verdict("runs to its end", "no error", f"{type(e).__name__}: {e}".splitlines()[0], False)
    torch.backends.cuda.enable_cudnn_sdp(before)
    free()


def gpu(args):
    """`bench gpu`: a table of verdicts; exit code 1 if one is "not"."""
    names = args.only.split(",") if args.only else list(PARTS)
    for name in names:
        if name not in PARTS:
            raise BadInput(f"--only={args.only} names {name!r}, which is no part: choose from {', '.join(PARTS)}")
    if args.json:
        check_output("--json", args.json)
    shape = FULL if CUDA and not args.miniature else MINIATURE
    began = time.time()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        meta = dict(name="ids", tokenizer="ids", row_length=None, vocab_size=shape.V, bos=shape.V - 1, predict_bos=True)
        writer = Writer(f"{folder}/ids", meta)
        for split, n in dict(train=2**16, val=2**11).items():
            writer.write(split, np.random.default_rng(0).integers(0, shape.V - 1, n))
        writer.finish()
        for name in names:
            print(f"{time.time() - began:.0f} s: {name}", file=sys.stderr, flush=True)
            for verdict in verdicts(name, shape, folder):
                ok = {True: "ok", False: "not", None: "skipped"}[verdict.ok]
                rows.append(dict(vars(verdict), part=name, ok=ok))
    args.n = len(rows)                                     # what `report` asks of all commands
    args.seed = None
    columns = dict(part="part", what="what", expected="expected", found="found", ok="ok")
    wrong = [row for row in rows if row["ok"] == "not"]
    note = f"{len(wrong)} of {len(rows)} are not as expected"
    report(args, rows, note, columns, began=began, device=DEVICE, dtype=None)
    sys.exit(bool(wrong))
