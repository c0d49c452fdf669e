"""The tests of students that begin as a pretrained model (init_from.py)."""
from types import SimpleNamespace

import pytest
import torch

import evaluate
import sample
import train
from bd3lm import BD3LM
from data import run
from extra.init_from import initial_weights
from mdlm import MDLM
from sample import load_model
from teacher import GPT2, GPT2_SIZES
from test_gumbel import gen, jsonl, refused, save_gpt2, succeeded
from test_gumbel import cli, in_text_runs, text_runs  # noqa: F401, the fixtures

V = 41
LENGTH = 12


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A random GPT-2 that was saved as a folder: V ids, 20 positions, of which the students' rows take 12."""
    folder = tmp_path_factory.mktemp("gpt2")
    save_gpt2(folder, V=V, L=20)
    return GPT2.from_pretrained(str(folder))


def student_from(source, make=MDLM, **kw):
    """A student with these weights, as train.py makes it."""
    shape = {name: getattr(source.config, name) for name in ("n_layer", "n_embd", "n_head")}
    model = make(V, LENGTH, V - 1, **shape, dropout=0.0, shift=True, positions=20, **kw)
    initial_weights(model, source, "x")
    return model.eval()


def clean_rows(n=4):
    x = torch.randint(V - 1, (n, LENGTH), generator=gen())
    x[:, 0] = V - 1
    return x


def test_a_student_made_causal_is_gpt2(gpt2):
    """On clean rows everywhere; on noised rows at the first masked place, which sees what GPT-2 sees."""
    model = student_from(gpt2)
    model.transformer.causal = True
    x = clean_rows()
    want = gpt2.log_probs(x)
    assert want.std() > 1
    found = model.logits(model.hidden(x)).log_softmax(-1)
    assert (found[:, 1:] - want[:, :-1]).abs().max() < 1e-4
    for row, first in zip(x, (1, 4, 7, 11)):
        z = row[None].clone()
        z[:, first::2] = V
        found = model.logits(model.hidden(z)).log_softmax(-1)
        assert (found[0, first] - gpt2.log_probs(row[None])[0, first - 1]).abs().max() < 1e-4


def test_a_student_sees_the_whole_row(gpt2):
    model = student_from(gpt2)
    x = clean_rows()
    other = x.clone()
    other[:, -1] = (x[:, -1] + 1) % (V - 1)
    assert (model.hidden(x)[:, 1] - model.hidden(other)[:, 1]).abs().max() > 1e-3


def test_blocks_of_one_token_are_gpt2(gpt2):
    """In the training pass, and, drawn from the same seed, in a sample with its cache."""
    model = student_from(gpt2, BD3LM, block_size=1)
    x = clean_rows()
    z = torch.full_like(x, V)
    z[:, 0] = V - 1
    found = model.log_probs(z, x)[..., :V]
    assert (found[:, 1:] - gpt2.log_probs(x)[:, :-1]).abs().max() < 1e-4
    written, _ = model.generate(z, 1, greedy=True)
    alone, _ = gpt2.generate(x[:, :1], LENGTH, greedy=True)
    assert torch.equal(written, alone)
    assert model.longest == 20


def test_the_embedding_has_a_row_for_masks_and_the_head_is_its_own(gpt2):
    model = student_from(gpt2)
    embedding = model.transformer.embed.weight
    assert embedding.shape == (V + 1, 128) and model.transformer.head.weight.shape == (V, 128)
    assert torch.allclose(embedding[-1], embedding[:-1].mean(0))
    assert torch.equal(model.transformer.head.weight, embedding[:-1])
    assert model.transformer.head.weight.data_ptr() != embedding.data_ptr()


@pytest.mark.parametrize("noise", ["gumbel", "log", "gaussian", "quantile"])
@pytest.mark.parametrize("make", [MDLM, BD3LM])
def test_added_noise_begins_by_saying_nothing(gpt2, make, noise):
    """The fresh student with noise is the fresh one without, whatever the noise; but learns from it."""
    kw = dict(block_size=4) if make is BD3LM else {}
    plain = student_from(gpt2, make, **kw)
    noisy = student_from(gpt2, make, noise=noise, inject="add", **kw)
    x = clean_rows()
    z = x.masked_fill(torch.rand(x.shape, generator=gen(1)) < 0.5, V)
    z[:, 0] = V - 1
    t = torch.full((4, noisy.n_blocks), 0.5)
    want, _ = plain.loss(x, t, z=z)
    found, _ = noisy.loss(x, t, z=z, noise=noisy.fresh_noise(x.shape, gen(2)))
    assert torch.equal(found, want)
    found.backward()
    assert noisy.noise_embed.weight.grad.abs().max() > 1e-5


@pytest.mark.parametrize("noise", ["gumbel", "quantile"])
def test_noise_in_the_place_of_masks_begins_at_the_scale_of_tokens(gpt2, noise):
    model = student_from(gpt2, noise=noise, inject="replace")
    g = model.noise_embed.from_prior(500, generator=gen(1))
    rms = gpt2.transformer.embed.weight.square().mean().sqrt()
    assert 0.9 < g.square().mean().sqrt() / rms < 1.1


# ---------------------------------------------------------------------------------------------------------------------
# the commands

@pytest.fixture
def start(in_text_runs, tmp_path):  # noqa: F811
    """A folder with a GPT-2 of bytes, 40 positions, beside the text and its teacher."""
    save_gpt2(tmp_path / "lm", V=257, L=40)
    return tmp_path / "lm"


FLAGS = ("--data=mine --length=24 --steps=3 --batch_size=16 --warmup=1 --log_every=1 --eval_every=4 --eval_rows=40 "
         "--report=0")


@pytest.mark.parametrize("kind", ["mdlm", "bd3lm --block_size=4"])
def test_students_begin_as_a_folder_says(start, cli, tmp_path, kind):
    """The folder decides the shape, and is not needed again: to go on, to sample, as the start of another student."""
    out = tmp_path / "a"
    command = f"--model={kind} {FLAGS} --init_from={start} --out={out}"
    succeeded(cli(train, f"{command} --lr=1e-9"))
    model = load_model(str(out))
    config = model.config
    assert (config.n_layer, config.n_embd, config.n_head, config.positions, config.shift) == (2, 128, 2, 40, True)
    began = GPT2.from_pretrained(str(start)).transformer.embed.weight
    assert torch.allclose(model.transformer.embed.weight[:-1], began, atol=1e-6)

    (start / "model.safetensors").unlink()
    _, err = succeeded(cli(train, f"{command.replace('--steps=3', '--steps=5')} --lr=1e-9"))
    assert "continuing at step 3" in err
    losses = [row["loss"] for row in jsonl(out / "log.jsonl") if "loss" in row]
    assert len(losses) == 5
    assert "sample 0" in succeeded(cli(sample, f"--ckpt={out} --n=1 --steps=2"))[0]
    succeeded(cli(evaluate, f"ppl --ckpt {out} --n=8"))
    noisy = f"--model={kind} {FLAGS} --gumbel --teacher=out/ar --n_layer=2 --n_embd=128 --n_head=2"
    for name, flag, want in (("b", "", "add"), ("c", "--inject=replace", "replace")):
        succeeded(cli(train, f"{noisy} --init_from={out} {flag} --out={tmp_path}/{name}"))
        config = load_model(str(tmp_path / name)).config
        assert (config.positions, config.inject) == (40, want)
    # what was added stays added, what replaced [MASK] replaces it, and the start still decides what it decided
    succeeded(cli(train, f"{noisy} --init_from={tmp_path}/c --out={tmp_path}/d"))
    assert load_model(str(tmp_path / "d")).config.inject == "replace"
    for flag, words in (("--n_layer=7", "--n_layer=7 2"), ("--size=tiny", "--size=tiny"),
                        ("--length=44", "--length=44 40")):
        line = f"--model={kind} {FLAGS} --init_from={out} {flag} --out={tmp_path}/no"
        refused(cli(train, line), "--init_from", *words.split())


@pytest.mark.parametrize("inject, want", [("", "add"), ("--inject=replace", "replace")])
def test_noise_is_added_unless_the_command_says_otherwise(start, cli, tmp_path, inject, want):
    """And a run that goes on keeps what it began with."""
    out = tmp_path / "a"
    command = f"--model=mdlm {FLAGS} --gumbel --teacher=out/ar --init_from={start} --out={out} {inject}"
    for steps in (3, 5):
        succeeded(cli(train, command.replace("--steps=3", f"--steps={steps}")))
        assert load_model(str(out)).config.inject == want


@pytest.mark.parametrize("flags, words", [
    ("--n_embd=48", "--n_embd=48 128"), ("--n_layer=3", "--n_layer=3 2"), ("--size=tiny", "--size=tiny"),
    ("--length=41", "--length=41 40")])
def test_a_start_that_does_not_fit_the_flags_is_refused(start, cli, tmp_path, flags, words):
    command = f"--model=mdlm {FLAGS} --init_from={start} --out={tmp_path}/no {flags}"
    refused(cli(train, command), "--init_from", *words.split())
    assert not (tmp_path / "no" / "ckpt.pt").exists()


def test_a_pretrained_start_is_for_masked_students(start, cli, tmp_path):
    refused(cli(train, f"--model=ar {FLAGS} --init_from={start} --out={tmp_path}/no"), "--init_from", "--model=mdlm")


def test_a_pass_on_a_gpu_is_as_large_as_the_start_allows(start, monkeypatch):
    """By the shape of the start, not by that of the flags."""
    args = train.parse(FLAGS.split() + [f"--init_from={start}"])
    data = SimpleNamespace(length=1024, meta=dict(vocab_size=50257))
    world = SimpleNamespace(size=1, cuda=True)
    seen = []
    monkeypatch.setattr(run, "rows_that_fit", lambda args, *rest: seen.append((args.n_layer, args.n_embd)) or 4)
    for known in ({}, GPT2.from_pretrained(str(start)).as_start(), dict(n_layer=5, n_embd=96)):
        assert run.micro_batch(args, data, known, world) == 4
    assert seen == [(12, 768), (2, 128), (5, 96)]


def test_a_start_of_another_vocabulary_is_refused(in_text_runs, cli, tmp_path):  # noqa: F811
    save_gpt2(tmp_path / "lm", V=300, L=40)
    command = f"--model=mdlm {FLAGS} --init_from={tmp_path}/lm --out={tmp_path}/no"
    refused(cli(train, command), "--init_from", "300", "257")


def test_a_sample_is_no_longer_than_the_positions(start, cli, tmp_path):
    succeeded(cli(train, f"--model=bd3lm --block_size=4 {FLAGS} --init_from={start} --out={tmp_path}/a"))
    succeeded(cli(sample, f"--ckpt={tmp_path}/a --n=1 --steps=1 --length=40"))
    refused(cli(sample, f"--ckpt={tmp_path}/a --n=1 --steps=1 --length=41"), "--length=41", "40")


def test_a_published_name_decides_the_shape():
    for name, (n_layer, n_embd, n_head) in GPT2_SIZES.items():
        args = train.parse([f"--init_from={name}"])
        assert (args.n_layer, args.n_embd, args.n_head) == (n_layer, n_embd, n_head)
    assert train.parse(["--init_from=gpt2", "--n_layer=3"]).n_layer == 3, "what is given is seen, and refused later"
