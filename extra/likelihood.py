"""How likely models find real text: `evaluate.py ppl` (Table 8).

    -log p(x) <= E_q[-log p(x | noise)] - log p_teacher(x), q the posterior of the noise: its KL to the prior is the
    teacher's nll exactly. The first term alone (nll_given_noise) is no likelihood.

Shapes: n rows, B of a batch, L tokens of a row with BOS.
"""
import math
import time

import numpy as np
import torch
from tqdm import tqdm

from data.batches import loss_inputs
from data.cli import BadInput
from data.shards import Shards
from extra.scores import ratio_with_error, sum_per_row
from mdlm import stratified_t
from sample import check_length, check_vocabulary, load_teacher, torch_seed

GROUP = 32                                                 # rows that share a seed: no flag, so that values compare


def likelihood_table(args, models, device):
    """The rows of `evaluate.py ppl`, and its note."""
    length = args.length or min(1024, *(model.length for model in models))
    rows = []
    for model in models:
        rows.append(likelihood_row(args, model, length, device))
    return rows, ("perplexity: exp(nats + teacher's nats), an upper bound; exact for AR models and "
                  "blocks of one token. ±: over rows; where there is a teacher, of the sum of both nats.\n"
                  "nll_given_noise is no likelihood: its noise is drawn given the text.")


def likelihood_row(args, model, length, device):
    """The row of one model, on rows of `length` tokens."""
    path = args.data or model.args.get("data")
    if not path:
        raise BadInput(f"--data is needed for {model.name}: it does not say what it was trained on")
    data = Shards(path, "val", length)
    check_vocabulary(f"--data={data.path}: {model.name}", model, data.meta)
    check_length(length, model)
    # one step per token of a block: without blocks, the whole row
    block_size = model.default_steps(length)
    if length % block_size:
        raise BadInput(f"--length={length} is no multiple of {model.name}'s block size, "
                       f"{block_size}")
    teacher = load_teacher(args, model, data.meta, length, device)

    # rows, levels, masks and noise are functions of the seed alone: all models are asked the same, in any batches
    began = time.perf_counter()
    n = min(args.n, len(data))
    n_blocks = model.block_count(length)
    draws = np.random.default_rng(args.seed)
    order = draws.permutation(len(data))[:n]
    levels = stratified_t(n * n_blocks, draws).view(n, n_blocks)
    of_single_tokens = n_blocks == length
    if of_single_tokens:                    # at t = 1 these are the chain rule: no bound
        levels = torch.ones_like(levels)
    nats = []
    teacher_nats = []
    for a in tqdm(range(0, n, GROUP), desc=model.name, disable=None):
        tokens = torch.from_numpy(data.rows(order[a:a + GROUP])).to(device)
        t = levels[a:a + GROUP].to(device)
        nats += nats_of_group(model, teacher, tokens, t, torch_seed(args.seed, a), args.batch_size)
        if teacher:
            for part in tokens.split(args.batch_size):
                teacher_nats += row_nats(teacher.losses(part))
    predicted = np.full(n, length - 1)
    nll, error = ratio_with_error(np.array(nats), predicted)
    row = dict(model=model.name, kind=model.loss_name, n=n, nll=nll, nll_stderr=error if n > 1 else None)
    if of_single_tokens:
        row["kind"] = "nll"
    bound = nll
    if teacher:
        bound, row["nll_stderr"] = ratio_with_error(np.array(nats) + teacher_nats, predicted)
        row |= dict(kind="nll_given_noise", teacher_nll=bound - nll, ppl_bound=math.exp(bound))
    return row | dict(ppl=math.exp(bound), seconds=time.perf_counter() - began)


def nats_of_group(model, teacher, tokens, t, seed, batch_size):
    """Nats of each row of a group [B, L] at noise levels t [B, n_blocks], `batch_size` at once.

    The draws go from row to row, whatever the batches (on CUDA, where torch draws in parallel, in law only).
    """
    if model.can_teach:
        return [nats for part in tokens.split(batch_size) for nats in row_nats(model.losses(part))]
    generator = torch.Generator(tokens.device).manual_seed(seed)
    z = model.noised(tokens, t, generator)
    nats = []
    for x, z_part, t_part in zip(tokens.split(batch_size), z.split(batch_size), t.split(batch_size)):
        kw = loss_inputs(model, tokens.device, t_part, teacher, 0) | dict(generator=generator)
        losses, masked, _ = model.losses(x, z=z_part, **kw)
        nats += sum_per_row(losses.double(), masked).tolist()
    return nats


def row_nats(losses):
    """Losses of tokens [B, L] -> their sums over rows, a list [B]."""
    return losses.double().sum(1).tolist()
