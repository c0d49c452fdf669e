"""Success: of languages in which every sample can be judged, the maze, words, molecules. `evaluate.py success`.

A new language is a class with the methods of `Maze`, and a line of `language_of`.

Shapes: N rows (or n samples) of T tokens, without BOS; V vocabulary.
"""
import os
import time

import numpy as np
import torch
from tqdm import tqdm

from data.cli import BadInput, refuse_unread, say_once
from data.maze import PAD, ExactDenoiser, maze_dataset, maze_statistics, validity_mass
from data.molecules import canonical, valid_molecules
from data.shards import SPLITS, Shards, knows_success
from data.vocab import Tokenizer
from extra.scores import entropy, up_to_eos
from extra.theory import TeacherDenoiser, theory_rows
from mdlm import SAMPLERS
from sample import check_vocabulary


# ---------------------------------------------------------------------------------------------------------------------
# the languages

def language_of(args, models):
    """The language that these models were trained on. Raises BadInput where they have none, or several: other rows than
    the first's are another language, unless --data says what all are judged by.
    """
    metas = [model.meta for model in models]
    for model in models:
        if not knows_success(model.meta):
            raise BadInput(f"--ckpt: {model.name} was trained on {model.meta['name']}, in which no sample is right or "
                           "wrong: give checkpoints of the maze, of words, molecules or other rows of one document")
    if metas[0]["tokenizer"] == "maze":
        names = {meta["name"] for meta in metas}
        if len(names) > 1:
            raise BadInput(f"--ckpt: these were trained on {', '.join(sorted(names))}: "
                           "give checkpoints of one maze")
        return Maze(metas[0]["name"])
    kind = Molecules if metas[0]["tokenizer"].startswith("smiles:") else Listed
    path = vars(args).get("data")
    language = kind(path or models[0].args["data"], models, vars(args).get("split", "val"))
    if not path:
        language.check_trained_on(models)
    return language


class Maze:
    """The maze's paths; see data/maze.py."""
    is_maze = True

    def __init__(self, name):
        self.name = name

    def batch(self, args):
        """How many samples are drawn at once."""
        return 1000

    def theory(self, args):
        """The perfect noise-blind denoiser of the training data; how many samples it draws; its sampler and order."""
        return ExactDenoiser(maze_dataset(self.name), PAD + 1), 10 * args.n, *theory_sampler(args, self.is_maze)

    def note(self, args, rows):
        """What the table's columns, and its rows of theory, mean."""
        of_theory = ""
        if has_row(rows, "theory"):
            sampler, order = theory_sampler(args, self.is_maze)
            how = f", {order} order" if sampler == "fixed" else ""
            of_theory = f" ({10 * args.n} for theory: the perfect noise-blind MDLM, {sampler} sampler{how})"
        return (f"n = {args.n} samples a row{of_theory}. "
                f"effective: number of equally likely paths that would repeat as often.{teacher_note(rows)}")

    def exactly(self, model, device):
        """What is known exactly of an AR model -> columns."""
        return dict(validity_mass=validity_mass(model, device))

    def statistics(self, rows):
        return maze_statistics(rows)


class Listed:
    """Rows of one document, padded with EOS: success is a row of the data, those held out included."""
    is_maze = False

    def __init__(self, path, models, split="val"):
        """path: the folder of shards that the models were trained on; split: whose lengths are the data's."""
        self.name = path
        self.rows = {}
        self.hashes = []
        for name in SPLITS:                                # `text --rows` has no test split
            data = Shards(path, name, may_be_empty=True)
            self.rows[name] = data.rows(np.arange(len(data)))[:, 1:]
            if name != "test":                             # a checkpoint knows what it was trained and validated on
                self.hashes += data.hashes()
        self.meta = data.meta
        self.eos = data.meta["bos"]
        self.tokenizer = Tokenizer(data.meta["tokenizer"])
        for model in models:
            check_vocabulary(f"--data={path}: {model.name}", model, data.meta)
        if not data.meta.get("padded") or not len(self.rows[split]):
            raise BadInput(f"--data={path} has no {split} rows of one document each: give the data that the models "
                           "were trained on")
        for model in models:
            length = model.meta["row_length"]
            if length != data.meta["row_length"]:
                raise BadInput(f"{model.name} was trained on rows of {length} tokens, those of --data={path} have "
                               f"{data.meta['row_length']}: give data and checkpoints of one length")
        self.data_lengths, _ = lengths_of(self.rows[split], self.eos)
        self.in_training = set(keys_of(self.rows["train"]))
        self.held_out = set(keys_of(self.rows["val"]) + keys_of(self.rows["test"])) - self.in_training

    def check_trained_on(self, models):
        """BadInput for a model of other rows than these. If the first model is its teacher, they may be the teacher's
        text: it is judged, and a line on stderr says by what.
        """
        for model in models:
            shards = (vars(model).get("conditions") or {}).get("shards")
            if shards:
                same = shards == self.hashes
            else:                                          # an old checkpoint knows the name alone
                same = model.meta["name"] == self.meta["name"]
            teacher = model.args.get("teacher")
            is_taught = teacher is not None and os.path.normpath(teacher) == os.path.normpath(models[0].path)
            if not same and is_taught:
                say_once(f"{model.name} was trained on {model.args['data']}: it is judged by {self.name}, the data of "
                         "its teacher")
            elif not same:
                raise BadInput(f"--ckpt: {model.name} was trained on other rows than {self.name} holds now: say with "
                               "--data what all are judged by")

    def batch(self, args):
        return vars(args).get("batch_size") or 1000

    def theory(self, args):
        denoiser = ExactDenoiser(self.rows["train"], self.eos + 1, otherwise="marginals")
        return denoiser, args.n, *theory_sampler(args, self.is_maze)

    def note(self, args, rows):
        text = f"n = {args.n} samples a row. At the data's lengths: success if samples were as long as the data. "
        if args.n >= 1000:
            text += "distinct per 1000: different successes in a thousand samples. "
        text += f"entropy of the set: of all tokens up to the first EOS. {self.about_novelty()}"
        if has_row(rows, "theory"):
            text += ("\ntheory: the perfect noise-blind denoiser of the training data, for draws at tau 1 and top_p 1 "
                     "in the same order: no bound for sharper decoding.")
        return text + teacher_note(rows)

    def exactly(self, model, device):
        return {}

    def statistics(self, rows):
        """Samples [n, T] -> the columns of their row in the table, as a dict."""
        n = len(rows)
        keys = keys_of(rows)
        lengths, ends_well = lengths_of(rows, self.eos)
        ok = ends_well & self.accepts(rows, keys)
        right = [key for key, is_right in zip(keys, ok) if is_right]
        p = ok.mean()
        found = dict(n=n, success=float(p), stderr=float(np.sqrt(p * (1 - p) / n)),
                     success_by_length=self.standardised(lengths, ok), distinct=len(set(right)))
        found |= per_1000([key if is_right else None for key, is_right in zip(keys, ok)])
        tokens = rows[up_to_eos(rows, self.eos)]
        found |= dict(entropy_set=entropy(tokens), mean_length=float(lengths.mean()))
        return found | self.novelty(right)

    def accepts(self, rows, keys):
        """Whether each of rows [n, T], whose ends are right, is of the language -> [n] bool. keys: `keys_of` them."""
        return self.in_data(keys)

    def in_data(self, keys):
        """Which of these keys are rows of the data, held out or not -> [n] bool."""
        return np.array([key in self.in_training or key in self.held_out for key in keys], dtype=bool)

    def standardised(self, lengths, ok):
        """Success if samples had the data's lengths: sum over l of P_data(l) success(l); 0 where no sample is so long.

        So success that is bought by shorter texts, which are easier, shows.
        """
        total = 0.0
        for length, count in zip(*np.unique(self.data_lengths, return_counts=True)):
            of_length = lengths == length
            if of_length.any():
                total += count / len(self.data_lengths) * ok[of_length].mean()
        return float(total)

    def about_novelty(self):
        """A sentence on what `novelty` counts."""
        share = len(self.held_out) / (len(self.held_out) + len(self.in_training))
        return (f"held out: of the successes, those that no training row has ({100 * share:.1f} % of the data's "
                "different rows).")

    def novelty(self, right):
        """What of the successes, a list of keys, no model has seen -> columns."""
        held_out = sum(key in self.held_out for key in right)
        return dict(held_out=held_out / len(right) if right else None)


class Molecules(Listed):
    """SMILES strings: success is a molecule; see data/molecules.py."""

    def accepts(self, rows, keys):
        return valid_molecules([self.tokenizer.decode(row) for row in rows])

    def about_novelty(self):
        return ("in the data: of the successes, those of QM9, which lists nearly all molecules of its kind: others are "
                "new, and no better for it.")

    def novelty(self, right):
        """QM9 is close to a list of all molecules of its kind: one that is not in it is no merit."""
        found = dict(in_data=float(self.in_data(right).mean()) if right else None)
        forms = canonical([self.tokenizer.decode(np.frombuffer(key, dtype=np.int64)) for key in right])
        if forms is not None:
            found["canonical"] = len(set(forms))
        return found


def keys_of(rows):
    """Rows [n, T] -> a list of their bytes, to compare and count."""
    return [row.tobytes() for row in np.ascontiguousarray(rows, dtype=np.int64)]


def lengths_of(rows, eos):
    """Rows [n, T] -> (the tokens before the first EOS [n], whether nothing but EOS follows it [n] bool)."""
    is_eos = rows == eos
    after = is_eos.cumsum(1) > 0            # from the first EOS on
    return (~after).sum(1), (is_eos == after).all(1)


def per_1000(keys):
    """How many distinct keys a thousand samples have, None not counted, with its standard error: the mean over whole
    thousands, so that it does not depend on how many there are. What is above them is not used; of less than a
    thousand samples nothing is said, of less than two thousand no error.
    """
    counts = []
    for a in range(0, len(keys) - 999, 1000):
        counts.append(len(set(keys[a:a + 1000]) - {None}))
    if not counts:
        return {}
    found = dict(distinct_per_1000=float(np.mean(counts)))
    if len(counts) > 1:
        found["distinct_per_1000_stderr"] = float(np.std(counts, ddof=1) / np.sqrt(len(counts)))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# theory, and the map from noise to text

def theory_sampler(args, is_maze):
    """The sampler and order of theory, those of the flags; None where there is no theory.

    It knows the draws of `mdlm.reveal_steps` alone. With other samplers the maze's stands beside them as a reference.
    """
    if vars(args).get("no_theory"):
        return None
    if args.sampler in SAMPLERS and args.order != "confidence":
        return args.sampler, args.order
    return ("ancestral", "random") if is_maze else None


def check_theory(args, models):
    """Refuse --particles that theory does not use, or cannot, before samples are drawn. Raises BadInput.

    -> the flags of sampling that theory reads.
    """
    how = theory_sampler(args, models[0].meta["tokenizer"] == "maze")
    particles = vars(args).get("particles")
    if particles:
        reason = "with --no_theory" if args.no_theory else "where the sampler, or its order, has no theory"
        refuse_unread(["particles"], ["particles"] if how else (), reason)
        teacher = teacher_among(models)
        if teacher is None:
            raise BadInput(f"--particles={particles} are the teacher's: give an AR checkpoint with --ckpt, too")
        n_tokens = teacher.length - 1
        if particles < n_tokens:                           # each position of a call takes its token from its own
            raise BadInput(f"--particles={particles} is less than the {n_tokens} tokens of a row, which one call may "
                           f"reveal: give {n_tokens} or more")
    read = []
    if how == (args.sampler, args.order):                  # not the maze's reference beside other samplers
        read += ["sampler", "order"]
    if how and how[0] != "first_hitting":                  # which takes a call for each token
        read.append("nfe")
    return read


def teacher_among(models):
    """The first AR model of these, which stands for what students learn from; None where there is none."""
    return next((model for model in models if model.can_teach), None)


def has_row(rows, name):
    """Whether the table has a row of this model."""
    return any(row["model"] == name for row in rows)


def teacher_note(rows):
    """What theory of the teacher is, where there is any."""
    if not has_row(rows, "theory_teacher"):
        return ""
    return ("\ntheory_teacher: the perfect noise-blind denoiser of what the teacher writes, drawn from as theory is. "
            "particles: different draws behind a token of it; its error is of the order of their inverse, beside ±.")


def theory(language, args, teacher):
    """The rows of the perfect noise-blind denoisers, of the training data and, with --particles, of what the teacher
    writes; [] where the sampler has no theory.
    """
    if theory_sampler(args, language.is_maze) is None:
        return []
    exact, n, sampler, order = language.theory(args)
    particles = vars(args).get("particles")

    def of_teacher():
        generator = torch.Generator(teacher.device).manual_seed(args.seed)
        return TeacherDenoiser(teacher, particles, generator)

    denoisers = dict(theory=lambda: exact)                 # a row's name -> makes its denoiser
    if particles:
        denoisers["theory_teacher"] = of_teacher
    rows = []
    for name, new_denoiser in denoisers.items():
        steps_of_rows = args.nfe
        if sampler == "first_hitting":                     # a call for each token, whatever --nfe is
            steps_of_rows = [new_denoiser().length]
        for steps in tqdm(steps_of_rows, desc=name, unit="row", disable=None):
            denoiser = new_denoiser()
            began = time.perf_counter()
            sampled, calls = theory_rows(denoiser, n, steps, args.seed, sampler, order)
            row = dict(model=name, decode="sample", nfe=steps, nfe_counted=calls, **language.statistics(sampled))
            if name == "theory_teacher":
                row["particles"], row["fewest_particles"] = denoiser.effective()
            if not language.is_maze:
                row["seconds"] = time.perf_counter() - began
            rows.append(row)
    return rows


def map_agreement(student, teacher, n, batch, seed, device):
    """With fresh noise and everything masked: how often the student's argmax is what the teacher writes from it.

    n rows, `batch` at once. -> {agree: fraction of sequences, agree_position: fraction of positions}.
    """
    generator = torch.Generator(device).manual_seed(seed)
    same = []
    for done in range(0, n, batch):
        start = student.start(min(batch, n - done), teacher.length).to(device)
        noise = student.fresh_noise(start.shape, generator, device)
        tokens, _ = teacher.generate(start[:, :1], teacher.length, noise=noise)
        written, _ = student.generate(start, 1, greedy=True, noise=noise)
        same.append((written == tokens)[:, 1:])            # BOS is given
    same = torch.cat(same)
    return dict(agree=float(same.all(1).float().mean()), agree_position=float(same.float().mean()))
