"""Load a checkpoint, draw samples, print them.

    python sample.py --ckpt=out/maze-mdlm-gumbel --n=3 --steps=1 --greedy
    python sample.py --ckpt=out/mine-mdlm --prompt="The state of" --steps=64
    python sample.py --ckpt=out/mine-mdlm --infill="The [MASK][MASK][MASK][MASK] of the Union"
    python sample.py --ckpt=out/mine-mdlm --sampler=remdm --remask=0.05 --steps=128
    python sample.py --ckpt=out/mine-mdlm --sampler=apd --verifier=out/mine-ar
    python sample.py --ckpt=out/mine-mdlm-gumbel --sampler=exact --verifier=out/mine-ar    # what mine-ar would write
    python sample.py --ckpt=gpt2-large --shards=data/gpt2-written --n=100000 --length=1024 --batch_size=64

In this order: the table of models; loading; whether a model fits its data; sampling; its flags; the command.
A model of your own becomes an entry of MODELS: every command asks it through its members (see mdlm.MDLM).
"""
import dataclasses
import itertools
import math
import os
import sys
import time
from contextlib import suppress
from functools import lru_cache

import numpy as np
import torch
from tqdm import tqdm

import bd3lm
import mdlm
import teacher
from bd3lm import BD3LM
from data.cli import BadInput, Parser, number, refuse_unread, run_main, say_once
from data.files import check_fields, check_output, share, whole
from data.maze import draw_maze
from data.presets import EMBEDDED
from data.run import allow_changing_shapes, body_to_bfloat16, device_and_dtype, is_finite, load_checkpoint, memory_bytes
from data.samples import write_sample
from data.sampling import (COUNTS, SAMPLING_FLAGS, VERIFIED, check_sampling_flags, check_sampling_read,
                           resolve_sampling, sampling_shown)
from data.shards import MOST_IDS, knows_success
from data.vocab import Tokenizer, add_fingerprint, same_tokenizer
from mdlm import MDLM, ORDERS, SAMPLERS
from medusa import ACCEPT, Medusa
from teacher import AR, GPT2, GPT2_SIZES, model_hash

# files that are called so in every folder
WEIGHT_FILES = (".pt", "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json",
                "pytorch_model.bin.index.json")
MODELS = {"ar": AR, "mdlm": MDLM, "bd3lm": BD3LM, "medusa": Medusa}  # what --model names


# ---------------------------------------------------------------------------------------------------------------------
# loading

def load_model(path, weights=None, device="cpu"):
    """A model ready for inference, with its run's `args` and `step`, its dataset's `meta`, its `path` and `name`.

    path: as in `source_of`. weights: "ema", "raw", or None: EMA where the file has them. Raises BadInput.
    """
    source = source_of(path)
    if source == "checkpoint":
        model = load_own(path, weights, device)
    else:
        model = load_foreign(path, source, weights)
    run = path
    if path.endswith(WEIGHT_FILES):             # a run bears the name of its folder
        run = os.path.dirname(path)
    model.path = path
    model.name = os.path.basename(os.path.abspath(run))
    for name, w in model.state_dict().items():
        if not is_finite(w):
            raise BadInput(f"{path} holds numbers that are not finite (nan or inf), in {name}: train it again, or take "
                           "another")
    return model.to(device).eval().requires_grad_(False)


def source_of(path):
    """Where a model comes from:

    "checkpoint"  train.py's, the file or its run directory
    "hf"          hf:NAME
    "gpt2"        a published name, as gpt2-large
    "published"   a Lightning .ckpt of the authors' code, a .safetensors or .bin file, or a folder
                  as Hugging Face has it: GPT-2, or the authors' networks
    """
    if os.path.exists(os.path.join(path, "ckpt.pt")):
        return "checkpoint"
    if path.startswith("hf:"):
        return "hf"
    if path in GPT2_SIZES and not os.path.isdir(path):
        return "gpt2"
    if path.endswith((".ckpt", ".safetensors", ".bin")):
        return "published"
    for name in ("config.json", *WEIGHT_FILES):
        if os.path.exists(os.path.join(path, name)):
            return "published"
    # ours, or nothing at all: `load_checkpoint` says which
    return "checkpoint"


# ranges of a config's fields; the others need to be of the type that its model's Config names
RANGES = dict(vocab_size=whole(1, MOST_IDS), length=whole(2, 1 << 20), n_layer=whole(1, 1000),
              n_embd=whole(1, 1 << 16), n_head=whole(1, 1 << 16), heads=whole(1, 1000), block_size=whole(1, 1 << 20),
              positions=whole(0, 1 << 20), dropout=share)


def build(kind, config):
    """A model of a checkpoint's kind and config; BadInput if this version does not know them, or memory has no room."""
    if kind not in MODELS:
        raise BadInput(f"unknown model {kind!r}: one of {', '.join(MODELS)}")
    cannot = f"cannot build model {kind!r}"
    of_model = dataclasses.fields(MODELS[kind].Config)
    checks = {field.name: RANGES.get(field.name, field.type) for field in of_model if field.name in config}
    if "bos" in checks:
        checks["bos"] = lambda bos: whole(0, config["vocab_size"] - 1)(bos)
    check_fields(f"the config of model {kind!r}", config, checks, "it cannot be built")
    D = config.get("n_embd", 0)
    weights = 12 * config.get("n_layer", 0) * D**2 + config.get("vocab_size", 0) * D       # its blocks and embedding
    if 4 * weights > memory_bytes():
        raise BadInput(f"{cannot}: {weights / 1e9:.0f} G weights do not fit into {memory_bytes() / 1e9:.0f} GB of "
                       "memory: choose a smaller --n_layer or --n_embd")
    try:
        return MODELS[kind](**config)
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as e:
        raise BadInput(f"{cannot}: {e}") from None


def load_own(path, weights, device):
    """A model that train.py wrote; heads come with their backbone, on this device."""
    ckpt = load_checkpoint(path)
    try:
        model = build(ckpt["args"]["model"], ckpt["config"])
        model.load_state_dict(ckpt["model" if weights == "raw" else "ema"])    # EMA: what validation measured
    except (BadInput, RuntimeError) as e:
        why = str(e).splitlines()[-1].strip()
        raise BadInput(f"{path} does not hold the weights that its config describes: "
                       f"{why}") from None
    model.args = ckpt["args"]
    model.meta = ckpt["meta"]
    model.step = ckpt["step"]
    model.conditions = ckpt.get("conditions")
    if model.drafts:                            # heads are saved without the model that they sit on
        attach_backbone(model, path, device)
    return model


def attach_backbone(model, path, device):
    """Give heads the backbone that they were trained on: it is found by its name, and known by its weights' hash."""
    name = model.config.backbone
    try:
        backbone, sha256 = load_backbone(str(name), device)
    except BadInput as e:
        raise BadInput(f"{path} needs its backbone {name}: {e}") from None
    if sha256 != model.config.sha256:
        raise BadInput(f"{path} holds heads of another backbone than {name} is now (its weights' "
                       f"hash is {sha256}, the heads' {model.config.sha256}): put that one back")
    model.attach(backbone)


@lru_cache(maxsize=1)                           # heads that are compared share it
def load_backbone(path, device):
    backbone = load_model(path)
    sha256 = model_hash(backbone)
    return backbone.to(device), sha256


def load_foreign(path, source, weights):
    """A model that train.py did not write, described as if it had."""
    kind = "ar"
    own = {}                                    # what its own tokenizer says
    try:
        if source == "hf":
            from extra.hf import HF
            tokenizer = path
            with suppress(BadInput):            # a model may come without one
                codec = Tokenizer(path)
                own = dict(bos=codec.bos, fingerprint=codec.fingerprint())
            model = HF(path.removeprefix("hf:"), own.get("bos"))
        elif source == "gpt2":
            model = GPT2.from_pretrained(path)
            tokenizer = "gpt2"
        else:
            kind, model, tokenizer = load_published(path, weights)
    except (OSError, ValueError, RuntimeError, LookupError, AttributeError, TypeError) as e:
        # damaged in one way or another
        why = (str(e) or type(e).__name__).splitlines()[-1].strip()
        raise BadInput(f"{path} cannot be loaded: {why}") from None
    name = os.path.basename(os.path.normpath(path))
    model.meta = dict(name=name, tokenizer=tokenizer, vocab_size=model.vocab_size, bos=model.bos,
                      predict_bos=True, row_length=None) | own
    model.args = dict(model=kind)
    model.step = None
    return model


def load_published(path, weights):
    """Other people's weights -> (the model's name in MODELS, the model, its tokenizer's name). Raises OSError,
    ValueError.
    """
    from extra.published import describe, read_weights, tokenizer_of
    state, settings = read_weights(path, weights)
    if "wte.weight" in state:
        kind = "ar"
        model = GPT2.from_state(state, settings)
        n_embd = model.config.n_embd
        if "n_head" not in settings and n_embd not in [size[1] for size in GPT2_SIZES.values()]:
            raise ValueError("nothing says what its n_head is: write what is true of it to config.json "
                             f'beside it, as in {{"n_head": {math.gcd(n_embd // 2, 12)}}}')
    else:
        kind, known = describe(state, settings)
        loader = {"ar": teacher, "mdlm": mdlm, "bd3lm": bd3lm}[kind]
        model = loader.load_published(state, **known)
    return kind, model, tokenizer_of(path, settings, model)


# ---------------------------------------------------------------------------------------------------------------------
# a model and its data

def check_vocabulary(what, model, meta):
    """BadInput unless the model's ids mean what those of data with this meta mean; a warning where nothing can tell. A
    model that may begin its rows with any id (Hugging Face's) begins them as the data do from now on.
    """
    # what would crash, or mean something else, whatever the tokenizers are called
    for key, value in (("vocab_size", model.vocab_size), ("bos", model.bos)):
        if value != meta[key] and not (key == "bos" and model.can_teach and model.any_bos):
            raise BadInput(f"{what} has {key} {value}, the data {meta[key]}: they must be the same")
    theirs = model.meta["tokenizer"]
    ours = meta["tokenizer"]
    # characters are given by the data that they come from: the remedy is another one
    if theirs != ours and ours.startswith("chars:"):
        raise BadInput(f"{what} knows other characters than the data: train it on this dataset")
    same = same_tokenizer(model.meta, meta)
    # two names that say something: ask the tokenizers themselves, where they are to be had
    if same is None and theirs != ours and "ids" not in (theirs, ours):
        same = same_tokenizer(add_fingerprint(model.meta), add_fingerprint(meta))
        if same is None:
            say_once(f"{what} has the tokenizer {theirs[:60]}, the data {ours[:60]}: "
                     "whether they are the same cannot be told")
    if same is False:
        raise BadInput(f"{what} has the tokenizer {theirs[:60]}, the data {ours[:60]}, which is another: "
                       "use a model of this vocabulary, or prepare the text with the model's")
    if model.bos != meta["bos"]:
        say_once(f"{what} has the BOS {model.bos}, the data {meta['bos']}: its rows begin with the data's")
        model.bos = model.config.bos = model.meta["bos"] = meta["bos"]


def check_length(length, model):
    if length > model.longest:
        raise BadInput(f"--length={length} is more than the {model.longest} tokens "
                       f"that {model.name} knows")


def default_teacher(meta, length):
    """The teacher of data with this meta where none is named: of embedded data its own, GPT-2-large for its ids."""
    if knows_success(meta) and meta["name"] in EMBEDDED:
        name = f"{meta['name']}-ar"
        if length is not None and length > meta["row_length"] + 1:
            name += f"-{length}"                # rows with a PAD more, for block diffusion
        return os.path.join("out", name)
    if meta["tokenizer"] == "gpt2":
        return "gpt2-large"
    return None


def load_ar(flag, path, meta, length, device="cpu"):
    """The AR model that a flag names, checked to fit data with this meta, in rows of `length` tokens."""
    model = load_model(path, device=device)
    if not model.can_teach:
        raise BadInput(f"{flag}={path} is a {model.args['model']} checkpoint: "
                       "it must be one of --model=ar")
    check_vocabulary(f"{flag}={path}", model, meta)
    if length is not None and length > model.length:
        raise BadInput(f"{flag}={path} has rows of {model.length} tokens: "
                       f"use --length={model.length} or less, or train it with --length={length}")
    return model


def load_teacher(args, model, meta, length, device):
    """The teacher whose noise a student reads, for rows of `length` tokens; None for the other models."""
    if not model.paired:
        return None
    path = args.teacher or model.args.get("teacher") or default_teacher(meta, length)
    if path is None:
        raise BadInput(f"--teacher is needed for {model.name}: an AR checkpoint of its vocabulary")
    teacher = load_ar("--teacher", path, meta, length, device)
    trained_with = (vars(model).get("conditions") or {}).get("teacher")
    if trained_with and trained_with != model_hash(teacher):
        say_once(f"{path} is another teacher than the one that {model.name} was trained with")
    return cast_body(teacher)


def cast_body(model):
    """Under autocast in bf16: a frozen model's layers in it once, which spares the cast at each call. After its hash is
    taken; the numbers are the same. Returns the model.
    """
    if torch.is_autocast_enabled(next(model.parameters()).device.type):
        body_to_bfloat16(model)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# sampling

def torch_seed(*key):
    """A seed for torch from whole numbers that say what a draw is for."""
    sequence = np.random.SeedSequence([int(k) for k in key])
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)       # torch takes 63 bits


def generate(model, tokens, options, generator=None, verifier=None):
    """Samples of any model, from tokens [B, *] to begin with -> (tokens [B, L], then counts [B]: nfe, and those of
    COUNTS that the sampler has). options: from `sampling_options`; the model gets those that it reads.
    """
    if options.get("drafts", 1) > 1:
        from extra.verified import choose_draft
        return choose_draft(model, tokens, verifier, options["drafts"], generator, **options_read(model, options))
    if options["sampler"] in VERIFIED and options["sampler"] in model.samplers:
        from extra.verified import generate_verified
        return generate_verified(model, tokens, verifier, options, generator)
    return model.generate(tokens, generator=generator, **options_read(model, options))


def options_read(model, options):
    """Those of the options that `model.generate` reads. Where a command has no such flag, its default holds."""
    return {name: options[name] for name in model.generate_reads if name in options}


def sampling_options(args, model, length, steps, greedy):
    """How a sample is drawn, by the names of `generate`'s arguments: the flags, and what they leave open."""
    return vars(args) | dict(length=length, steps=steps, greedy=greedy) | resolve_sampling(args, model)


def check_sampler(args, model):
    """Refuse a model that has not the sampler of the flags, or was not trained for it."""
    if args.sampler in model.samplers:
        left_to_right = args.sampler in VERIFIED or args.order == "left_to_right"
        if knows_suffixes_alone(model) and not left_to_right:
            raise BadInput(f"{model.name} was trained with --mask_suffix=1, to write from left to right: add "
                           "--sampler=fixed --order=left_to_right")
        return
    # what continues a prompt reveals nothing: it ignores in which order others do
    if not model.samplers and args.sampler in SAMPLERS:
        return
    having_it = [kind.__name__ for kind in MODELS.values() if args.sampler in kind.samplers]
    its_own = ", ".join(model.samplers) or "none"
    raise BadInput(f"--sampler={args.sampler} is for masked models ({', '.join(having_it)}): "
                   f"{model.name} is a {model.args['model']} checkpoint, which has {its_own}")


def knows_suffixes_alone(model):
    """Whether a model has only ever seen rows whose end is missing."""
    return model.args.get("mask_suffix") == 1


def check_random_masks(model, what):
    """Refuse a model that was not trained on masks within a text."""
    if knows_suffixes_alone(model):
        raise BadInput(f"{what} masks at random, or within a text: {model.name} was trained with --mask_suffix=1, for "
                       "what is missing at the end")


def load_verifier(args, models, device):
    """The AR model that checks what these models draft, or None where the sampler asks none."""
    if args.sampler not in VERIFIED and args.drafts == 1:
        return None
    # the maze's table has no --length
    length = vars(args).get("length") or min(model.length for model in models)
    return cast_body(load_ar("--verifier", args.verifier, models[0].meta, length, device))


def start_tokens(model, tokenizer, prompt, infill, length):
    """One row to begin with, LongTensor [1, *]: BOS and the prompt, then what this model begins with ([MASK]s, or
    nothing); or BOS and the infill text with its [MASK]s.
    """
    flag = "--prompt"
    parts = [prompt]
    if infill is not None:
        flag = "--infill"
        parts = infill.split("[MASK]")
        if len(parts) == 1:
            raise BadInput(f"--infill={infill} has no [MASK]: put one where a token is to be filled in")
        if not model.fills_masks:
            raise BadInput("--infill needs a masked model: "
                           "AR models and Medusa only continue a --prompt")
    mask_id = model.vocab_size
    ids = encode_parts(tokenizer, parts, mask_id, model.fills_masks)
    if len(ids) + 1 > length:
        raise BadInput(f"{flag} has {len(ids)} tokens, "
                       f"but a sample of this model has at most {length - 1}: shorten it")
    ids = [model.bos] + ids
    runs = itertools.groupby(ids, lambda i: i == mask_id)
    longest = max(len(list(run)) for is_mask, run in runs if not is_mask)
    if longest > model.length:                  # where a sample may be longer than the window
        raise BadInput(f"{flag} has {longest - 1} tokens in a row, "
                       f"but the model's window has {model.length}: shorten it")
    row = torch.tensor([ids])
    # an infill text is the whole sample; on the maze, whose rows are of one length, its beginning
    if infill is None or tokenizer.name == "maze":
        rest = model.start(1, length)[:, len(ids):]
        return torch.cat([row, rest], 1)
    if model.meta.get("padded"):                # what follows it in such rows is known: EOS, which is BOS
        rest = torch.full((1, length - len(ids)), model.bos)
        return torch.cat([row, rest], 1)
    return row


def encode_parts(tokenizer, parts, mask_id, fills_masks):
    """Texts -> a list of their ids, with a [MASK] between each two texts."""
    unfit = BadInput(f"--prompt, --infill: prompts of this model are made of ids below {mask_id}")
    try:
        encoded = [part.tolist() for part in tokenizer.encode(parts)]
    except (ValueError, OverflowError):         # of numbers, where a checkpoint names no tokenizer
        raise unfit from None
    ids = encoded[0]
    for part in encoded[1:]:
        ids = ids + [mask_id] + part
    if max(ids, default=0) >= mask_id + fills_masks:       # [MASK]'s own number is one more
        raise unfit
    return ids


# ---------------------------------------------------------------------------------------------------------------------
# flags

def sampling_flags(parser):
    """The flags that every sampling command shares."""
    from extra.verified import DRAFTS
    samplers = {}                               # in the order of MODELS, each once
    for kind in MODELS.values():
        samplers |= dict.fromkeys(kind.samplers)
    group = parser.add_argument_group("sampling")
    add = group.add_argument
    add("--sampler", choices=list(samplers), default="ancestral",
        help="fixed: the same number of tokens a step; first_hitting: one; remdm: as ancestral, but "
        "tokens may be masked again; apd: left to right, checked by --verifier; exact: what --verifier writes alone")
    add("--order", choices=ORDERS, default="random", help="another than random needs --sampler=fixed")
    add("--remask", type=number(float, 0, 1), default=0.0, metavar="ETA",
        help="remdm: the highest probability with which a step masks a revealed token again")
    add("--verifier", help="apd, exact, --drafts: AR checkpoint or gpt2[-medium|-large|-xl] of the same vocabulary")
    add("--apd_ratio", type=number(float, 0, 1), default=0.5, help="apd: weight of student logits")
    add("--max_lookahead", type=number(int, 1, 2**20), default=10, help="apd: tokens drafted at once")
    add("--draft", choices=DRAFTS, default="every",
        help="exact: when the student drafts: every round; once, then the verifier's last draft is the next; never")
    add("--drafts", type=number(int, 1, 10_000), default=1,
        help="infilling: so many are drawn, and one of them by its probability under --verifier")
    add("--tau", type=number(float, above=0),
        help="noise temperature (AR, exact: the sampling temperature); default 1, and 0.85 for a student "
        "with noise on text, as the authors released it, but for exact")
    add("--top_p", type=number(float, above=0, high=1), help="nucleus; default 0.9, 1 where success is counted")
    loading_flags(group)


def loading_flags(group):
    add = group.add_argument
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="same seed and flags: same result")
    add("--weights", choices=["ema", "raw"], help="default: EMA, where a file has both")
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="auto: bf16 on CUDA")


def medusa_flags(parser):
    group = parser.add_argument_group("Medusa")
    group.add_argument("--accept", choices=ACCEPT[:2], default="typical",
                       help="typical: drafts that are not unlikely; exact: that the backbone would "
                       "draw; greedy decoding takes its argmax")
    typical_flags(group)


def typical_flags(group):
    add = group.add_argument
    add("--epsilon", type=number(float, 0), default=0.09, help="typical: accept above this probability,")
    add("--delta", type=number(float, 0), default=0.3, help="or above delta exp(-entropy)")


def parse(argv=None):
    parser = Parser(description="Draw samples from a checkpoint.")
    add = parser.add_argument
    add("--ckpt", required=True,
        help="checkpoint, run directory, gpt2[-medium|-large|-xl], hf:NAME, published .ckpt, folder")
    add("--n", type=number(int, 1, 2**31), default=4, help="number of samples")
    add("--batch_size", type=number(int, 1, 2**20), default=16, help="samples drawn at once")
    add("--steps", type=number(int, 1, 2**31),
        help="per sample (BD3-LM: per block); default: one per token")
    add("--prompt", default="", help="text that every sample begins with")
    add("--infill", help="text with [MASK] where a token is to be filled in")
    add("--length", type=number(int, 2, 2**20),
        help="tokens of a sample, with BOS; any number with BD3-LM")
    add("--greedy", action="store_true",
        help="argmax instead of a draw: the natural choice with noise")
    add("--resample_noise", action="store_true", help="draw the noise anew at each step")
    add("--stop_at_eos", action="store_true", help="BD3-LM: a sample ends with its first EOS")
    add("--no_cache", action="store_true", help="BD3-LM, Medusa: no KV cache, to compare")
    add("--out", help="also write the samples to this .jsonl file")
    add("--shards", help="write n rows of an AR model's text to this folder, as a dataset to train on")
    sampling_flags(parser)
    medusa_flags(parser)
    args = parser.parse_args(argv)
    check_sampling_flags(args)
    if args.prompt and args.infill is not None:
        raise BadInput("--prompt and --infill exclude each other: "
                       "begin the --infill text with the prompt")
    if args.out:
        check_output("--out", args.out, fresh=True)
    return args


# ---------------------------------------------------------------------------------------------------------------------
# the command

def check_model(args, model):
    """Refuse flags that this model does not read."""
    if args.length:
        check_length(args.length, model)
    check_sampler(args, model)
    if args.infill is not None:
        check_random_masks(model, "--infill")
    if args.shards:
        refuse_unread(SAMPLING_FLAGS, (), "with --shards, which draws at --tau=1 and --top_p=1: only so is the noise "
                      "that is extracted later the true one")
    else:
        check_sampling_read(args, [(model, args.greedy)])


def draw(model, args, length, device, autocast):
    """Draw n samples, print them, and write them to args.out."""
    from extra.scores import entropy
    with autocast:
        cast_body(model)
        verifier = load_verifier(args, [model], device)
    tokenizer = Tokenizer(model.meta["tokenizer"], model.vocab_size)
    is_maze = tokenizer.name == "maze"
    start = start_tokens(model, tokenizer, args.prompt, args.infill, length).to(device)
    steps = args.steps or model.default_steps(length)
    options = sampling_options(args, model, length, steps, args.greedy)
    options["cached"] = not args.no_cache       # the flag says it the other way round
    generator = torch.Generator(device).manual_seed(args.seed)
    out = None
    if args.out:
        out = open(args.out, "x", buffering=1)  # by line: an interrupted run loses none
    began = time.time()
    bar = tqdm(total=args.n, unit="sample", disable=args.n <= args.batch_size)
    for done in range(0, args.n, args.batch_size):
        b = min(args.batch_size, args.n - done)
        with autocast:
            tokens, *counts = generate(model, start.expand(b, -1), options, generator, verifier)
        for i, row in enumerate(tokens[:, 1:].tolist()):
            if args.stop_at_eos:
                row = without_repeated_eos(row, model.bos)
            facts = {}
            for name, calls in zip(COUNTS, counts):
                facts[name] = int(calls[i])
            if not is_maze:
                facts["entropy"] = round(entropy(row), 3)
            text = tokenizer.decode(row)
            if out:                             # first: a closed terminal loses none
                write_sample(out, dict(text=text, tokens=row) | facts)
            print(f"--- sample {done + i},", ", ".join(f"{name} {v}" for name, v in facts.items()))
            print(draw_maze(row) if is_maze else text)
        bar.update(b)
    bar.close()
    how = ["greedy" if args.greedy else "sampled"]
    for name, value in sampling_shown(args, model, args.greedy).items():
        if value is not None:
            how.append(f"{name} {value}")
    seconds = time.time() - began
    print(f"{args.n} samples from {model.name} (step {model.step or 'unknown'}) in {seconds:.1f} s: "
          f"{', '.join(how)}", file=sys.stderr)


def without_repeated_eos(row, eos):
    """A row that ends in EOS after EOS: one is enough to print."""
    while row[-2:] == [eos, eos]:
        row = row[:-1]
    return row


def main():
    args = parse()
    dtype = args.dtype
    if args.shards and dtype == "auto":         # a teacher's text: bf16 only if it is asked for
        dtype = "float32"
    device, _, autocast = device_and_dtype(dtype)
    allow_changing_shapes()
    model = load_model(args.ckpt, args.weights, device)
    check_model(args, model)
    length = args.length or min(model.length, 1024)     # an hf: model may read a million
    if args.shards:
        from extra.teacher_text import write_shards
        write_shards(model, args, length, device, autocast)
    else:
        draw(model, args, length, device, autocast)


if __name__ == "__main__":
    run_main(main)
