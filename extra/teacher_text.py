"""Sequential extraction: a teacher's own text as a dataset, `sample.py --shards=DIR` (Section 4.1).
"""
import os
import sys
import time

import numpy as np
import torch
from tqdm import tqdm

from data.cli import BadInput
from data.shards import Writer
from sample import torch_seed
from teacher import model_hash


def check_shards(args, model):
    """Refuse what would not be the teacher's text, drawn as it is."""
    if not model.can_teach:
        raise BadInput(f"--shards is the teacher's text: {args.ckpt} must be an AR model")
    # anything else than draws from BOS on is not the law under which noise is extracted
    if args.prompt or args.greedy or args.out or args.infill is not None:
        raise BadInput("--shards goes with none of --prompt, --infill, --greedy, --out")
    if args.n < 2:
        raise BadInput("--n must be at least 2 with --shards: a row for each of train and val")


def write_shards(model, args, length, device, autocast):
    """n rows of the AR model's own text, drawn at tau 1 and top_p 1, as a dataset for training.

    The noise is not stored: given these rows, parallel extraction redraws it with exactly the law it had (Section 4.1).
    Each batch has its own seed, so that an interrupted run continues with what it would have written.
    """
    check_shards(args, model)
    n_val = max(1, round(0.02 * args.n))        # the first rows
    meta = dict(name=os.path.basename(os.path.normpath(args.shards)), row_length=length - 1)
    for key in ("tokenizer", "vocab_size", "bos", "predict_bos", "padded", "fingerprint"):
        if key in model.meta:                   # an old checkpoint has no fingerprint
            meta[key] = model.meta[key]
    flags = ("ckpt", "n", "batch_size", "length", "seed", "weights", "dtype")
    # another run with these continues this one, with any other starts over
    decides = {flag: vars(args)[flag] for flag in flags} | dict(step=model.step, sha256=model_hash(model))
    with Writer(args.shards, meta, key=decides) as writer:
        write_rows(writer, model, args, n_val, length, device, autocast)
    print(f"{args.shards}: {args.n} rows of {length - 1} tokens by {model.name}, "
          f"{n_val} of them for validation", file=sys.stderr)


def write_rows(writer, model, args, n_val, length, device, autocast):
    """What is not there yet of the rows, of which the first n_val are for validation."""
    first = writer.done                         # rows that an earlier run has written
    bar = tqdm(total=args.n, initial=first, unit="row", desc=args.shards)
    began = time.time()
    for done in range(first, args.n, args.batch_size):
        b = min(args.batch_size, args.n - done)
        generator = torch.Generator(device).manual_seed(torch_seed(args.seed, done))
        start = model.start(b, length).to(device)
        with autocast:
            tokens, _ = model.generate(start, length, generator=generator)
        # the first n_val rows of all are for validation
        val, train = np.split(tokens[:, 1:].cpu().numpy(), [max(0, n_val - done)])
        writer.write("val", val.ravel())
        writer.write("train", train.ravel())
        writer.commit(done + b)
        bar.update(b)
        tokens_per_s = (writer.done - first) * (length - 1) / (time.time() - began)
        bar.set_postfix(tokens_per_s=f"{tokens_per_s:,.0f}")
    bar.close()
    writer.finish()
