"""The tests of words, molecules and other rows of one document: their data, what success is, and the table."""
import csv
import importlib.util
import itertools
import json
import sys

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

import evaluate
import sample
import train
from data import molecules, prepare, words
from data.batches import mask_suffixes
from data.shards import Shards, read_meta
from data.vocab import Tokenizer
from extra import front, noise_use, scores, success
from test_gumbel import evaluated, gen, randomise, refused, succeeded, tiny, tiny_ar
from test_gumbel import cli, in_maze_runs, runs  # noqa: F401, fixtures

SHAPE = ("--n_layer=1 --n_embd=16 --n_head=2 --batch_size=16 --warmup=2 --log_every=1 --eval_every=4 --eval_rows=20 "
         "--steps=4 --save_every=2")
WORDS = sorted({"".join(p) for n in (3, 4, 5) for p in itertools.product("abt", repeat=n) if "aa" not in "".join(p)})


@pytest.fixture
def word_runs(tmp_path, cli, monkeypatch):
    """A folder with data/words, made of WORDS, and networks that were trained on it for a few steps."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.txt").write_text("\n".join([*WORDS, "Anna", "it's", "at", "abstractedly", "abbot", "", "x1y"]))
    succeeded(cli(prepare, "words --files list.txt"))
    succeeded(cli(train, f"--model=ar --data=words --report=0 {SHAPE}"))
    succeeded(cli(train, f"--model=mdlm --gumbel --data=words --mask_suffix=0 --report=0 {SHAPE}"))
    return tmp_path


# ---------------------------------------------------------------------------------------------------------------------
# rows of one document

def texts(path, split):
    """The texts of a split, decoded: what stands before the first EOS of each row."""
    data = Shards(str(path), split)
    tokenizer = Tokenizer(data.meta["tokenizer"])
    return [tokenizer.decode(row) for row in data.rows(np.arange(len(data)))]


def test_words_are_lower_case_distinct_and_split_in_three(tmp_path, cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("\n".join([*WORDS, WORDS[0], "Anna", "it's", "at", "abbreviation"]))
    _, err = succeeded(cli(prepare, "words --files a.txt"))
    parts = {split: texts("data/words", split) for split in ("train", "val", "test")}
    assert sorted(itertools.chain(*parts.values())) == WORDS
    assert len(parts["val"]) == len(parts["test"]) == round(len(WORDS) / 20)
    meta, _ = read_meta("data/words")
    assert (meta["vocab_size"], meta["bos"], meta["row_length"], meta["padded"]) == (27, 26, 11, True)
    rows = Shards("data/words", "train").rows(np.arange(3))
    assert rows.shape == (3, 12) and (rows[:, 0] == 26).all()
    succeeded(cli(prepare, "verify data/words"))


def test_words_need_a_list(tmp_path, cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(words, "SYSTEM_LIST", "/nowhere/words")
    refused(cli(prepare, "words"), "/nowhere/words", "--files")
    (tmp_path / "few.txt").write_text("abc\nabd\n")
    refused(cli(prepare, "words --files few.txt"), "--files", "2 rows")


def test_rows_of_text_hold_a_document_each(tmp_path, cli, monkeypatch):
    """Longer ones are left out, however long, and counted; EOS fills the rest; a row may be full."""
    monkeypatch.chdir(tmp_path)
    lines = [f"line {i}" for i in range(40)] + ["x" * 11, "y" * 12, "long " * 600_000]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    _, err = succeeded(cli(prepare, "text --files a.txt --rows=11 --tokenizer=bytes --out=rows"))
    assert "of more than 11 tokens: 2 documents" in err and "block" not in err
    found = texts("rows", "train") + texts("rows", "val")
    assert sorted(found) == sorted(lines[:41])
    meta, _ = read_meta("rows")
    assert meta["row_length"] == 11 and meta["padded"]
    _, err = succeeded(cli(prepare, "text --files a.txt --rows=16 --tokenizer=bytes --out=rows16"))
    assert "no block size" in err                          # 17 is prime


def test_a_long_documents_last_piece_is_no_row():
    rows = prepare.Rows(5, eos=9)
    assert len(rows.padded(np.array([1, 2]), ends=False)) == 0
    assert len(rows.padded(np.array([3]), ends=True)) == 0
    assert rows.padded(np.array([4]), ends=True).tolist() == [4, 9, 9, 9, 9]
    assert rows.n_longer == 1


def test_rows_bring_their_length(word_runs, cli):
    """No --length is needed for data that is cut: neither to train on it, nor on a teacher's text."""
    succeeded(cli(sample, "--ckpt=out/words-ar --shards=data/written --n=40 --batch_size=20"))
    meta, _ = read_meta("data/written")
    assert meta["row_length"] == 11 and meta["padded"]
    succeeded(cli(train, f"--model=mdlm --data=data/written {SHAPE} --report=0 --out=out/kd"))
    refused(cli(train, f"--model=mdlm --data=words {SHAPE} --length=20 --out=out/no"), "--length=20", "--length=12")
    refused(cli(train, f"--model=bd3lm --block_size=5 --data=words {SHAPE} --out=out/no"), "block_size 5", "12")


# ---------------------------------------------------------------------------------------------------------------------
# molecules

def test_smiles_tokens():
    assert molecules.smiles_tokens("C[NH3+]%12BrCCl@@") == ["C", "[NH3+]", "%12", "Br", "C", "Cl", "@@"]
    tokenizer = Tokenizer("smiles:( ) 1 = Br C [NH3+]")
    assert (tokenizer.vocab_size, tokenizer.bos) == (8, 7)
    ids = tokenizer.encode(["BrC(=C)[NH3+]"])[0]
    assert ids.tolist() == [4, 5, 0, 3, 5, 1, 6]
    assert tokenizer.decode([*ids, 7, 7]) == "BrC(=C)[NH3+]"
    with pytest.raises(prepare.BadInput, match="'N'"):
        tokenizer.encode(["CN"])
    assert tokenizer.fingerprint() != Tokenizer("smiles:( ) 1 = Br [NH3+] C").fingerprint()


# from the README of partialsmiles: syntax, ring openings, valence, kekulisation
INVALID = ["", "CC(", "C)", "C1CC", "C(C)(C)(C)(C)C", "O=O=O", "c1cc1", "[N", "C==C", "N(C)(C)(C)(C)C"]


def test_valid_molecules():
    pytest.importorskip("partialsmiles", reason="pip install partialsmiles")
    good = ["C", "CC(=O)O", "C1CC1", "c1ccccc1", "[NH4+]", "C#N", "OC1=NC=CO1"]
    assert molecules.valid_molecules(good + INVALID).tolist() == [True] * len(good) + [False] * len(INVALID)


def test_canonical_forms():
    pytest.importorskip("rdkit", reason="pip install rdkit")
    forms = molecules.canonical(["OCC", "CCO", "C(O)C", "C1CC1"])
    assert len(set(forms)) == 2


@pytest.fixture
def molecule_data(tmp_path, cli, monkeypatch):
    """data/molecules, made of a package that looks like qm9pack."""
    monkeypatch.chdir(tmp_path)
    strings = ["C" * n + end for n in range(1, 15) for end in ("", "O", "N", "=C", "#N", "(C)C", "(O)C", "1CC1")]
    strings = [text for text in strings if not text.startswith("C=") or len(text) > 2]
    folder = tmp_path / "qm9pack/data"
    folder.mkdir(parents=True)
    (tmp_path / "qm9pack/__init__.py").write_text("raise ImportError('pandas')")
    for i, name in enumerate(molecules.QM9_FILES):
        with open(folder / name, "w", newline="") as f:
            writer = csv.writer(f)
            writer.writerow(["Index", "SMILES"])
            writer.writerows([k, text] for k, text in enumerate(strings[i::3]))
    monkeypatch.syspath_prepend(tmp_path)
    succeeded(cli(prepare, "molecules"))
    return strings


def test_molecules_are_read_where_the_package_lies(molecule_data, cli, tmp_path, monkeypatch):
    parts = [texts("data/molecules", split) for split in ("train", "val", "test")]
    assert sorted(itertools.chain(*parts)) == sorted(set(molecule_data))
    (tmp_path / "mine.smi").write_text("\n".join(f"{text} name{i}" for i, text in enumerate(molecule_data)))
    succeeded(cli(prepare, "molecules --files mine.smi --out=data/mine"))
    assert texts("data/mine", "val") and read_meta("data/mine")[0]["row_length"] == 23
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(cli(prepare, "molecules --out=data/other"), "qm9pack", "--files")


def test_what_judges_molecules_is_missed_before_training(molecule_data, cli, monkeypatch):
    monkeypatch.setitem(sys.modules, "partialsmiles", None)
    refused(cli(train, f"--model=ar --data=molecules {SHAPE}"), "partialsmiles", "--report")
    succeeded(cli(train, f"--model=ar --data=molecules --report=0 {SHAPE}"))
    refused(cli(evaluate, "success --ckpt out/molecules-ar --n=10"), "partialsmiles")


# ---------------------------------------------------------------------------------------------------------------------
# what success is, and what stands beside it

def language(kind, rows, held_out, names):
    """A language of these rows, without files."""
    made = kind.__new__(kind)
    made.eos = 3
    made.rows = dict(train=np.array(rows))
    made.data_lengths, _ = success.lengths_of(made.rows["train"], made.eos)
    made.in_training = set(success.keys_of(rows))
    made.held_out = set(success.keys_of(held_out))
    made.tokenizer = Tokenizer(names)
    return made


ROWS = np.array([[0, 3, 3, 3], [1, 3, 3, 3], [0, 1, 3, 3], [0, 1, 2, 2]])


def test_success_on_listed_rows_is_its_definition():
    """A token after an EOS is a failure; a row without EOS may be right; held-out rows are right, and counted."""
    words_here = language(success.Listed, ROWS[:3], ROWS[3:], "chars:abt")
    sampled = np.array([[0, 3, 3, 3], [0, 3, 3, 3], [0, 3, 1, 3], [0, 1, 3, 3],
                        [0, 1, 2, 2], [2, 2, 3, 3], [3, 3, 3, 3], [1, 1, 1, 1]])
    found = words_here.statistics(sampled)
    assert found["success"] == 4 / 8 and found["distinct"] == 3 and found["held_out"] == 1 / 4
    assert "distinct_per_1000" not in found                # it would depend on how few there are
    assert found["mean_length"] == (1 + 1 + 1 + 2 + 4 + 2 + 0 + 4) / 8
    # lengths of the data: two of 1, one of 2. Of samples of length 1 two of three are right, of length 2 one of two
    assert found["success_by_length"] == pytest.approx(2 / 3 * 2 / 3 + 1 / 3 * 1 / 2)
    tokens = np.array([0, 3, 0, 3, 0, 3, 0, 1, 3, 0, 1, 2, 2, 2, 2, 3, 3, 1, 1, 1, 1])
    p = np.bincount(tokens) / len(tokens)
    assert found["entropy_set"] == pytest.approx(-(p * np.log(p)).sum())
    nothing = words_here.statistics(sampled[-2:])
    assert nothing["success"] == 0 and nothing["held_out"] is None


def test_distinct_per_1000_does_not_depend_on_how_many_there_are():
    keys = [i % 300 for i in range(4000)]
    found = success.per_1000(keys)
    assert found == dict(distinct_per_1000=300.0, distinct_per_1000_stderr=0.0)
    assert success.per_1000(keys[:1999]) == dict(distinct_per_1000=300)
    assert success.per_1000([None, *keys[:999]]) == dict(distinct_per_1000=300)
    assert success.per_1000(keys[:999]) == {}
    halves = [i if i < 1000 else None for i in range(2000)]
    assert success.per_1000(halves)["distinct_per_1000_stderr"] == pytest.approx(500)


def test_judge_of_one_document_counts_the_first_eos():
    """Else words that stop anywhere would look good; a judge of text drops every EOS, as METHOD 8 has it."""
    judge = randomise(tiny_ar()).eval()
    eos = judge.bos
    row = np.array([1, 2, eos, eos, 1, eos])
    with torch.no_grad():
        logp = judge.log_probs(torch.tensor([[eos, *row]]))[0].gather(-1, torch.tensor(row)[:, None])[:, 0]
    for padded, counted in ((None, [0, 1, 4]), (True, [0, 1, 2])):
        judge.meta = dict(padded=padded)
        nats, count = scores.judge_nll(judge, [row], "cpu")
        assert count[0] == 3 and nats[0] == pytest.approx(-float(logp[counted].sum()), rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# the table

def test_table_of_words(word_runs, cli):
    """The first teacher is `teacher`; a run finds it, and starts from its weights, by itself."""
    args = torch.load("out/words-mdlm-gumbel/ckpt.pt", weights_only=True)["args"]
    assert args["init_from"] == "teacher" and args["lr"] == 3e-3 and args["length"] is None
    flags = "success --ckpt out/words-ar out/words-mdlm-gumbel --n=40 --nfe=1,3 --judge=out/words-ar"
    rows, out, _ = evaluated(cli, flags, "rows.json")
    assert [(row["model"], row["decode"], row["nfe"]) for row in rows[:5]] == [
        ("teacher", "sample", 11), ("words-mdlm-gumbel", "sample", 1), ("words-mdlm-gumbel", "sample", 3),
        ("words-mdlm-gumbel", "greedy", 1), ("words-mdlm-gumbel", "greedy", 3)]
    for row in rows[:5]:
        assert {"success_by_length", "distinct", "held_out", "entropy_set", "mean_length", "gen_ppl", "nfe_counted",
                "seconds"} <= row.keys()
    assert "agree" in rows[3] and "distinct per 1000" not in out
    assert [(row["model"], row["nfe"]) for row in rows[5:]] == [("theory", 1), ("theory", 3)]
    flags = "success --ckpt out/words-ar out/words-mdlm-gumbel --n=10 --decode=greedy --nfe=2"
    more = "--particles=12 --sampler=fixed --order=left_to_right"
    rows, out, _ = evaluated(cli, f"{flags} {more}", "rows.json")
    assert [row["model"] for row in rows[2:]] == ["theory", "theory_teacher"]
    assert 1 <= rows[3]["fewest_particles"] <= rows[3]["particles"] <= 12
    assert "\ntheory: " in out and "\ntheory_teacher: " in out
    rows, out, _ = evaluated(cli, f"{flags} --no_theory", "rows.json")
    assert len(rows) == 2 and "theory" not in out
    out, _ = succeeded(cli(evaluate, "nfe --ckpt out/words-mdlm-gumbel --n=20 --nfe=1,2"))
    assert "success %" in out


def test_an_infilled_word_ends_where_its_text_ends(word_runs, cli):
    model = sample.load_model("out/words-mdlm-gumbel")
    row = sample.start_tokens(model, Tokenizer(model.meta["tokenizer"]), None, "a[MASK][MASK]b", 12)
    a, mask, b = 0, model.mask_id, 1
    assert row.tolist() == [[model.bos, a, mask, mask, b] + [model.bos] * 7]
    out, _ = succeeded(cli(sample, "--ckpt=out/words-mdlm-gumbel --infill=a[MASK][MASK]b --n=2 --steps=2 --greedy"))
    assert out.count("a") >= 2


def test_table_refuses_what_has_no_success(word_runs, cli):
    refused(cli(evaluate, "success --ckpt out/words-mdlm-gumbel --data=list.txt"), "list.txt")
    (word_runs / "b.txt").write_text("\n".join("one two three four".split() * 20))
    succeeded(cli(prepare, "text --files b.txt --separator=\\n --tokenizer=bytes --out=data/text"))
    succeeded(cli(train, f"--model=mdlm --data=data/text --length=8 {SHAPE}"))
    refused(cli(evaluate, "success --ckpt out/text-mdlm"), "text-mdlm", "words")
    refused(cli(evaluate, "success --ckpt out/words-mdlm-gumbel out/text-mdlm"), "text-mdlm")
    refused(cli(evaluate, "success --ckpt out/words-mdlm-gumbel --data=data/text"), "data/text")
    flags = f"--model=mdlm --data=data/text --length=8 --init_from=teacher --out=out/no {SHAPE}"
    refused(cli(train, flags), "--init_from", "--teacher")


def test_particles_are_refused_before_samples_are_drawn(word_runs, cli):
    both = "success --ckpt out/words-ar out/words-mdlm-gumbel --n=10 --particles=12"
    refused(cli(evaluate, f"{both} --no_theory"), "--particles=12", "--no_theory")
    refused(cli(evaluate, f"{both} --sampler=remdm --remask=0.1"), "--particles=12", "sampler")
    refused(cli(evaluate, f"{both} --sampler=fixed --order=confidence"), "--particles=12", "order")
    refused(cli(evaluate, "success --ckpt out/words-mdlm-gumbel --n=10 --particles=12"), "--particles=12", "AR")
    # fewer than tokens: those of one call would come from the same draw, and fit together
    refused(cli(evaluate, "success --ckpt out/words-ar --n=10 --particles=10"), "--particles=10", "11")
    assert not (word_runs / "out/samples").exists()


def test_a_teacher_alone_has_theory_in_the_order_asked_for(word_runs, cli):
    """The sampler and its order are theory's, where no student is drawn from."""
    flags = "success --ckpt out/words-ar --n=1000 --nfe=3 --sampler=fixed"
    rows = {}
    for order in ("random", "left_to_right"):
        rows[order], _, _ = evaluated(cli, f"{flags} --order={order}", "rows.json")
        assert [(row["model"], row["nfe"]) for row in rows[order]] == [("teacher", 11), ("theory", 3)]
    assert rows["random"][1]["success"] != rows["left_to_right"][1]["success"]
    refused(cli(evaluate, f"{flags} --tau=0.5"), "--tau=0.5")


def test_one_token_a_call_has_one_row_of_theory(word_runs, cli):
    flags = "success --ckpt out/words-ar out/words-mdlm-gumbel --n=10 --decode=greedy --sampler=first_hitting"
    rows, _, _ = evaluated(cli, f"{flags} --particles=11", "rows.json")
    assert [(row["model"], row["nfe"], row["nfe_counted"]) for row in rows] == [
        (name, 11, 11) for name in ("teacher", "words-mdlm-gumbel", "theory", "theory_teacher")]
    refused(cli(evaluate, f"{flags} --nfe=1,3"), "--nfe=1,3")


def test_theory_of_the_maze_is_of_the_sampler_where_it_can_be(in_maze_runs, cli, tmp_path):
    """Other samplers have the ancestral one beside them, and the note says which it is."""
    flags = "maze --ckpt out/maze-mdlm --n=20 --decode=greedy"
    for more, named, calls in (("--nfe=4", "ancestral sampler)", None), ("--nfe=1,4 --sampler=remdm --remask=0.1",
                               "ancestral sampler)", None), ("--sampler=first_hitting", "first_hitting sampler)", 10),
                               ("--nfe=4 --sampler=fixed --order=left_to_right",
                                "fixed sampler, left_to_right order)", 4)):
        rows, out, _ = evaluated(cli, f"{flags} {more}", tmp_path / "rows.json")
        assert rows[-1]["model"] == "theory" and f"200 for theory: the perfect noise-blind MDLM, {named}" in out
        assert calls in (None, rows[-1]["nfe_counted"])
    _, out, _ = evaluated(cli, f"success {flags[5:]} --nfe=4 --no_theory", tmp_path / "rows.json")
    assert "theory" not in out


def test_flags_that_the_maze_does_not_read(in_maze_runs, cli):
    for flag in ("--data=data/maze", "--split=train", "--batch_size=7"):
        refused(cli(evaluate, f"success --ckpt out/maze-mdlm --n=10 {flag}"), flag, "maze")
    for flag in ("--data=data/maze", "--batch_size=7"):
        refused(cli(evaluate, f"nfe --ckpt out/maze-mdlm --n=10 {flag}"), flag, "maze")


def test_models_of_other_rows_are_not_judged_by_the_first_ones(word_runs, cli):
    """Unless they were trained on its text, or --data says so; a copy of the rows is the same rows."""
    (word_runs / "b.txt").write_text("\n".join(word for word in WORDS if word[0] != "t"))
    succeeded(cli(prepare, "words --files b.txt --out=data/b"))
    succeeded(cli(train, f"--model=mdlm --data=b --report=0 {SHAPE} --out=out/b"))
    both = "success --ckpt out/words-ar out/b --n=10 --nfe=1 --no_theory"
    refused(cli(evaluate, both), "b was trained on other rows than data/words", "--data")
    succeeded(cli(evaluate, f"{both} --data=data/words"))
    succeeded(cli(evaluate, "success --ckpt out/b --n=10 --nfe=1 --no_theory"))
    checkpoint = torch.load("out/b/ckpt.pt", weights_only=True)
    del checkpoint["conditions"]                           # an old one has its data's name alone
    torch.save(checkpoint, "out/b/ckpt.pt")
    refused(cli(evaluate, both), "--data")

    succeeded(cli(sample, "--ckpt=out/words-ar --shards=data/written --n=40 --batch_size=20"))
    student = f"--model=mdlm --gumbel --data=written --teacher=out/words-ar {SHAPE} --report=10 --out=out/kd"
    _, err = succeeded(cli(train, student))                # the table of the run is such a one
    assert "kd was trained on data/written: it is judged by data/words" in err

    succeeded(cli(prepare, "words --files list.txt --out=data/copy"))
    succeeded(cli(train, f"--model=mdlm --data=copy --report=0 {SHAPE} --out=out/copy"))
    succeeded(cli(evaluate, "success --ckpt out/words-ar out/copy --n=10 --nfe=1 --no_theory"))


def test_models_of_other_lengths_are_refused(word_runs, cli):
    succeeded(cli(prepare, "text --files list.txt --rows=14 --tokenizer=chars --out=data/longer"))
    succeeded(cli(prepare, "text --files list.txt --rows=15 --tokenizer=chars --out=data/longest"))
    succeeded(cli(train, f"--model=mdlm --data=longer --report=0 {SHAPE} --out=out/longer"))
    refused(cli(evaluate, "success --ckpt out/longer --data=data/longest --n=10"), "longer", "14", "15")


def test_the_note_has_the_share_that_is_held_out(word_runs, cli):
    """Of the different rows: a tenth of words, as much of other rows as --val_fraction says."""
    succeeded(cli(prepare, "text --files list.txt --rows=14 --tokenizer=chars --val_fraction=0.5 --out=data/half"))
    succeeded(cli(train, f"--model=ar --data=half --report=0 {SHAPE} --out=out/half"))
    for name, run, splits, wanted in (("words", "words-ar", ["val", "test"], 10), ("half", "half", ["val"], 50)):
        training = {*texts(f"data/{name}", "train")}
        every = training.union(*(texts(f"data/{name}", split) for split in splits))
        share = 100 * (1 - len(training) / len(every))
        out, _ = succeeded(cli(evaluate, f"success --ckpt out/{run} --n=10 --no_theory"))
        assert f"({share:.1f} % of the data's different rows)" in out and abs(share - wanted) < 1


@pytest.mark.parametrize("noise", ["gumbel", "quantile"])
def test_map_agreement_is_that_of_one_batch(noise):
    teacher = randomise(tiny_ar()).eval()
    student = randomise(tiny(L=teacher.length, noise=noise)).eval()
    whole = success.map_agreement(student, teacher, 25, 25, 3, "cpu")
    assert success.map_agreement(student, teacher, 25, 10, 3, "cpu") == whole and 0 < whole["agree_position"] < 1


def test_best_at_an_entropy_lies_between_the_points():
    curve = [(2.0, 10), (1.6, 20), (1.2, 90), (0.4, 5)]
    assert [front.best_at(curve, entropy) for entropy in (1.6, 1.4, 1.8, 0.1)] == pytest.approx([20, 55, 15, 90])
    assert front.best_at(curve, 2.1) == -np.inf
    assert front.best_at([(1.0, 50)], 1.0) == 50


def test_comparison_at_equal_entropy():
    """A run's greedy score beside the best of the other's curves, averaged over its runs, both orders."""
    def row(model, decode, top_p, entropy, score, order="random"):
        return dict(model=model, decode=decode, top_p=top_p, nfe=2, entropy_set=entropy, distinct_per_1000=score,
                    order=order)
    rows = [row("a-s0", "greedy", None, 1.5, 100), row("a-s1", "greedy", None, 1.5, 140),
            row("b-s0", "sample", 1.0, 2.0, 10), row("b-s0", "sample", 0.5, 1.0, 50),
            row("b-s0", "greedy", None, 0.5, 0),
            row("b-s1", "sample", 1.0, 2.0, 20), row("b-s1", "sample", 1.0, 1.5, 50, "left_to_right"),
            row("theory", "sample", None, 2.0, 70)]
    (found,) = front.compare(rows, "a", "b")
    assert (found["score"], found["other"], found["ratio"], found["theory"]) == (120, 40, 3, 70)
    assert found["score_stderr"] == pytest.approx(np.std([100, 140], ddof=1))
    assert (found["runs"], found["other_runs"], found["other_runs_of"]) == (2, 2, 2)


def front_row(model, entropy, score, decode="greedy", **others):
    return dict(model=model, decode=decode, nfe=2, entropy_set=entropy, distinct_per_1000=score) | others


@pytest.fixture
def front_file(tmp_path):
    """front_file(rows) -> the path of a new file that holds them, as `evaluate.py success` writes it."""
    numbers = itertools.count()
    def write(rows, sampler="fixed", order="random"):
        path = tmp_path / f"front-{next(numbers)}.json"
        path.write_text(json.dumps(dict(meta=dict(args=dict(sampler=sampler, order=order)), rows=rows)))
        return str(path)
    return write


def test_front_averages_the_runs_that_reach_the_entropy(front_file, cli):
    mine = [front_row("a-s0", 1.5, 100)]
    short = [front_row(f"b-s{i}", 1.0, 90) for i in range(2)]
    files = [front_file(mine), front_file(short), front_file([front_row("b-s2", 2.0, 40, "sample", top_p=1.0)])]
    (found,) = front.compare(front.read_rows(files), "a", "b")
    assert (found["other"], found["ratio"], found["other_runs"], found["other_runs_of"]) == (40, 2.5, 1, 3)
    assert "other_stderr" not in found
    out, _ = succeeded(cli(front, f"{' '.join(files)} --model=a --other=b"))
    assert "1 of 3" in out
    (found,) = front.compare(front.read_rows(files[:2]), "a", "b")
    assert (found["other"], found["ratio"], found["other_runs"], found["other_runs_of"]) == (None, None, 0, 2)
    out, err = succeeded(cli(front, f"{' '.join(files[:2])} --model=a --other=b"))
    assert "0 of 2" in out and "none does" in out and "inf" not in out and not err


def test_front_counts_a_row_once_and_none_of_a_verifier(front_file):
    """Of two files with one row, the later; other orders, samplers and tau are other rows."""
    other = front_row("b", 2.0, 50, "sample", top_p=1.0)
    files = [front_file([front_row("a", 1.5, score, tau=1.0), other]) for score in (100, 110)]
    checked = front_file([front_row(name, 1.5, 900, tau=1.0, verifier_calls=3.0) for name in ("a", "b")])
    (found,) = front.compare(front.read_rows([*files, checked]), "a", "b")
    assert (found["score"], found["runs"], found["other"]) == (110, 1, 50)
    files += [front_file([front_row("a", 1.5, 120, tau=1.0)], "ancestral"),
              front_file([front_row("a", 1.5, 130, tau=0.5)]),
              front_file([front_row("a", 1.5, 140, tau=1.0)], order="left_to_right")]
    found = front.compare(front.read_rows(files), "a", "b")
    assert [(row["order"], row["tau"], row["score"], row["runs"]) for row in found] == [
        ("ancestral", 1.0, 120, 1), ("left_to_right", 1.0, 140, 1), ("random", 0.5, 130, 1), ("random", 1.0, 110, 1)]


def test_front_shows_tau_where_it_differs(front_file, cli):
    rows = [front_row("a", 1.5, 100, tau=1.0), front_row("b", 2.0, 50)]
    out, _ = succeeded(cli(front, f"{front_file(rows)} --model=a --other=b"))
    assert "τ" not in out
    rows.append(front_row("a", 1.5, 100, tau=0.5))
    out, _ = succeeded(cli(front, f"{front_file(rows)} --model=a --other=b"))
    assert "| τ |" in out and "| 0.50 |" in out and "| 1.00 |" in out


def test_front_compares_with_theory_and_the_teacher(front_file):
    """Their rows have no top_p; a curve goes from all of the distribution to the argmax."""
    names = ("theory", "teacher")
    path = front_file([front_row("a", 1.5, 100), *[front_row(name, 2.0, 40, "sample") for name in names]])
    for name in names:
        (found,) = front.compare(front.read_rows([path]), "a", name)
        assert found["other"] == 40
    rows = [front_row("b", 1.0, 3), front_row("b", 1.5, 2, "sample", top_p=0.5), front_row("b", 2.0, 1, "sample")]
    curves = front.curves_of(front.read_rows([front_file(rows)]), "b", 2)
    assert curves == {("b", "random"): [(2.0, 1), (1.5, 2), (1.0, 3)]}


def test_fronts_theory_is_of_the_same_order(front_file):
    rows = [front_row("a", 1.5, 100), front_row("b", 2.0, 50)]
    theories = [front_row("theory", 2.0, 30, "sample"), front_row("theory_teacher", 2.0, 20, "sample")]
    files = [front_file([*rows, *theories]),
             front_file([*rows, front_row("theory", 2.0, 70, "sample")], order="left_to_right"),
             front_file(rows, "first_hitting"),
             front_file([front_row("theory", 2.0, 90, "sample")], "ancestral")]
    found = front.compare(front.read_rows(files), "a", "b")
    assert [(row["order"], row.get("theory"), row.get("theory_teacher")) for row in found] == [
        ("first_hitting", None, None), ("left_to_right", 70, None), ("random", 30, 20)]


def test_front_reads_rows_with_a_score_and_an_entropy(front_file, cli):
    rows = [front_row("a", 1.5, 100), dict(model="data", entropy=2.0), front_row("b", None, 50)]
    assert [row["model"] for row in front.read_rows([front_file(rows)])] == ["a"]
    for wrong in (rows[1:], [front_row("a", "1.5", 100)], [front_row("a", 1.5, True)], ["a"], None):
        path = front_file(wrong)
        refused(cli(front, f"{path} --model=a --other=b"), path)


# ---------------------------------------------------------------------------------------------------------------------
# what training on these rows has besides

def test_mask_suffixes():
    """The share that was asked for is masked from a uniform place on, and nothing before; the others stay as they are.
    """
    L = 12
    levels = torch.full((4000, 1), 0.25)
    masked = mask_suffixes(levels, 0.75, L, np.random.default_rng(0))
    is_suffix = (masked != 0.25).all(1)
    assert is_suffix.sum() == 3000 and (masked[~is_suffix] == 0.25).all()
    suffix = masked[is_suffix]
    assert set(suffix.unique().tolist()) == {0, 1} and (suffix[:, 0] == 0).all()
    assert (suffix.diff(dim=1) >= 0).all() and (suffix[:, -1] == 1).all()
    counts = suffix.sum(1).long().bincount(minlength=L)[1:]            # 1 .. L - 1 masked tokens, equally often
    assert chisquare(counts.numpy()).pvalue > 1e-4
    z = tiny(L=L).noised(torch.zeros(4000, L, dtype=torch.long), masked, gen(0))
    assert ((z == 7) == (masked == 1))[is_suffix].all()


def test_checkpoints_that_stay(word_runs, cli):
    succeeded(cli(train, f"--model=mdlm --mask_suffix=0.5 --data=words --report=0 --out=out/kept {SHAPE} --keep=1,3"))
    steps = {path.name: torch.load(path, weights_only=True)["step"] for path in (word_runs / "out/kept").glob("*.pt")}
    assert steps == {"ckpt.pt": 4, "ckpt.previous.pt": 3, "ckpt.1.pt": 1, "ckpt.3.pt": 3}
    rows, _, _ = evaluated(cli, "success --ckpt out/kept/ckpt.1.pt out/kept --n=20 --nfe=1 --decode=greedy", "k.json")
    assert [row["model"] for row in rows] == ["out/kept/ckpt.1.pt", "out/kept", "theory"]
    refused(cli(train, f"--model=ar --data=words --mask_suffix=0.5 {SHAPE}"), "--mask_suffix", "mdlm")


def test_suffixes_alone_are_written_from_left_to_right(word_runs, cli):
    """The table after training, and validation, are of what the student was trained for; other orders are refused."""
    out, _ = succeeded(cli(train, f"--model=mdlm --mask_suffix=1 --data=words --report=20 --out=out/suffix {SHAPE}"))
    assert "left_to_right" in out
    log = [json.loads(line) for line in (word_runs / "out/suffix/log.jsonl").read_text().splitlines()]
    assert any("val_suffix_nll" in line for line in log)
    flags = "success --ckpt out/suffix --n=10 --nfe=2 --no_theory"
    succeeded(cli(evaluate, f"{flags} --sampler=fixed --order=left_to_right"))
    for other in ("", "--sampler=fixed --order=random", "--sampler=first_hitting", "--sampler=remdm --remask=0.1"):
        refused(cli(evaluate, f"{flags} {other}"), "--mask_suffix=1", "--order=left_to_right")
    refused(cli(sample, "--ckpt=out/suffix --n=1"), "--mask_suffix=1")
    left = "--sampler=fixed --order=left_to_right"
    refused(cli(sample, f"--ckpt=out/suffix --infill=a[MASK][MASK]b {left}"), "--infill", "--mask_suffix=1")
    refused(cli(evaluate, "ppl --ckpt out/suffix --n=4"), "--mask_suffix=1")
    refused(cli(noise_use, "--ckpt out/suffix --teacher=out/words-ar --n=4"), "--mask_suffix=1")
    refused(cli(train, f"--model=mdlm --mask_suffix=1 --t_one=0.5 --data=words {SHAPE}"), "--t_one")
