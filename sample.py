"""Load a checkpoint, draw samples, print them.

    python sample.py --ckpt=out/maze-mdlm-gumbel --n=3 --steps=1 --greedy
    python sample.py --ckpt=out/mine-mdlm --prompt="The state of" --steps=64
    python sample.py --ckpt=out/mine-mdlm --infill="The [MASK][MASK][MASK][MASK] of the Union"
"""
import json
import os
import sys
import time

import torch
from tqdm import tqdm

from data.prepare import BadInput, Parser, Tokenizer, check_output, draw_maze, number, run_main
from mdlm import MDLM, ORDERS, SAMPLERS
from teacher import AR

MODELS = {"ar": AR, "mdlm": MDLM}
CHECKPOINT_KEYS = ("model", "ema", "optimizer", "step", "tokens_seen", "rng", "args", "config", "meta", "git")


# ---------------------------------------------------------------------------------------------------------------------
# loading

def load_checkpoint(path):
    """A checkpoint of train.py (the file, or its run directory) -> its dict; BadInput if it is none."""
    if os.path.isdir(path):
        path = os.path.join(path, "ckpt.pt")
    if not os.path.isfile(path):
        raise BadInput(f"there is no checkpoint {path}: train one with train.py, or correct the path")
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:                                 # foreign files fail in a dozen ways, IndexError among them
        raise BadInput(f"{path} is not a readable checkpoint (truncated, or not a torch file): "
                       f"{str(e).splitlines()[0] if str(e) else type(e).__name__}") from None
    if not isinstance(ckpt, dict) or any(key not in ckpt for key in CHECKPOINT_KEYS):
        raise BadInput(f"{path} is not a checkpoint of this project: it lacks "
                       + ", ".join(k for k in CHECKPOINT_KEYS if not isinstance(ckpt, dict) or k not in ckpt))
    return ckpt


def build(kind, config):
    """A model of a checkpoint's kind and config; BadInput if this version does not know them."""
    if kind not in MODELS:
        raise BadInput(f"unknown model {kind!r}: one of {', '.join(MODELS)}")
    try:
        return MODELS[kind](**config)
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as e:
        raise BadInput(f"cannot build model {kind!r}: {e}") from None


def load_model(path, weights="ema", device="cpu"):
    """A trained model, ready for inference: `weights` "ema" or "raw". It carries its run's args and dataset meta."""
    ckpt = load_checkpoint(path)
    model = build(ckpt["args"]["model"], ckpt["config"])
    try:
        model.load_state_dict(ckpt["ema" if weights == "ema" else "model"])
    except RuntimeError as e:
        raise BadInput(f"{path} does not hold the weights that its config describes: "
                       f"{str(e).splitlines()[-1].strip()}") from None
    model.args, model.meta, model.step = ckpt["args"], ckpt["meta"], ckpt["step"]
    model.name = os.path.basename(os.path.abspath(path if os.path.isdir(path) else os.path.dirname(path)))
    return model.to(device).eval().requires_grad_(False)


def device_and_dtype(dtype):
    """The device, and the autocast context for `dtype`: "auto" is bfloat16 on CUDA and float32 on a CPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {"auto": "bfloat16" if device == "cuda" else "float32"}.get(dtype, dtype)
    return device, dtype, torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")


# ---------------------------------------------------------------------------------------------------------------------
# sampling

def generate(model, tokens, steps, tau, top_p, greedy, sampler="ancestral", order="random", resample_noise=False,
             length=None, generator=None):
    """`model.generate` for any kind of model: an AR model continues the prompt and ignores what is about steps."""
    if isinstance(model, AR):
        return model.generate(tokens, length, tau=tau, top_p=top_p, greedy=greedy, generator=generator)
    return model.generate(tokens, steps, sampler, order, tau=tau, top_p=top_p, greedy=greedy,
                          resample_noise=resample_noise, generator=generator)


def sampling_flags(parser):
    """The flags that every sampling command shares."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--sampler", choices=SAMPLERS, default="ancestral",
                       help="fixed: the same number of tokens a step")
    group.add_argument("--order", choices=ORDERS, default="random", help="another than random needs --sampler=fixed")
    group.add_argument("--tau", type=number(float, above=0), help="noise temperature (AR: the sampling temperature); "
                       "default 1, and 0.85 for a student with noise on text, as the authors released it")
    group.add_argument("--top_p", type=number(float, above=0, high=1),
                       help="nucleus; default 0.9 on text, 1 on the maze")
    group.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0, help="same seed and flags: same samples")
    group.add_argument("--weights", choices=["ema", "raw"], default="ema", help="which weights of the checkpoint")
    group.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto",
                       help="auto: bfloat16 on CUDA")


def resolve_sampling(args, model):
    """tau and top_p of `args`, or the defaults for this model's data."""
    text = model.meta["tokenizer"] != "maze"
    noisy = getattr(model, "noise_embed", None) is not None
    tau = args.tau if args.tau is not None else 0.85 if text and noisy else 1.0
    top_p = args.top_p if args.top_p is not None else 0.9 if text else 1.0
    if args.order != "random" and args.sampler != "fixed":
        raise BadInput(f"--order={args.order} needs --sampler=fixed: the other samplers reveal at random")
    return tau, top_p


def start_tokens(model, tokenizer, prompt, infill, length):
    """One row to start from: [BOS] + prompt (+ [MASK]s), or the infill text with its [MASK]s. -> LongTensor [1, *]."""
    encode = ((lambda s: ["UDLR.".index(c) for c in s]) if tokenizer.name == "maze"
              else (lambda s: tokenizer.encode([s])[0].tolist()))
    ar = isinstance(model, AR)
    try:
        if infill is not None:
            if ar:
                raise BadInput("--infill needs a masked model: an AR model only continues a --prompt")
            ids = []
            for i, part in enumerate(infill.split("[MASK]")):
                ids += [model.mask_id] * (i > 0) + encode(part)
        else:
            ids = encode(prompt)
    except ValueError:
        raise BadInput("the maze's prompts are made of U D L R and . (PAD)") from None
    if len(ids) + 1 > length:
        raise BadInput(f"--{'infill' if infill is not None else 'prompt'} has {len(ids)} tokens, but "
                       f"a sample of this model has at most {length - 1}: shorten it")
    if not ar:
        ids += [model.mask_id] * (length - 1 - len(ids)) if infill is None or tokenizer.name == "maze" else []
    return torch.tensor([[model.bos] + ids])


def main():
    parser = Parser(description="Draw samples from a checkpoint.")
    parser.add_argument("--ckpt", required=True, help="checkpoint, or its run directory")
    parser.add_argument("--n", type=number(int, 1), default=4, help="number of samples")
    parser.add_argument("--batch_size", type=number(int, 1), default=16, help="samples drawn at once")
    parser.add_argument("--steps", type=number(int, 1), help="steps of a masked model; default: the length of a row")
    parser.add_argument("--prompt", default="", help="text that every sample begins with")
    parser.add_argument("--infill", help="text with [MASK] where a token is to be filled in")
    parser.add_argument("--length", type=number(int, 2), help="tokens of a sample, BOS included; at most the model's")
    parser.add_argument("--greedy", action="store_true", help="argmax instead of a draw: the natural choice with noise")
    parser.add_argument("--resample_noise", action="store_true", help="draw the noise anew at each step")
    parser.add_argument("--out", help="also write the samples to this .jsonl file")
    sampling_flags(parser)
    args = parser.parse_args()

    if args.prompt and args.infill is not None:
        raise BadInput("--prompt and --infill exclude each other: begin the --infill text with the prompt")
    if args.out:
        check_output("--out", args.out, fresh=True)
    device, _, autocast = device_and_dtype(args.dtype)
    model = load_model(args.ckpt, args.weights, device)
    if args.length and args.length > model.length:
        raise BadInput(f"--length={args.length} is more than the {model.length} tokens that this model was trained on")
    length = args.length or model.length
    tau, top_p = resolve_sampling(args, model)
    tokenizer = Tokenizer(model.meta["tokenizer"])
    start = start_tokens(model, tokenizer, args.prompt, args.infill, length).to(device)
    generator = torch.Generator(device).manual_seed(args.seed)
    began, done = time.time(), 0
    out = open(args.out, "w") if args.out else None
    with tqdm(total=args.n, unit="sample", disable=args.n <= args.batch_size) as bar:
        while done < args.n:
            b = min(args.batch_size, args.n - done)
            with autocast:
                tokens, nfe = generate(model, start.expand(b, -1), args.steps or length, tau, top_p, args.greedy,
                                       args.sampler, args.order, args.resample_noise, length, generator)
            for row, calls in zip(tokens[:, 1:].tolist(), nfe.tolist()):
                text = tokenizer.decode(row)
                print(f"--- sample {done}, nfe {calls}\n{draw_maze(row) if tokenizer.name == 'maze' else text}")
                if out:
                    out.write(json.dumps(dict(text=text, tokens=row, nfe=calls)) + "\n")
                done += 1
            bar.update(b)
    print(f"{args.n} samples from {model.name} (step {model.step}) in {time.time() - began:.1f} s: "
          f"tau {tau}, top_p {top_p}, {'greedy' if args.greedy else 'sampled'}", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
