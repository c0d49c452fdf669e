"""Where a training step's time and memory go: random weights and random tokens, so nothing needs to be downloaded.

    export MALLOC_MMAP_THRESHOLD_=1000000
    python -m extra.bench --size=tiny --teacher=gpt2 --length=128 --micro_batch_size=2,4,8     # minutes on a CPU
    python -m extra.bench --teacher=gpt2-large --micro_batch_size=8,16,32 --compile            # the default job's shape

Caveats first: the warm-up is left out, the median of --repeats is reported; on a shared machine compare ratios within
one run. Memory is the peak above what is held between steps (weights, optimizer); on a CPU it is the process's, and
only the variable above makes the C library return what is freed. A step is forward, backward and AdamW.
"""
import re
import time

import numpy as np
import torch

from bd3lm import BD3LM
from data.prepare import Parser, number
from evaluate import print_table
from mdlm import MDLM, stratified_t
from sample import device_and_dtype
from teacher import GPT2, GPT2_SIZES, body_to_bfloat16
from train import SIZES


def timed(f, repeats, device):
    """Median seconds of f(), and its peak memory in MB above what is held (device memory, or the process's)."""
    def process(what):
        with open("/proc/self/status") as file:
            return int(re.search(what + r":\s+(\d+)", file.read())[1]) / 1e3
    f()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated() / 1e6
    else:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")                                # resets VmHWM
        held = process("VmRSS")
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        f()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    if device == "cuda":
        return float(np.median(seconds)), torch.cuda.max_memory_allocated() / 1e6 - held
    return float(np.median(seconds)), process("VmHWM") - held


def main():
    parser = Parser(description="Time and memory of a training step, by part.")
    parser.add_argument("--size", choices=SIZES, default="small", help="the student")
    parser.add_argument("--teacher", choices=GPT2_SIZES, default="gpt2-large", help="its shape; the weights are random")
    parser.add_argument("--vocab_size", type=number(int, 2), default=50257, help="of both")
    parser.add_argument("--length", type=number(int, 2, 1024), default=1024, help="tokens of a row")
    parser.add_argument("--micro_batch_size", type=lambda s: [number(int, 1)(x) for x in s.split(",")], default=[8, 16],
                        help="rows per step, a comma list")
    parser.add_argument("--block_size", type=number(int, 1), default=4, help="of BD3-LM")
    parser.add_argument("--repeats", type=number(int, 1), default=5, help="after one warm-up")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--compile", action="store_true", help="torch.compile the student's transformer")
    args = parser.parse_args()
    if args.length % args.block_size:
        parser.error(f"--block_size={args.block_size} does not divide --length={args.length}: choose a divisor")
    device, dtype, autocast = device_and_dtype(args.dtype)
    V, (n_layer, n_embd, n_head) = args.vocab_size, SIZES[args.size]
    torch.manual_seed(0)
    layers, width, heads = GPT2_SIZES[args.teacher]
    teacher = GPT2(V, 1024, V - 1, layers, width, heads, 0.0, learned=1024).to(device).eval().requires_grad_(False)
    if dtype == "bfloat16":
        body_to_bfloat16(teacher)
    plain = MDLM(V, args.length, V - 1, n_layer, n_embd, n_head).to(device)
    noisy = MDLM(V, args.length, V - 1, n_layer, n_embd, n_head, noise="gumbel").to(device)
    blocks = BD3LM(V, args.length, V - 1, args.block_size, n_layer=n_layer, n_embd=n_embd, n_head=n_head).to(device)
    optimizers = {m: torch.optim.AdamW(m.parameters(), lr=1e-4, fused=True) for m in (plain, noisy, blocks)}
    if args.compile:
        for model in optimizers:
            model.transformer.compile()
    rows = []
    for B in args.micro_batch_size:
        tokens = torch.randint(V - 1, (B, args.length), device=device)
        tokens[:, 0] = V - 1
        t = stratified_t(B, np.random.default_rng(0)).to(device)
        masked = torch.rand(tokens.shape, device=device) < t[:, None]
        masked[:, 0] = False
        generator = torch.Generator(device).manual_seed(0)

        def extract():
            with torch.no_grad(), autocast:
                noisy.noise_embed.from_posterior(teacher.posterior_logits(tokens, masked), tokens[masked], generator)

        def step(model, **kw):
            with autocast:
                loss, _ = model.loss(tokens, t[:, None].expand(B, model.n_blocks), generator=generator, **kw)
            loss.backward()
            optimizers[model].step()
            optimizers[model].zero_grad(set_to_none=True)

        def body():
            with torch.no_grad(), autocast:
                teacher.hidden(tokens[:, :-1])
        base = None
        for part, f in (("teacher forward (body)", body), ("extraction: body, head, posterior, projection", extract),
                        ("step of MDLM", lambda: step(plain)),
                        ("step of MDLM + token KD", lambda: step(plain, teacher=teacher, kd=1.0)),
                        ("step of MDLM + Gumbel", lambda: step(noisy, teacher=teacher)),
                        (f"step of BD3-LM, blocks of {args.block_size}", lambda: step(blocks))):
            seconds, memory = timed(f, args.repeats, device)
            base = base or seconds
            rows.append(dict(part=part, batch=B, masked=int(masked.sum()), seconds=f"{seconds:.3g}",
                             ratio=f"{seconds / base:.2f}", tokens=round(B * args.length / seconds),
                             memory=round(memory)))
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print_table(rows, dict(part="part", batch="micro-batch", masked="masked", seconds="seconds",
                           ratio="/ teacher forward", tokens="tokens/s", memory="peak MB above"))
    print(f"\n{name}, {dtype}, torch {torch.__version__}; student {args.size}, teacher {args.teacher}, V {V}, "
          f"rows of {args.length}; one [B, L, V] float32 tensor at the largest micro-batch would take "
          f"{4e-6 * max(args.micro_batch_size) * args.length * V:,.0f} MB.")


if __name__ == "__main__":
    main()
