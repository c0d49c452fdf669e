"""What a backbone takes of the tokens that Medusa drafts (Table 3, Section C.2): `evaluate.py acceptance`. What a
verifier takes of a masked student's stands beside it: extra/exact.py.

Shapes: n prompts, P tokens of each, K heads.
"""
import itertools
import time

import numpy as np
import torch
from tqdm import tqdm

from data.cli import BadInput, refuse_unread
from data.maze import PAD, maze_dataset
from data.shards import Shards
from extra.exact import EXACT_COLUMNS, EXACT_NOTE, exact_rows, exact_theory
from extra.scores import ratio_with_error
from gumbel import sample_gumbel
from sample import cast_body, check_length, check_vocabulary, load_ar, torch_seed


def acceptance_table(args, models, device):
    """The rows of `evaluate.py acceptance`, its note, columns and digits."""
    heads = [model for model in models if model.drafts]
    students = [model for model in models if not model.drafts]
    check_flags(args, heads, students)
    length = args.length or min(128, *(model.length for model in models))
    data = Shards(args.data or models[0].args["data"], "val", length)
    is_maze = data.meta["name"] in ("maze", "maze_skewed")
    prompt_length = args.prompt_length
    if prompt_length is None:
        prompt_length = 1 if is_maze else max(1, length // 4)
    for model in models:
        check_acceptance(model, data, length, prompt_length)
        if model.quantile and args.tau != 1:
            raise BadInput(f"--tau={args.tau}: {model.name} reads quantile noise, which has no temperature: leave it "
                           "out")
    verifier = None
    if students:
        verifier = cast_body(load_ar("--verifier", args.verifier, data.meta, length, device))
    order = np.random.default_rng(args.seed).permutation(len(data))[:args.n]
    if prompt_length == 1:
        order = np.resize(order, args.n)    # BOS alone: any number of samples
    prompts = torch.from_numpy(data.rows(order)[:, :prompt_length])
    rows = []
    bar = tqdm(total=len(prompts) * len(heads) * len(args.accept), unit="prompt", disable=None)
    for model, accept in itertools.product(heads, args.accept):
        rows.append(measure_acceptance(model, accept, args, prompts, length, device, bar))
    bar.close()
    # perfect heads are counted for the backbone's own distribution, and exact acceptance
    has_theory = is_maze and args.tau == args.top_p == 1
    if has_theory and "exact" in args.accept:
        for n_heads in sorted({len(model.heads) for model in heads}):
            rows.append(acceptance_theory(data.meta["name"], n_heads, length, prompt_length))
    if students:
        rows += exact_rows(students, verifier, args, prompts, length, device)
        if has_theory and "every" in args.draft:
            rows.append(exact_theory(padded_paths(data.meta["name"], length), prompt_length - 1))

    most_heads = max((len(model.heads) for model in heads), default=0)
    each_head = {f"head{k}": f"head {k}" for k in range(1, 1 + most_heads)}
    columns = dict(model="model", accept="acceptance") | each_head
    if students:
        columns |= EXACT_COLUMNS
    columns |= dict(
        accepted_length="accepted length", calls_per_token="calls per token", agreement="same text",
        near_ties="near ties", tokens_per_s="tokens/s", alone_tokens_per_s="backbone alone", speedup="speed-up")
    note = (f"prompts of {prompt_length} tokens (BOS included) continued to {length}, "
            f"{args.batch_size} at once, tau {args.tau}, top_p {args.top_p}, {args.weights or 'EMA'} weights, "
            f"{torch.get_num_threads()} threads.")
    if heads:
        note += (f"\nhead k: of its candidates with accepted predecessors, the accepted ones (epsilon {args.epsilon}, "
                 f"delta {args.delta}); accepted length: tokens per backbone call, in whole drafts;\nsame text: of up "
                 "to 8 samples, the tokens that the backbone alone writes from the same noise.")
    if students:
        note += EXACT_NOTE
    if is_maze:
        note += "\ntheory: heads, or a student, without noise that know the true marginals."
    return rows, note, columns, dict.fromkeys(["accepted_length", "first_prefix", "first_agreement", *each_head], 3)


def check_flags(args, heads, students):
    """Refuse models of which there is nothing to accept, and flags that none of these reads."""
    for model in students:
        if "exact" not in model.samplers:
            raise BadInput(f"--ckpt: {model.name} is a {model.args['model']} checkpoint, "
                           "acceptance is of Medusa heads and of masked students")
        if not args.verifier:
            raise BadInput(f"--ckpt: {model.name} is a {model.args['model']} checkpoint: its drafts need a --verifier, "
                           "an AR checkpoint of its vocabulary")
    refuse_unread(["verifier", "draft"], ["verifier", "draft"] if students else (), "without a masked student")
    of_heads = ["accept", "epsilon", "delta"]
    refuse_unread(of_heads, of_heads if heads else (), "without Medusa heads")


def check_acceptance(model, data, length, prompt_length):
    check_vocabulary(f"--data={data.path}: {model.name}", model, data.meta)
    if not model.drafts:
        check_length(length, model)
        if prompt_length >= length:
            raise BadInput(f"rows of {length} tokens have no room for a prompt of {prompt_length}: set --length or "
                           "--prompt_length")
        return
    if length > model.backbone.length:
        raise BadInput(f"--length={length} is more than the {model.backbone.length} tokens "
                       f"of {model.name}'s backbone")
    if prompt_length + len(model.heads) >= length:
        raise BadInput(f"rows of {length} tokens have no room for a prompt of {prompt_length} and a "
                       f"draft of {model.name}: set --length or --prompt_length")


def measure_acceptance(model, accept, args, prompts, length, device, bar):
    """A row of the table: prompts [n, P] continued to `length` by the model, and by its backbone alone."""
    sampling = dict(length=length, tau=args.tau, top_p=args.top_p)
    rule = dict(accept=accept, epsilon=args.epsilon, delta=args.delta)
    greedy = accept == "greedy"
    counts = []                             # calls [b], verified [b, K], accepted [b, K]
    seconds = 0.0
    alone = 0.0
    for i, start in enumerate(prompts.split(args.batch_size)):
        start = start.to(device)
        generator = torch.Generator(device).manual_seed(torch_seed(args.seed, i * args.batch_size))
        if i == 0:                          # the warm-up, and the same noise for both
            some = start[:8]
            xi = sample_gumbel((len(some), length, model.vocab_size), generator, device)
            drafted, *_ = model.decode(some, **sampling, **rule, noise=xi)
            written, _ = model.backbone.generate(some, **sampling, noise=xi, greedy=greedy)
            same = (drafted == written)[:, start.shape[1]:].cpu()
        began = time.perf_counter()
        _, *drafts = model.decode(start, **sampling, **rule, generator=generator)
        counts.append([count.cpu().numpy() for count in drafts])      # (waits for the device)
        # the backbone alone, at once after it: a busy spell slows both
        middle = time.perf_counter()
        model.backbone.generate(start, **sampling, greedy=greedy, generator=generator)[0].cpu()
        seconds += middle - began
        alone += time.perf_counter() - middle
        bar.update(len(start))
    calls, verified, accepted = (np.concatenate(count) for count in zip(*counts))
    n_new = len(prompts) * (length - prompts.shape[1])
    row = dict(model=model.name, accept=accept, nfe_counted=float(calls.mean()), n=len(prompts))
    row |= acceptance_row(verified, accepted)
    row |= dict(calls_per_token=float(calls.sum() / n_new), tokens_per_s=n_new / seconds,
                alone_tokens_per_s=n_new / alone, speedup=alone / seconds, seconds=seconds)
    return row | dict(agreement=float(same.double().mean()))


def acceptance_row(verified, accepted):
    """Counts per prompt [n, K] -> each head's conditional acceptance, and the accepted length: tokens per backbone call
    (head 0's and the accepted ones) over whole drafts. With standard errors over prompts.
    """
    row = {}
    for k in range(verified.shape[1]):
        ratio, error = ratio_with_error(accepted[:, k], verified[:, k])
        row |= {f"head{k + 1}": ratio, f"head{k + 1}_stderr": error}
    drafts = verified[:, 0]                 # head 1's candidate is looked at in each of them
    ratio, error = ratio_with_error(drafts + accepted.sum(1), drafts)
    return row | dict(accepted_length=ratio, accepted_length_stderr=error)


def padded_paths(name, length):
    """The maze's rows without BOS, of `length` - 1 tokens."""
    paths = maze_dataset(name).astype(np.int64)
    more = length - 1 - paths.shape[1]      # the PADs of longer rows
    return np.pad(paths, ((0, 0), (0, more)), constant_values=PAD)


def acceptance_theory(name, n_heads, length, prompt_length):
    """The row of perfect heads without noise on the maze."""
    verified, accepted = perfect_heads(padded_paths(name, length), n_heads, prompt_length - 1)
    row = dict(model="theory", accept="exact")
    for key, value in acceptance_row(verified, accepted).items():
        if not key.endswith("_stderr"):     # all paths, not a sample of them
            row[key] = value
    return row


def perfect_heads(rows, heads, start=0, weights=None):
    """Heads without noise that learnt their task perfectly, on an enumerable language: counts [n, K] as `Medusa.decode`
    has them under exact acceptance. rows [n, L] without BOS, of probability `weights` [n]; `start` tokens are given.

    Head k proposes the mode of its marginal: the most frequent token k places after the next one, given the prefix
    (head 1 can do no better; later ones could, by building on those before). The row decides what is accepted.
    """
    verified = np.zeros((len(rows), heads), dtype=int)
    accepted = np.zeros((len(rows), heads), dtype=int)
    for r, row in enumerate(rows):
        p = start                           # the place of the next token
        while p + heads < len(row):
            like = (rows[:, :p] == row[:p]).all(1)         # the rows with this prefix
            weights_of_like = None
            if weights is not None:
                weights_of_like = weights[like]
            fits = []
            for k in range(1, heads + 1):
                mode = np.bincount(rows[like, p + k], weights_of_like).argmax()
                fits.append(mode == row[p + k])
            taken = np.cumprod(fits)        # a candidate falls with those before it
            verified[r] += np.append(1, taken[:-1])
            accepted[r] += taken
            p += 1 + taken.sum()
    return verified, accepted
