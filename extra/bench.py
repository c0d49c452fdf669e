"""Where time and memory go: random weights and random tokens, so nothing needs to be downloaded.

    python -m extra.bench sampling                          # against the authors' way of sampling, in one run
    python -m extra.bench noise                             # noise and its embedding: full tensors, chunks, sparse
    python -m extra.bench sparse --ckpt=out/chars-gumbel-s0                  # a trained student, shown sparse noise
    python -m extra.bench step --length=128 --micro_batch_size=8                    # a training step, by part
    python -m extra.bench step --teacher=gpt2-large --length=1024 --compile         # the default job's shape, for a GPU
    python -m extra.bench scaling                           # in L, V, batch and NFE
    python -m extra.bench cache --teacher=out/bpe-ar --data=data/bpe --length=32    # what a teacher cache leaves out

Caveats first. Medians of --repeats after a warm-up, the cases of a table in turn: on a shared machine only their
ratios mean anything. Weights are random; in sampling, the output layer gives logits a standard deviation of 3 (6.5
nats over GPT-2's vocabulary, as in a student's first steps): where a nucleus ends, and so what finding it costs,
depends on that. Memory is the peak above what is held between repeats; on a CPU, the process's. "Teacher cache" in a
step is random ids in memory: without the read from disk, 35 KB a row of 1024 at k = 8.
"""
import ctypes
import re
import time
from collections import defaultdict
from functools import partial
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F

import evaluate
import gumbel
from bd3lm import BD3LM
from data.cli import BadInput, Parser, number, run_main
from data.shards import Shards
from gumbel import GumbelEmbedding, _posterior_times, _truncated_posterior_times, noise_features, sample_exponential
from mdlm import MDLM
from sample import device_and_dtype, load_ar, load_model
from teacher import AR, GPT2, GPT2_SIZES, body_to_bfloat16
from train import SIZES, flops_per_row

SHAPE = "n_layer", "n_embd", "n_head"


# ---------------------------------------------------------------------------------------------------------------------
# the clock

sync = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None


def process_mb(what):
    with open("/proc/self/status") as file:
        return int(re.search(what + r":\s+(\d+)", file.read())[1]) / 1e3


def peak_memory(f):
    """MB above what is held before, while f runs: device memory, or the process's."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated() / 1e6
        f()
        return torch.cuda.max_memory_allocated() / 1e6 - held
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 1 << 20)                              # M_MMAP_THRESHOLD: what is freed goes back to the system
    libc.mallopt(-1, 1 << 17)                              # M_TRIM_THRESHOLD
    libc.malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")                                    # resets VmHWM
    held = process_mb("VmRSS")
    f()
    peak = process_mb("VmHWM")
    libc.mallopt(-3, 1 << 25)                              # it costs time: not while that is measured
    libc.mallopt(-1, 1 << 30)
    return peak - held


def measure(cases, repeats):
    """Functions -> [(median seconds, peak MB)], in turn so that a busy spell hits all."""
    memory, seconds = [peak_memory(f) for f in cases], [[] for _ in cases]               # the warm-up, too
    for _ in range(repeats):
        for f, s in zip(cases, seconds):
            sync()
            began = time.perf_counter()
            f()
            sync()
            s.append(time.perf_counter() - began)
    return [(float(np.median(s)), mb) for s, mb in zip(seconds, memory)]


class Clock:
    """Seconds by part: clock("name") books what has passed since the last call."""

    def start(self):
        self.parts, self.last = defaultdict(float), time.perf_counter()

    def __call__(self, name):
        sync()
        now = time.perf_counter()
        self.parts[name] += now - self.last
        self.last = now


def against(value, base):
    """The value, and how many times the base it is."""
    return f"{value:.3g} (× {value / base:.2f})"


def show(rows):
    """A table of dicts whose keys are the columns' titles."""
    evaluate.print_table(rows, {title: title for row in rows for title in row})


def filled(model, std=3.0):
    """Random weights where a new model has zeros; logits of this standard deviation."""
    for name, p in model.named_parameters():
        if "head.weight" in name:
            torch.nn.init.normal_(p, std=std / p.shape[1] ** 0.5)
        elif not p.any():
            torch.nn.init.normal_(p, std=0.02)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# sampling

def reference_sample(model, tokens, steps, noise, top_p, generator, clock):
    """Ancestral sampling as the authors' code does it: at each step the noise's softmax and projection, the network,
    and at every position the output layer, log-probabilities, float64, a sorted nucleus and a draw. (Theirs reuses the
    probabilities after a step that revealed nothing; with 255 tokens in 16 steps there is none.)"""
    x, mask = tokens.clone(), model.mask_id
    for i in range(steps):
        g = F.linear(noise.softmax(-1), model.noise_embed.weight)
        clock("noise")
        h = model.hidden(x, g)
        clock("network")
        logits = F.pad(model.logits(h), (0, 1), value=-1e6)
        clock("output layer")
        logp = logits - logits.logsumexp(-1, keepdim=True)
        given = x != mask
        logp[given] = -1e6
        logp[given, x[given]] = 0
        p = logp.double().exp()
        top, where = p.sort(-1, descending=True)
        inside = top.cumsum(-1) <= top_p
        inside[..., 0] = True
        p.scatter_(-1, where, top * inside)
        p /= p.sum(-1, keepdim=True)
        stay = 1 - 1 / (steps - i)
        p *= 1 - stay
        p[..., mask] = stay
        u = torch.rand(p.shape, generator=generator, device=p.device, dtype=torch.float64)
        new = (p / (1e-10 - (u + 1e-10).log())).argmax(-1)
        x = torch.where(given, x, new)
        clock("softmax, nucleus, draw")
    return x


def sampling(args, device, autocast):
    V, L, nfe, net = args.vocab_size, args.length, args.nfe, dict(zip(SHAPE, SIZES[args.size]), dropout=0.0)
    model, ar, blocks = (filled(m).to(device).eval() for m in (
        MDLM(V, L, V - 1, noise="gumbel", **net), AR(V, L, V - 1, **net),
        BD3LM(V, L, V - 1, 16, noise="gumbel", **net)))
    generator, clock, parts = torch.Generator(device).manual_seed(0), Clock(), {}
    for method, part in dict(embed_noise="noise", hidden="network", logits="output layer").items():
        def timed(*a, f=getattr(model, method), part=part, **kw):
            clock("softmax, nucleus, draw")
            result = f(*a, **kw)
            clock(part)
            return result
        setattr(model, method, timed)

    def start(n):                                          # all masked but BOS
        return F.pad(torch.full((n, L - 1), V, device=device), (1, 0), value=V - 1)

    @torch.no_grad()
    def reference(n):
        noise = -sample_exponential((n, L, V), generator, device).log()
        reference_sample(model, start(n), nfe, noise, args.top_p, generator, clock)

    def run(name, n, f):
        clock.start()
        with autocast:
            f(n)
        clock("softmax, nucleus, draw")
        parts[name, n] = clock.parts                       # of the last run
    draws, calls = dict(top_p=args.top_p, generator=generator), max(1, nfe * 16 // L)              # calls: of a block
    cases = [(name, n, steps, partial(run, name, n, f)) for name, steps, f in (
        ("as the authors' code", nfe, reference),
        ("here", nfe, lambda n: model.generate(start(n), nfe, "fixed", **draws)),                  # no step is empty
        ("AR, KV cache", L - 1, lambda n: ar.generate(start(n)[:, :1], L, **draws)),
        ("BD3-LM, blocks of 16, cached", calls * L // 16, lambda n: blocks.generate(start(n), calls, "fixed", **draws))
    ) for n in ((1,) if f is reference else (1, args.batch_size))]
    measured, rows = measure([f for *_, f in cases], args.repeats), []
    base = measured[0][0]
    for (name, n, steps, _), (seconds, memory) in zip(cases, measured):
        shares = {part: f"{s / seconds:.0%}" for part, s in parts[name, n].items()} if len(parts[name, n]) > 1 else {}
        rows.append({"": name, "batch": n, "NFE": steps, "s per NFE": against(seconds / steps, base / nfe), **shares,
                     "samples/s": against(n / seconds, 1 / base), "peak MB above": round(memory)})
    show(rows)


# ---------------------------------------------------------------------------------------------------------------------
# noise and its embedding

def reference_noise(logits, tokens, weight):
    """Posterior, softmax and Linear on full tensors, as Algorithm 1 reads. [N, V], [N], [D, V] -> [N, D]."""
    logp, w = logits.log_softmax(-1), tokens[:, None]
    xi, xi0 = (-torch.log(-torch.log(torch.rand(n, device=w.device).clamp(1e-20))) for n in (logits.shape, w.shape))
    noise = -torch.log(torch.exp(-xi) + torch.exp(logp - xi0))
    return F.linear(noise.scatter(-1, w, xi0 - logp.gather(-1, w)).softmax(-1), weight)


def sparse_prior(n, V, K, generator=None, device=None):
    """The K smallest of V iid Exp(1) as order statistics (Renyi), at random places (few coincide), and softmax(noise)
    there, and its mean over the other places, in O(K) a row: ids [n, K], s [n, K], rest [n, 1]."""
    e = sample_exponential((n, K), generator, device) / (V - torch.arange(K, device=device))
    inverse = e.cumsum_(-1).reciprocal()
    ids = torch.randint(V, (n, K), generator=generator, device=device)
    low = 1 / inverse[:, -1:]                              # the others are low + Exp(1), mean of 1/T e^low E1(low)
    mean = low.exp() * (low - low.square() / 4 - low.log() - 0.577216)                    # (low is about K / V, small)
    total = inverse.sum(-1, keepdim=True) + (V - K) * mean
    return ids, inverse / total, mean / total


def noise(args, device, autocast):
    V, D, N = args.vocab_size, SIZES[args.size][1], args.rows
    generator = torch.Generator(device).manual_seed(0)
    embedding = GumbelEmbedding(V, D).to(device)
    logits = 3 * torch.randn(N, V, generator=generator, device=device)
    tokens = torch.distributions.Categorical(logits=logits).sample()
    p, ids = logits.softmax(-1).topk(8)
    p_w, frequency = logits.softmax(-1).gather(1, tokens[:, None]), torch.full((V,), 1 / V, device=device)

    table = embedding.weight.detach().t().contiguous().requires_grad_()          # [V, D]: rows to gather

    @autocast
    def both(f):
        f().sum().backward()
        embedding.weight.grad = table.grad = None

    @autocast
    @torch.no_grad()
    def forward(f):
        f()

    def sparse(K):
        i, s, rest = sparse_prior(N, V, K, generator, device)
        # the others at their mean: that times the sum of all columns, which the K take part in
        return F.embedding_bag(i, table, per_sample_weights=(s - rest), mode="sum") + rest * table.sum(0)
    cases = {"full tensors": lambda: reference_noise(logits, tokens, embedding.weight),
             "here: posterior, teacher's logits": lambda: embedding.from_posterior(
                 lambda a, b: logits[a:b], tokens, generator),
             "here: posterior, teacher cache, k = 8": lambda: embedding.from_posterior(
                 lambda a, b: (p[a:b], ids[a:b], p_w[a:b], frequency), tokens, generator),
             "here: prior": lambda: embedding.from_prior(N, 1.0, generator)}
    cases |= {f"sparse study: prior, K = {K}": partial(sparse, K) for K in (64, 512, 4096) if 8 * K < V}
    s = noise_features(sample_exponential((256, V), generator, device)).sort(-1, descending=True).values
    low, high = (measure([partial(f, case) for case in cases.values()], args.repeats) for f in (forward, both))
    rows = []
    for name, a, b in zip(cases, low, high):
        rows.append({f"{N} rows": name, "forward, s": against(a[0], low[0][0]), "peak MB": against(a[1], low[0][1]),
                     "with backward, s": against(b[0], high[0][0]), "its peak MB": against(b[1], high[0][1])})
        if "K = " in name:                                 # what the mean of the others loses of g, as energy
            rest = s[:, int(name.split()[-1]):]
            rows[-1]["error of g"] = (
                f"{((rest - rest.mean(-1, keepdim=True)).square().sum() / s.square().sum()).sqrt():.1%}")
    show(rows)


def sparse(args, device, autocast):
    args.length = None
    model, rows, off = load_model(args.ckpt, device=device), [], []
    V = model.config["vocab_size"]

    def features(T, *kind, K):                             # the K largest, the others at their mean
        s = noise_features(T, *kind)
        top, ids = s.topk(K)
        kept = ((1 - top.sum(-1, keepdim=True)) / max(1, V - K)).expand_as(s).scatter(-1, ids, top)
        off.append(((kept - s).norm() / s.norm()).item())
        return kept
    for K in [V] + [K for K in (4096, 512, 64, 32, 16, 8, 4, 2) if K < V]:
        off.clear()
        with patch.object(gumbel, "noise_features", partial(features, K=K)), torch.no_grad(), autocast:
            (row,), *_ = evaluate.ppl(args, [model], device)
        if not off:
            raise BadInput(f"--ckpt={args.ckpt} reads no noise of its text: give a student trained with --gumbel")
        rows.append({"K": K, "error of softmax(noise)": f"{np.mean(off):.1%}", "loss given noise": f"{row['nll']:.4f}",
                     "±": f"{row['nll_stderr']:.4f}"})
    show(rows)
    print(f"\n{args.n} rows at most, the same with the same draws; {model.name}, V = {V}")


# ---------------------------------------------------------------------------------------------------------------------
# a training step

class RandomCache:
    """In place of a TeacherCache, k = 8: random ids, with probabilities as a teacher's fall off."""

    def __init__(self, vocab_size):
        self.V = vocab_size

    def posterior_logits(self, tokens, masked):
        n, V, device = int(masked.sum()), self.V, tokens.device
        p = (0.5 / torch.arange(2, 10, device=device) ** 1.5).expand(n, 8)
        ids, frequency = torch.randint(V, (n, 8), device=device), torch.full((V,), 1 / V, device=device)
        return lambda a, b: (p[a:b], ids[a:b], p[a:b, :1], frequency)


def step(args, device, autocast):
    V, L, B, net = args.vocab_size, args.length, args.micro_batch_size, dict(zip(SHAPE, SIZES[args.size]))
    teacher = GPT2(V, 1024, V - 1, *GPT2_SIZES[args.teacher], 0.0, learned=1024).to(device).eval().requires_grad_(False)
    if autocast._enabled:
        body_to_bfloat16(teacher)
    plain, noisy, blocks, ar = (m.to(device) for m in (
        MDLM(V, L, V - 1, **net), MDLM(V, L, V - 1, noise="gumbel", **net), BD3LM(V, L, V - 1, args.block_size, **net),
        AR(V, L, V - 1, **net)))
    optimizers = {m: torch.optim.AdamW(m.parameters(), lr=1e-4, fused=True) for m in (plain, noisy, blocks, ar)}
    for model, optimizer in optimizers.items():            # its moments are held from now on
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if args.compile:
            model.transformer.compile()
    generator, cache = torch.Generator(device).manual_seed(0), RandomCache(V)
    tokens = torch.randint(V - 1, (B, L), device=device)
    tokens[:, 0] = V - 1
    t = torch.full((B,), 0.5, device=device)               # as many masked as on average
    masked = torch.rand(tokens.shape, device=device) < t[:, None]
    masked[:, 0] = False
    z = tokens.masked_fill(masked, V)

    def run(model, loss):
        with autocast:
            value = loss()
        value.backward()
        optimizers[model].step()
        optimizers[model].zero_grad(set_to_none=True)

    def diffuse(model, **kw):
        run(model, lambda: model.loss(tokens, t[:, None].expand(B, model.n_blocks), z=z, generator=generator, **kw)[0])

    def nanogpt():                                         # full logits, one cross-entropy
        logits = ar.transformer.head(ar.hidden(tokens[:, :-1]))
        return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())

    @autocast
    def embed(source):
        noisy.noise_embed.from_posterior(source.posterior_logits(tokens, masked), tokens[masked],
                                         generator).sum().backward()
        noisy.zero_grad(set_to_none=True)

    @autocast
    @torch.no_grad()
    def body():
        teacher.hidden(tokens[:, :-1])
    base, cached = flops_per_row(plain, None, L), flops_per_row(noisy, None, L)
    cases = (
        ("MDLM", lambda: diffuse(plain), base),
        ("MDLM + Gumbel, teacher cache", lambda: diffuse(noisy, teacher=cache), cached),
        ("&nbsp; of it: noise, embedding, backward", lambda: embed(cache), cached - base),
        ("MDLM + Gumbel, teacher", lambda: diffuse(noisy, teacher=teacher), flops_per_row(noisy, teacher, L)),
        ("&nbsp; of it: teacher's body", body, None),
        ("&nbsp; of it: teacher, noise, embedding, backward", lambda: embed(teacher), None),
        ("MDLM + token KD", lambda: diffuse(plain, teacher=teacher, kd=1.0), None),
        (f"BD3-LM, blocks of {args.block_size}", lambda: diffuse(blocks), flops_per_row(blocks, None, L)),
        ("AR", lambda: run(ar, lambda: ar.loss(tokens)[0]), flops_per_row(ar, None, L)),
        ("AR as nanoGPT, full logits", lambda: run(ar, nanogpt), flops_per_row(ar, None, L)))
    measured, rows = measure([f for _, f, _ in cases], args.repeats), []
    for (part, _, flops), (seconds, memory) in zip(cases, measured):
        rows.append({"a step of": part, "seconds": against(seconds, measured[0][0]), "tokens/s": round(B * L / seconds),
                     "peak MB above": round(memory)})
        if flops:
            gflop = B * flops / 1e9
            rows[-1] |= {"GFLOP, half masked": round(gflop), "GFLOP/s": round(gflop / seconds)}
    show(rows)
    print(f"\n{B} rows of {L}, {masked.sum()} positions masked")


# ---------------------------------------------------------------------------------------------------------------------
# growth

def scaling(args, device, autocast):
    base, rows = dict(L=256, V=50257, B=4, NFE=16), []
    grid = dict(L=(64, 128, 256, 512, 1024), V=(512, 4096, 50257), B=(1, 4, 16), NFE=(4, 16, 64))
    for key, value in ((key, value) for key, values in grid.items() for value in values):
        L, V, B, nfe = (base | {key: value}).values()
        model = filled(MDLM(V, L, V - 1, *SIZES[args.size], noise="gumbel")).to(device)
        generator, cache = torch.Generator(device).manual_seed(0), RandomCache(V)
        tokens, position = torch.randint(V - 1, (B, L), device=device), torch.arange(L, device=device)
        tokens[:, 0] = V - 1
        t = torch.full((B,), 0.5, device=device)

        @autocast
        def sample():
            model.eval().generate(tokens.masked_fill(position > 0, V), nfe, "fixed", top_p=0.9, generator=generator)

        def train():
            with autocast:
                loss, _ = model.train().loss(tokens, t, cache, tokens.masked_fill(position % 2 > 0, V),
                                             generator=generator)
            loss.backward()
            model.zero_grad(set_to_none=True)
        (a, low), (b, high) = measure([sample, train], args.repeats)
        rows.append({"varied": f"{key} = {value}", "sampling, s": f"{a:.3g}", "peak MB above": round(low),
                     "ms per sample and NFE": f"{1e3 * a / B / nfe:.3g}", "forward + backward, s": f"{b:.3g}",
                     "us per token": f"{1e6 * b / B / L:.3g}", "its peak MB": round(high)})
    show(rows)
    print("\nthe others: " + ", ".join(f"{k} = {v}" for k, v in base.items()))


# ---------------------------------------------------------------------------------------------------------------------
# what a teacher cache leaves out

def cache(args, device, _):
    data = Shards(args.data, "train", args.length)
    teacher = load_ar("--teacher", args.teacher, data.meta, data.length, device)
    order = np.random.default_rng(0).permutation(len(data))[:max(1, args.rows // (data.length - 1))]
    tokens = torch.from_numpy(data.rows(order)).to(device)
    generator = torch.Generator(device).manual_seed(0)
    sums, frequency = defaultdict(lambda: np.zeros(4)), torch.from_numpy(data.frequency()).to(device)
    h, x = teacher.hidden(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
    n = len(x)
    for h, x in zip(h.split(64), x.split(64)):
        logits = teacher.logits(h)
        e, probs, i = sample_exponential(logits.shape, generator, device), logits.softmax(-1), x[:, None]
        exact = noise_features(_posterior_times(logits, x, e.clone()))
        for k in sorted({min(k, teacher.vocab_size) for k in (1, 2, 4, 8, 32, 128)}):
            p, ids = probs.topk(k)
            T = _truncated_posterior_times(p, ids, probs.gather(1, i), frequency, x, e.clone())
            off = noise_features(T) - exact
            others, f = (v.scatter(1, ids, 0).scatter(1, i, 0) for v in (probs, frequency.repeat(len(x), 1)))
            rest = others.sum(1, keepdim=True)
            d = (rest * f / f.sum(1, keepdim=True).clamp(min=1e-9) - others).clamp(min=0).sum(1)
            sums[k] += [v.sum().item() for v in (rest, d / (1 + d), off.abs() / 2, off.norm(dim=1) / exact.norm(dim=1))]
    show([{"k": k, "bytes a token": 4 * k + 2, "OpenWebText, GB": f"{9.04 * (4 * k + 2):.0f}",
           "mass left out": f"{rest / n:.4f}", "noise off by (total variation)": f"{tv / n:.4f}",
           "mass of softmax(noise) moved": f"{moved / n:.5f}", "its change / norm": f"{norm / n:.5f}"}
          for k, (rest, tv, moved, norm) in sums.items()])
    print(f"\n{n} positions of {args.data}, teacher {args.teacher}; the last two with the same draws")


def main():
    parser = Parser(description="Time and memory, by part.", epilog="Caveats: see the file's first lines.")
    commands = parser.add_subparsers(dest="what", required=True, parser_class=Parser)
    whole = number(int, 1)

    def command(f, **flags):
        sub = commands.add_parser(f.__name__)
        sub.set_defaults(f=f)
        for name, kw in flags.items():
            sub.add_argument(f"--{name}", **kw)
    shared = dict(dtype=dict(choices=["auto", "float32", "bfloat16"], default="auto"),
                  repeats=dict(type=whole, default=3, help="after one warm-up"))
    size = dict(choices=SIZES, default="small")
    vocab_size, rows = dict(type=number(int, 16), default=50257), dict(type=whole, default=2048, help="positions")
    length = dict(type=number(int, 2, 1024), help="tokens of a row")
    command(sampling, **shared, size=size, vocab_size=vocab_size, length=length | dict(default=256),
            nfe=dict(type=whole, default=16), batch_size=dict(type=whole, default=16),
            top_p=dict(type=number(float, above=0, high=1), default=0.9))
    command(noise, **shared, size=size, vocab_size=vocab_size, rows=rows)
    command(sparse, ckpt=dict(required=True, help="a student trained with --gumbel"),
            data=dict(help="folder of shards; default: the student's"), teacher=dict(help="default: the student's"),
            n=dict(type=number(int, 2), default=1000, help="validation rows"), batch_size=dict(type=whole, default=50),
            seed=dict(type=number(int, 0), default=0))
    command(step, **shared, size=size, vocab_size=vocab_size, length=length | dict(default=1024),
            teacher=dict(choices=GPT2_SIZES, default="gpt2", help="its shape; the weights are random"),
            micro_batch_size=dict(type=whole, default=8, help="rows per step"),
            block_size=dict(type=whole, default=4, help="of BD3-LM"),
            compile=dict(action="store_true", help="torch.compile the student's transformer"))
    command(scaling, **shared, size=size | dict(default="tiny"))
    command(cache, teacher=dict(required=True, help="as in train.py"), length=length, rows=rows,
            data=dict(required=True, help="folder of shards"))
    args = parser.parse_args()
    if args.what == "step" and args.length % args.block_size:
        parser.error(f"--block_size={args.block_size} does not divide --length={args.length}: choose a divisor")
    if args.what == "sampling" and args.length % 16:
        parser.error(f"--length={args.length} must be a multiple of 16, BD3-LM's blocks")
    device, dtype, autocast = device_and_dtype(getattr(args, "dtype", "float32"))
    torch.manual_seed(0)
    args.f(args, device, autocast)
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"\n{name}, {dtype}, torch {torch.__version__}, {getattr(args, 'size', 'no student')}")


if __name__ == "__main__":
    run_main(main)
