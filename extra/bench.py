"""Where time and memory go: random weights and random tokens, so nothing needs to be downloaded.

    python -m extra.bench sampling                          # against the authors' way of sampling, in one run
    python -m extra.bench noise                             # noise and its embedding: full tensors, chunks, sparse
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

import numpy as np
import torch
import torch.nn.functional as F

from bd3lm import BD3LM
from data.prepare import Parser, Shards, number, run_main
from evaluate import print_table
from gumbel import GumbelEmbedding, _posterior_times, _truncated_posterior_times, noise_features, sample_exponential
from mdlm import MDLM
from sample import device_and_dtype, load_ar
from teacher import AR, GPT2, GPT2_SIZES, body_to_bfloat16
from train import SIZES, flops_per_row


# ---------------------------------------------------------------------------------------------------------------------
# the clock

def sync(device):
    if device == "cuda":
        torch.cuda.synchronize()


def measure(cases, repeats, device):
    """Functions -> their median seconds, in turn so that a busy spell hits all, and peak MB above what is held (device
    memory, or the process's): [(seconds, MB)]."""
    def process(what):
        with open("/proc/self/status") as file:
            return int(re.search(what + r":\s+(\d+)", file.read())[1]) / 1e3

    def memory(f):
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated() / 1e6
            f()
            return torch.cuda.max_memory_allocated() / 1e6 - held
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 20)                          # M_MMAP_THRESHOLD: what is freed goes back to the system
        libc.mallopt(-1, 1 << 17)
        libc.malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")                                # resets VmHWM
        held = process("VmRSS")
        f()
        peak = process("VmHWM")
        libc.mallopt(-3, 1 << 25)                          # it costs time: not while that is measured
        libc.mallopt(-1, 1 << 30)                          # M_TRIM_THRESHOLD
        return peak - held
    used, seconds = [memory(f) for f in cases], [[] for _ in cases]                      # the warm-up, too
    for _ in range(repeats):
        for f, s in zip(cases, seconds):
            sync(device)
            began = time.perf_counter()
            f()
            sync(device)
            s.append(time.perf_counter() - began)
    return [(float(np.median(s)), mb) for s, mb in zip(seconds, used)]


class Clock:
    """Seconds by part: clock("name") books what has passed since the last call."""

    def __init__(self, device):
        self.device, self.parts, self.last = device, defaultdict(float), time.perf_counter()

    def __call__(self, name):
        sync(self.device)
        self.parts[name] -= self.last - (now := time.perf_counter())
        self.last = now


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
        clock("noise: softmax, projection")
        h = model.hidden(x, g)
        clock("network")
        logits = F.pad(model.logits(h), (0, 1), value=-1e6)
        clock("output layer")
        logp = logits - logits.logsumexp(-1, keepdim=True)
        given = x != mask
        logp[given] = -1e6
        logp[given, x[given]] = 0
        p = logp.double().exp()
        clock("log-probabilities, float64")
        top, where = p.sort(-1, descending=True)
        inside = top.cumsum(-1) <= top_p
        inside[..., 0] = True
        p.scatter_(-1, where, top * inside)
        p /= p.sum(-1, keepdim=True)
        clock("nucleus")
        stay = 1 - 1 / (steps - i)
        p *= 1 - stay
        p[..., mask] = stay
        u = torch.rand(p.shape, generator=generator, device=p.device, dtype=torch.float64)
        new = (p / (1e-10 - (u + 1e-10).log())).argmax(-1)
        x = torch.where(given, x, new)
        clock("draw")
    return x


def sampling(args, device, autocast):
    (n_layer, n_embd, n_head), V, L, B = SIZES[args.size], args.vocab_size, args.length, args.batch_size
    net = dict(n_layer=n_layer, n_embd=n_embd, n_head=n_head, dropout=0.0)
    model = filled(MDLM(V, L, V - 1, noise="gumbel", **net)).to(device).eval()
    generator = torch.Generator(device).manual_seed(0)
    clocks = {}                                            # of the last run of each

    def start(n):
        x = torch.full((n, L), V, device=device)
        x[:, 0] = V - 1
        return x

    def reference():
        noise = -sample_exponential((1, L, V), generator, device).log()
        clock = clocks["as the authors' code", 1] = Clock(device)
        with torch.no_grad(), autocast:
            reference_sample(model, start(1), args.nfe, noise, args.top_p, generator, clock)

    def ours(n):
        clock = clocks["here", n] = Clock(device)
        for method, part in dict(embed_noise="noise: draws, softmax, projection", hidden="network",
                                 logits="output layer").items():
            def timed_method(*a, f=getattr(type(model), method), part=part):
                clock("nucleus, draw, rest")
                result = f(model, *a)
                clock(part)
                return result
            setattr(model, method, timed_method)
        with autocast:
            model.generate(start(n), args.nfe, "fixed", top_p=args.top_p, generator=generator)     # no step is empty
        clock("nucleus, draw, rest")

    def ar(n):
        with autocast:
            causal.generate(start(n)[:, :1], L, top_p=args.top_p, generator=generator)

    def blocks(n):
        with autocast:
            block.generate(start(n), calls, "fixed", top_p=args.top_p, generator=generator)
    causal = filled(AR(V, L, V - 1, **net)).to(device).eval()
    block = filled(BD3LM(V, L, V - 1, 16, noise="gumbel", **net)).to(device).eval()
    calls, rows = max(1, args.nfe * 16 // L), []
    cases = [("as the authors' code", 1, args.nfe, reference)] + [
        (name, n, nfe, partial(f, n)) for name, nfe, f in (
            ("here", args.nfe, ours), ("AR, KV cache", L - 1, ar),
            ("BD3-LM, blocks of 16, cached", calls * L // 16, blocks)) for n in (1, B)]
    measured = measure([f for *_, f in cases], args.repeats, device)
    base = measured[0][0]
    for (name, n, nfe, _), (seconds, memory) in zip(cases, measured):
        rows.append(dict(what=name, batch=n, nfe=nfe, seconds=f"{seconds / nfe:.3g}", rate=f"{n / seconds:.3g}",
                         ratio=f"{seconds / nfe / (base / args.nfe):.3f}", times=f"{n * base / seconds:.1f}",
                         memory=round(memory)))
        for part, s in clocks[name, n].parts.items() if (name, n) in clocks else ():
            rows.append(dict(what=f"&nbsp; {part}", seconds=f"{s / nfe:.3g}", share=f"{s / seconds:.0%}"))
    print_table(rows, dict(what="", batch="batch", nfe="NFE", seconds="s per NFE", share="share",
                           ratio="/ the authors' way",
                           rate="samples/s", times="times the authors' samples/s", memory="peak MB above"))


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

    def run(f):
        with autocast:
            f().sum().backward()
        embedding.weight.grad = table.grad = None

    def forward(f):
        with torch.no_grad(), autocast:
            f()
    table = embedding.weight.detach().t().contiguous().requires_grad_()          # [V, D]: rows to gather

    def sparse(K):
        i, s, rest = sparse_prior(N, V, K, generator, device)
        # the others at their mean: that times the sum of all columns, which the K take part in
        return F.embedding_bag(i, table, per_sample_weights=(s - rest), mode="sum") + rest * table.sum(0)
    cases = [("full tensors", lambda: reference_noise(logits, tokens, embedding.weight)),
             ("here: posterior, teacher's logits", lambda: embedding.from_posterior(
                 lambda a, b: logits[a:b], tokens, generator)),
             ("here: posterior, teacher cache, k = 8", lambda: embedding.from_posterior(
                 lambda a, b: (p[a:b], ids[a:b], p_w[a:b], frequency), tokens, generator)),
             ("here: prior", lambda: embedding.from_prior(N, 1.0, generator))]
    cases += [(f"sparse study: prior, K = {K}", lambda K=K: sparse(K)) for K in (64, 512, 4096) if 8 * K < V]
    s = noise_features(sample_exponential((256, V), generator, device)).sort(-1, descending=True).values
    base, *_ = measured = list(zip(*(measure([partial(g, f) for _, f in cases], args.repeats, device)
                                     for g in (forward, run))))
    rows = []
    for (name, _), (low, both) in zip(cases, measured):
        row = dict(what=name, forward=f"{low[0]:.3g}", ratio=f"{low[0] / base[0][0]:.2f}", memory=round(low[1]),
                   part=f"{low[1] / base[0][1]:.2f}", both=f"{both[0]:.3g}", both_ratio=f"{both[0] / base[1][0]:.2f}",
                   both_memory=round(both[1]), both_part=f"{both[1] / base[1][1]:.2f}")
        if "K = " in name:                                 # what the mean of the others loses of g, as energy
            rest = s[:, int(name.split()[-1]):]
            row["error"] = f"{((rest - rest.mean(-1, keepdim=True)).square().sum() / s.square().sum()).sqrt():.1%}"
        rows.append(row)
    print_table(rows, dict(what=f"{N} rows", forward="forward, s", ratio="ratio", memory="peak MB above", part="ratio",
                           both="with backward, s", both_ratio="ratio", both_memory="peak MB above",
                           both_part="ratio", error="error of g"))


# ---------------------------------------------------------------------------------------------------------------------
# a training step

class RandomCache:
    """In place of a TeacherCache: random ids, with probabilities as a teacher's fall off."""

    def __init__(self, k, vocab_size):
        self.k, self.vocab_size = k, vocab_size

    def posterior_logits(self, tokens, masked):
        n = int(masked.sum())
        p = (0.5 / torch.arange(2, self.k + 2, device=tokens.device) ** 1.5).expand(n, self.k)
        ids = torch.randint(self.vocab_size, (n, self.k), device=tokens.device)
        frequency = torch.full((self.vocab_size,), 1 / self.vocab_size, device=tokens.device)
        return lambda a, b: (p[a:b], ids[a:b], p[a:b, :1], frequency)


def step(args, device, autocast):
    V, L, (n_layer, n_embd, n_head) = args.vocab_size, args.length, SIZES[args.size]
    net = dict(n_layer=n_layer, n_embd=n_embd, n_head=n_head)
    layers, width, heads = GPT2_SIZES[args.teacher]
    teacher = GPT2(V, 1024, V - 1, layers, width, heads, 0.0, learned=1024).to(device).eval().requires_grad_(False)
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
    rows, cache = [], RandomCache(8, V)
    for B in args.micro_batch_size:
        tokens = torch.randint(V - 1, (B, L), device=device)
        tokens[:, 0] = V - 1
        t = torch.full((B,), 0.5, device=device)           # as many masked as on average
        masked = torch.rand(tokens.shape, device=device) < t[:, None]
        masked[:, 0] = False
        generator = torch.Generator(device).manual_seed(0)

        def embed(source):
            with autocast:
                noisy.noise_embed.from_posterior(source.posterior_logits(tokens, masked), tokens[masked],
                                                 generator).sum().backward()
            noisy.zero_grad(set_to_none=True)

        def run(model, loss):
            with autocast:
                value = loss()
            value.backward()
            optimizers[model].step()
            optimizers[model].zero_grad(set_to_none=True)

        def nanogpt():                                     # full logits, one cross-entropy
            logits = ar.transformer.head(ar.hidden(tokens[:, :-1]))
            return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())

        def diffuse(model, **kw):
            run(model, lambda: model.loss(tokens, t[:, None].expand(B, model.n_blocks), z=z, generator=generator,
                                          **kw)[0])

        def body():
            with torch.no_grad(), autocast:
                teacher.hidden(tokens[:, :-1])
        z = tokens.masked_fill(masked, V)
        cached = flops_per_row(noisy, None, L)
        cases = (
            ("MDLM", lambda: diffuse(plain), flops_per_row(plain, None, L)),
            ("MDLM + Gumbel, teacher cache", lambda: diffuse(noisy, teacher=cache), cached),
            ("&nbsp; of it: noise, embedding, backward", lambda: embed(cache), cached - flops_per_row(plain, None, L)),
            ("MDLM + Gumbel, teacher", lambda: diffuse(noisy, teacher=teacher), flops_per_row(noisy, teacher, L)),
            ("&nbsp; of it: teacher's body", body, None),
            ("&nbsp; of it: teacher, noise, embedding, backward", lambda: embed(teacher), None),
            ("MDLM + token KD", lambda: diffuse(plain, teacher=teacher, kd=1.0), None),
            (f"BD3-LM, blocks of {args.block_size}", lambda: diffuse(blocks), flops_per_row(blocks, None, L)),
            ("AR", lambda: run(ar, lambda: ar.loss(tokens)[0]), flops_per_row(ar, None, L)),
            ("AR as nanoGPT, full logits", lambda: run(ar, nanogpt), flops_per_row(ar, None, L)))
        measured = measure([f for _, f, _ in cases], args.repeats, device)
        for (part, _, flops), (seconds, memory) in zip(cases, measured):
            rows.append(dict(part=part, batch=B, masked=int(masked.sum()), seconds=f"{seconds:.3g}",
                             ratio=f"{seconds / measured[0][0]:.2f}", tokens=round(B * L / seconds),
                             memory=round(memory), gflop=round(B * flops / 1e9) if flops else None,
                             rate=f"{B * flops / 1e9 / seconds:.0f}" if flops else None))
    print_table(rows, dict(part="a step of", batch="micro-batch", masked="masked", seconds="seconds", ratio="/ MDLM",
                           tokens="tokens/s", memory="peak MB above", gflop="GFLOP, half masked", rate="GFLOP/s"))


# ---------------------------------------------------------------------------------------------------------------------
# growth

def scaling(args, device, autocast):
    n_layer, n_embd, n_head = SIZES[args.size]
    base, rows = dict(L=256, V=50257, B=4, NFE=16), []
    grid = dict(L=(64, 128, 256, 512, 1024), V=(512, 4096, 50257), B=(1, 4, 16), NFE=(4, 16, 64))
    for key, values in grid.items():
        for value in values:
            L, V, B, nfe = (base | {key: value}).values()
            model = filled(MDLM(V, L, V - 1, n_layer, n_embd, n_head, noise="gumbel")).to(device)
            generator, cache = torch.Generator(device).manual_seed(0), RandomCache(8, V)
            tokens = torch.randint(V - 1, (B, L), device=device)
            tokens[:, 0] = V - 1
            z = tokens.masked_fill(torch.arange(L, device=device) % 2 > 0, V)

            def sample():
                with autocast:
                    model.eval().generate(tokens.masked_fill(torch.arange(L, device=device) > 0, V), nfe, "fixed",
                                          top_p=0.9, generator=generator)

            def train():
                with autocast:
                    loss, _ = model.train().loss(tokens, torch.full((B,), 0.5, device=device), cache, z,
                                                 generator=generator)
                loss.backward()
                model.zero_grad(set_to_none=True)
            (a, low), (b, high) = measure([sample, train], args.repeats, device)
            rows.append(dict(vary=key, value=value, sample=f"{a:.3g}", each=f"{1e3 * a / B / nfe:.3g}", low=round(low),
                             step=f"{b:.3g}", per=f"{1e6 * b / B / L:.3g}", high=round(high)))
    print_table(rows, dict(vary="varied", value="=", sample="sampling, s", each="ms per sample and NFE",
                           low="peak MB above", step="forward + backward, s", per="us per token",
                           high="peak MB above"))
    print("\nthe others: " + ", ".join(f"{k} = {v}" for k, v in base.items()))


# ---------------------------------------------------------------------------------------------------------------------
# what a teacher cache leaves out

def cache(args, device, _):
    data = Shards(args.data, "train", args.length)
    teacher = load_ar("--teacher", args.teacher, data.meta, data.length, device)
    order = np.random.default_rng(0).permutation(len(data))[:max(1, args.rows // (data.length - 1))]
    tokens = torch.from_numpy(data.rows(order)).to(device)
    generator = torch.Generator(device).manual_seed(0)
    V, sums = teacher.vocab_size, defaultdict(lambda: np.zeros(4))
    ks = sorted({min(k, V) for k in (1, 2, 4, 8, 32, 128)})
    frequency = torch.from_numpy(data.frequency()).to(device)
    with torch.no_grad():
        h, x = teacher.hidden(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
        for h, x in zip(h.split(64), x.split(64)):
            logits = teacher.logits(h)
            e, probs, i = sample_exponential(logits.shape, generator, device), logits.softmax(-1), x[:, None]
            exact = noise_features(_posterior_times(logits, x, e.clone()))
            for k in ks:
                p, ids = probs.topk(k)
                s = noise_features(_truncated_posterior_times(p, ids, probs.gather(1, i), frequency, x, e.clone()))
                others, f = (v.scatter(1, ids, 0).scatter(1, i, 0) for v in (probs, frequency.repeat(len(x), 1)))
                rest = others.sum(1, keepdim=True)
                d = (rest * f / f.sum(1, keepdim=True).clamp(min=1e-9) - others).clamp(min=0).sum(1)
                sums[k] += [rest.sum().item(), (d / (1 + d)).sum().item(), 0.5 * (s - exact).abs().sum().item(),
                            (s - exact).square().sum(1).div(exact.square().sum(1)).sqrt().sum().item()]
    n = tokens[:, 1:].numel()
    print_table([dict(k=k, bytes=4 * k + 2, owt=f"{9.04 * (4 * k + 2):.0f}", rest=f"{a / n:.4f}", tv=f"{b / n:.4f}",
                      moved=f"{c / n:.5f}", norm=f"{d / n:.5f}") for k, (a, b, c, d) in sums.items()],
                dict(k="k", bytes="bytes a token", owt="OpenWebText, GB", rest="mass left out",
                     tv="noise off by (total variation)", moved="mass of softmax(noise) moved",
                     norm="its change / norm"))
    print(f"\n{n} positions of {args.data}, teacher {args.teacher}; the last two with the same draws")


def main():
    parser = Parser(description="Time and memory, by part.", epilog="Caveats: see the file's first lines.")
    sub = parser.add_subparsers(dest="what", required=True, parser_class=Parser)
    commands = dict(sampling=sampling, noise=noise, step=step, scaling=scaling, cache=cache)
    p = {name: sub.add_parser(name) for name in commands}
    for name, q in p.items():
        if name != "cache":
            q.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
            q.add_argument("--repeats", type=number(int, 1), default=3, help="after one warm-up")
            q.add_argument("--size", choices=SIZES, default="tiny" if name == "scaling" else "small")
        if name in ("sampling", "noise", "step"):
            q.add_argument("--vocab_size", type=number(int, 16), default=50257)
        if name in ("sampling", "step", "cache"):
            q.add_argument("--length", type=number(int, 16 if name == "sampling" else 2, 1024),
                           default=dict(sampling=256, step=1024, cache=None)[name], help="tokens of a row")
        if name in ("noise", "cache"):
            q.add_argument("--rows", type=number(int, 1), default=2048, help="positions")
    p["sampling"].add_argument("--nfe", type=number(int, 1), default=16)
    p["sampling"].add_argument("--batch_size", type=number(int, 1), default=16)
    p["sampling"].add_argument("--top_p", type=number(float, above=0, high=1), default=0.9)
    p["step"].add_argument("--teacher", choices=GPT2_SIZES, default="gpt2", help="its shape; the weights are random")
    p["step"].add_argument("--micro_batch_size", type=lambda s: [number(int, 1)(x) for x in s.split(",")], default=[8],
                           help="rows per step, a comma list")
    p["step"].add_argument("--block_size", type=number(int, 1), default=4, help="of BD3-LM")
    p["step"].add_argument("--compile", action="store_true", help="torch.compile the student's transformer")
    p["cache"].add_argument("--teacher", required=True, help="as in train.py")
    p["cache"].add_argument("--data", required=True, help="folder of shards")
    args = parser.parse_args()
    if args.what == "step" and args.length % args.block_size:
        parser.error(f"--block_size={args.block_size} does not divide --length={args.length}: choose a divisor")
    if args.what == "sampling" and args.length % 16:
        parser.error(f"--length={args.length} must be a multiple of 16, BD3-LM's blocks")
    device, dtype, autocast = device_and_dtype(getattr(args, "dtype", "float32"))
    torch.manual_seed(0)
    commands[args.what](args, device, autocast)
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"\n{name}, {dtype}, torch {torch.__version__}, {getattr(args, 'size', 'no student')}")


if __name__ == "__main__":
    run_main(main)
