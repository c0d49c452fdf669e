"""Where time and memory go: random weights and random tokens, so nothing needs to be downloaded.

    python -m extra.bench sampling                          # against the authors' way of sampling, in one run
    python -m extra.bench noise                             # noise and its embedding: full tensors against chunks
    python -m extra.bench step --length=128 --micro_batch_size=8                    # a training step, by part
    python -m extra.bench step --teacher=gpt2-large --length=1024 --compile         # the default job's shape, for a GPU
    python -m extra.bench plan --gumbel --card=a100         # what the default job will cost there: needs no GPU
    python -m extra.bench gpu --json=gpu.json               # on a new GPU: is it right there, and as fast as planned?

Caveats first. Medians of --repeats after a warm-up, the cases of a table in turn: on a shared machine only their
ratios mean anything. Weights are random; in sampling, the output layer gives logits a standard deviation of 3 (6.5
nats over GPT-2's vocabulary, as in a student's first steps): where a nucleus ends, and so what finding it costs,
depends on that. Memory is the peak above what is held between repeats; on a CPU, the process's. "Teacher cache" in a
step is random ids in memory: without the read from disk, 35 KB a row of 1024 at k = 8.

Shapes: n samples, B rows of a batch, L length, V vocabulary, D width, N positions.
"""
import argparse
import ctypes
import re
import time
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from typing import Callable

import numpy as np
import torch
import torch.nn.functional as F

from bd3lm import BD3LM
from data.cli import Parser, add_flags, number, run_main
from data.report import print_table
from data.run import CARDS, allow_changing_shapes, body_to_bfloat16, device_and_dtype
from data.teacher_cache import truncated_logits
from extra.quantile import QuantileEmbedding
from gumbel import GumbelEmbedding, sample_exponential
from mdlm import MDLM
from teacher import AR, GPT2, GPT2_SIZES
from train import FLAGS, SIZES

BLOCK_SIZE = 16                                            # of BD3-LM, in sampling
# train.py's flags that `plan` reads
PLANNED = {"model", "gumbel", "noise", "inject", "kd", "teacher", "teacher_cache", "init_from", "size", "length",
           "block_size", "heads", "micro_batch_size", "batch_size", "steps", "dtype", "compile"}


# ---------------------------------------------------------------------------------------------------------------------
# the clock

def sync():
    """Wait until the device has done what it was given: a GPU runs behind the program."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory(run):
    """The most memory that is held while `run` runs, above what is held before, in MB; the device's if there is one."""
    if torch.cuda.is_available():
        return peak_device_memory(run)
    return peak_process_memory(run)


def peak_device_memory(run):
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()                   # weights and optimizers: not what is measured
    run()
    return (torch.cuda.max_memory_allocated() - held) / 1e6


M_TRIM_THRESHOLD = -1                                      # settings of glibc's mallopt
M_MMAP_THRESHOLD = -3


def peak_process_memory(run):
    libc = ctypes.CDLL(None)
    # what is freed goes back to the system at once, so that the process holds what it uses
    libc.mallopt(M_MMAP_THRESHOLD, 1 << 20)
    libc.mallopt(M_TRIM_THRESHOLD, 1 << 17)
    libc.malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")                                    # resets VmHWM, the peak
    held = process_mb("VmRSS")
    run()
    peak = process_mb("VmHWM")
    # that costs time: not while time is measured
    libc.mallopt(M_MMAP_THRESHOLD, 1 << 25)
    libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)
    return peak - held


def process_mb(name):
    with open("/proc/self/status") as file:
        kilobytes = re.search(name + r":\s+(\d+)", file.read())[1]
    return int(kilobytes) / 1e3


@dataclass
class Case:
    """A row of a table: something to run, and what is known of it beforehand."""
    name: str
    run: Callable[[], None]
    samples: int = 0                                       # that it draws
    nfe: int = 0                                           # network calls for each of them
    flops: float | None = None                             # of a row of training


def measure(cases, repeats):
    """Run all cases in turn, so that a busy spell hits all of them -> [(median seconds, peak MB)]."""
    memory = [peak_memory(case.run) for case in cases]     # the warm-up, too: compiles, fills caches
    seconds = [[] for _ in cases]
    for _ in range(repeats):
        for case, times in zip(cases, seconds):
            sync()                                         # nothing of the case before is still running
            began = time.perf_counter()
            case.run()
            sync()
            times.append(time.perf_counter() - began)
    return [(float(np.median(times)), mb) for times, mb in zip(seconds, memory)]


class Clock:
    """Seconds by part of a program: `book(part)` adds what has passed since the last booking to that part."""

    def __init__(self):
        self.start()

    def start(self):
        self.parts = defaultdict(float)
        self.last = time.perf_counter()

    def book(self, part):
        sync()                                             # or a part would be booked to the one that waits for it
        now = time.perf_counter()
        self.parts[part] += now - self.last
        self.last = now

    def call(self, part, before, function, *args, **kw):
        """Call a function and book its time as `part`; what has passed before it, as `before`. -> its result."""
        self.book(before)
        result = function(*args, **kw)
        self.book(part)
        return result


def against(value, base):
    """The value, and how many times the base it is."""
    return f"{value:.3g} (× {value / base:.2f})"


def show(rows):
    """A table of dicts whose keys are the columns' titles."""
    titles = {}
    for row in rows:
        titles |= {title: title for title in row}
    print_table(rows, titles)


def shape_of(args):
    n_layer, n_embd, n_head = SIZES[args.size]
    return dict(n_layer=n_layer, n_embd=n_embd, n_head=n_head)


# ---------------------------------------------------------------------------------------------------------------------
# sampling

REST = "softmax, nucleus, draw"                            # the parts of a sampling step
NOISE = "noise"
NETWORK = "network"
OUTPUT = "output layer"


def filled(model, std=3.0):
    """Random weights where a new model has zeros; logits get this standard deviation."""
    for name, p in model.named_parameters():
        if "head.weight" in name:
            torch.nn.init.normal_(p, std=std / p.shape[1] ** 0.5)
        elif not p.any():
            torch.nn.init.normal_(p, std=0.02)
    return model


def reference_sample(model, tokens, steps, noise, top_p, generator, clock):
    """Ancestral sampling as the authors' code does it. tokens [B, L], noise [B, L, V] -> tokens [B, L].

    At each step the noise's softmax and projection, the network, and at every position the output layer,
    log-probabilities, float64, a sorted nucleus and a draw. (Theirs reuses the probabilities after a step that revealed
    nothing; with 255 tokens in 16 steps there is none.)
    """
    x = tokens.clone()
    mask_id = model.mask_id
    for i in range(steps):
        g = F.linear(noise.softmax(-1), model.noise_embed.weight)
        clock.book(NOISE)
        h = model.hidden(x, g)
        clock.book(NETWORK)
        logits = F.pad(model.logits(h), (0, 1), value=-1e6)                 # [MASK] cannot be predicted
        clock.book(OUTPUT)
        # a given token predicts itself
        logp = logits - logits.logsumexp(-1, keepdim=True)
        given = x != mask_id
        logp[given] = -1e6
        logp[given, x[given]] = 0
        # the nucleus
        p = logp.double().exp()
        top, ids = p.sort(-1, descending=True)
        inside = top.cumsum(-1) <= top_p
        inside[..., 0] = True
        p.scatter_(-1, ids, top * inside)
        p /= p.sum(-1, keepdim=True)
        # a masked one stays masked with probability (t - 1/steps) / t
        stay = 1 - 1 / (steps - i)
        p *= 1 - stay
        p[..., mask_id] = stay
        # a draw: argmax of p / E, E ~ Exp(1)
        u = torch.rand(p.shape, generator=generator, device=p.device, dtype=torch.float64)
        new = (p / (1e-10 - (u + 1e-10).log())).argmax(-1)
        x = torch.where(given, x, new)
        clock.book(REST)
    return x


class Sampling:
    """`bench sampling`: the models, and a method for each way of drawing n samples."""

    def __init__(self, args, device, autocast):
        V = args.vocab_size
        L = args.length
        bos = V - 1
        net = dict(shape_of(args), dropout=0.0)
        self.model = MDLM(V, L, bos, noise="gumbel", **net)
        self.ar = AR(V, L, bos, **net)
        self.blocks = BD3LM(V, L, bos, block_size=BLOCK_SIZE, noise="gumbel", **net)
        for model in (self.model, self.ar, self.blocks):
            filled(model).to(device).eval()
        self.args = args
        self.device = device
        self.autocast = autocast
        self.generator = torch.Generator(device).manual_seed(0)
        self.draws = dict(top_p=args.top_p, generator=self.generator)
        self.calls_per_block = max(1, args.nfe * BLOCK_SIZE // L)           # --nfe over all blocks
        self.clock = Clock()
        self.parts = {}                                    # (name, n) -> seconds by part, of its last run
        # `generate` knows of no clock: the methods that it calls are replaced by ones that book their time
        noise_embed = self.model.noise_embed
        noise_embed.from_prior = partial(self.clock.call, NOISE, REST, noise_embed.from_prior)
        self.model.hidden = partial(self.clock.call, NETWORK, REST, self.model.hidden)
        self.model.logits = partial(self.clock.call, OUTPUT, REST, self.model.logits)

    def start(self, model, n):
        return model.start(n, self.args.length).to(self.device)

    @torch.no_grad()
    def sample_as_authors(self, n):
        shape = (n, self.args.length, self.args.vocab_size)
        noise = -sample_exponential(shape, self.generator, self.device).log()
        tokens = self.start(self.model, n)
        reference_sample(self.model, tokens, self.args.nfe, noise, self.args.top_p, self.generator, self.clock)

    def sample_here(self, n):
        tokens = self.start(self.model, n)
        self.model.generate(tokens, self.args.nfe, "fixed", **self.draws)   # fixed: no step is empty

    def sample_ar(self, n):
        self.ar.generate(self.start(self.ar, n), self.args.length, **self.draws)

    def sample_blocks(self, n):
        self.blocks.generate(self.start(self.blocks, n), self.calls_per_block, "fixed", **self.draws)

    def run(self, name, sample, n):
        self.clock.start()
        with self.autocast:
            sample(n)
        self.clock.book(REST)                              # what came after the last booked call
        self.parts[name, n] = self.clock.parts

    def cases(self):
        L = self.args.length
        many = self.args.batch_size
        nfe_blocks = self.calls_per_block * L // BLOCK_SIZE
        ways = [
            ("as the authors' code", self.args.nfe, self.sample_as_authors, [1]),
            ("here", self.args.nfe, self.sample_here, [1, many]),
            ("AR, KV cache", L - 1, self.sample_ar, [1, many]),
            (f"BD3-LM, blocks of {BLOCK_SIZE}, cached", nfe_blocks, self.sample_blocks, [1, many]),
        ]
        # theirs holds several [n, L, V] in float64, 1.6 GB each at 16 samples of 256 tokens: one sample only
        cases = []
        for name, nfe, sample, batches in ways:
            for n in batches:
                cases.append(Case(name, partial(self.run, name, sample, n), samples=n, nfe=nfe))
        return cases


def sampling(args, device, autocast):
    """A table: the authors' way of sampling, ours, an AR model and BD3-LM, of equal size."""
    allow_changing_shapes()
    bench = Sampling(args, device, autocast)
    cases = bench.cases()
    measured = measure(cases, args.repeats)
    base, _ = measured[0]                                  # the authors': others are given as multiples of it
    rows = []
    for case, (seconds, memory) in zip(cases, measured):
        row = {
            "": case.name,
            "batch": case.samples,
            "NFE": case.nfe,
            "s per NFE": against(seconds / case.nfe, base / args.nfe),
        }
        parts = bench.parts[case.name, case.samples]
        if len(parts) > 1:                                 # of AR and BD3-LM only the whole is timed
            for part, s in parts.items():
                row[part] = f"{s / seconds:.0%}"
        row["samples/s"] = against(case.samples / seconds, 1 / base)
        row["peak MB above"] = round(memory)
        rows.append(row)
    show(rows)


# ---------------------------------------------------------------------------------------------------------------------
# noise and its embedding

def reference_noise(logits, tokens, weight):
    """Posterior, softmax and Linear on full tensors, as Algorithm 1 reads. [N, V], [N], [D, V] -> [N, D]."""
    logp = logits.log_softmax(-1)
    w = tokens[:, None]                                    # (N, 1)
    xi = standard_gumbel(logits.shape, w.device)
    xi0 = standard_gumbel(w.shape, w.device)
    losers = -torch.log(torch.exp(-xi) + torch.exp(logp - xi0))
    winner = xi0 - logp.gather(-1, w)
    noise = losers.scatter(-1, w, winner)
    return F.linear(noise.softmax(-1), weight)


def standard_gumbel(shape, device):
    """Gumbel noise from float32 uniforms, as it is mostly written."""
    u = torch.rand(shape, device=device).clamp(1e-20)
    return -torch.log(-torch.log(u))


class NoiseEmbeddings:
    """`bench noise`: N positions, and a method for each way to the embeddings of their noise [N, D]."""

    def __init__(self, args, device, autocast):
        self.V = args.vocab_size
        self.N = args.rows
        self.autocast = autocast
        self.generator = torch.Generator(device).manual_seed(0)
        _, D, _ = SIZES[args.size]
        self.embedding = GumbelEmbedding(self.V, D).to(device)
        self.quantile = QuantileEmbedding(self.V, D).to(device)
        # of about a teacher's sharpness
        self.logits = 3 * torch.randn(self.N, self.V, generator=self.generator, device=device)
        self.tokens = torch.distributions.Categorical(logits=self.logits).sample()
        # what a teacher cache knows of these logits
        p = self.logits.softmax(-1)
        self.p, self.ids = p.topk(8)
        self.p_w = p.gather(1, self.tokens[:, None])
        self.frequency = torch.full((self.V,), 1 / self.V, device=device)

    def on_full_tensors(self):
        return reference_noise(self.logits, self.tokens, self.embedding.weight)

    def from_teacher(self):
        return self.embedding.from_posterior(self.teacher_logits, self.tokens, self.generator)

    def from_cache(self):
        return self.embedding.from_posterior(self.cached_logits, self.tokens, self.generator)

    def from_prior(self):
        return self.embedding.from_prior(self.N, 1.0, self.generator)

    def teacher_logits(self, a, b):
        return self.logits[a:b]

    def cached_logits(self, a, b):
        return truncated_logits(self.p[a:b], self.ids[a:b], self.p_w[a:b], self.frequency, self.tokens[a:b])

    def forward(self, embed):
        with self.autocast, torch.no_grad():
            embed()

    def forward_and_backward(self, embed):
        with self.autocast:
            embed().sum().backward()
        for module in (self.embedding, self.quantile):     # or the next run would add to it
            module.zero_grad()


def noise(args, device, autocast):
    """A table: the noise and its embedding on full tensors, and in chunks."""
    bench = NoiseEmbeddings(args, device, autocast)
    ways = {
        "full tensors": bench.on_full_tensors,
        "here: posterior, teacher's logits": bench.from_teacher,
        "here: posterior, teacher cache, k = 8": bench.from_cache,
        "here: prior": bench.from_prior,
        "quantile: posterior, teacher's logits": partial(bench.quantile.from_posterior, bench.teacher_logits,
                                                         bench.tokens, bench.generator),
        "quantile: prior": partial(bench.quantile.from_prior, bench.N, 1.0, bench.generator),
    }
    forward = [Case(name, partial(bench.forward, embed)) for name, embed in ways.items()]
    both = [Case(name, partial(bench.forward_and_backward, embed)) for name, embed in ways.items()]
    forward = measure(forward, args.repeats)
    both = measure(both, args.repeats)
    rows = []
    for name, (seconds, memory), (seconds_both, memory_both) in zip(ways, forward, both):
        rows.append({
            f"{args.rows} rows": name,
            "forward, s": against(seconds, forward[0][0]),
            "peak MB": against(memory, forward[0][1]),
            "with backward, s": against(seconds_both, both[0][0]),
            "its peak MB": against(memory_both, both[0][1]),
        })
    show(rows)


# ---------------------------------------------------------------------------------------------------------------------
# a training step

class RandomCache:
    """In place of a `TeacherCache`, k = 8: random ids, with probabilities as a teacher's fall off."""

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size

    def posterior_logits(self, tokens, masked):
        """As `TeacherCache.posterior_logits`: a function (a, b) -> logits [b - a, V]."""
        device = tokens.device
        V = self.vocab_size
        x = tokens[masked]
        p = 0.5 / torch.arange(2, 10, device=device) ** 1.5                 # a power law, as of words
        p = p.expand(len(x), 8)
        ids = torch.randint(V, (len(x), 8), device=device)
        frequency = torch.full((V,), 1 / V, device=device)
        return lambda a, b: truncated_logits(p[a:b], ids[a:b], p[a:b, :1], frequency, x[a:b])


class TrainingStep:
    """`bench step`: models with their optimizers, one batch, and a method for each kind of step."""

    def __init__(self, args, device, autocast):
        V = args.vocab_size
        L = args.length
        B = args.micro_batch_size
        bos = V - 1
        net = shape_of(args)
        self.args = args
        self.autocast = autocast
        self.teacher = GPT2(V, 1024, bos, *GPT2_SIZES[args.teacher], dropout=0.0)
        self.teacher.to(device).eval().requires_grad_(False)
        if args.dtype == "bfloat16":
            body_to_bfloat16(self.teacher)                 # as train.py does
        if args.compile:
            self.teacher.transformer.compile()
        self.cache = RandomCache(V)
        self.plain = MDLM(V, L, bos, **net).to(device)
        self.noisy = MDLM(V, L, bos, noise="gumbel", **net).to(device)
        self.blocks = BD3LM(V, L, bos, block_size=args.block_size, **net).to(device)
        self.ar = AR(V, L, bos, **net).to(device)
        self.optimizers = {}
        for model in (self.plain, self.noisy, self.blocks, self.ar):
            self.optimizers[model] = self.make_optimizer(model)
            if args.compile:
                for network in model.networks():
                    network.compile()
        self.generator = torch.Generator(device).manual_seed(0)
        # one batch with its masks, the same for all
        self.tokens = torch.randint(V - 1, (B, L), device=device)
        self.tokens[:, 0] = bos
        self.t = torch.full((B,), 0.5, device=device)      # as many masked as on average
        self.masked = torch.rand(self.tokens.shape, device=device) < self.t[:, None]
        self.masked[:, 0] = False
        self.z = self.tokens.masked_fill(self.masked, V)

    @staticmethod
    def make_optimizer(model):
        """AdamW after a step without gradients: from now on it holds its moments, and no run has to make them."""
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return optimizer

    def update(self, model, loss):
        loss.backward()
        self.optimizers[model].step()
        self.optimizers[model].zero_grad(set_to_none=True)

    def diffuse(self, model, **kw):
        """A step of a masked model; kw: what its loss reads besides, as a teacher."""
        t = self.t[:, None].expand(-1, model.n_blocks)
        with self.autocast:
            loss, _ = model.loss(self.tokens, t, z=self.z, generator=self.generator, **kw)
        self.update(model, loss)

    def predict_next(self):
        """A step of the AR model."""
        with self.autocast:
            loss, _ = self.ar.loss(self.tokens)
        self.update(self.ar, loss)

    def predict_next_as_nanogpt(self):
        """The same with full logits and one cross-entropy."""
        with self.autocast:
            logits = self.ar.transformer.head(self.ar.hidden(self.tokens[:, :-1]))
            loss = F.cross_entropy(logits.float().flatten(0, 1), self.tokens[:, 1:].flatten())
        self.update(self.ar, loss)

    def embed_noise(self, source):
        """Of a step with noise: the teacher's logits (or the cache's), the noise, its embedding, the gradient of W."""
        with self.autocast:
            logits = source.posterior_logits(self.tokens, self.masked)
            g = self.noisy.noise_embed.from_posterior(logits, self.tokens[self.masked], self.generator)
            g.sum().backward()
        self.noisy.zero_grad(set_to_none=True)

    def run_teacher(self):
        """Of a step with a teacher: its pass without the output layer."""
        with self.autocast, torch.no_grad():
            self.teacher.hidden(self.tokens[:, :-1])

    def cases(self):
        L = self.args.length
        plain = self.plain.flops_per_row(L)
        noisy = self.noisy.flops_per_row(L)
        noisy_with_teacher = noisy + self.teacher.extraction_flops(L, 0.5)
        blocks = self.blocks.flops_per_row(L)
        ar = self.ar.flops_per_row(L)
        return [
            Case("MDLM", partial(self.diffuse, self.plain), flops=plain),
            Case("MDLM + Gumbel, teacher cache", partial(self.diffuse, self.noisy, teacher=self.cache), flops=noisy),
            Case("&nbsp; of it: noise, embedding, backward", partial(self.embed_noise, self.cache),
                 flops=noisy - plain),
            Case("MDLM + Gumbel, teacher", partial(self.diffuse, self.noisy, teacher=self.teacher),
                 flops=noisy_with_teacher),
            Case("&nbsp; of it: teacher's body", self.run_teacher),
            Case("&nbsp; of it: teacher, noise, embedding, backward", partial(self.embed_noise, self.teacher)),
            Case("MDLM + token KD", partial(self.diffuse, self.plain, teacher=self.teacher, kd=1.0)),
            Case(f"BD3-LM, blocks of {self.args.block_size}", partial(self.diffuse, self.blocks), flops=blocks),
            Case("AR", self.predict_next, flops=ar),
            Case("AR as nanoGPT, full logits", self.predict_next_as_nanogpt, flops=ar),
        ]


def step(args, device, autocast):
    """A table: a training step of each kind of model, with and without noise, and its parts."""
    bench = TrainingStep(args, device, autocast)
    cases = bench.cases()
    measured = measure(cases, args.repeats)
    base, _ = measured[0]                                  # MDLM without noise
    B = args.micro_batch_size
    L = args.length
    rows = []
    for case, (seconds, memory) in zip(cases, measured):
        row = {
            "a step of": case.name,
            "seconds": against(seconds, base),
            "tokens/s": round(B * L / seconds),
            "peak MB above": round(memory),
        }
        if case.flops is not None:
            gflop = B * case.flops / 1e9
            row["GFLOP, half masked"] = round(gflop)
            row["GFLOP/s"] = round(gflop / seconds)
        rows.append(row)
    show(rows)
    print(f"\n{B} rows of {L}, {bench.masked.sum()} positions masked")


# ---------------------------------------------------------------------------------------------------------------------
# the command

def flags():
    parser = Parser(description="Time and memory, by part.", epilog="Caveats: see the file's first lines.")
    commands = parser.add_subparsers(dest="what", required=True, parser_class=Parser)
    count = number(int, 1)
    length = number(int, 2, 1024)

    sub = add_command(commands, sampling)
    sub.add_argument("--length", type=length, default=256, help="tokens of a row")
    sub.add_argument("--nfe", type=count, default=16)
    sub.add_argument("--batch_size", type=count, default=16)
    sub.add_argument("--top_p", type=number(float, above=0, high=1), default=0.9)

    sub = add_command(commands, noise)
    sub.add_argument("--rows", type=count, default=2048, help="positions")

    sub = add_command(commands, step)
    sub.add_argument("--length", type=length, default=1024, help="tokens of a row")
    sub.add_argument("--teacher", choices=GPT2_SIZES, default="gpt2",
                     help="its shape; the weights are random")
    sub.add_argument("--micro_batch_size", type=count, default=8, help="rows per step")
    sub.add_argument("--block_size", type=count, default=4, help="of BD3-LM")
    sub.add_argument("--compile", action="store_true", help="torch.compile transformers and draws")

    sub = commands.add_parser("plan", argument_default=argparse.SUPPRESS)    # as in train.parse
    read = [flag for flags in FLAGS.values() for flag in flags if flag[0] in PLANNED]
    add_flags(sub, {"the run, as in train.py": read})
    sub.add_argument("--vocab_size", type=number(int, 16), default=50257)
    sub.add_argument("--masked", type=number(float, above=0, high=1), default=0.5, help="share of the positions")
    sub.add_argument("--processes", type=count, default=8, help="GPUs")
    sub.add_argument("--card", choices=[name.lower() for name in CARDS if " " not in name], default="h100")

    sub = commands.add_parser("gpu")
    sub.add_argument("--only", help="parts of it, by name, with commas between")
    sub.add_argument("--miniature", action="store_true", help="tiny sizes, as without a GPU")
    sub.add_argument("--json", help="also write the verdicts to this file")
    return parser


def add_command(commands, function):
    """A subcommand named like the function that it runs, with the flags that all of them have."""
    sub = commands.add_parser(function.__name__)
    sub.set_defaults(function=function)
    sub.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    sub.add_argument("--repeats", type=number(int, 1), default=3, help="after one warm-up")
    sub.add_argument("--size", choices=SIZES, default="small")
    sub.add_argument("--vocab_size", type=number(int, 16), default=50257)
    return sub


def main():
    parser = flags()
    args = parser.parse_args()
    if args.what == "plan":
        from extra.plan import plan
        plan(args)
        return
    if args.what == "gpu":
        from extra.gpu import gpu
        gpu(args)
        return
    if args.what == "step" and args.length % args.block_size:
        parser.error(f"--block_size={args.block_size} does not divide --length={args.length}: choose a divisor")
    if args.what == "sampling" and args.length % BLOCK_SIZE:
        parser.error(f"--length={args.length} must be a multiple of {BLOCK_SIZE}, BD3-LM's blocks")
    device, args.dtype, autocast = device_and_dtype(args.dtype)
    torch.manual_seed(0)                                   # of weights and tokens
    args.function(args, device, autocast)
    machine = f"CPU, {torch.get_num_threads()} threads"
    if device == "cuda":
        machine = torch.cuda.get_device_name()
    print(f"\n{machine}, {args.dtype}, torch {torch.__version__}, {args.size}")


if __name__ == "__main__":
    run_main(main)
