"""Load a checkpoint, draw samples, print them.

    python sample.py --ckpt=out/maze-mdlm-gumbel --n=3 --steps=1 --greedy
    python sample.py --ckpt=out/mine-mdlm --prompt="The state of" --steps=64
    python sample.py --ckpt=out/mine-mdlm --infill="The [MASK][MASK][MASK][MASK] of the Union"
    python sample.py --ckpt=out/mine-mdlm --sampler=apd --verifier=out/mine-ar
    python sample.py --ckpt=gpt2-large --shards=data/gpt2-written --n=100000 --length=1024 --batch_size=64
"""
import json
import os
import sys
import time
from functools import lru_cache
from itertools import groupby

import numpy as np
import torch
from tqdm import tqdm

import bd3lm
import mdlm
import teacher
from bd3lm import BD3LM
from data.cli import BadInput, Parser, check_output, number, run_main
from data.maze import draw_maze
from data.shards import Writer
from data.vocab import Tokenizer
from extra.published import read_weights
from mdlm import MDLM, ORDERS, SAMPLERS
from medusa import ACCEPT, Medusa
from teacher import AR, GPT2, GPT2_SIZES, HF, CausalLM, model_hash

MODELS = {"ar": AR, "mdlm": MDLM, "bd3lm": BD3LM, "medusa": Medusa}
PROMPTED = (CausalLM, Medusa)                              # continue a prompt; the others fill in [MASK]s
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
                       f"{(str(e) or type(e).__name__).splitlines()[0]}") from None
    missing = [k for k in CHECKPOINT_KEYS if not isinstance(ckpt, dict) or k not in ckpt]
    if missing:
        raise BadInput(f"{path} is not a checkpoint of this project: it lacks {', '.join(missing)}")
    return ckpt


def build(kind, config):
    """A model of a checkpoint's kind and config; BadInput if this version does not know them."""
    if kind not in MODELS:
        raise BadInput(f"unknown model {kind!r}: one of {', '.join(MODELS)}")
    try:
        return MODELS[kind](**config)
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as e:
        raise BadInput(f"cannot build model {kind!r}: {e}") from None


def load_model(path, weights=None, device="cpu"):
    """A model ready for inference, with its run's args and dataset meta. `path`: a checkpoint of train.py or its run
    directory; gpt2, gpt2-medium, gpt2-large, gpt2-xl; a folder as Hugging Face has it (GPT-2, or the authors' MDLM); a
    Lightning .ckpt of the authors' code; hf:NAME. `weights`: "ema", "raw", or None: EMA where the file has them.
    """
    ours = os.path.exists(os.path.join(path, "ckpt.pt"))
    if not ours and (path.startswith("hf:") or path in GPT2_SIZES or path.endswith((".ckpt", ".safetensors")) or any(
            os.path.exists(os.path.join(path, n)) for n in ("config.json", "model.safetensors", "pytorch_model.bin"))):
        model = load_foreign(path, weights)
    else:
        ckpt = load_checkpoint(path)
        model = build(ckpt["args"]["model"], ckpt["config"])
        try:
            model.load_state_dict(ckpt["model" if weights == "raw" else "ema"])
        except RuntimeError as e:
            raise BadInput(f"{path} does not hold the weights that its config describes: "
                           f"{str(e).splitlines()[-1].strip()}") from None
        model.args, model.meta, model.step = ckpt["args"], ckpt["meta"], ckpt["step"]
        if isinstance(model, Medusa):
            name = model.config["backbone"]
            try:
                backbone, sha256 = load_backbone(name, device)
            except BadInput as e:
                raise BadInput(f"{path} needs its backbone {name}: {e}") from None
            if sha256 != model.config["sha256"]:
                raise BadInput(f"{path} holds heads of another backbone than {name} is now (its weights' hash is "
                               f"{sha256}, the heads' {model.config['sha256']}): put that one back")
            model.attach(backbone)
    model.path = path
    model.name = os.path.basename(os.path.abspath(path if not path.endswith(".pt") else os.path.dirname(path)))
    return model.to(device).eval().requires_grad_(False)


@lru_cache(maxsize=1)                                      # heads that are compared share it
def load_backbone(path, device):
    backbone = load_model(path)
    sha256 = model_hash(backbone)
    return backbone.to(device), sha256


def load_foreign(path, weights):
    """A model that train.py did not write, described as if it had."""
    try:
        if path.startswith("hf:"):
            model = HF(path[3:])
        elif path in GPT2_SIZES:
            model = GPT2.from_pretrained(path)
        else:
            state, settings = read_weights(path, weights)
            if any(k.endswith("wte.weight") for k in state):
                model = GPT2.from_state(state, settings)
            else:
                ids = next((len(w) for k, w in state.items() if k.endswith("vocab_embed.embedding")), 2)
                kw = dict(n_heads=settings.get("n_heads"), bos=ids - 2, length=settings.get("model_length"))
                if not any(k.endswith("sigma_map.mlp.0.weight") for k in state):
                    model = teacher.load_published(state, **kw)
                elif settings.get("block_size", kw["length"]) != kw["length"]:
                    model = bd3lm.load_published(state, settings["block_size"], inject=settings.get("inject"), **kw)
                else:
                    model = mdlm.load_published(state, inject=settings.get("inject"), **kw)
    except (OSError, ValueError, RuntimeError, AttributeError, TypeError) as e:                   # damaged in some way
        why = (str(e) or type(e).__name__).splitlines()[-1].strip()
        raise BadInput(f"{path} cannot be loaded: {why}") from None
    V = model.config["vocab_size"]
    tokenizer = path if path.startswith("hf:") else "gpt2" if V == 50257 else "ids"
    model.meta = dict(name=os.path.basename(os.path.normpath(path)), tokenizer=tokenizer, vocab_size=V, bos=model.bos,
                      predict_bos=True, row_length=None)
    model.args, model.step = dict(model=next((k for k, c in MODELS.items() if type(model) is c), "ar")), None
    return model


def device_and_dtype(dtype):
    """The device, and the autocast context for `dtype`: "auto" is bfloat16 on CUDA and float32 on a CPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {"auto": "bfloat16" if device == "cuda" else "float32"}.get(dtype, dtype)
    return device, dtype, torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")


# ---------------------------------------------------------------------------------------------------------------------
# sampling

def generate(model, tokens, steps, tau, top_p, greedy, sampler="ancestral", order="random", resample_noise=False,
             length=None, generator=None, apd=None, **kw):
    """`model.generate` for any kind of model: AR models and Medusa continue the prompt and ignore what is about steps.

    steps: per block for BD3-LM; apd: from `load_verifier`; kw: from `own_flags`. -> (tokens, nfe [, verifier calls]).
    """
    kw |= dict(tau=tau, top_p=top_p, generator=generator)
    if isinstance(model, Medusa):
        return model.generate(tokens, length, **kw | ({"accept": "greedy"} if greedy else {}))
    if isinstance(model, CausalLM):
        return model.generate(tokens, length, greedy=greedy, **kw)
    kw |= dict(greedy=greedy, resample_noise=resample_noise)
    if sampler == "apd":
        from extra.verified import generate_apd
        return generate_apd(model, tokens, **apd, **kw)
    return model.generate(tokens, steps, sampler, order, **kw)


def own_flags(model, args):
    """The arguments of `model.generate` that not all models have, from the flags."""
    cached = not getattr(args, "no_cache", False)
    if isinstance(model, Medusa):
        return dict(accept=args.accept, epsilon=args.epsilon, delta=args.delta, cached=cached)
    if isinstance(model, BD3LM):
        return dict(stop_at_eos=getattr(args, "stop_at_eos", False), cached=cached)
    return {}


def sampling_flags(parser):
    """The flags that every sampling command shares."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--sampler", choices=[*SAMPLERS, "apd"], default="ancestral",
                       help="fixed: the same number of tokens a step; apd: left to right, checked by --verifier")
    group.add_argument("--order", choices=ORDERS, default="random", help="another than random needs --sampler=fixed")
    group.add_argument("--verifier", help="apd: AR checkpoint or gpt2[-medium|-large|-xl] of the same vocabulary")
    group.add_argument("--apd_ratio", type=number(float, 0, 1), default=0.5, help="apd: weight of student logits")
    group.add_argument("--max_lookahead", type=number(int, 1), default=10, help="apd: tokens drafted at once")
    group.add_argument("--tau", type=number(float, above=0), help="noise temperature (AR: the sampling temperature); "
                       "default 1, and 0.85 for a student with noise on text, as the authors released it")
    group.add_argument("--top_p", type=number(float, above=0, high=1), help="nucleus; default 0.9, 1 on the maze")
    loading_flags(group)


def accepts(text):
    if not set(values := text.split(",")) <= set(ACCEPT):
        raise BadInput(f"--accept={text}: a comma list of {', '.join(ACCEPT)}")
    return values


def medusa_flags(parser, several=False):
    group = parser.add_argument_group("Medusa")
    group.add_argument("--accept", **(dict(type=accepts, default=["typical", "exact"]) if several else
                                      dict(choices=ACCEPT[:2], default="typical")),
                       help="typical: drafts that are not unlikely; exact: that the backbone would draw; "
                       + ("greedy: its argmax; a comma list" if several else "greedy decoding takes its argmax"))
    group.add_argument("--epsilon", type=number(float, 0), default=0.09, help="typical: accept above this probability,")
    group.add_argument("--delta", type=number(float, 0), default=0.3, help="or above delta exp(-entropy)")


def loading_flags(group):
    group.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0, help="same seed and flags: same result")
    group.add_argument("--weights", choices=["ema", "raw"], help="default: EMA, where a file has both")
    group.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="auto: bf16 on CUDA")


def resolve_sampling(args, model):
    """tau and top_p of `args`, or the defaults for this model's data."""
    text = model.meta["tokenizer"] != "maze"
    noisy = isinstance(model, MDLM) and model.noise_embed is not None
    tau = args.tau if args.tau is not None else 0.85 if text and noisy else 1.0
    top_p = args.top_p if args.top_p is not None else 0.9 if text else 1.0
    if args.order != "random" and args.sampler != "fixed":
        raise BadInput(f"--order={args.order} needs --sampler=fixed: others reveal at random or, apd, left to right")
    return tau, top_p


def load_verifier(args, models, device):
    """What `generate` wants as `apd`, or None; BadInput where the verifier does not fit the models."""
    if args.sampler != "apd":
        if args.verifier:
            raise BadInput("--verifier is read with --sampler=apd only: add it, or leave --verifier out")
        return None
    for m in models:
        if isinstance(m, (BD3LM, Medusa)):
            raise BadInput(f"--sampler=apd needs an MDLM to draft: {m.name} is a {m.args['model']} checkpoint")
    if not args.verifier:
        raise BadInput("--sampler=apd needs --verifier: an AR checkpoint of the same vocabulary, or gpt2")
    length = getattr(args, "length", None) or min(m.length for m in models)
    return dict(verifier=load_ar("--verifier", args.verifier, models[0].meta, length, device),
                ratio=args.apd_ratio, max_lookahead=args.max_lookahead)


def check_vocabulary(what, model, meta):
    """BadInput unless the model's ids mean what those of data with this meta mean."""
    for key in ("vocab_size", "bos"):
        if model.config[key] != meta[key]:
            raise BadInput(f"{what} has {key} {model.config[key]}, the data {meta[key]}: they must be the same")
    if model.meta["tokenizer"] != meta["tokenizer"] and meta["tokenizer"].startswith("chars:"):
        raise BadInput(f"{what} knows other characters than the data: train it on this dataset")


def default_teacher(meta, length):
    """The teacher of data with this meta where none is named: the maze's own, GPT-2-large for its ids, or None."""
    if meta["tokenizer"] == "maze":
        return os.path.join("out", f"{meta['name']}-ar" + f"-{length}" * ((length or 0) > meta["row_length"] + 1))
    return "gpt2-large" if meta["tokenizer"] == "gpt2" else None


def load_ar(flag, path, meta, length, device="cpu"):
    """The AR model that a flag names, checked to fit data with this meta, in rows of `length` tokens."""
    model = load_model(path, device=device)
    if not isinstance(model, CausalLM):
        raise BadInput(f"{flag}={path} is a {model.args['model']} checkpoint: it must be one of --model=ar")
    check_vocabulary(f"{flag}={path}", model, meta)
    if length is not None and length > model.length:
        raise BadInput(f"{flag}={path} has rows of {model.length} tokens: use --length={model.length} or less")
    return model


def start_tokens(model, tokenizer, prompt, infill, length):
    """One row to start from: [BOS] + prompt (+ [MASK]s), or the infill text with its [MASK]s. -> LongTensor [1, *]."""
    flag, parts = ("--prompt", [prompt]) if infill is None else ("--infill", infill.split("[MASK]"))
    prompted, mask = isinstance(model, PROMPTED), model.config["vocab_size"]
    if prompted and infill is not None:
        raise BadInput("--infill needs a masked model: AR models and Medusa only continue a --prompt")
    try:
        ids, *rest = [part.tolist() for part in tokenizer.encode(parts)]
        for part in rest:
            ids += [mask] + part
        if max(ids, default=0) > mask:
            raise ValueError
    except (ValueError, OverflowError):                    # of numbers, for a checkpoint that names no tokenizer
        raise BadInput(f"prompts of this model are made of ids below {mask}") from None
    if len(ids) + 1 > length:
        raise BadInput(f"{flag} has {len(ids)} tokens, but a sample of this model has at most {length - 1}: shorten it")
    given = max(len(list(run)) for masked, run in groupby([model.bos] + ids, lambda i: i == mask) if not masked)
    if given > model.length:                               # BD3-LM, whose samples may be longer
        raise BadInput(f"{flag} has {given - 1} tokens in a row, but the model's window has {model.length}: shorten it")
    if not prompted and (infill is None or tokenizer.name == "maze"):
        ids += [mask] * (length - 1 - len(ids))
    return torch.tensor([[model.bos] + ids])


def torch_seed(*key):
    """A seed for torch from whole numbers that say what a draw is for."""
    return int(np.random.SeedSequence([int(k) for k in key]).generate_state(1, np.uint64)[0] >> 1)


def entropy(ids):
    """Unigram entropy of token ids in nats: repetition shows as a low value."""
    count = np.unique(ids, return_counts=True)[1]
    p = count / count.sum()
    return float(-(p * np.log(p)).sum())


def write_shards(model, args, length, device, autocast):
    """Sequential extraction: n rows of the AR model's own text, drawn at tau 1 and top_p 1, as a dataset for training.

    The noise is not stored: given these rows, parallel extraction redraws it with exactly the law it had (Section 4.1).
    Each batch has its own seed, so that an interrupted run continues with what it would have written.
    """
    if not isinstance(model, CausalLM):
        raise BadInput(f"--shards is the teacher's text: {args.ckpt} must be an AR model")
    for flag in ("tau", "top_p"):
        if getattr(args, flag) not in (None, 1.0):
            raise BadInput(f"--shards draws at --{flag}=1: only so is the noise that is extracted later the true one")
    if args.prompt or args.greedy or args.out or args.infill is not None:
        raise BadInput("--shards goes with none of --prompt, --infill, --greedy, --out")
    if args.n < 2:
        raise BadInput("--n must be at least 2 with --shards: a row for each of train and val")
    held = max(1, round(0.02 * args.n))
    key = {k: getattr(args, k) for k in ("ckpt", "n", "batch_size", "length", "seed", "weights", "dtype")}
    meta = dict(name=os.path.basename(os.path.normpath(args.shards)), row_length=length - 1,
                **{k: model.meta[k] for k in ("tokenizer", "vocab_size", "bos", "predict_bos")})
    writer = Writer(args.shards, meta, key | {"step": model.step})
    bar, began, first = tqdm(total=args.n, initial=writer.done, unit="row", desc=args.shards), time.time(), writer.done
    for done in range(first, args.n, args.batch_size):
        b = min(args.batch_size, args.n - done)
        generator = torch.Generator(device).manual_seed(torch_seed(args.seed, done))
        with autocast:
            tokens, _ = model.generate(torch.full((b, 1), model.bos, device=device), length, generator=generator)
        val, train = np.split(tokens[:, 1:].cpu().numpy(), [max(0, held - done)])
        writer.write("val", val.ravel())
        writer.write("train", train.ravel())
        writer.commit(done + b)
        bar.update(b)
        bar.set_postfix(tokens_per_s=f"{(writer.done - first) * (length - 1) / (time.time() - began):,.0f}")
    bar.close()
    writer.finish()
    print(f"{args.shards}: {args.n} rows of {length - 1} tokens by {model.name}, {held} of them for validation",
          file=sys.stderr)


def main():
    parser = Parser(description="Draw samples from a checkpoint.")
    parser.add_argument("--ckpt", required=True,
                        help="checkpoint, run directory, gpt2[-medium|-large|-xl], hf:NAME, published .ckpt or folder")
    parser.add_argument("--n", type=number(int, 1), default=4, help="number of samples")
    parser.add_argument("--batch_size", type=number(int, 1), default=16, help="samples drawn at once")
    parser.add_argument("--steps", type=number(int, 1), help="per sample (BD3-LM: per block); default: one per token")
    parser.add_argument("--prompt", default="", help="text that every sample begins with")
    parser.add_argument("--infill", help="text with [MASK] where a token is to be filled in")
    parser.add_argument("--length", type=number(int, 2), help="tokens of a sample, with BOS; any number with BD3-LM")
    parser.add_argument("--greedy", action="store_true", help="argmax instead of a draw: the natural choice with noise")
    parser.add_argument("--resample_noise", action="store_true", help="draw the noise anew at each step")
    parser.add_argument("--stop_at_eos", action="store_true", help="BD3-LM: a sample ends with its first EOS")
    parser.add_argument("--no_cache", action="store_true", help="BD3-LM, Medusa: no KV cache, to compare")
    parser.add_argument("--out", help="also write the samples to this .jsonl file")
    parser.add_argument("--shards", help="write n rows of an AR model's text to this folder, as a dataset to train on")
    sampling_flags(parser)
    medusa_flags(parser)
    args = parser.parse_args()

    if args.prompt and args.infill is not None:
        raise BadInput("--prompt and --infill exclude each other: begin the --infill text with the prompt")
    if args.out:
        check_output("--out", args.out, fresh=True)
    exact = args.shards and args.dtype == "auto"           # a teacher's text: bf16 only if it is asked for
    device, _, autocast = device_and_dtype("float32" if exact else args.dtype)
    model = load_model(args.ckpt, args.weights, device)
    own, blocks = own_flags(model, args), isinstance(model, BD3LM)
    if args.stop_at_eos and not blocks or args.no_cache and not own:
        raise BadInput("--stop_at_eos is for BD3-LM, --no_cache for it and Medusa: leave them out for this model")
    if args.length and args.length > model.length and not blocks:
        raise BadInput(f"--length={args.length} is more than the {model.length} tokens that this model was trained on")
    length = args.length or min(model.length, 1024)
    if args.shards:
        return write_shards(model, args, length, device, autocast)
    tau, top_p = resolve_sampling(args, model)
    if args.sampler == "apd" and isinstance(model, CausalLM):
        raise BadInput("--sampler=apd needs a masked model to draft: --ckpt is an AR model")
    apd = load_verifier(args, [model], device)
    tokenizer = Tokenizer(model.meta["tokenizer"], model.config["vocab_size"])
    start = start_tokens(model, tokenizer, args.prompt, args.infill, length).to(device)
    generator = torch.Generator(device).manual_seed(args.seed)
    steps, maze, began = args.steps or getattr(model, "block_size", length), tokenizer.name == "maze", time.time()
    out = open(args.out, "w", buffering=1) if args.out else None          # by line: an interrupted run loses none
    bar = tqdm(total=args.n, unit="sample", disable=args.n <= args.batch_size)
    for done in range(0, args.n, args.batch_size):
        with autocast:
            tokens, *counts = generate(
                model, start.expand(min(args.batch_size, args.n - done), -1), steps, tau, top_p, args.greedy,
                args.sampler, args.order, args.resample_noise, length, generator, apd, **own)
        for i, row in enumerate(tokens[:, 1:].tolist()):
            while args.stop_at_eos and row[-2:] == [model.bos] * 2:                    # one EOS is enough to print
                row.pop()
            text = tokenizer.decode(row)
            facts = {name: int(calls[i]) for name, calls in zip(("nfe", "verifier_calls"), counts)}
            if not maze:
                facts["entropy"] = round(entropy(row), 3)
            print(f"--- sample {done + i},", ", ".join(f"{k} {v}" for k, v in facts.items()))
            print(draw_maze(row) if maze else text)
            if out:
                out.write(json.dumps(dict(text=text, tokens=row) | facts) + "\n")
        bar.update(len(tokens))
    bar.close()
    print(f"{args.n} samples from {model.name} (step {model.step or 'unknown'}) in {time.time() - began:.1f} s: "
          f"tau {tau}, top_p {top_p}, {'greedy' if args.greedy else 'sampled'}", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
