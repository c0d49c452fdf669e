"""The tables: one function each. Results go to stdout as Markdown, and with --json=FILE to a file.

    python evaluate.py maze --ckpt out/maze-ar out/maze-mdlm-gumbel              # success with diversity, row by row
    python evaluate.py success --ckpt out/words-ar out/words-mdlm-gumbel         # the same of words, of molecules
    python evaluate.py genppl --judge=gpt2-large --ckpt out/mine-mdlm-gumbel     # samples under an AR judge, + entropy
    python evaluate.py mauve  --judge=gpt2-large --ckpt out/mine-mdlm-gumbel     # MAUVE against validation text
    python evaluate.py infill --judge=gpt2-large --ckpt out/mine-mdlm-gumbel     # what is filled into real text
    python evaluate.py nfe --ckpt out/maze-mdlm-gumbel out/maze-mdlm             # one of these metrics against NFE
    python evaluate.py ppl --ckpt out/mine-mdlm-gumbel out/mine-mdlm out/mine-ar # bounds on the likelihood of data
    python evaluate.py acceptance --ckpt out/mine-medusa-gumbel out/mine-medusa  # what a backbone takes of its drafts

The samples behind a row are written to out/samples; --samples=FILE.jsonl reads one such file in place of drawing.

A new table is a function (args, models, device) -> (rows, note [, columns, digits, table]), as `report` takes them, and
a line of COMMANDS; a new column is a key in its rows and a line of data/report.py's COLUMNS.
"""
import hashlib
import itertools
import os
import sys
import time

import numpy as np
import torch
from tqdm import tqdm

from data.cli import BadInput, Parser, number, optional, refuse_unread, run_main
from data.files import check_folder, check_output
from data.report import device_name, report
from data.run import allow_changing_shapes, device_and_dtype
from data.samples import names_file, read_samples, write_samples
from data.sampling import COUNTS, VERIFIED, check_sampling_flags, check_sampling_read, sampling_shown
from data.shards import SPLITS, Shards, knows_success
from data.vocab import Tokenizer, same_tokenizer, translate
from medusa import ACCEPT
from sample import (cast_body, check_length, check_random_masks, check_sampler, check_vocabulary, generate, load_ar,
                    load_model, load_verifier, loading_flags, medusa_flags, options_read, sampling_flags,
                    sampling_options, torch_seed, typical_flags)


# ---------------------------------------------------------------------------------------------------------------------
# the samples behind a row of a table

def drawn_rows(args, models, device, batch, length=None, start=None):
    """For each model, decoding and number of steps: yields (the model, a row of the table, samples [n, L - 1]).

    length: of a sample, default: of each model's rows. `batch`, `start`: as in `sample_rows`.
    """
    jobs = []
    for model in models:
        for decode in decodes_of(model, args):
            for steps in steps_of(model, length or model.length, args, start):
                jobs.append((model, decode, steps))
    if names_file(args.samples) and len(jobs) != 1:
        raise BadInput(f"--samples={args.samples} holds the samples of one row, these flags ask for "
                       f"{len(jobs)}: give one --ckpt, one --decode and one --nfe, or a folder")
    verifier = load_verifier(args, models, device)
    for model, decode, steps in tqdm(jobs, unit="row", disable=None):
        sampled, facts = sample_rows(model, decode, steps, args, device, verifier,
                                     length or model.length, batch, start)
        yield model, dict(model=model.name, decode=decode, nfe=steps, **facts), sampled


def decodes_of(model, args):
    if is_reference(model):              # the reference is no student: it is only drawn from
        return ["sample"]
    return args.decode


def is_reference(model):
    """An AR model is the reference where success counts: whatever the flags, it is drawn from as it was trained."""
    return model.can_teach and knows_success(model.meta)


def steps_of(model, length, args, start):
    """The numbers of steps for a sample, ascending: --nfe, at least one per block; its tokens where each takes one."""
    if not model.fills_masks or args.sampler in (*VERIFIED, "first_hitting"):
        if start is None:
            return [length - 1]
        return [int((start == model.vocab_size).sum(1).max())]         # those that are masked
    n_blocks = model.block_count(length)
    # a block gets its share of the steps; a set, since small numbers become the same one
    return sorted({max(1, k // n_blocks) * n_blocks for k in args.nfe})


def sample_rows(model, decode, steps, args, device, verifier, length, batch, start=None):
    """n samples -> (rows [n, L - 1] without BOS, facts: their mean network calls, verifier calls, seconds of drawing).

    `start` [n, L]: what to fill in, default nothing but BOS. `steps` are those of a whole row: BD3-LM spreads them over
    its blocks. The samples are written to a file in the folder `args.samples`, or read from it, if it is such a file.
    """
    if start is None:
        start = model.start(args.n, length)
    steps_per_block = max(1, steps // model.block_count(length))
    options = sampling_options(args, model, length, steps_per_block, greedy=decode == "greedy")
    if is_reference(model):
        options |= dict(tau=1.0, top_p=1.0)
    settings = dict(model=model.name, decode=decode, steps=steps, n=args.n, seed=args.seed,
                    batch=batch)
    settings |= settings_of(model, options, args, device, start)
    if names_file(args.samples):
        samples = read_samples(args.samples, settings, model.vocab_size)
    else:
        drawn = draw_samples(model, options, args, device, verifier, batch, start)
        samples = write_samples(args.samples, settings, drawn)
    facts = dict(nfe_counted=float(np.mean([sample["nfe"] for sample in samples])),
                 seconds=sum(sample["seconds"] for sample in samples), verifier_calls=None)
    for name in COUNTS[1:]:
        if name in samples[0]:
            facts[name] = float(np.mean([sample[name] for sample in samples]))
    return np.array([sample["tokens"] for sample in samples]), facts


def settings_of(model, options, args, device, start):
    """What else the samples depend on, for the first line of their file."""
    settings = options_read(model, options)
    # the row's decoding and its number of steps say the same
    settings.pop("greedy", None)
    settings.pop("steps", None)
    settings |= dict(path=model.path, step=model.step, weights=args.weights,
                     config=vars(model.config), length=options["length"], dtype=args.dtype,
                     device=device_name(device))
    # what was given: real text, if it is to be filled in
    settings["start"] = hashlib.sha256(start.numpy().tobytes()).hexdigest()[:16]
    sampler = options["sampler"] if model.samplers else None           # what continues a prompt has none
    if sampler == "apd":
        settings |= dict(verifier=args.verifier, ratio=args.apd_ratio,
                         max_lookahead=args.max_lookahead)
    if args.drafts > 1:
        settings |= dict(verifier=args.verifier, drafts=args.drafts)
    if sampler == "exact":
        settings |= dict(verifier=args.verifier, draft=args.draft)
    return settings


def draw_samples(model, options, args, device, verifier, batch, start):
    """Yields each sample as a dict: text, tokens (without BOS), seconds, and those of COUNTS that there are."""
    tokenizer = Tokenizer(model.meta["tokenizer"], model.vocab_size)
    generator = torch.Generator(device).manual_seed(args.seed)
    for part in start.split(batch):
        began = time.perf_counter()
        tokens, *counts = generate(model, part.to(device), options, generator, verifier)
        rows = tokens[:, 1:].tolist()       # (waits for the device)
        # of a sample: its share of its batch's
        seconds = (time.perf_counter() - began) / len(rows)
        if tokens.max() >= model.vocab_size:
            raise RuntimeError(f"{model.name} left a [MASK] in a sample: a bug in its sampler")
        for i, row in enumerate(rows):
            sample = dict(text=tokenizer.decode(row), tokens=row, seconds=seconds)
            for name, calls in zip(COUNTS, counts):
                sample[name] = int(calls[i])
            yield sample


# ---------------------------------------------------------------------------------------------------------------------
# success

def success(args, models, device):
    """Success ± standard error per NFE, with diversity (so that success bought by collapse shows). Appendix E.1."""
    from extra.success import language_of
    refuse_heads(models)
    language = language_of(args, models)
    rows = success_rows(language, models, args, device)
    note = f"{language.note(args, rows)}\nStudents: {sampling_note(args, models)}{sampler_note(args)}"
    return rows, note


def success_rows(language, models, args, device):
    """Every row of the table for these models; an AR model among them is `teacher`, and the map's reference."""
    from extra.scores import gen_ppl
    from extra.success import map_agreement, teacher_among, theory
    judge = None
    if args.what == "success" and args.judge:
        judge = cast_body(load_ar("--judge", args.judge, models[0].meta, None, device))
    teacher = teacher_among(models)
    batch = language.batch(args)
    rows = []
    for model, row, sampled in drawn_rows(args, models, device, batch):
        row |= language.statistics(sampled)
        if model is teacher:
            row["model"] = "teacher"
        if model.can_teach:
            row |= language.exactly(model, device)
        elif not language.is_maze:
            row |= sampling_shown(args, model, row["decode"] == "greedy")
        if judge is not None:
            row |= gen_ppl(judge, sampled, device)
        # one call that turns all of the noise into a sample, as the teacher does in many
        is_map = model.noise_embed is not None and model.n_blocks == 1
        if teacher and is_map and (row["decode"], row["nfe"]) == ("greedy", 1):
            row |= map_agreement(model, teacher, args.n, batch, args.seed, device)
        rows.append(row)
    rows += theory(language, args, teacher)
    return rows


def refuse_heads(models):
    """Refuse Medusa heads, in tables that have nothing to say of them."""
    for model in models:
        if model.drafts:
            raise BadInput(f"--ckpt: {model.name} holds Medusa heads: "
                           "evaluate.py acceptance and genppl measure these")


def sampling_note(args, models):
    """tau and top_p of the students, where these have an effect."""
    shown = {}
    for model in models:
        if not is_reference(model):
            for decode in args.decode:
                found = sampling_shown(args, model, decode == "greedy")
                shown |= {name: value for name, value in found.items() if value is not None}
    return "".join(f"{name} {value}, " for name, value in shown.items())


def sampler_note(args):
    how = ""
    if args.sampler == "fixed":
        how = f", {args.order} order"
    elif args.sampler == "apd":
        how = f", R {args.apd_ratio}, up to {args.max_lookahead} ahead"
    elif args.sampler == "exact":
        how = f" (verifier {args.verifier}, draft {args.draft})"
    elif args.sampler == "remdm":
        how = f", remask {args.remask}"
    if args.drafts > 1:
        how += f", one of {args.drafts} drafts by its probability under {args.verifier}"
    return f"{args.sampler} sampler{how}, {args.weights or 'EMA'} weights."


# ---------------------------------------------------------------------------------------------------------------------
# text

class TextSetting:
    """What the metrics of generated text share, checked: `judge`, `data` (validation text, or None), `length` of a row.

    longest: of rows where no flag says. Raises BadInput.
    """

    def __init__(self, args, models, device, longest=1024, needs_data=False):
        first = models[0]
        if needs_data and not args.data:
            args.data = first.args.get("data")
            if not args.data:
                raise BadInput(f"--data is needed for {first.name}: "
                               "validation text to compare with")
        # a student gives no p(x_i | x_<i)
        self.judge = cast_body(load_model(args.judge, device=device))
        if not self.judge.can_teach:
            raise BadInput(f"--judge={args.judge} is a {self.judge.args['model']} checkpoint: "
                           "it must be an AR model")
        self.length = args.length or min(longest, *(model.length for model in models))
        for model in models:
            if not same_ids(model, first) or model.vocab_size != first.vocab_size:
                raise BadInput(f"--ckpt: {model.name} and {first.name} have different "
                               "vocabularies: compare those of one")
            check_length(self.length, model)
        self.data = None
        if args.data:
            self.data = Shards(args.data, "val", self.length)
            check_vocabulary(f"--data={args.data}: {first.name}", first, self.data.meta)
        # the tokenizers of models and judge, where text must go through both
        self.tokenizer = None
        self.judges_tokenizer = None
        if not same_ids(self.judge, first):
            names = (first.meta["tokenizer"], self.judge.meta["tokenizer"])
            if "ids" in names:
                raise BadInput(f"--judge={args.judge}: it or {first.name} names no tokenizer, so "
                               "neither can read the other's text: use a judge of the same vocabulary")
            self.tokenizer = Tokenizer(names[0], first.vocab_size)
            self.judges_tokenizer = Tokenizer(names[1])
            known = self.judges_tokenizer.chars
            written = self.tokenizer.chars      # None: any
            if known is not None and (written is None or set(written) - set(known)):
                raise BadInput(f"--judge={args.judge} knows no other characters than {known!r:.60}, and {first.name} "
                               "writes others: use a judge of its vocabulary")

    def for_judge(self, rows):
        """Rows of the models' ids -> the judge's ids, through text where the tokenizers differ."""
        if self.tokenizer is None:
            return rows
        return [translate(row, self.tokenizer, self.judges_tokenizer) for row in rows]

    def note(self, args, models):
        text = (f"{self.length - 1} tokens a sample, judge {self.judge.name}; entropy: of the tokens of a "
                "sample (mean), and of the whole set, in nats; distinct-k: of all k-grams.\n"
                f"{sampler_note(args)}")
        if any(model.drafts for model in models):
            text += f" Medusa: {args.accept} acceptance, epsilon {args.epsilon}, delta {args.delta}."
        return text


def same_ids(a, b):
    """Whether the ids of two models mean the same, by all that is known: fingerprints, else the tokenizers' names."""
    same = same_tokenizer(a.meta, b.meta)
    if same is None:
        same = a.meta["tokenizer"] == b.meta["tokenizer"]
    return same


def text_rows(args, models, device, length, start=None):
    """As `drawn_rows`: yields (a row of the table, with the temperature and nucleus, samples [n, length - 1])."""
    for model, row, sampled in drawn_rows(args, models, device, args.batch_size, length, start):
        yield row | sampling_shown(args, model, row["decode"] == "greedy"), sampled


def validation_rows(data, n, seed):
    """n rows of a dataset, the same for a seed, with BOS."""
    order = np.random.default_rng(seed).permutation(len(data))
    return data.rows(order[:n])


def genppl(args, models, device):
    """Generative perplexity of samples under an AR judge, always with their entropy (lower entropy lowers GenPPL)."""
    from extra.scores import gen_ppl, text_facts
    setting = TextSetting(args, models, device)
    drawn = text_rows(args, models, device, setting.length)
    if setting.data:                        # what the data themselves have, to compare with
        real = validation_rows(setting.data, args.n, args.seed)[:, 1:]
        drawn = itertools.chain([(dict(model="data"), real)], drawn)
    rows = []
    for row, sampled in drawn:
        row |= gen_ppl(setting.judge, setting.for_judge(sampled), device)
        rows.append(row | text_facts(sampled))
    return rows, setting.note(args, models)


def infill(args, models, device):
    """GenPPL of the tokens alone that a masked model fills into validation rows: 32 of 128 (Section E.3)."""
    from extra.scores import gen_ppl, text_facts
    setting = TextSetting(args, models, device, longest=128, needs_data=True)
    for model in models:
        if not model.fills_masks:
            raise BadInput(f"--ckpt: {model.name} is a {model.args['model']} checkpoint: "
                           "only masked models fill in")
    if setting.tokenizer is not None:
        raise BadInput(f"--judge={args.judge} has another tokenizer than {models[0].name}: "
                       "it cannot tell which tokens were filled in")
    if args.masked >= setting.length:
        raise BadInput(f"--masked={args.masked} of rows of {setting.length} tokens, BOS included: "
                       "mask fewer, or set --length")
    tokens = torch.from_numpy(validation_rows(setting.data, args.n, args.seed))
    args.n = len(tokens)
    # exactly so many of each row are masked, BOS never; the same ones for every model
    generator = torch.Generator().manual_seed(torch_seed(args.seed, 1))
    u = torch.rand(tokens[:, 1:].shape, generator=generator)
    masked = u.argsort(1).argsort(1) < args.masked                                # (n, L - 1)
    blank = tokens.clone()
    blank[:, 1:][masked] = models[0].mask_id
    real = tokens[:, 1:].numpy()
    masked = masked.numpy()

    # the judge reads whole rows, and scores what was filled in
    data_row = (dict(model="data"), real)
    drawn = text_rows(args, models, device, setting.length, blank)
    rows = []
    for row, filled in itertools.chain([data_row], drawn):
        row |= gen_ppl(setting.judge, filled, device, masked) | text_facts(filled)
        row["recovered"] = float((filled == real)[masked].mean())
        rows.append(row)
    return rows, (f"{args.masked} of {setting.length - 1} tokens masked at random; GenPPL of these "
                  f"alone; recovered: of these, those of the data.\n{setting.note(args, models)}")


def mauve(args, models, device):
    """MAUVE of samples against validation text: mean and standard deviation over 5 runs of k-means (Section D.1)."""
    from extra.scores import last_hidden, mauve_scores, text_facts
    setting = TextSetting(args, models, device, needs_data=True)
    text = validation_rows(setting.data, args.n, args.seed)[:, 1:]
    real = last_hidden(setting.judge, setting.for_judge(text), device)
    if min(args.n, len(real)) < 1000:
        print(f"{args.n} samples against {len(real)} rows: below 1000 MAUVE is too high, and rough",
              file=sys.stderr)
    rows = []
    for row, sampled in text_rows(args, models, device, setting.length):
        features = last_hidden(setting.judge, setting.for_judge(sampled), device)
        scores = mauve_scores(features, real)
        row |= dict(mauve=float(scores.mean()), mauve_std=float(scores.std(ddof=1)))
        rows.append(row | dict(references=len(real)) | text_facts(sampled))
    return rows, (f"{setting.note(args, models)}\nMAUVE against {len(real)} validation rows of "
                  f"{args.data}; ±: standard deviation over 5 seeds of k-means.")


# ---------------------------------------------------------------------------------------------------------------------
# one of these against the number of network calls

# a metric -> the function that measures it, its error's key, what to print: factor, digits, title
METRICS = {
    "success": (success, "stderr", 100, 1, "success %"),
    "gen_ppl": (genppl, "gen_ppl_stderr", 1, 1, "GenPPL"),
    "mauve": (mauve, "mauve_std", 1, 3, "MAUVE"),
}


def metric_of(args, models):
    return args.metric or ("success" if knows_success(models[0].meta) else "gen_ppl")


def nfe(args, models, device):
    """A metric against NFE (Figure 3), one line per model and decoding; runs that differ in their seed are averaged."""
    if args.plot:                           # find out before the work, not after it
        optional("matplotlib", "--plot")
    metric = metric_of(args, models)
    function, error, scale, digits, title = METRICS[metric]
    rows, note = function(args, models, device)
    from extra.plot import nfe_table, plot_nfe
    steps = sorted({row["nfe"] for row in rows if row.get("nfe")})
    table, lines = nfe_table(rows, metric, error, scale, digits)
    if args.plot:
        plot_nfe(args.plot, lines, steps, title)
    columns = dict(model=title, decode="decode")
    columns |= {k: f"NFE {k}" for k in steps} | dict(entropy="entropy")
    note = ("±: over samples (MAUVE: over seeds of k-means), or, where there are runs of several "
            "seeds, their standard deviation.\n" + note)
    return rows, note, columns, {}, table


# ---------------------------------------------------------------------------------------------------------------------
# likelihood

def ppl(args, models, device):
    """Bounds on the data's likelihood: nll of an AR model, NELBO of a plain student, for a Gumbel student ppl_bound."""
    from extra.likelihood import likelihood_table
    refuse_heads(models)
    return likelihood_table(args, models, device)


# ---------------------------------------------------------------------------------------------------------------------
# Medusa

def acceptance(args, models, device):
    """Medusa's drafts, and those of students with a --verifier: what is accepted, speed (Table 3, C.2)."""
    from extra.acceptance import acceptance_table
    return acceptance_table(args, models, device)


# ---------------------------------------------------------------------------------------------------------------------
# flags

def steps_list(text):
    return sorted({number(int, 1, 2**31)(part) for part in text.split(",")})


def decodes(text):
    return listed("--decode", text, ("sample", "greedy"))


def accepts(text):
    return listed("--accept", text, ACCEPT)


def drafts(text):
    from extra.verified import DRAFTS
    return listed("--draft", text, DRAFTS)


def listed(flag, text, choices):
    """The values of a comma list; BadInput where one is not among the choices."""
    values = text.split(",")
    if not set(values) <= set(choices):
        raise BadInput(f"{flag}={text}: a comma list of {', '.join(choices)}")
    return values


def data_flags(parser):
    add = parser.add_argument
    add("--data",
        help="shards: validation text; default: the run's (genppl: none; it adds a row for the text)")
    add("--batch_size", type=number(int, 1, 2**20), default=32, help="rows at once")
    add("--length", type=number(int, 2, 2**20),
        help="tokens of a row, BOS included; default: the shortest of the models', at most 1024 "
        "(acceptance, infill: 128)")


def drawing_flags(parser):
    add = parser.add_argument
    add("--nfe", type=steps_list,
        help="numbers of steps; BD3-LM makes the same number, at least one, in each block")
    add("--decode", type=decodes, help="sample, greedy (argmax), or both")
    add("--samples", default=os.path.join("out", "samples"),
        help="folder to write the samples to; or a .jsonl file from there, to read in place of drawing")


def judge_flags(parser):
    parser.add_argument("--judge", default="gpt2-large",
                        help="AR checkpoint, gpt2[-medium|-large|-xl], hf:NAME")


def success_flags(parser):
    add = parser.add_argument
    add("--data", help="shards of one document a row; default: the first run's")
    add("--split", choices=SPLITS, default="val", help="whose lengths are the data's")
    add("--judge", help="AR checkpoint of the same vocabulary: adds GenPPL")
    add("--batch_size", type=number(int, 1, 2**20), default=1000, help="rows at once")
    add("--no_theory", action="store_true", help="no rows of theory, which take minutes where there is much data")
    add("--particles", type=number(int, 1, 2**20),
        help="adds theory of what the teacher among --ckpt writes, from so many draws of it a row, at least as many as "
        "a row has tokens, as in --particles=64")


def infill_flags(parser):
    parser.add_argument("--masked", type=number(int, 1), default=32, help="tokens of a row to fill in")


def nfe_flags(parser):
    add = parser.add_argument
    add("--metric", choices=METRICS, help="default: success where samples are right or wrong, else gen_ppl")
    add("--plot", help="also draw it into this .png or .svg (needs matplotlib)")


def ppl_flags(parser):
    parser.add_argument("--teacher",
                        help="of students with noise; default: the one that they were trained with")


def acceptance_flags(parser):
    add = parser.add_argument
    add("--prompt_length", type=number(int, 1),
        help="tokens of a prompt, BOS included; default: a quarter of a row (maze: BOS)")
    add("--tau", type=number(float, above=0), default=1.0, help="sampling temperature")
    add("--top_p", type=number(float, above=0, high=1), default=1.0, help="nucleus")
    add("--accept", type=accepts, default=["typical", "exact"],
        help="typical: drafts that are not unlikely; exact: that the backbone would draw; "
        "greedy: its argmax; a comma list")
    add("--verifier", help="of masked students: AR checkpoint or gpt2[-medium|-large|-xl] of their vocabulary")
    add("--draft", type=drafts, default="every,once,never", help="of these: when they draft; a comma list")


# a command -> what measures it, its defaults, the groups of its flags beside --ckpt, --n, --json
DRAWING = [drawing_flags, sampling_flags]
TEXT = [data_flags, *DRAWING, judge_flags, medusa_flags]
COMMANDS = {
    "maze": (success, dict(n=1000, nfe="1,2,4,8,16", decode="sample,greedy"), DRAWING),
    "success": (success, dict(n=1000, nfe="1,2,4,8,16", decode="sample,greedy"), [*DRAWING, success_flags]),
    "genppl": (genppl, dict(n=300, nfe="8,64", decode="sample"), TEXT),
    "mauve": (mauve, dict(n=5000, nfe="8,64", decode="sample"), TEXT),
    "infill": (infill, dict(n=300, nfe="8,32", decode="sample"), [*TEXT, infill_flags]),
    "nfe": (nfe, dict(n=1000, nfe="1,2,4,8,16", decode="sample,greedy"), [*TEXT, nfe_flags]),
    "ppl": (ppl, dict(n=2000), [data_flags, loading_flags, ppl_flags]),
    "acceptance": (acceptance, dict(n=500),
                   [data_flags, loading_flags, acceptance_flags, typical_flags]),
}


def parse(argv=None):
    parser = Parser(description="Evaluate checkpoints.")
    commands = parser.add_subparsers(dest="what", required=True, metavar="|".join(COMMANDS),
                                     parser_class=Parser)
    for name, (function, defaults, groups) in COMMANDS.items():
        sub = commands.add_parser(name, help=function.__doc__.splitlines()[0])
        sub.add_argument("--ckpt", nargs="+", required=True, help="checkpoints or run directories")
        sub.add_argument("--n", type=number(int, 2, 2**31),
                         help="samples per row; acceptance: prompts; infill, ppl: validation rows")
        sub.add_argument("--json", help="also write the rows to this file")
        for add_flags in groups:
            add_flags(sub)
        sub.set_defaults(**defaults)
    return parser.parse_args(argv)


def check_flags(args):
    """Refuse what does not go together, before a model is loaded."""
    if args.json:
        check_output("--json", args.json)
    if args.what == "nfe" and args.plot:
        check_output("--plot", args.plot)
        if not args.plot.endswith((".png", ".svg")):
            raise BadInput(f"--plot={args.plot} must end in .png or .svg")
    if draws_samples(args):
        check_sampling_flags(args)
        if not names_file(args.samples):
            check_folder("--samples", args.samples)


def draws_samples(args):
    _, _, groups = COMMANDS[args.what]
    return drawing_flags in groups


def check_read(args, models):
    """Refuse flags that none of these models reads, or that it cannot have."""
    if args.what == "ppl":
        with_teacher = [model for model in models if model.paired]
        refuse_unread(["teacher"], ["teacher"] if with_teacher else (), "without a student that reads its noise")
    if args.what in ("ppl", "infill"):
        for model in models:
            check_random_masks(model, f"evaluate.py {args.what}")
    if args.what == "acceptance":
        typical = ["epsilon", "delta"] if "typical" in args.accept else ()
        refuse_unread(["epsilon", "delta"], typical, "without --accept=typical")
    if not draws_samples(args):
        return
    students = [model for model in models if not is_reference(model)]
    for model in models:
        if not model.can_teach:             # AR models may stand beside the others: they have none
            check_sampler(args, model)
    counts_success = args.what in ("maze", "success") or args.what == "nfe" and metric_of(args, models) == "success"
    if args.what != "success" and counts_success:          # nothing is judged
        refuse_unread(["judge", "length"], (), "on what is right or wrong")
    read_by_theory = []
    if counts_success:
        from extra.success import check_theory
        read_by_theory = check_theory(args, models)
        if models[0].meta["tokenizer"] == "maze":          # its paths are known, and drawn in batches of 1000
            refuse_unread(["data", "split", "batch_size"], (), "on the maze")
    drawn = [(model, decode == "greedy") for model in students for decode in args.decode]
    check_sampling_read(args, drawn, read_by_theory)
    refuse_unread(["decode"], ["decode"] if students else (), "on a teacher alone")


def main(argv=None):
    args = parse(argv)
    began = time.time()
    check_flags(args)
    device, dtype, autocast = device_and_dtype(args.dtype)
    allow_changing_shapes()
    models = [load_model(path, args.weights, device) for path in args.ckpt]
    if len({model.name for model in models}) < len(models):
        for path, model in zip(args.ckpt, models):
            model.name = path               # run directories of the same name
    check_read(args, models)
    function, _, _ = COMMANDS[args.what]
    # TextSetting may fill in args.data, infill lowers args.n to the rows there are: --json has both
    with autocast, torch.no_grad():
        for model in models:
            cast_body(model)
        rows, note, *table = function(args, models, device)
    report(args, rows, note, *table, began=began, device=device, dtype=dtype)


if __name__ == "__main__":
    run_main(main)
