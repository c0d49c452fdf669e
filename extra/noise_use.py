"""What a student makes of its noise, and why it does not pay where it does not.

    python -m extra.noise_use --ckpt out/mine-mdlm out/mine-mdlm-gumbel --teacher=out/mine-ar

First, the loss with the noise behind the row, and with fresh noise, which tells nothing of it; and how often one call,
with everything masked, writes the teacher's own tokens, by the quarters of a row. Second, some steps later: a share of
the places is revealed, with (a) the student's own tokens, (b) the teacher's from the same noise, (c) the teacher's from
other noise. How often, at the places still masked, does the student then write what the teacher writes there, left to
right, from the noise, given what is revealed? Where (a) is as good as (b), the student's errors do no harm; where (c)
is much worse than (b), what harms is revealed tokens that contradict the noise.

A student without noise is coupled to it as in exact decoding: it writes argmax(log q + xi).

Shapes: B rows, L length, V vocabulary.
"""

import numpy as np
import torch
from tqdm import tqdm

from data.cli import BadInput, Parser, number, run_main
from data.files import check_output
from data.report import report
from data.run import device_and_dtype
from data.shards import Shards
from evaluate import validation_rows
from gumbel import draw_tokens
from mdlm import Denoiser, close_gaps, reveal_steps, stratified_t
from sample import check_random_masks, check_vocabulary, load_ar, load_model, loading_flags, torch_seed

STEPS = 8                                                  # of the student's, for all places
REVEALED = {2: 0.25, 4: 0.5, 6: 0.75}                      # after so many of them, this share is over


# ---------------------------------------------------------------------------------------------------------------------
# the loss

def losses(model, teacher, tokens, seed):
    """NELBO per token of rows [n, L] with their own noise and with fresh noise; equal for a model that reads none."""
    t = stratified_t(len(tokens), np.random.default_rng(seed))
    own = 0.0
    fresh = 0.0
    for i, (part, levels) in enumerate(zip(tokens.split(32), t.to(tokens.device).split(32))):
        generator = torch.Generator(tokens.device)
        z = model.noised(part, levels, generator.manual_seed(torch_seed(seed, i)))
        loss, _ = model.loss(part, levels, teacher, z, generator=generator)
        own += loss.item() * len(part)
        if model.paired:
            noise = model.fresh_noise(part.shape, generator, part.device)
            loss, _ = model.loss(part, levels, teacher, z, noise)
        fresh += loss.item() * len(part)
    return dict(loss_own=own / len(tokens), loss_fresh=fresh / len(tokens))


# ---------------------------------------------------------------------------------------------------------------------
# one call, and some calls later

def write_left_to_right(teacher, x, mask_id, noise):
    """The teacher fills in the [MASK]s of x [B, L] from noise [B, L, V] (quantile: [B, L]), reading what is revealed as
    it passes it.
    """
    x = x.clone()
    cache = teacher.new_cache(*x.shape)
    for i in range(1, x.shape[1]):
        logits = teacher.logits(teacher.hidden(x[:, i - 1:i], cache)[:, -1])
        written = draw_tokens(logits, noise=noise[:, i])
        x[:, i] = torch.where(x[:, i] == mask_id, written, x[:, i])
    return x


def write(model, denoiser, x, wanted, noise):
    """One call of the student: its tokens at the places `wanted` [B, L] of x [B, L], from noise [B, L, V] -> [N]."""
    rows = torch.arange(len(x), device=x.device)
    logits = denoiser.logits(denoiser.hidden(x, rows, wanted))
    if model.paired:
        return logits.argmax(-1)
    return (logits + noise[wanted]).argmax(-1)


def after_some_steps(model, teacher, n, seed, device):
    """Both questions of n samples, each of own noise -> (agreement of the first call in each quarter of a row [4],
    {(share, what is revealed): agreement}).
    """
    L = model.length
    generator = torch.Generator(device).manual_seed(seed)
    blank = model.start(n, L).to(device)
    masked = blank == model.mask_id
    noise = model.fresh_noise((n, L), generator, device)
    other = model.fresh_noise((n, L), generator, device)
    text = write_left_to_right(teacher, blank, model.mask_id, noise)
    other_text = write_left_to_right(teacher, blank, model.mask_id, other)
    noise_read = None if model.noise_embed is None else noise
    denoiser = Denoiser(model, masked, 1.0, noise_read)

    first = blank.masked_scatter(masked, write(model, denoiser, blank, masked, noise))
    same = (first == text)[:, 1:].double().mean(0)
    quarters = [float(part.mean()) for part in same.tensor_split(4)]

    step = close_gaps(reveal_steps(masked, STEPS, "fixed", "random", generator))
    own = blank
    agreement = {}
    for k in range(1, STEPS):
        now = step == k
        own = own.masked_scatter(now, write(model, denoiser, own, now, noise))
        hidden = step > k
        if k not in REVEALED or not hidden.any():          # (short rows are full earlier)
            continue
        for what, revealed in (("own", own), ("teacher", text), ("other", other_text)):
            x = revealed.masked_fill(hidden, model.mask_id)
            wanted = write_left_to_right(teacher, x, model.mask_id, noise)
            found = write(model, denoiser, x, hidden, noise)
            agreement[REVEALED[k], what] = float((found == wanted[hidden]).double().mean())
    return quarters, agreement


# ---------------------------------------------------------------------------------------------------------------------
# the command

def measure(model, teacher, tokens, args, device):
    """A row of the table of a model."""
    row = dict(model=model.name, step=model.step, n=args.n, n_loss=len(tokens))
    row |= losses(model, teacher, tokens, args.seed)
    quarters, agreement = after_some_steps(model, teacher, args.n, args.seed, device)
    row |= {f"quarter_{k}": value for k, value in enumerate(quarters, 1)}
    return row | {f"{what}_{share}": value for (share, what), value in agreement.items()}


def flags():
    parser = Parser(description="What students make of their noise.")
    add = parser.add_argument
    add("--ckpt", nargs="+", required=True, help="MDLM checkpoints or run directories")
    add("--teacher", required=True, help="AR checkpoint of the same vocabulary")
    add("--data", help="shards: validation rows for the loss; default: the run's")
    add("--n", type=number(int, 2, 2**20), default=500, help="rows, and samples")
    add("--json", help="also write the rows to this file")
    loading_flags(parser)
    return parser


def main(argv=None):
    args = flags().parse_args(argv)
    if args.json:
        check_output("--json", args.json)
    device, dtype, autocast = device_and_dtype(args.dtype)
    models = [load_model(path, args.weights, device) for path in args.ckpt]
    for model, path in zip(models, args.ckpt):
        model.name = path
        if not model.fills_masks or model.n_blocks > 1:
            raise BadInput(f"--ckpt: {path} is a {model.args['model']} checkpoint: this is about --model=mdlm")
        check_random_masks(model, "extra.noise_use")
    data = Shards(args.data or models[0].args["data"], "val", models[0].length)
    teacher = load_ar("--teacher", args.teacher, data.meta, models[0].length, device)
    tokens = torch.from_numpy(validation_rows(data, args.n, args.seed)).to(device)
    rows = []
    with autocast, torch.no_grad():
        for model in tqdm(models, unit="model", disable=None):
            check_vocabulary(f"--data={data.path}: {model.name}", model, data.meta)
            rows.append(measure(model, teacher, tokens, args, device))
    columns = dict(model="model", step="step", loss_own="loss, own noise", loss_fresh="fresh noise")
    columns |= {f"quarter_{k}": f"first call, quarter {k}" for k in range(1, 5)}
    columns |= {f"{what}_{share}": f"{share:.0%} revealed, {title}" for share in REVEALED.values()
                for what, title in (("own", "its own"), ("teacher", "the teacher's"), ("other", "of other noise"))}
    note = ("Losses in nats per token. Others: agreement with what the teacher writes from the same noise, left to "
            f"right, given what is revealed after a share of the {STEPS} steps, in random order.")
    report(args, rows, note, columns, dict.fromkeys(columns, 3))


if __name__ == "__main__":
    run_main(main)
