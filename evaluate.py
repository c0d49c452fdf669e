"""The tables: one function each. Results go to stdout as Markdown, and with --json=FILE to a file.

    python evaluate.py maze --ckpt out/maze-ar out/maze-mdlm-gumbel              # success with diversity, row by row
    python evaluate.py genppl --judge=gpt2-large --ckpt out/mine-mdlm-gumbel     # samples under an AR judge, + entropy
    python evaluate.py mauve  --judge=gpt2-large --ckpt out/mine-mdlm-gumbel     # MAUVE against validation text
    python evaluate.py infill --judge=gpt2-large --ckpt out/mine-mdlm-gumbel     # what is filled into real text
    python evaluate.py nfe --ckpt out/maze-mdlm-gumbel out/maze-mdlm             # one of these metrics against NFE
    python evaluate.py ppl --ckpt out/mine-mdlm-gumbel out/mine-mdlm out/mine-ar # bounds on the likelihood of data
    python evaluate.py acceptance --ckpt out/mine-medusa-gumbel out/mine-medusa  # what a backbone takes of its drafts

Samples are kept in out/samples and used again where weights, settings, code and machine kind are the same.
"""
import functools
import hashlib
import itertools
import json
import math
import os
import re
import sys
import time

import numpy as np
import torch
from tqdm import tqdm

from data.cli import BadInput, Parser, check_output, git_commit, number, optional, run_main
from data.maze import PAD, ExactDenoiser, maze_dataset, maze_keys, maze_paths, maze_valid
from data.shards import Shards
from data.vocab import Tokenizer
from extra.scores import gen_ppl, last_hidden, mauve_scores, ratio_with_error
from gumbel import sample_gumbel
from mdlm import reveal_steps, stratified_t, unmask
from medusa import Medusa
from sample import (PROMPTED, check_vocabulary, default_teacher, device_and_dtype, entropy, generate, load_ar,
                    load_model, load_verifier, loading_flags, medusa_flags, own_flags, resolve_sampling,
                    sampling_flags, torch_seed)
from teacher import CausalLM, extract_sequential, model_hash


FOLDER = os.path.dirname(os.path.abspath(__file__))
# the files that draw samples: kept ones are used again as long as this is the same
CODE = hashlib.sha256(b"".join(open(os.path.join(FOLDER, name + ".py"), "rb").read() for name in (
    "gumbel", "mdlm", "teacher", "bd3lm", "medusa", "sample"))).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------------
# results


# every table's columns: the key in a row, and its title
COLUMNS = dict(model="model", decode="decode", kind="what", nfe="NFE", nfe_counted="calls", verifier_calls="verifier",
               success="success %", stderr="±", distinct="distinct", effective="effective",
               validity_mass="validity mass %", agree="map agreement, paths %", agree_position="positions %",
               tau="τ", top_p="top_p", gen_ppl="GenPPL", gen_ppl_stderr="±", mauve="MAUVE", mauve_std="±",
               recovered="recovered %", entropy="entropy", entropy_set="entropy of the set", distinct_1="distinct-1",
               distinct_2="distinct-2", distinct_3="distinct-3", nll="nats per token", nll_stderr="±",
               teacher_nll="teacher's nats", ppl="perplexity (bound)")
RUN_COLUMNS = dict(n="n", seconds="seconds", precision="precision", device="device", seed="seed", git="commit")
PERCENT = {"success", "stderr", "validity_mass", "agree", "agree_position", "recovered", "acc", "acc_norm"}
DIGITS = dict(tau=2, top_p=2, gen_ppl=2, gen_ppl_stderr=2, entropy=2, entropy_set=2, distinct_1=3, distinct_2=3,
              distinct_3=3, nll=3, nll_stderr=3, teacher_nll=3, ppl=2, mauve=3, mauve_std=3, calls_per_token=3,
              agreement=3, speedup=2, tokens_per_s=0, alone_tokens_per_s=0)


def print_table(rows, columns, digits=DIGITS):
    """Flat dicts as a Markdown table, `columns` {key: title}; a column no row has is left out. Fractions become %. A
    standard error (key + "_stderr") stands behind its value, unless it has a column of its own."""
    def cell(key, value, error):
        if not isinstance(value, float):
            return "" if value is None else str(value)
        values = [value] if error is None or f"{key}_stderr" in columns else [value, error]
        return " ± ".join(f"{100 * v if key in PERCENT else v:.{digits.get(key, 1)}f}" for v in values)
    columns = {key: title for key, title in columns.items() if any(row.get(key) is not None for row in rows)}
    print("| " + " | ".join(columns.values()) + " |\n|" + "---|" * len(columns))
    for row in rows:
        cells = [cell(key, row.get(key), row.get(f"{key}_stderr")) for key in columns]
        print("| " + " | ".join(cells) + " |", flush=True)


def report(args, rows, note, columns=COLUMNS, digits={}, table=None, began=0.0, device="cpu", dtype="float32"):
    """Print the rows, or a `table` made of them, with what they were measured on, and write them to args.json."""
    facts = dict(precision=dtype, device=torch.cuda.get_device_name() if device == "cuda" else device,
                 seed=args.seed, git=git_commit())
    rows = [row | facts for row in rows]
    print_table(rows if table is None else [row | facts for row in table], columns | RUN_COLUMNS, DIGITS | digits)
    print("\n" + note)
    if args.json:
        meta = dict(n=args.n, seconds=round(time.time() - began, 1), **facts, args=vars(args))
        with open(args.json, "w") as f:
            json.dump(dict(meta=meta, rows=rows), f, indent=1)


# ---------------------------------------------------------------------------------------------------------------------
# the maze


def maze_statistics(rows):
    """Samples [n, 10] -> success, its standard error, distinct valid paths, effective number n(n-1) / sum c(c-1)."""
    valid = maze_valid(rows)
    p, (_, c) = valid.mean(), np.unique(maze_keys(rows[valid]), return_counts=True)
    pairs, n = (c * (c - 1)).sum(), valid.sum()
    return dict(n=len(rows), success=float(p), stderr=math.sqrt(p * (1 - p) / len(rows)), distinct=len(c),
                effective=float(n * (n - 1) / pairs) if pairs else None)


def blocks(model, length):
    """Over how many blocks a sample's steps are spread: 1, or those of BD3-LM."""
    return -(-length // getattr(model, "block_size", length))


def steps_of(model, length, args):
    """The numbers of steps for a sample, ascending: --nfe, at least one per block; its tokens, if left to right."""
    if isinstance(model, PROMPTED) or args.sampler == "apd":
        return [length - 1]
    n = blocks(model, length)
    return sorted({max(1, k // n) * n for k in args.nfe})


weights_hash = functools.lru_cache(maxsize=8)(model_hash)          # seconds for a large model, and every row asks


def sample_rows(model, decode, steps, args, device, apd, length, batch, start=None):
    """n samples -> (rows [n, L - 1] without BOS, facts: their mean network calls, verifier calls, seconds of drawing).

    `start` [n, L]: what to fill in, default nothing but BOS. `steps` are those of a whole row: BD3-LM spreads them over
    its blocks. The samples come from the file in `args.samples` that such a call has written before, or go there.
    """
    reference = isinstance(model, CausalLM) and model.meta["tokenizer"] == "maze"             # the teacher, as it is
    tau, top_p = (1.0, 1.0) if reference else resolve_sampling(args, model)
    own = own_flags(model, args)
    if start is None:
        start = torch.full((args.n, 1 if isinstance(model, PROMPTED) else length),
                           getattr(model, "mask_id", model.bos))
        start[:, 0] = model.bos
    settings = dict(decode=decode, steps=steps, n=args.n, length=length, tau=tau, top_p=top_p,
                    sampler=args.sampler, order=args.order, seed=args.seed, batch=batch, **own, dtype=args.dtype,
                    device=torch.cuda.get_device_name() if device == "cuda" else device,
                    weights=weights_hash(model), config=model.config, code=CODE,
                    start=hashlib.sha256(start.numpy().tobytes()).hexdigest()[:16],
                    apd=apd and dict(apd, verifier=weights_hash(apd["verifier"])))
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
    path = os.path.join(args.samples, f"{os.path.basename(model.name)}-{decode}-{steps}-{key}.jsonl")
    if not os.path.exists(path):
        tokenizer = Tokenizer(model.meta["tokenizer"], model.config["vocab_size"])
        generator = torch.Generator(device).manual_seed(args.seed)
        part = f"{path}.{os.getpid()}.tmp"                 # another process may be drawing the same
        try:
            os.makedirs(args.samples, exist_ok=True)
            f = open(part, "w")
        except OSError as e:
            raise BadInput(f"--samples={args.samples} cannot be written ({e.strerror}): choose another folder"
                           ) from None
        with f:
            f.write(json.dumps(dict(settings=dict(model=model.name, **settings))) + "\n")
            for given in start.split(batch):
                began = time.perf_counter()
                tokens, *calls = generate(
                    model, given.to(device), steps // blocks(model, length), tau, top_p, decode == "greedy",
                    args.sampler, args.order, length=length, generator=generator, apd=apd, **own)
                rows = tokens[:, 1:].tolist()              # (waits for the device)
                seconds = (time.perf_counter() - began) / len(rows)
                if tokens.max() >= model.config["vocab_size"]:
                    raise RuntimeError(f"{model.name} left a [MASK] in a sample: a bug in its sampler")
                for row, *counts in zip(rows, *(c.tolist() for c in calls)):
                    f.write(json.dumps(dict(text=tokenizer.decode(row), tokens=row, seconds=seconds)
                                       | dict(zip(("nfe", "verifier_calls"), counts))) + "\n")
        os.replace(part, path)
    with open(path) as f:
        kept = [json.loads(line) for line in f][1:]
    return np.array([s["tokens"] for s in kept]), dict(
        nfe_counted=float(np.mean([s["nfe"] for s in kept])), seconds=sum(s["seconds"] for s in kept),
        verifier_calls=float(np.mean([s["verifier_calls"] for s in kept])) if "verifier_calls" in kept[0] else None)


def maze_theory(name, n, steps, seed):
    """What a perfect noise-blind MDLM reaches at `steps` ancestral steps: the sampler with the true conditionals."""
    exact, generator = ExactDenoiser(maze_dataset(name).astype(np.int64), 5), torch.Generator().manual_seed(seed)
    parts = []
    for x in torch.full((n, 10), 5).split(1000):
        parts.append(unmask(x, reveal_steps(x == 5, steps, generator=generator), 5, exact.hidden, exact.logits,
                            generator=generator))
    rows, calls = (torch.cat(part) for part in zip(*parts))
    return rows.numpy(), int(calls.sum()) / n


def validity_mass(model, device):
    """The exact probability that an AR model writes a valid path: a sum over all 2000, in one pass."""
    rows = torch.from_numpy(maze_paths().astype(np.int64)).to(device)
    rows = torch.cat([torch.full_like(rows[:, :1], model.bos), rows], 1)
    logp = model.log_probs(rows[:, :-1]).gather(-1, rows[:, 1:, None]).squeeze(-1)
    return float(logp.double().sum(-1).exp().sum())


def map_agreement(student, teacher, n, seed, device):
    """With fresh noise and everything masked: how often the student's argmax is what the teacher writes from it.

    -> (fraction of sequences, fraction of positions).
    """
    generator = torch.Generator(device).manual_seed(seed)
    tokens, noise = extract_sequential(teacher, n, generator=generator)
    start = torch.full_like(tokens, student.mask_id)
    start[:, 0] = student.bos
    same = (student.generate(start, 1, greedy=True, noise=noise)[0] == tokens)[:, 1:]
    return float(same.all(1).float().mean()), float(same.float().mean())


def maze_rows(models, args, device):
    """Every row of the maze table for these models; an AR model among them is `teacher`, and the map's reference."""
    names = {model.meta["name"] for model in models}
    if len(names) > 1 or not names <= {"maze", "maze_skewed"}:
        raise BadInput(f"--ckpt: these were trained on {', '.join(sorted(names))}: give checkpoints of one maze")
    teacher = next((m for m in models if isinstance(m, CausalLM)), None)
    apd = load_verifier(args, models, device)
    jobs = [(m, d, k) for m in models for d in (["sample"] if isinstance(m, CausalLM) else args.decode)
            for k in steps_of(m, m.length, args)]
    rows = []
    for model, decode, k in tqdm(jobs, unit="row", disable=None):
        sampled, facts = sample_rows(model, decode, k, args, device, apd, model.length, batch=1000)
        row = dict(model="teacher" if model is teacher else model.name, decode=decode, nfe=k, **facts,
                   **maze_statistics(sampled))
        if isinstance(model, CausalLM):
            row["validity_mass"] = validity_mass(model, device)
        elif teacher and model.noise_embed is not None and (decode, k) == ("greedy", 1) and model.n_blocks == 1:
            row["agree"], row["agree_position"] = map_agreement(model, teacher, args.n, args.seed, device)
        rows.append(row)
    for k in args.nfe:
        sampled, calls = maze_theory(*names, 10 * args.n, k, args.seed)
        rows.append(dict(model="theory", decode="sample", nfe=k, nfe_counted=calls, **maze_statistics(sampled)))
    return rows


def sampler_note(args):
    apd = args.sampler == "apd"
    how = f"R {args.apd_ratio}, up to {args.max_lookahead} ahead" if apd else f"{args.order} order"
    return f"{args.sampler} sampler, {how}, {args.weights or 'EMA'} weights."


def maze(args, models, device):
    """Success ± standard error per NFE, with diversity (so that success bought by collapse shows). Appendix E.1."""
    tau, top_p = resolve_sampling(args, models[-1])
    return maze_rows(models, args, device), (
        f"n = {args.n} samples a row ({10 * args.n} for theory: the perfect noise-blind MDLM). effective: "
        "number of equally likely paths that would repeat as often.\n"
        f"Students: tau {tau}, top_p {top_p}, {sampler_note(args)}")


# ---------------------------------------------------------------------------------------------------------------------
# text


def text_setting(args, models, device):
    """What the metrics of generated text share, checked: -> (judge, to_judge, validation data or None, row length).

    to_judge(rows of the models' ids) -> the judge's ids, through text where the tokenizers differ.
    """
    judge = load_model(args.judge, device=device)
    if not isinstance(judge, CausalLM):
        raise BadInput(f"--judge={args.judge} is a {judge.args['model']} checkpoint: it must be an AR model")
    name, vocab_size = models[0].meta["tokenizer"], models[0].config["vocab_size"]
    length = args.length or min(128 if args.what == "infill" else 1024, *(m.length for m in models))
    for m in models:
        if (m.meta["tokenizer"], m.config["vocab_size"]) != (name, vocab_size):
            raise BadInput(f"--ckpt: {m.name} and {models[0].name} have different vocabularies: compare those of one")
        if length > m.length and not hasattr(m, "block_size"):                   # (BD3-LM writes texts of any length)
            raise BadInput(f"--length={length} is more than the {m.length} tokens that {m.name} was trained on")
    data = Shards(args.data, "val", length) if args.data else None
    if data:
        check_vocabulary(f"--data={args.data}: {models[0].name}", models[0], data.meta)
    if judge.meta["tokenizer"] == name:
        return judge, lambda rows: rows, data, length
    if "ids" in (judge.meta["tokenizer"], name):
        raise BadInput(f"--judge={args.judge}: it or {models[0].name} names no tokenizer, so neither can read the "
                       "other's text: use a judge of the same vocabulary")
    tokenizer, other = Tokenizer(name, vocab_size), Tokenizer(judge.meta["tokenizer"])

    def to_judge(rows):                                    # (a sample of nothing but EOS is no text: EOS again)
        return [ids if len(ids) else [judge.bos] for ids in other.encode([tokenizer.decode(row) for row in rows])]
    return judge, to_judge, data, length


def text_rows(args, models, device, length, start=None):
    """For each model, decoding and number of steps: yields (facts of a table row, samples [n, length - 1])."""
    apd = load_verifier(args, models, device)
    jobs = [(m, d, k) for m in models for d in args.decode for k in steps_of(m, length, args)]
    for model, decode, k in tqdm(jobs, unit="row", disable=None):
        tau, top_p = resolve_sampling(args, model)
        sampled, facts = sample_rows(model, decode, k, args, device, apd, length, args.batch_size, start)
        yield dict(model=model.name, decode=decode, nfe=k, tau=tau, top_p=top_p, **facts), sampled


def text_facts(sampled):
    """How varied samples [n, T] are: unigram entropy in nats, and the share of their n-grams that are distinct."""
    facts = dict(n=len(sampled), entropy=float(np.mean([entropy(r) for r in sampled])), entropy_set=entropy(sampled))
    grams = sampled.astype(np.int64)
    for k in range(1, 1 + min(3, sampled.shape[1])):
        facts[f"distinct_{k}"] = len(np.unique(grams)) / grams.size
        grams = grams[:, :-1] * 2 ** 20 + sampled[:, k:]   # (three ids below 2^20 fit into 63 bits)
    return facts


def text_note(args, models, judge, length):
    medusa = any(isinstance(m, Medusa) for m in models)
    return (f"{length - 1} tokens a sample, judge {judge.name}; entropy: of the tokens of a sample (mean), and of the "
            f"whole set, in nats; distinct-k: of all k-grams.\n{sampler_note(args)}"
            + f" Medusa: {args.accept} acceptance, epsilon {args.epsilon}, delta {args.delta}." * medusa)


def validation_rows(data, n, seed):
    """n rows of a dataset, the same for a seed, with BOS."""
    return data.rows(np.random.default_rng(seed).permutation(len(data))[:n])


def genppl(args, models, device):
    """Generative perplexity of samples under an AR judge, always with their entropy (lower entropy lowers GenPPL)."""
    judge, to_judge, data, length = text_setting(args, models, device)
    real = [(dict(model="data"), validation_rows(data, args.n, args.seed)[:, 1:])] if data else []
    rows = [row | gen_ppl(judge, to_judge(sampled), device) | text_facts(sampled)
            for row, sampled in itertools.chain(real, text_rows(args, models, device, length))]
    return rows, text_note(args, models, judge, length)


def infill(args, models, device):
    """GenPPL of the tokens alone that a masked model fills into validation rows: 32 of 128 (Section E.3)."""
    judge, _, data, length = text_setting(args, models, device)
    for m in models:
        if isinstance(m, PROMPTED):
            raise BadInput(f"--ckpt: {m.name} is a {m.args['model']} checkpoint: only masked models fill in")
    if judge.meta["tokenizer"] != models[0].meta["tokenizer"]:
        raise BadInput(f"--judge={args.judge} has another tokenizer than {models[0].name}: it cannot tell which tokens "
                       "were filled in")
    if args.masked >= length:
        raise BadInput(f"--masked={args.masked} of rows of {length} tokens, BOS included: mask fewer, or set --length")
    tokens = torch.from_numpy(validation_rows(data, args.n, args.seed))
    args.n = len(tokens)
    u = torch.rand(tokens[:, 1:].shape, generator=torch.Generator().manual_seed(torch_seed(args.seed, 1)))
    masked = torch.nn.functional.pad(u.argsort(1).argsort(1) < args.masked, (1, 0))      # exactly so many of each row
    blank = torch.where(masked, models[0].mask_id, tokens)
    real, masked, rows = tokens[:, 1:].numpy(), masked[:, 1:].numpy(), []
    for row, filled in itertools.chain([(dict(model="data"), real)], text_rows(args, models, device, length, blank)):
        rows.append(row | gen_ppl(judge, filled, device, masked) | text_facts(filled)
                    | dict(recovered=float((filled == real)[masked].mean())))
    return rows, (f"{args.masked} of {length - 1} tokens masked at random; GenPPL of these alone; recovered: of these, "
                  f"those of the data.\n{text_note(args, models, judge, length)}")


def mauve(args, models, device):
    """MAUVE of samples against validation text: mean and standard deviation over 5 runs of k-means (Section D.1)."""
    judge, to_judge, data, length = text_setting(args, models, device)
    real = last_hidden(judge, to_judge(validation_rows(data, args.n, args.seed)[:, 1:]), device)
    if min(args.n, len(real)) < 1000:
        print(f"{args.n} samples against {len(real)} rows: below 1000 MAUVE is too high, and rough", file=sys.stderr)
    rows = []
    for row, sampled in text_rows(args, models, device, length):
        scores = mauve_scores(last_hidden(judge, to_judge(sampled), device), real)
        rows.append(row | dict(mauve=float(scores.mean()), mauve_std=float(scores.std(ddof=1)), references=len(real))
                    | text_facts(sampled))
    return rows, (f"{text_note(args, models, judge, length)}\nMAUVE against {len(real)} validation rows of {args.data};"
                  " ±: standard deviation over 5 seeds of k-means.")


# a metric -> the function that measures it, its error's key, what to print: factor, digits, title
METRICS = dict(success=(maze, "stderr", 100, 1, "success %"), gen_ppl=(genppl, "gen_ppl_stderr", 1, 1, "GenPPL"),
               mauve=(mauve, "mauve_std", 1, 3, "MAUVE"))


def nfe(args, models, device):
    """A metric against NFE (Figure 3), one line per model and decoding; runs that differ in their seed are averaged."""
    if args.plot:
        optional("matplotlib", "--plot")
    metric = args.metric or ("success" if models[0].meta["tokenizer"] == "maze" else "gen_ppl")
    function, error, scale, digits, title = METRICS[metric]
    rows, note = function(args, models, device)
    recipe = {m.name: re.sub(rf"s{m.args.get('seed')}\b", "s*", json.dumps(         # init_from: of that seed as well
        {k: v for k, v in m.args.items() if v is not None and k not in ("seed", "out")})) for m in models}
    first = {name: next(other for other in recipe if recipe[other] == recipe[name]) for name in recipe}
    if len({(first[m.name], m.args.get("seed")) for m in models}) < len(models):
        first = {}                                         # the same run twice is no second seed
    groups = {}                                            # (model, decode) -> {nfe: [row of each seed]}
    for row in rows:
        line = groups.setdefault((first.get(row["model"], row["model"]), row.get("decode")), {})
        line.setdefault(row.get("nfe"), []).append(row)
    table, lines = [], {}                                  # lines: label -> {nfe: (value, error)}
    for (model, decode), line in groups.items():
        runs = next(iter(line.values()))                   # a row of each seed
        label = model + f" and {len(runs) - 1} other seed{'s' * (len(runs) > 2)}" * (len(runs) > 1)
        points = lines[f"{label}, {decode}" if decode else label] = {
            k: (scale * np.mean([r[metric] for r in rs]),
                scale * (np.std([r[metric] for r in rs], ddof=1) if len(rs) > 1 else rs[0][error]))
            for k, rs in line.items()}
        row = {k: f"{value:.{digits}f} ± {spread:.{digits}f}" for k, (value, spread) in points.items()}
        if entropies := [r["entropy"] for rs in line.values() for r in rs if "entropy" in r]:
            row["entropy"] = f"{min(entropies):.2f} to {max(entropies):.2f}"
        if None in row:                                    # the data, which have no NFE
            label += ": " + row[None]
        table.append(dict(model=label, decode=decode, n=runs[0]["n"]) | row)
    steps = sorted({row["nfe"] for row in rows if row.get("nfe")})
    if args.plot:
        from extra.plot import plot_nfe
        plot_nfe(args.plot, lines, steps, title)
    columns = dict(model=title, decode="decode") | {k: f"NFE {k}" for k in steps} | dict(entropy="entropy")
    return rows, ("±: over samples (MAUVE: over seeds of k-means), or, where there are runs of several seeds, their "
                  "standard deviation.\n" + note), columns, {}, table


def load_teacher(args, model, meta, length, device):
    """The teacher whose noise a student reads, for rows of `length` tokens; None for the other models."""
    if model.config.get("noise") in (None, "unpaired"):
        return None
    path = args.teacher or model.args.get("teacher") or default_teacher(meta, length)
    if path is None:
        raise BadInput(f"--teacher is needed for {model.name}: an AR checkpoint of its vocabulary")
    return load_ar("--teacher", path, meta, length, device)


def ppl(args, models, device):
    """Bounds on the data's likelihood: nll of an AR model, NELBO of a plain student, for a Gumbel student ppl_bound.

    -log p(x) <= E_q[-log p(x | noise)] - log p_teacher(x), q the posterior of the noise: its KL to the prior is the
    teacher's nll exactly. The first term alone (nll_given_noise) is no likelihood.
    """
    rows, length = [], args.length or min(1024, *(m.length for m in models))
    for model in models:
        if not (args.data or model.args.get("data")):
            raise BadInput(f"--data is needed for {model.name}: it does not say what it was trained on")
        data = Shards(args.data or model.args["data"], "val", length)
        check_vocabulary(f"--data={data.path}: {model.name}", model, data.meta)
        if length > model.length:
            raise BadInput(f"--length={length} is more than the {model.length} tokens that {model.name} was trained on")
        if length % getattr(model, "block_size", 1):
            raise BadInput(f"--length={length} is no multiple of {model.name}'s block size, {model.block_size}")
        teacher = load_teacher(args, model, data.meta, length, device)
        n, began = min(args.n, len(data)), time.perf_counter()
        draws = np.random.default_rng(args.seed)
        order, n_blocks = draws.permutation(len(data))[:n], blocks(model, length)
        levels = stratified_t(n * n_blocks, draws).view(n, n_blocks)
        if exact := n_blocks == length:
            levels = torch.ones_like(levels)               # blocks of one token: at t = 1 the chain rule, no bound
        batches = []                                       # (its share of the rows, its nats, its teacher's)
        for i, a in enumerate(tqdm(range(0, n, args.batch_size), desc=model.name, disable=None)):
            tokens = torch.from_numpy(data.rows(order[a:a + args.batch_size])).to(device)
            kw = {} if isinstance(model, CausalLM) else dict(
                t=levels[a:a + args.batch_size].to(device), teacher=teacher,
                generator=torch.Generator(device).manual_seed(args.seed + i))
            batches.append((len(tokens) / n, model.loss(tokens, **kw)[0].item(),
                            teacher.loss(tokens)[0].item() if teacher else 0.0))
        w, losses, references = np.array(batches).T
        nll, error = ratio_with_error(w * losses, w)
        reference = float(w @ references)
        row = dict(model=model.name, kind="nll" if isinstance(model, CausalLM) or exact else "nelbo", nll=nll,
                   nll_stderr=error if len(w) > 1 else None, n=n, ppl=math.exp(nll + reference),
                   seconds=time.perf_counter() - began)
        if teacher:
            row |= dict(kind="nll_given_noise", teacher_nll=reference, ppl_bound=row["ppl"])
        rows.append(row)
    return rows, ("perplexity: exp(nats + teacher's nats), an upper bound; exact for AR models and blocks of one token."
                  "\nnll_given_noise is no likelihood: its noise is drawn given the text.")


# ---------------------------------------------------------------------------------------------------------------------
# Medusa

def acceptance_row(verified, accepted):
    """Counts per prompt [n, K] -> each head's conditional acceptance, and the accepted length: tokens per backbone call
    (head 0's and the accepted ones) over whole drafts. With standard errors over prompts."""
    row = {}
    for k in range(verified.shape[1]):
        row[f"head{k + 1}"], row[f"head{k + 1}_stderr"] = ratio_with_error(accepted[:, k], verified[:, k])
    row["accepted_length"], row["accepted_length_stderr"] = ratio_with_error(
        verified[:, 0] + accepted.sum(1), verified[:, 0])
    return row


def perfect_heads(rows, heads, start=0, weights=None):
    """Heads without noise that learnt their task perfectly, on an enumerable language: counts [n, K] as `Medusa.decode`
    has them under exact acceptance. rows [n, L] without BOS, of probability `weights` [n]; `start` tokens are given.

    Head k proposes the mode of its marginal: the most frequent token k places after the next one, given the prefix
    (head 1 can do no better; later ones could, by building on those before). The row decides what is accepted.
    """
    verified, accepted = np.zeros((2, len(rows), heads), dtype=int)
    for r, row in enumerate(rows):
        p = start
        while p + heads < len(row):
            like = (rows[:, :p] == row[:p]).all(1)
            ok = np.cumprod([np.bincount(rows[like, p + k], None if weights is None else weights[like]).argmax()
                             == row[p + k] for k in range(1, heads + 1)])
            verified[r] += np.append(1, ok[:-1])
            accepted[r] += ok
            p += 1 + ok.sum()
    return verified, accepted


def acceptance(args, models, device):
    """Medusa's drafts: acceptance per head, accepted length, speed against the backbone alone (Table 3, C.2)."""
    for model in models:
        if not isinstance(model, Medusa):
            raise BadInput(f"--ckpt: {model.name} is a {model.args['model']} checkpoint, acceptance is of Medusa heads")
    length = args.length or min(128, *(m.length for m in models))
    data = Shards(args.data or models[0].args["data"], "val", length)
    maze = data.meta["name"] in ("maze", "maze_skewed")
    prompt = args.prompt_length or (1 if maze else max(1, length // 4))
    for model in models:
        check_vocabulary(f"--data={data.path}: {model.name}", model, data.meta)
        if length > model.backbone.length:
            raise BadInput(f"--length={length} is more than the {model.backbone.length} tokens of {model.name}'s "
                           "backbone")
        if prompt + len(model.heads) >= length:
            raise BadInput(f"rows of {length} tokens have no room for a prompt of {prompt} and a draft of {model.name}:"
                           " set --length or --prompt_length")
    order = np.random.default_rng(args.seed).permutation(len(data))[:args.n]
    if prompt == 1:
        order = np.resize(order, args.n)                   # BOS alone: any number of samples
    rows, new, kw = [], len(order) * (length - prompt), dict(length=length, tau=args.tau, top_p=args.top_p)
    bar = tqdm(total=len(order) * len(models) * len(args.accept), unit="prompt", disable=None)
    for model, accept in itertools.product(models, args.accept):
        counts, seconds, alone = [], 0.0, 0.0
        how, greedy = dict(accept=accept, epsilon=args.epsilon, delta=args.delta), accept == "greedy"
        for a in range(0, len(order), args.batch_size):
            start = torch.from_numpy(data.rows(order[a:a + args.batch_size])[:, :prompt]).to(device)
            generator = torch.Generator(device).manual_seed(torch_seed(args.seed, a))
            if a == 0:                                     # warm-up, and the same noise for both
                xi = sample_gumbel((len(start[:8]), length, model.vocab_size), generator, device)
                drafted = model.decode(start[:8], **kw, **how, noise=xi)[0]
                same = (drafted == model.backbone.generate(start[:8], **kw, noise=xi, greedy=greedy)[0]).cpu()
            began = time.perf_counter()
            _, *drafts = model.decode(start, **kw, **how, generator=generator)
            counts.append([c.cpu().numpy() for c in drafts])                   # (waits for the device)
            middle = time.perf_counter()
            model.backbone.generate(start, **kw, greedy=greedy, generator=generator)[0].cpu()
            seconds += middle - began
            alone += time.perf_counter() - middle
            bar.update(len(start))
        calls, *drafts = (np.concatenate(c) for c in zip(*counts))
        rows.append(dict(model=model.name, accept=accept, nfe_counted=float(calls.mean()), n=len(order),
                         **acceptance_row(*drafts), calls_per_token=float(calls.sum() / new),
                         tokens_per_s=new / seconds, alone_tokens_per_s=new / alone, speedup=alone / seconds,
                         seconds=seconds, agreement=float(same[:, prompt:].double().mean())))
    bar.close()
    if maze and args.tau == args.top_p == 1 and "exact" in args.accept:
        paths = maze_dataset(data.meta["name"]).astype(np.int64)
        paths = np.pad(paths, ((0, 0), (0, length - 11)), constant_values=PAD)
        for heads in sorted({len(m.heads) for m in models}):
            row = acceptance_row(*perfect_heads(paths, heads, prompt - 1))
            rows.append(dict(model="theory", accept="exact") | {k: v for k, v in row.items() if "stderr" not in k})
    heads = {f"head{k}": f"head {k}" for k in range(1, 1 + max(len(m.heads) for m in models))}
    columns = dict(model="model", accept="acceptance") | heads | dict(
        accepted_length="accepted length", calls_per_token="calls per token", agreement="same text",
        tokens_per_s="tokens/s", alone_tokens_per_s="backbone alone", speedup="speed-up")
    note = (f"prompts of {prompt} tokens (BOS included) continued to {length}, {args.batch_size} at once, "
            f"tau {args.tau}, top_p {args.top_p}, epsilon {args.epsilon}, delta {args.delta}, "
            f"{args.weights or 'EMA'} weights, {torch.get_num_threads()} threads.\nhead k: of its candidates with "
            "accepted predecessors, the accepted ones; accepted length: tokens per backbone call, in whole drafts;\n"
            "same text: of up to 8 samples, the tokens that the backbone alone writes from the same noise."
            + "\ntheory: heads without noise that know the true marginals." * maze)
    return rows, note, columns, dict.fromkeys(["accepted_length", *heads], 3)


# ---------------------------------------------------------------------------------------------------------------------
# flags

def steps_list(text):
    return sorted({number(int, 1)(part) for part in text.split(",")})


def decodes(text):
    values = text.split(",")
    if not set(values) <= {"sample", "greedy"}:
        raise BadInput(f"--decode={text}: a comma list of sample, greedy")
    return values


def main(argv=None):
    parser = Parser(description="Evaluate checkpoints.")
    functions = dict(maze=maze, genppl=genppl, mauve=mauve, infill=infill, nfe=nfe, ppl=ppl, acceptance=acceptance)
    sub = parser.add_subparsers(dest="what", required=True, metavar="|".join(functions), parser_class=Parser)
    for name, function in functions.items():
        p = sub.add_parser(name, help=function.__doc__.splitlines()[0])
        p.add_argument("--ckpt", nargs="+", required=True, help="checkpoints or run directories")
        n = dict(genppl=300, infill=300, mauve=5000, ppl=2000, acceptance=500).get(name, 1000)
        what = dict(ppl="validation rows", acceptance="prompts", infill="validation rows").get(name, "samples per row")
        p.add_argument("--n", type=number(int, 2), default=n, help=what)
        p.add_argument("--json", help="also write the rows to this file")
        if name != "maze":
            p.add_argument("--data", help="shards: " + (
                "adds a row for their validation text" if name == "genppl" else "validation text; default: the run's"))
            p.add_argument("--batch_size", type=number(int, 1), default=32, help="rows at once")
            p.add_argument("--length", type=number(int, 2), help="tokens of a row, BOS included; default: the shortest "
                           f"of the models', at most {128 if name in ('acceptance', 'infill') else 1024}")
        if name == "ppl":
            p.add_argument("--teacher", help="of students with noise; default: the one that they were trained with")
        if name == "acceptance":
            p.add_argument("--prompt_length", type=number(int, 1),
                           help="tokens of a prompt, BOS included; default: a quarter of a row (maze: BOS)")
            p.add_argument("--tau", type=number(float, above=0), default=1.0, help="sampling temperature")
            p.add_argument("--top_p", type=number(float, above=0, high=1), default=1.0, help="nucleus")
        if name in ("ppl", "acceptance"):
            loading_flags(p)
        else:
            steps = dict(maze="1,2,4,8,16", nfe="1,2,4,8,16", infill="8,32").get(name, "8,64")
            p.add_argument("--nfe", type=steps_list, default=steps,
                           help="numbers of steps; BD3-LM makes the same number, at least one, in each block")
            p.add_argument("--decode", type=decodes, default="sample,greedy" if name in ("maze", "nfe") else "sample",
                           help="sample, greedy (argmax), or both")
            p.add_argument("--samples", default=os.path.join("out", "samples"),
                           help="folder of samples, to be used again with the same weights, settings and code")
            sampling_flags(p)
            if name != "maze":
                p.add_argument("--judge", default="gpt2-large", help="AR checkpoint, gpt2[-medium|-large|-xl], hf:NAME")
        if name not in ("maze", "ppl"):
            medusa_flags(p, several=name == "acceptance")
        if name == "nfe":
            p.add_argument("--metric", choices=METRICS, help="default: success for the maze, else gen_ppl")
            p.add_argument("--plot", help="also draw it into this .png or .svg (needs matplotlib)")
        if name == "infill":
            p.add_argument("--masked", type=number(int, 1), default=32, help="tokens of a row to fill in")
    args, began = parser.parse_args(argv), time.time()
    for flag in ("json", "plot"):
        if getattr(args, flag, None):
            check_output("--" + flag, getattr(args, flag))
    if getattr(args, "plot", None) and not args.plot.endswith((".png", ".svg")):
        raise BadInput(f"--plot={args.plot} must end in .png or .svg")
    device, dtype, autocast = device_and_dtype(args.dtype)
    models = [load_model(path, args.weights, device) for path in args.ckpt]
    if len({m.name for m in models}) < len(models):
        for path, m in zip(args.ckpt, models):
            m.name = path                                  # run directories of the same name
    for m in models:
        if isinstance(m, Medusa) and (
                args.what in ("maze", "ppl") or args.what == "nfe" and m.meta["tokenizer"] == "maze"):
            raise BadInput(f"--ckpt: {m.name} holds Medusa heads: evaluate.py acceptance and genppl measure these")
    if (args.what in ("infill", "mauve") or getattr(args, "metric", None) == "mauve") and not args.data:
        args.data = models[0].args.get("data")
        if not args.data:
            raise BadInput(f"--data is needed for {models[0].name}: validation text to compare with")
    with autocast, torch.no_grad():
        rows, note, *table = functions[args.what](args, models, device)
    report(args, rows, note, *table, began=began, device=device, dtype=dtype)


if __name__ == "__main__":
    run_main(main)
