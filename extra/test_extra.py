"""The tests of extra/: published weights, decoding with a verifier, judges, MAUVE, figures, bench, lm-eval."""
import argparse
import contextlib
import functools
import hashlib
import http.server
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch._subclasses.fake_tensor import FakeTensorMode

import bd3lm
import evaluate
import gumbel
import mdlm
import medusa
import sample
import teacher
import train
from bd3lm import BD3LM
from data import prepare
from data.cli import BadInput, say_once
from data.maze import maze_paths, maze_valid
from data.run import CARDS, flops_per_row, peak_flops, rows_that_fit
from data.vocab import Tokenizer
from extra import bench, figures, front, gpu, lm_eval_model, noise_use, plan, published, scores
from extra import judge as llm_judge
from extra.plot import nfe_table
from extra.verified import generate_apd
from gumbel import GumbelEmbedding, nucleus, sample_gumbel
from mdlm import MDLM, load_published
from teacher import GPT2, CausalConfig, CausalLM, extract_parallel, extract_sequential
from teacher import load_published as load_published_ar
from test_gumbel import (HERE, SHARED, gen, golden, needs_shared, randomise, refused, rows_of, run_in, save_gpt2, tiny,
                         tiny_ar)
from test_gumbel import cli, runs  # noqa: F401, the fixtures

# ---------------------------------------------------------------------------------------------------------------------
# published.py

def test_safetensors_come_back_as_they_were_written(tmp_path):
    """By safetensors itself; a tensor of 3 bytes leaves the next one unaligned."""
    st = pytest.importorskip("safetensors.torch", reason="pip install safetensors")
    tensors = {str(d): torch.randn(3, 4, generator=gen()).mul(5).to(d) for d in published.DTYPES.values()}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "odd": torch.arange(3, dtype=torch.uint8),
                "after odd": torch.randn(5, dtype=torch.float64, generator=gen())}
    st.save_file(tensors, tmp_path / "x.safetensors", {"k": "v"})
    found = published.read_safetensors(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    assert all(found[k].dtype == v.dtype and torch.equal(found[k], v) for k, v in tensors.items())


def test_load_published_names_what_another_file_lacks(tmp_path):
    torch.save({"state_dict": {"weight": torch.zeros(2)}}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="vocab_embed.embedding"):
        load_published(str(tmp_path / "x.ckpt"))


class Bomb:
    """A pickled object that would leave a trace, the file `path`, if it were executed."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


class Node:
    """Pickles as OmegaConf's containers and leaves do: an object with a state dict."""

    def __init__(self, **state):
        self.__dict__.update(state)


def omegaconf(tree):
    if isinstance(tree, dict):
        return Node(_metadata=Node(x=1), _content={k: omegaconf(v) for k, v in tree.items()}, _parent=None)
    return Node(_metadata=Node(x=1), _val=tree)


def ema_of(state_dict):
    """EMA weights that differ from the raw ones, by name: without buffers."""
    names = [name for name in state_dict if not name.endswith("inv_freq")]
    return {name: state_dict[name] + 0.01 * (i % 3 == 0) for i, name in enumerate(names)}


def lightning_file(path, name, bomb=None, ema=True, **change):
    """A .ckpt as the authors' code writes it, from a golden state dict."""
    g = golden(name)
    state = {"backbone._orig_mod." + k: v for k, v in g["state_dict"].items()}             # as torch.compile names
    state |= {"teacher_model.wte.weight": torch.zeros(3), "sampling_eps_min": torch.tensor(1e-3)}
    config = g["config"] | change
    if config["block_size"] == 32:
        config["block_size"] = "${model.length}"           # pickled unresolved, as their configs say it
    ckpt = {"epoch": 1, "global_step": 7, "state_dict": state, "loops": {"x": Node(y=2)}, "callbacks": {},
            "hyper_parameters": {"config": omegaconf(config), "tokenizer": bomb or Node(z=3)}}
    if ema:
        shadow = [torch.nn.Parameter(w, False) for w in ema_of(g["state_dict"]).values()]
        ckpt["ema"] = {"decay": 0.9999, "num_updates": 7, "shadow_params": shadow}
    torch.save(ckpt, path)


INPUTS = {"mdlm": ["indices"], "bd3lm": ["xt", "x0"], "ar": ["indices"]}
LOADERS = {"mdlm": load_published, "bd3lm": functools.partial(bd3lm.load_published, block_size=4),
           "ar": load_published_ar}


@pytest.fixture(params=["mdlm", "mdlm_gumbel", "bd3lm", "bd3lm_gumbel", "ar"])
def lightning(request, tmp_path):
    """A .ckpt with EMA weights and a bomb: its path and kind, the golden tensors, the network's inputs."""
    name = request.param
    path = str(tmp_path / "x.ckpt")
    lightning_file(path, name, Bomb(tmp_path / "executed"))
    g = golden(name)
    inputs = [g["inputs"][key] for key in INPUTS[name.removesuffix("_gumbel")]]
    if name.endswith("gumbel"):
        inputs.append(F.pad(g["inputs"]["gumbel"], (0, 0, 1, 0)))
    return argparse.Namespace(path=path, name=name, kind=name.removesuffix("_gumbel"), golden=g, inputs=inputs)


@needs_shared
def test_raw_weights_of_a_lightning_checkpoint_give_the_golden_output(lightning):
    model = sample.load_model(lightning.path, "raw")
    assert model.args["model"] == lightning.kind and getattr(model, "block_size", 4) == 4
    V = model.vocab_size
    found = model.log_probs(*lightning.inputs)[..., :V]
    difference = found - lightning.golden["log_probs"][..., :V]
    if lightning.kind == "ar":
        # the authors normalise over V + 1 ids: compare up to a constant
        difference = difference - difference[..., :1]
    else:
        difference = difference[lightning.inputs[0] == V]
    assert difference.abs().max() < 1e-4


@needs_shared
def test_ema_weights_of_a_lightning_checkpoint_are_its_shadow_list(lightning):
    """Compared with the network that is loaded from these weights by name."""
    ema = sample.load_model(lightning.path, "ema")
    raw = sample.load_model(lightning.path, "raw")
    state_dict = lightning.golden["state_dict"]
    state = state_dict | ema_of(state_dict)
    load = LOADERS[lightning.kind]
    want = load(state, length=32, bos=99).log_probs(*lightning.inputs)
    assert torch.equal(ema.log_probs(*lightning.inputs), want)
    assert not torch.equal(raw.log_probs(*lightning.inputs), want)
    assert (ema.length, ema.bos, ema.config.n_head) == (32, 99, 4)
    assert load(lightning.path).length == 32


@needs_shared
def test_nothing_that_a_lightning_checkpoint_pickles_is_executed(lightning, tmp_path, cli):
    steps = "" if lightning.name == "ar" else "--steps=4"
    code, out, err = cli(sample, f"--ckpt={lightning.path} --n=2 --length=8 {steps}")
    assert code == 0 and out.count("--- sample") == 2 and "entropy" in out, err
    sample.load_model(lightning.path, "raw")
    assert not (tmp_path / "executed").exists()


@needs_shared
def test_a_lightning_checkpoint_without_ema_gives_its_raw_weights_alone(lightning, cli):
    want = sample.load_model(lightning.path, "raw").log_probs(*lightning.inputs)
    lightning_file(lightning.path, lightning.name, ema=False)
    assert torch.equal(sample.load_model(lightning.path).log_probs(*lightning.inputs), want)
    refused(cli(sample, f"--ckpt={lightning.path} --n=1 --weights=ema"), "x.ckpt", "--weights=raw")


def published_folder(folder):
    """A folder as Hugging Face has the authors' MDLM, from its golden state dict."""
    st = pytest.importorskip("safetensors.torch", reason="pip install safetensors")
    state = {"backbone." + k: v.clone() for k, v in golden("mdlm")["state_dict"].items()}
    config = dict(model_type="mdlm", model_length=32, n_heads=4, n_blocks=3, hidden_dim=64, vocab_size=101)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    st.save_file(state, folder / "model.safetensors")
    return folder


@needs_shared
def test_a_published_folder_gives_the_golden_output_and_takes_ids_for_a_prompt(tmp_path, cli):
    folder = published_folder(tmp_path / "mdlm-owt")
    model = sample.load_model(str(folder))
    assert model.length == 32
    g = golden("mdlm")
    x = g["inputs"]["indices"]
    difference = model.log_probs(x)[..., :100] - g["log_probs"][..., :100]
    assert difference[x == 100].abs().max() < 1e-4
    code, out, _ = cli(sample, f"--ckpt={folder} --n=1 --steps=4 --prompt=5")
    assert code == 0 and out.splitlines()[1].startswith("5 ")


# ---------------------------------------------------------------------------------------------------------------------
# published.py: safetensors that are not what they say

def safetensors_file(path, header, data=bytes(range(64))):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def entry(a, b, shape=(8,), dtype="F32"):
    return dict(dtype=dtype, shape=list(shape), data_offsets=[a, b])


GOOD_HEADER = dict(a=entry(0, 32), b=entry(32, 64))
BAD_HEADERS = {
    "reads its own header": dict(a=entry(-32, 0), b=entry(0, 64, [16])),
    "ends before it begins": dict(a=entry(32, 0), b=entry(0, 64, [16])),
    "beyond the end": dict(a=entry(0, 32), b=entry(32, 96, [16])),
    "less than the shape": dict(a=entry(0, 28), b=entry(28, 64, [9])),
    "overlap": dict(a=entry(0, 40, [10]), b=entry(32, 64)),
    "the same bytes twice": dict(a=entry(0, 64, [16]), b=entry(0, 64, [16])),
    "a hole": dict(a=entry(0, 16, [4]), b=entry(32, 64)),
    "bytes that nothing names": dict(a=entry(0, 32)),
    "no tensor, and data": {},
    "a shape to be inferred": dict(a=entry(0, 32, [-1]), b=entry(32, 64)),
    "two negative sizes": dict(a=entry(0, 32, [-2, -4]), b=entry(32, 64)),
    "a size that is no int": dict(a=entry(0, 32, [8.0]), b=entry(32, 64)),
    "a size that is true": dict(a=entry(0, 32, [8, True]), b=entry(32, 64)),
    "a shape that is no list": GOOD_HEADER | dict(a=dict(dtype="F32", shape=8, data_offsets=[0, 32])),
    "offsets that are no list": GOOD_HEADER | dict(a=dict(dtype="F32", shape=[8], data_offsets=0)),
    "three offsets": GOOD_HEADER | dict(a=dict(dtype="F32", shape=[8], data_offsets=[0, 32, 32])),
    "an unknown dtype": dict(a=entry(0, 32, dtype="F33"), b=entry(32, 64)),
    "an entry that is no object": dict(a=3, b=entry(32, 64)),
    "a list": [1, 2],
    "a name twice": json.dumps(GOOD_HEADER).replace('"b"', '"a"').encode(),
    "a dtype twice": json.dumps(GOOD_HEADER).replace('"dtype"', '"dtype": "I32", "dtype"', 1).encode(),
    "nested deeply": b"[" * 100_000,
    "no JSON": b"{no",
    "no UTF-8": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("what", BAD_HEADERS)
def test_safetensors_whose_header_does_not_describe_them_are_refused(tmp_path, what):
    path = tmp_path / "x.safetensors"
    safetensors_file(path, GOOD_HEADER)
    assert published.read_safetensors(path)["b"].tolist() == np.arange(32, 64, dtype=np.uint8).view("<f4").tolist()
    safetensors_file(path, BAD_HEADERS[what])
    with pytest.raises(ValueError, match="x.safetensors is no complete safetensors file"):
        published.read_safetensors(path)


def test_safetensors_that_are_cut_off_or_have_a_tail_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors_file(path, GOOD_HEADER)
    content = path.read_bytes()
    for bad in (b"", content[:5], content[:20], content[:-1], content + b"x", b"\xff" * 8 + content[8:]):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="x.safetensors is no complete"):
            published.read_safetensors(path)


# ---------------------------------------------------------------------------------------------------------------------
# published.py: settings are read and checked, wherever they stand, and never guessed

FLAT = {"mdlm": dict(model_type="mdlm", model_length=32, n_heads=4),
        "bd3lm": dict(model_type="bd3lm", model_length=32, n_heads=4, block_size=4),
        "ar": dict(model_type="ar", model_length=32, n_heads=4)}
FLAT |= {"mdlm_gumbel": FLAT["mdlm"], "bd3lm_gumbel": FLAT["bd3lm"]}


def weights_file(path, name, config=None, heads_in_weights=True):
    """The golden weights in a file without settings, of the kind that the path's ending says; `config` beside it."""
    path.parent.mkdir(exist_ok=True)
    state = {"backbone." + k: v.clone() for k, v in golden(name)["state_dict"].items()}
    if not heads_in_weights:
        del state["backbone.rotary_emb.inv_freq"]
    if path.suffix == ".safetensors":
        st = pytest.importorskip("safetensors.torch", reason="pip install safetensors")
        st.save_file(state, path)
    elif path.suffix == ".ckpt":
        torch.save({"state_dict": state}, path)
    else:
        torch.save(state, path)
    if config is not None:
        (path.parent / "config.json").write_text(json.dumps(config))
    return path


CONTRARY = [                                               # (what the sentence names, in a .ckpt, in a config.json)
    ("time_conditioning", {"algo": {"time_conditioning": True}}, {"time_conditioning": True}),
    ("time_conditioning", {"time_conditioning": True}, {"algo": {"time_conditioning": True}}),
    ("duo", {"algo": {"name": "duo", "parameterization": "mean"}}, {"model_type": "duo", "parameterization": "mean"}),
    ("mean", {"algo": {"parameterization": "mean"}}, {"parameterization": "mean"}),
    ("sedd", {"parameterization": "sedd"}, {"parameterization": "sedd"}),
    ("d3pm", {"algo": {"parameterization": "d3pm"}}, {"model_type": "d3pm"}),
    ("duo", {"algo": {"name": "duo"}}, {"model_type": "duo"}),
    ("udlm", {"model_type": "udlm"}, {"model_type": "udlm"}),
    ("gpt2", {"algo": {"name": "gpt2"}}, {"model_type": "gpt2"}),
    ("bert-base-uncased", {"data": {"tokenizer_name_or_path": "bert-base-uncased"}},
     {"tokenizer_name_or_path": "bert-base-uncased"}),
    ("text8", {"data": {"tokenizer_name_or_path": "text8"}}, {"data": {"tokenizer_name_or_path": "text8"}}),
    ("dimamba", {"algo": {"backbone": "dimamba"}}, {"backbone": "dimamba"}),
    ("uniform", {"diffusion": "uniform"}, {"diffusion": "uniform"}),
    ("causal", {"algo": {"causal_attention": True}}, {"causal": True}),
    ("parameterization", {"algo": {"parameterization": "ar"}}, {"parameterization": "ar"}),
    ("bd3lm", {"algo": {"name": "ar"}}, {"model_type": "ar"}),
    ("mdlm", {"algo": {"name": "mdlm"}}, {"model_type": "mdlm"}),
    ("cross_attn", {"algo": {"cross_attn": False}}, {"cross_attn": False}),
    ("both", {"model": {"gumbel_inject_mode": "both"}}, {"gumbel_inject_mode": "both"}),
    ("n_heads", {"model": {"n_heads": 8}}, {"n_heads": 8}),
    ("n_heads", {"model": {"n_heads": -1}}, {"n_heads": "4"}),
    ("n_blocks", {"model": {"n_blocks": 4}}, {"n_blocks": 10**9}),
    ("hidden_dim", {"model": {"hidden_dim": 32}}, {"hidden_dim": 128}),
    ("vocab_size", {"vocab_size": 50258}, {"vocab_size": 50258}),
    ("block_size", {"block_size": 0}, {"block_size": [4]}),
    ("block_size", {"block_size": True}, {"block_size": 4.0}),
    ("length", {"model": {"length": 10**12}}, {"model_length": "x"}),
]


def merged(tree, change):
    """A tree of dicts with some of its leaves changed."""
    tree = dict(tree)
    for key, value in change.items():
        if isinstance(value, dict):
            value = merged(tree.get(key, {}), value)
        tree[key] = value
    return tree


@needs_shared
@pytest.mark.parametrize("name, of_ckpt, of_folder", CONTRARY)
def test_a_setting_that_our_networks_do_not_have_is_refused_by_name(tmp_path, cli, name, of_ckpt, of_folder):
    config = merged(golden("bd3lm_gumbel")["config"], of_ckpt)
    lightning_file(tmp_path / "x.ckpt", "bd3lm_gumbel", **config)
    refused(cli(sample, f"--ckpt={tmp_path}/x.ckpt --n=1"), "x.ckpt", name)
    weights_file(tmp_path / "f" / "model.safetensors", "bd3lm_gumbel", FLAT["bd3lm"] | of_folder)
    refused(cli(sample, f"--ckpt={tmp_path}/f --n=1"), f"{tmp_path}/f", name)


@pytest.mark.parametrize("content, words", [
    (b"[1, 2]", ["config.json", "object"]), (b"{", ["config.json", "JSON"]), (b"", ["config.json", "JSON"]),
    (b"\xff\xfe", ["config.json", "JSON"]), (b"[" * 100_000, ["config.json", "JSON"]), (b"null", ["config.json"])])
def test_a_config_json_that_is_none_is_refused_by_name(tmp_path, cli, content, words):
    torch.save({"x": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_bytes(content)
    refused(cli(sample, f"--ckpt={tmp_path} --n=1"), *words)


@needs_shared
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "mine.safetensors", "mine.bin", "x.ckpt"])
@pytest.mark.parametrize("name", ["mdlm", "mdlm_gumbel", "bd3lm", "bd3lm_gumbel", "ar"])
def test_a_file_is_what_the_config_json_beside_it_says(tmp_path, name, file):
    """As is its folder, where the name is Hugging Face's."""
    path = weights_file(tmp_path / "f" / file, name, FLAT[name])
    paths = [path]
    if file in published.WEIGHTS:
        paths.append(path.parent)
    for where in paths:
        model = sample.load_model(str(where))
        want = LOADERS[name.removesuffix("_gumbel")](golden(name)["state_dict"], length=32, bos=99)
        assert type(model) is type(want) and model.config == want.config
        assert all(map(torch.equal, model.state_dict().values(), want.state_dict().values()))


@needs_shared
@pytest.mark.parametrize("file", ["model.safetensors", "mine.bin", "x.ckpt"])
@pytest.mark.parametrize("name, config, heads_in_weights", [
    ("mdlm", None, True), ("bd3lm", None, True), ("bd3lm", None, False), ("ar", None, False),
    ("mdlm_gumbel", dict(n_heads=4), True), ("mdlm", dict(model_type="mdlm"), False),
    ("bd3lm", dict(model_type="bd3lm", model_length=30), True), ("bd3lm_gumbel", dict(block_size=8), False)])
def test_what_neither_weights_nor_settings_say_is_asked_for(tmp_path, cli, name, config, heads_in_weights, file):
    """And the line in the sentence, written to config.json, will do."""
    path = weights_file(tmp_path / file, name, config, heads_in_weights)
    result = cli(sample, f"--ckpt={path} --n=1")
    refused(result, "config.json", "n_heads", str(path))
    line = "{" + result[2].split("{")[1].split("}")[0] + "}"
    (tmp_path / "config.json").write_text(line)
    model = sample.load_model(str(path))
    assert model.config.n_head == 4                        # (the guess for a width of 64 happens to be right)
    said = json.loads(line)
    assert getattr(model, "block_size", said["block_size"]) == said["block_size"]
    assert (config or {}).items() <= said.items()


@needs_shared
def test_an_mdlm_needs_no_more_than_its_name_and_rows_of_1024_are_said(tmp_path, capsys):
    path = weights_file(tmp_path / "x.safetensors", "mdlm", dict(model_type="mdlm"))
    say_once.cache_clear()                                 # another test may have heard it
    model = sample.load_model(str(path))
    assert (model.args["model"], model.length) == ("mdlm", 1024)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "model_length" in err and "1024" in err


@needs_shared
def test_settings_of_the_file_itself_come_before_those_beside_it(tmp_path):
    lightning_file(tmp_path / "x.ckpt", "bd3lm")
    (tmp_path / "config.json").write_text(json.dumps(dict(block_size=8, model_type="mdlm", time_conditioning=False)))
    assert sample.load_model(str(tmp_path / "x.ckpt")).block_size == 4


@needs_shared
@pytest.mark.parametrize("block_size", ["${block_size}", "${model.nothing}", "${eval: 2 + 2}"])
def test_a_reference_that_leads_nowhere_says_nothing(tmp_path, cli, block_size):
    lightning_file(tmp_path / "x.ckpt", "bd3lm", block_size=block_size)
    refused(cli(sample, f"--ckpt={tmp_path}/x.ckpt --n=1"), "block_size", "config.json")


@needs_shared
@pytest.mark.parametrize("flags, kind", [({}, "gumbel"), ({"use_gaussian": True}, "gaussian"),
                                         ({"use_uniform": True}, "uniform"),
                                         ({"use_uniform": True, "use_gaussian": True}, "gaussian")])
@pytest.mark.parametrize("name", ["mdlm_gumbel", "bd3lm_gumbel"])
def test_the_kind_of_noise_is_the_one_that_the_settings_name(tmp_path, name, flags, kind):
    """The authors' networks embed softmax(noise): given the same normal or uniform variates, so do ours."""
    lightning_file(tmp_path / "x.ckpt", name, **merged(golden(name)["config"], {"algo": flags}))
    model = sample.load_model(str(tmp_path / "x.ckpt"), "raw")
    assert model.config.noise == model.noise_embed.kind == kind
    u = torch.rand(3, 100, generator=gen(), dtype=torch.float64)
    theirs = {"gumbel": -(-u.log()).log(), "gaussian": torch.special.ndtri(u), "uniform": u}[kind]
    want = theirs.softmax(-1).float() @ golden(name)["state_dict"]["gumbel_noise_embed.linear.weight"].T
    assert torch.allclose(model.noise_embed(-(-u.log()).log()), want, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# published.py: weights that are none

@needs_shared
@pytest.mark.parametrize("change", [torch.Tensor.long, lambda w: w + 1j, torch.Tensor.bool, str])
@pytest.mark.parametrize("name", ["vocab_embed.embedding", "blocks.1.norm1.weight", "gumbel_noise_embed.linear.weight"])
def test_what_is_no_real_number_is_no_weight(tmp_path, cli, name, change):
    for path in (tmp_path / "x.ckpt", tmp_path / "x.bin"):
        state = {"backbone." + k: v for k, v in golden("mdlm_gumbel")["state_dict"].items()}
        state["backbone." + name] = change(state["backbone." + name])
        torch.save({"state_dict": state}, path)
        (tmp_path / "config.json").write_text(json.dumps(FLAT["mdlm"]))
        refused(cli(sample, f"--ckpt={path} --n=1"), str(path), name)


@needs_shared
@pytest.mark.parametrize("name, renamed", [
    ("blocks.1.", "blocks.7."), ("blocks.1.", "blocks.x."), ("blocks.1.", "blocks.01."), ("sigma_map", "sigma_mao"),
    ("gumbel_noise_embed", "gumbel_noise_embde"), ("blocks.2.norm1.", "blocks.2.norm3."), ("backbone", "teacher"),
    ("rotary_emb", "blocks.1.rotary_emb")])
def test_a_weight_of_an_unknown_name_is_refused(tmp_path, cli, name, renamed):
    """It was left out without a word: the blocks behind a gap, the noise."""
    path = weights_file(tmp_path / "x.bin", "mdlm_gumbel", FLAT["mdlm"])
    state = {k.replace(name, renamed): v for k, v in torch.load(path).items()}
    torch.save(state, path)
    # the first is named that is missing, or too many
    word = {"sigma_mao": "sigma_map", "teacher": "embedding"}.get(renamed, renamed.split(".")[0])
    refused(cli(sample, f"--ckpt={path} --n=1"), "x.bin", word)


@needs_shared
@pytest.mark.parametrize("file", ["x.bin", "x.ckpt"])
def test_a_flipped_bit_in_a_torch_file_is_found(tmp_path, cli, file):
    path = weights_file(tmp_path / file, "mdlm", FLAT["mdlm"])
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4                        # of some weight
    path.write_bytes(content)
    refused(cli(sample, f"--ckpt={path} --n=1"), file, "damaged")


@pytest.mark.parametrize("contents", [
    Node(x=1), [torch.zeros(2)], 3, {"state_dict": Node(x=1)}, {"state_dict": None}, {"state_dict": {3: torch.ones(1)}},
    {"state_dict": {"w": Node(x=1)}}, {"state_dict": {"w": torch.ones(1)}, "ema": Node(x=1)},
    {"state_dict": {"w": torch.ones(1)}, "ema": {"shadow_params": 3}},
    {"state_dict": {"w": torch.ones(1)}, "ema": {"shadow_params": [3]}},
    {"state_dict": {"w": torch.ones(1)}, "hyper_parameters": Node(x=1)},
    {"state_dict": {"w": torch.ones(1)}, "hyper_parameters": {"config": Node(_content=3)}}])
@pytest.mark.parametrize("file", ["x.ckpt", "x.bin"])
def test_a_torch_file_of_something_else_is_refused_in_words(tmp_path, cli, contents, file):
    torch.save(contents, tmp_path / file)
    result = cli(sample, f"--ckpt={tmp_path / file} --n=1")
    refused(result, file)
    assert "_Inert" not in result[2] and "object has no attribute" not in result[2]


# ---------------------------------------------------------------------------------------------------------------------
# published.py: GPT-2 by the commands' door

def rewrite(folder, **change):
    """config.json with these values; None leaves one out."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | change
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


BAD_GPT2 = [                                               # (what config.json says, V, the word that names it)
    *[(dict(bos_token_id=bos), 301, "bos_token_id") for bos in (10**9, -3, "x", [1, 2], 301, 1.5, True)],
    (dict(bos_token_id=50256), 300, "bos_token_id"),
    *[(dict(n_head=n_head), 301, "n_head") for n_head in (-1, 0, "2", 2.0, 10**9, True, [2])],
    (dict(n_head=3), 301, "n_head"), (dict(n_head=None), 301, "n_head"),
    (dict(n_layer=10**9), 301, "n_layer"), (dict(n_layer=1), 301, "n_layer"), (dict(n_embd=64), 301, "n_embd"),
    (dict(vocab_size=300), 301, "vocab_size"), (dict(n_positions=41), 301, "n_positions"),
    (dict(activation_function="relu"), 301, "activation_function"), (dict(model_type="opt"), 301, "model_type"),
    (dict(time_conditioning=True), 301, "time_conditioning")]


@pytest.fixture(scope="module")
def gpt2_of(tmp_path_factory):
    """A function: V -> a folder with a GPT-2 of so many ids, made once."""
    @functools.cache
    def make(V):
        folder = tmp_path_factory.mktemp(f"gpt2-{V}")
        save_gpt2(folder, V=V)
        return folder
    return make


@pytest.mark.parametrize("change, V, name", BAD_GPT2)
def test_a_gpt2_whose_settings_are_not_its_own_is_refused_by_name(gpt2_of, tmp_path, cli, change, V, name):
    folder = copied(gpt2_of(V), tmp_path)
    rewrite(folder, **change)
    refused(cli(sample, f"--ckpt={folder} --n=1"), str(folder), name)


def copied(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "lm"))


def test_a_gpt2_file_has_the_heads_of_the_config_json_beside_it(gpt2_of, tmp_path, cli):
    """Without one they are asked for, with the line to write."""
    folder = copied(gpt2_of(301), tmp_path)
    x = torch.randint(301, (2, 20), generator=gen())
    want = sample.load_model(str(folder))(x)
    file = folder / "model.safetensors"
    assert torch.equal(sample.load_model(str(file))(x), want)
    (folder / "config.json").unlink()
    for path in (file, folder):
        result = cli(sample, f"--ckpt={path} --n=1")
        refused(result, "n_head", "config.json")
    (folder / "config.json").write_text("{" + result[2].split("{")[1].split("}")[0] + "}")
    assert sample.load_model(str(folder)).config.n_head == 4               # 128 wide, which it did not know
    assert sample.load_model(str(file)).bos == 300


def test_a_gpt2_of_a_published_width_needs_no_config(tmp_path):
    state = GPT2(20, 8, 19, 1, 768, 12, 0.0).state_dict()
    theirs = {ours: name for name, ours in teacher.GPT2_NAMES.items()}
    out = {}
    for key, w in state.items():
        parts = key.removeprefix("transformer.").split(".")
        if parts[0] == "head":
            continue
        prefix = ""
        if parts[0] == "blocks":
            prefix = f"h.{parts[1]}."
            parts = parts[2:]
        name = theirs[parts[0]]
        out[f"{prefix}{name}.{parts[1]}"] = w.t() if "c_" in name and parts[1] == "weight" else w
    torch.save(out, tmp_path / "gpt2.bin")
    assert sample.load_model(str(tmp_path / "gpt2.bin")).config.n_head == 12


@pytest.mark.parametrize("rename", [("h.1.", "h.1000000000."), ("h.1.", "h.2."), ("h.0.", "h.00.")])
def test_gpt2_layers_with_a_gap_are_refused(gpt2_of, rename):
    state = published.read_weights(gpt2_of(301))[0]
    with pytest.raises(ValueError, match="not GPT-2's.*blocks"):
        GPT2.from_state({k.replace(*rename): w for k, w in state.items()}, {})


def test_a_gpt2_without_tokens_is_refused(gpt2_of):
    state = published.read_weights(gpt2_of(301))[0]
    for empty in (torch.zeros(0, 128), torch.zeros(0), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="GPT-2"):
            GPT2.from_state(state | {"wte.weight": empty}, {})


@pytest.mark.parametrize("bos, vocab_size, V", [(50256, 50304, 50257), (None, None, 50257), (50256, 50257, 50257),
                                                (7, 50304, 50304)])
def test_gpt2_padded_to_50304_rows_is_cut_where_its_bos_is_gpt2s(gpt2_of, tmp_path, bos, vocab_size, V):
    folder = copied(gpt2_of(50304), tmp_path)
    rewrite(folder, bos_token_id=bos, eos_token_id=bos, vocab_size=vocab_size)
    model = sample.load_model(str(folder))
    assert (model.vocab_size, model.bos) == (V, bos or 50256)
    assert model.meta["tokenizer"] == ("gpt2" if V == 50257 else "ids")
    x = torch.randint(50257, (1, 6), generator=gen())
    assert model(x).shape == (1, 6, V) and len(model.transformer.embed.weight) == V


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_weights_in_several_files_are_those_of_one(gpt2_of, tmp_path, cli, kind):
    folder = copied(gpt2_of(301), tmp_path)
    x = torch.randint(301, (2, 20), generator=gen())
    want = sample.load_model(str(folder))(x)
    state, _ = published.read_weights(folder)
    (folder / "model.safetensors").unlink()
    file_of = {name: f"part-{i % 3}.{kind}" for i, name in enumerate(state)}
    for file in set(file_of.values()):
        part = {name: w.clone() for name, w in state.items() if file_of[name] == file}
        if kind == "bin":
            torch.save(part, folder / file)
        else:
            pytest.importorskip("safetensors.torch").save_file(part, folder / file)
    index = folder / (published.WEIGHTS[2] if kind == "safetensors" else published.WEIGHTS[3])
    index.write_text(json.dumps(dict(metadata={}, weight_map=file_of)))
    assert torch.equal(sample.load_model(str(folder))(x), want)

    name = next(iter(file_of))
    for bad in (file_of | {name: f"../lm/part-0.{kind}"}, file_of | {name: "/etc/passwd"}, file_of | {name: 3},
                file_of | {name: f"part-1.{kind}"}, file_of | {"h.7.ln_1.weight": f"part-1.{kind}"},
                file_of | {name: f"no.{kind}"}, [name], None, {}):
        index.write_text(json.dumps(dict(weight_map=bad)))
        refused(cli(sample, f"--ckpt={folder} --n=1"), str(folder))


# ---------------------------------------------------------------------------------------------------------------------
# published.py: whose tokenizer

def gpt2_tokens():
    return {token: i for i, token in Tokenizer("gpt2").codec.tokens().items()}


@needs_shared
def test_the_hash_of_gpt2s_tokens_is_that_of_tiktokens(monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", os.path.join(SHARED, "assets", "tiktoken_cache"))
    by_id = sorted((i, token) for token, i in gpt2_tokens().items())
    digest = hashlib.sha256(json.dumps(by_id).encode()).hexdigest()
    assert digest == published.GPT2_TOKENS_SHA256


@pytest.mark.parametrize("draws", [1, 3])
def test_the_score_of_a_request_does_not_depend_on_the_batch(draws):
    """Its noise is drawn from a generator of its own."""
    teacher = tiny_ar(V=7, L=12, seed=2)
    student = tiny("gumbel", V=7, L=12, seed=5)
    student.meta = dict(tokenizer="ids")
    student.name = "student"
    g = gen()
    pairs = []
    for n in torch.randint(2, 11, (33,), generator=g).tolist():
        ids = torch.randint(6, (n,), generator=g).tolist()
        pairs.append((ids[:n // 2], ids[n // 2:]))
    scores = []
    for batch in (1, 7, 32):
        scorer = lm_eval_model.Scorer(student, teacher, False, draws, batch, seed=1)
        scores.append([nats for nats, _ in scorer.score_all(pairs, show_bar=False)])
    assert np.allclose(scores[1], scores[0], rtol=1e-5) and np.allclose(scores[2], scores[0], rtol=1e-5)
    assert len(set(scores[0])) > 20


SWAPPED = {"the": "a", "a": "the"}                         # two tokens that change places: another tokenizer
TOKENIZERS = [                                             # (files, V, bos, the tokenizer's name, a word on stderr)
    ("none", 50257, 50256, "gpt2", "taken for GPT-2's"), ("none", 50257, 0, "ids", ""), ("none", 301, 300, "ids", ""),
    ("vocab.json", 50257, 50256, "gpt2", ""), ("tokenizer.json", 50257, 50256, "gpt2", ""),
    ("padded tokenizer.json", 50257, 50256, "gpt2", ""), ("other vocab.json", 50257, 50256, "hf:", ""),
    ("other tokenizer.json", 50257, 50256, "hf:", ""), ("other vocab.json", 50257, 0, "hf:", ""),
    ("unigram tokenizer.json", 50257, 50256, "hf:", ""), ("named", 50257, 50256, "gpt2", "")]


@needs_shared
@pytest.mark.parametrize("files, V, bos, name, word", TOKENIZERS)
def test_a_tokenizer_is_known_by_its_tokens(tmp_path, capsys, monkeypatch, files, V, bos, name, word):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", os.path.join(SHARED, "assets", "tiktoken_cache"))
    tokens = gpt2_tokens()
    if "other" in files:
        tokens = {SWAPPED.get(token, token): i for token, i in tokens.items()}
    content = tokens
    if "tokenizer.json" in files:
        content = {"model": {"type": "BPE", "vocab": tokens}, "added_tokens": []}
    if "padded" in files:
        content["added_tokens"] = [{"id": 50256, "content": "<|endoftext|>"}, {"id": 50257, "content": "[PAD]"}]
    if "unigram" in files:
        content["model"]["vocab"] = [["a", -1.5], ["b", -2]]
    if files not in ("none", "named"):
        (tmp_path / files.split()[-1]).write_text(json.dumps(content))
        (tmp_path / "merges.txt").write_text("")
    settings = {}
    if files == "named":
        settings = {"tokenizer": "gpt2"}
        (tmp_path / "vocab.json").write_text("{}")
    model = argparse.Namespace(vocab_size=V, bos=bos)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        found = published.tokenizer_of(str(path), settings, model)
        assert found == (f"hf:{tmp_path}" if name == "hf:" else name)
        err = capsys.readouterr().err
        assert word in err and err.count("\n") == bool(word)


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"model": 3}', b'{"model": {}}', b'{"model": {"vocab": 3}}',
                                     b'{"model": {"vocab": {}}, "added_tokens": [3]}',
                                     b'{"model": {"vocab": {"a": "x"}}}'])
def test_a_damaged_tokenizer_is_refused(gpt2_of, tmp_path, cli, content):
    folder = copied(gpt2_of(301), tmp_path)
    (folder / "tokenizer.json").write_bytes(content)
    refused(cli(sample, f"--ckpt={folder} --n=1"), str(folder), "tokenizer")


def hugging_face_model(folder, bos, eos, tokenizer_bos=None, V=120):
    """A Llama whose config names these BOS and EOS, in a folder with a tokenizer whose BOS is another, or none."""
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    tokenizers = pytest.importorskip("tokenizers")
    transformers.logging.set_verbosity_error()             # it warns of such configs
    torch.manual_seed(0)
    lm = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64))
    lm.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    # null: a name that is left out has the default of its class
    (folder / "config.json").write_text(json.dumps(config | dict(bos_token_id=bos, eos_token_id=eos)))
    (folder / "generation_config.json").unlink(missing_ok=True)
    if tokenizer_bos is not None:
        words = {f"w{i}": i for i in range(V)}
        bpe = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
        bpe.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=f"w{tokenizer_bos}")
        theirs.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("bos, eos, tokenizer_bos, want", [
    (7, 2, 5, 5), (None, None, 5, 5), (None, [5, 6], 5, 5), (10**6, 2, 5, 5),          # its tokenizer's, as in shards
    (7, 2, None, 7), (None, 2, None, 2),                                               # without one, its config's
    (None, [5, 6], None, "bos_token_id"), (None, None, None, "bos_token_id"), (10**6, 2, None, "bos_token_id"),
    (-1, 2, None, "bos_token_id")])
def test_a_hugging_face_model_has_the_bos_of_its_tokenizer(tmp_path, cli, monkeypatch, bos, eos, tokenizer_bos, want):
    folder = hugging_face_model(tmp_path / "lm", bos, eos, tokenizer_bos)
    loaded = []
    monkeypatch.setattr(sample, "Tokenizer", lambda *args: loaded.append(args) or Tokenizer(*args))
    if isinstance(want, str):
        refused(cli(sample, f"--ckpt=hf:{folder} --n=1"), f"hf:{folder}", want)
        return
    model = sample.load_model(f"hf:{folder}")
    assert model.bos == model.config.bos == model.meta["bos"] == want and len(loaded) == 1
    assert bool(model.meta.get("fingerprint")) == (tokenizer_bos is not None)


# ---------------------------------------------------------------------------------------------------------------------
# published.py: what a server says of a file

class Hub(http.server.BaseHTTPRequestHandler):
    """As Hugging Face's: a redirection that states the hash of what lies behind it."""

    def do_HEAD(self):
        self.send_response(self.server.status)
        self.send_header("Location", "http://127.0.0.1:9/elsewhere")
        for name, value in self.server.answer.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(self.server.content)))
        self.end_headers()

    def do_GET(self):
        self.server.status = 200
        self.do_HEAD()
        self.wfile.write(self.server.content)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.status = 302
    server.answer = {}
    server.content = b"x" * 1000
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    monkeypatch.setattr(teacher, "GPT2_URL", f"http://127.0.0.1:{server.server_port}/{{}}/model.safetensors")
    monkeypatch.setenv("GUMBEL_CACHE", str(tmp_path / "cache"))
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("status", [200, 302, 307, 404])
@pytest.mark.parametrize("etag, want", [
    ('"' + 64 * "a" + '"', 64 * "a"), (64 * "b", 64 * "b"), ('"' + 40 * "a" + '"', None), ("", None), (None, None),
    ('W/"x"', None)])
def test_the_hash_of_a_download_is_the_one_that_the_server_states(hub, status, etag, want):
    hub.status = status
    if etag is not None:
        hub.answer["X-Linked-Etag"] = etag
    assert published.server_sha256(teacher.GPT2_URL.format("gpt2")) == want


def test_a_server_that_is_not_there_states_no_hash():
    assert published.server_sha256("http://127.0.0.1:9/x") is None


def test_gpt2_is_downloaded_with_the_servers_hash_and_one_of_another_hash_is_not_kept(hub, gpt2_of, tmp_path, cli):
    hub.content = (gpt2_of(301) / "model.safetensors").read_bytes()
    hub.answer["X-Linked-Etag"] = '"' + 64 * "0" + '"'
    refused(cli(sample, "--ckpt=gpt2 --n=1"), "gpt2", "hash")
    assert not (tmp_path / "cache" / "gpt2" / "model.safetensors").exists()
    hub.status = 302
    hub.answer["X-Linked-Etag"] = '"' + hashlib.sha256(hub.content).hexdigest() + '"'
    assert sample.load_model("gpt2").vocab_size == 301


def test_a_download_without_a_hash_is_known_by_its_header(hub, gpt2_of, tmp_path, cli):
    hub.content = (gpt2_of(301) / "model.safetensors").read_bytes()[:-100]
    refused(cli(sample, "--ckpt=gpt2 --n=1"), "gpt2", "no complete safetensors file", "remove")


# ---------------------------------------------------------------------------------------------------------------------
# verified.py

def apd_by_hand(student, verifier, row, ratio, look, top_p, greedy, generator, g=None):
    """Section 4 of Israel et al. as a plain loop over one row -> (the row, how many calls)."""
    x = row.clone()
    V = student.mask_id
    calls = 0
    while (x == V).any():
        first = int((x == V).nonzero()[0])
        where = [i for i in range(first, min(first + look, len(x))) if x[i] == V]
        logits = student.logits(student.hidden(x[None], g)[0])[where].double()
        if top_p < 1:
            logits = nucleus(logits, top_p)
        zeta = torch.zeros_like(logits)
        if not greedy:
            zeta = sample_gumbel(logits.shape, generator)
        draft = (logits + zeta).argmax(-1)
        y = x.clone()
        y[where] = draft
        y[y == V] = 0                                      # what stands after the draft does not matter
        ar = torch.stack([verifier.log_probs(y[None])[0, i - 1] for i in where]).double()
        for j, i in enumerate(where):
            target = ratio * logits[j].log_softmax(-1) + (1 - ratio) * ar[j]
            target[logits[j] == -math.inf] = -math.inf
            if j and (target + zeta[j]).argmax() != draft[j]:
                break
            x[i] = draft[j]
        calls += 1
    return x, calls


APD_SETTINGS = [                                           # (ratio, max_lookahead, top_p, greedy)
    (0.5, 4, 1.0, False), (0.0, 11, 1.0, False), (0.7, 3, 0.6, False), (0.3, 5, 1.0, True), (0.5, 1, 1.0, False)]


@pytest.mark.parametrize("noise", [None, "gumbel"])
def test_apd_is_its_definition(noise):
    student = tiny(noise, L=12)
    verifier = tiny_ar(L=12)
    saved = 0                                              # calls, against one a token
    for seed, setting in enumerate(4 * APD_SETTINGS):
        row = rows_of(1, L=12, seed=seed)[0]
        row[torch.rand(12, generator=gen(seed)) < 0.8] = 7
        row[0] = student.bos
        xi = None
        g = None
        if noise:
            xi = sample_gumbel((1, 12, 7), gen(seed))
            g = student.noise_embed(xi)
        ratio, look, top_p, greedy = setting
        got, nfe, checks = generate_apd(student, row[None], verifier, ratio, look, 1.0, top_p, greedy, xi,
                                        generator=gen(seed + 50))
        want, calls = apd_by_hand(student, verifier, row, *setting, gen(seed + 50), g)
        assert torch.equal(got[0], want) and nfe.tolist() == [calls] == checks.tolist()
        assert torch.equal(got[0][row != 7], row[row != 7])
        saved += int((row == 7).sum()) - calls
    assert saved > 5                                       # some drafts were longer than one token


def test_apd_with_ratio_1_accepts_every_draft_and_rows_go_at_their_own_pace():
    """Drafts of 4: rows with 11, 6 and 0 masked tokens take 3, 2 and 0 calls."""
    rows = rows_of(3, L=12)
    rows[0, 1:] = 7
    rows[1, 6:] = 7
    x, nfe, checks = generate_apd(tiny(L=12), rows, tiny_ar(L=12), 1.0, 4, generator=gen())
    assert nfe.tolist() == [3, 2, 0] == checks.tolist()
    assert (x < 7).all() and torch.equal(x[2], rows[2])


@pytest.mark.parametrize("setting", [dict(ratio=1.5), dict(max_lookahead=0), dict(tau=0.0), dict(top_p=0.0)])
def test_apd_refuses_values_out_of_range(setting):
    rows = torch.full((1, 12), 7)
    rows[:, 0] = 6
    with pytest.raises(ValueError):
        generate_apd(tiny(L=12), rows, tiny_ar(L=12), **setting)


@pytest.mark.slow
def test_apd_samples_and_is_evaluated_from_the_command_line(runs, cli, monkeypatch):
    monkeypatch.chdir(runs)
    apd = "--sampler=apd --verifier=out/maze-ar"
    for model in ("out/maze-mdlm", "out/maze-mdlm-gumbel"):
        code, out, _ = cli(sample, f"--ckpt={model} --n=2 {apd} --max_lookahead=4")
        assert code == 0 and out.count("verifier_calls") == 2
    code, out, _ = cli(evaluate, f"maze --ckpt out/maze-ar out/maze-mdlm --n=20 --nfe=4 {apd}")
    assert code == 0 and "| verifier |" in out and "| teacher |" in out


# ---------------------------------------------------------------------------------------------------------------------
# scores.py: generative perplexity

def log_p_of(judge, row):
    """log p of each token after the first, one row in one pass: [L] -> [L - 1]."""
    return judge.log_probs(row[None, :-1])[0].gather(-1, row[1:, None]).squeeze(1)


def test_judge_nats_are_the_sum_over_the_predicted_tokens_without_eos():
    """Whatever the lengths in a batch."""
    judge = tiny_ar(V=9, L=16, seed=3).requires_grad_(False)
    samples = [np.random.default_rng(i).integers(0, 9, n) for i, n in enumerate([15, 3, 9, 1, 15])]
    nats, count = scores.judge_nll(judge, samples, "cpu", batch=2)
    for ids, a, c in zip(samples, nats, count):
        row = torch.tensor([8, *ids])
        scored = row[1:] != 8
        assert abs(a + log_p_of(judge, row)[scored].sum()) < 1e-4 and c == scored.sum()


def test_judge_reads_a_long_sample_in_windows_that_score_each_token_once():
    """Windows of 16 ids, 8 further each time; a token is scored by the first that holds it."""
    judge = tiny_ar(V=9, L=16, seed=3).requires_grad_(False)
    x = torch.randint(0, 8, (40,), generator=gen())
    row = torch.cat([torch.tensor([8]), x])
    want = {}                                              # place -> log p
    for start in range(0, 40, 8):
        for j, logp in enumerate(log_p_of(judge, row[start:start + 16])):
            want.setdefault(start + j + 1, float(logp))
    nats, count = scores.judge_nll(judge, [x.numpy()], "cpu")
    assert count[0] == 40 == len(want) and abs(nats[0] + sum(want.values())) < 1e-3


class Unigram(CausalLM):
    """A judge that gives every token the same distribution, wherever it stands."""

    def __init__(self, p):
        super().__init__(CausalConfig(vocab_size=len(p), length=64, bos=len(p) - 1))
        self.table = torch.nn.Parameter(torch.tensor(p).log())

    def hidden(self, tokens, cache=None):
        return tokens[..., None].float()

    def logits(self, h, exact=True):
        return self.table.expand(*h.shape[:-1], -1)


UNIGRAM = np.array([0.5, 0.25, 0.15, 0.1, 1e-9])           # the last is EOS
UNIGRAM = UNIGRAM / UNIGRAM.sum()
UNIGRAM_PPL = math.exp(-(UNIGRAM * np.log(UNIGRAM)).sum())


def test_genppl_under_the_judge_that_wrote_the_samples_is_exp_of_its_entropy():
    """Within the printed error, which is right on average: 200 sets of 40 samples."""
    judge = Unigram(UNIGRAM)
    rng = np.random.default_rng(0)
    facts = [scores.gen_ppl(judge, rng.choice(5, (40, 30), p=UNIGRAM), "cpu") for _ in range(200)]
    values = np.array([f["gen_ppl"] for f in facts])
    errors = np.array([f["gen_ppl_stderr"] for f in facts])
    assert abs(values.mean() - UNIGRAM_PPL) < 4 * values.std() / 200 ** 0.5 + 0.01
    assert 0.8 < errors.mean() / values.std() < 1.25
    assert (np.abs(values[::2] - values[1::2]) < 4 * np.hypot(errors[::2], errors[1::2])).all()      # two seeds


def test_a_repetitive_sample_is_liked_better_and_its_entropy_gives_it_away():
    """The likeliest token alone: a perplexity of 1 / 0.5."""
    same = np.zeros((40, 30), dtype=int)
    facts = scores.gen_ppl(Unigram(UNIGRAM), same, "cpu") | scores.text_facts(same)
    assert abs(facts["gen_ppl"] - 2) < 1e-4 < UNIGRAM_PPL - 2
    assert facts["entropy"] == facts["entropy_set"] == 0


@pytest.mark.parametrize("rows, distinct, entropy", [
    (np.zeros((40, 30), dtype=int), (1 / 1200, 1 / 1160, 1 / 1120), 0),
    (np.arange(200_000, 200_024).reshape(2, 12), (1, 1, 1), math.log(12)),
    # 12 21 12 12 23 31, 121 212 123 231
    (np.array([[1, 2, 1, 2], [1, 2, 3, 1]]), (3 / 8, 4 / 6, 1), (math.log(2) + 1.5 * math.log(2)) / 2)])
def test_text_facts_are_those_counted_by_hand(rows, distinct, entropy):
    facts = scores.text_facts(rows)
    assert (facts["distinct_1"], facts["distinct_2"], facts["distinct_3"]) == distinct
    assert abs(facts["entropy"] - entropy) < 1e-12


def test_genppl_refuses_an_id_that_the_judge_does_not_know():
    with pytest.raises(BadInput, match=r"\b5\b.*MASK"):
        scores.gen_ppl(Unigram(UNIGRAM), np.array([[1, 5]]), "cpu")


def test_genppl_is_that_of_transformers(tmp_path):
    """A random GPT-2 in the published format: the mean of transformers' own loss over rows."""
    lm = save_gpt2(tmp_path)
    samples = torch.randint(300, (6, 20), generator=gen())
    rows = torch.cat([torch.full((6, 1), 300), samples], 1)
    with torch.no_grad():
        want = math.exp(lm(rows, labels=rows).loss.item())
    found = scores.gen_ppl(sample.load_model(str(tmp_path)), samples.numpy(), "cpu")["gen_ppl"]
    assert abs(found / want - 1) < 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# scores.py: MAUVE

def features(shift, n):
    """Correlated features of two sets, the second shifted: 2 x [n, 24]."""
    A = torch.randn(24, 24, generator=gen())
    return [torch.randn(n, 24, generator=gen(i)) @ A + shift * i for i in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("shift", [0.0, 0.3, 1.0])
def test_mauve_is_that_of_mauve_text(shift, recwarn):
    """Within what the seeds of k-means differ by, from near to far apart."""
    reference = pytest.importorskip("mauve", reason="pip install mauve-text")
    p, q = features(shift, 500)
    ours = scores.mauve_scores(p, q)
    theirs = np.array([reference.compute_mauve(p.numpy(), q.numpy(), seed=s).mauve for s in range(5)])
    error = math.hypot(ours.std(), theirs.std()) / 5 ** 0.5
    assert abs(ours.mean() - theirs.mean()) < 2 * error + 0.004, (ours, theirs)


def test_mauve_is_1_for_a_set_against_itself_and_0_for_sets_that_share_no_cluster():
    p, _ = features(0.0, 500)
    assert np.allclose(scores.mauve_scores(p, p), 1)
    assert scores.mauve_scores(p, p + 50).max() < 0.01


def test_kmeans_is_a_fixed_point_of_lloyds_iteration_and_the_best_of_its_runs():
    x = torch.randn(300, 5, generator=gen())
    costs = []
    for redo in (5, 1):
        labels = scores.kmeans(x, 8, gen(2), redo=redo)
        centre = torch.stack([x[labels == i].mean(0) for i in range(8)])
        assert torch.equal(torch.cdist(x, centre).argmin(1), labels)
        costs.append(float((x - centre[labels]).square().sum()))
    assert costs[0] < costs[1]


def test_kmeans_finds_two_clusters_and_takes_more_clusters_than_distinct_points():
    x = torch.randn(300, 5, generator=gen())
    x[:100] += 20
    labels = scores.kmeans(x, 2, gen())
    assert (labels[:100] == labels[0]).all() and (labels[100:] == 1 - labels[0]).all()
    assert len(scores.kmeans(torch.ones(30, 5), 4, gen())) == 30


@pytest.mark.slow
def test_mauve_features_are_those_of_mauve_text(tmp_path):
    """The last layer at each text's last token, no BOS in front, texts of different lengths in one batch."""
    mauve_utils = pytest.importorskip("mauve.utils", reason="pip install mauve-text")
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    save_gpt2(tmp_path, V=60, L=32)
    samples = [torch.randint(60, (n,), generator=gen(n)) for n in (5, 31, 12, 7, 32)]
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    want = mauve_utils.featurize_tokens_from_model(theirs, [s[None] for s in samples], 2)
    ours = GPT2.from_pretrained(str(tmp_path))
    found = scores.last_hidden(ours, [s.numpy() for s in samples], "cpu", batch=3)
    assert torch.allclose(found, want, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# plot.py

def test_a_line_of_the_figure_is_the_mean_over_seeds_with_their_standard_deviation():
    """Of one run, its own standard error. 0.2 and 0.4 have the sample deviation 0.1 sqrt(2)."""
    rows = [dict(model="a-s0", decode="greedy", nfe=2, n=9, success=0.2, stderr=0.01),
            dict(model="a-s1", decode="greedy", nfe=2, n=9, success=0.4, stderr=0.01),
            dict(model="b-s0", decode="greedy", nfe=2, n=9, success=0.5, stderr=0.02)]
    table, lines = nfe_table(rows, "success", "stderr", scale=100, digits=1)
    assert [row[2] for row in table] == ["30.0 ± 14.1", "50.0 ± 2.0"]
    assert np.allclose(lines["a-s0 and 1 other seed, greedy"][2], (30, 10 * 2 ** 0.5))


# ---------------------------------------------------------------------------------------------------------------------
# figures.py

def test_figure_of_paths_shows_what_the_models_write_from_the_same_noise(runs, tmp_path, monkeypatch):
    """The plain student's row is Gumbel-max of its marginals; rates are counted over all draws."""
    monkeypatch.setattr(figures, "RESULTS", str(tmp_path))
    monkeypatch.setattr(figures, "DRAWS", 50)
    paths = [str(runs / "out" / name) for name in ("maze-ar", "maze-mdlm", "maze-mdlm-gumbel")]
    figures.draw_paths(paths)
    teacher, plain, student = figures.read("draws.json")["models"]
    model = sample.load_model(paths[0])
    tokens, noise = extract_sequential(model, 50, generator=torch.Generator().manual_seed(0))
    assert teacher["paths"] == tokens[:6, 1:].tolist()
    assert teacher["success"] == maze_valid(tokens[:, 1:].numpy()).mean()
    assert teacher["same_as_teacher"] == 1 and teacher["calls"] == 10
    masked = torch.full((50, 11), 6)
    masked[:, 0] = 5
    alone = (sample.load_model(paths[1]).log_probs(masked)[..., :6] + noise).argmax(-1)
    assert plain["paths"] == alone[:6, 1:].tolist() and plain["calls"] == 1
    together, _ = sample.load_model(paths[2]).generate(masked, 1, greedy=True, noise=noise)
    assert student["paths"] == together[:6, 1:].tolist() and student["calls"] == 1


def test_figures_are_drawn_from_the_committed_results(tmp_path, monkeypatch):
    """Every figure of the README can be made again, and none is larger than 300 KB."""
    pytest.importorskip("matplotlib")
    figures.main([f"--out={tmp_path}"])
    made = sorted(path.name for path in tmp_path.iterdir())
    assert made == ["block_mask.svg", "entropy.svg", "maze.svg", "molecules.svg", "paths.svg"]
    for name in made:
        committed = os.path.join(figures.FOLDER, name)
        assert 1000 < os.path.getsize(committed) < 300_000
        assert 1000 < (tmp_path / name).stat().st_size < 300_000


def test_figure_shows_a_path_green_only_if_it_is_valid():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    rows = maze_paths()[[0, 1000]].tolist()
    rows.append([0] * 10)                                  # straight up, and out
    for row, color in zip(rows, ("valid", "valid", "invalid")):
        figure, axes = pyplot.subplots()
        figures.draw_path(axes, row)
        assert {line.get_color() for line in axes.lines} == {figures.COLORS[color]}
        pyplot.close(figure)


# ---------------------------------------------------------------------------------------------------------------------
# bench.py

@pytest.mark.parametrize("flags, names", [
    pytest.param("sampling --length=16 --nfe=4 --batch_size=2 --vocab_size=40", ["as the authors' code", "AR, KV"],
                 marks=pytest.mark.slow),
    ("noise --rows=30 --vocab_size=6000", ["full tensors", "teacher cache, k = 8"]),
    pytest.param("step --length=16 --micro_batch_size=2 --vocab_size=40", ["MDLM + Gumbel, teacher cache", "AR as"],
                 marks=pytest.mark.slow)])
def test_bench_prints_the_rows_that_it_names(cli, flags, names):
    code, out, err = cli(bench, f"{flags} --size=tiny --repeats=1")
    assert code == 0 and all(name in out for name in names) and "| nan" not in out, (out, err)


# ---------------------------------------------------------------------------------------------------------------------
# plan.py

@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--model=bd3lm --gumbel", "--model=mdlm --size=medium"])
def test_the_micro_batch_that_is_chosen_fits(monkeypatch, flags):
    """The rule of thumb of a run on a GPU of 24 GB, against what is counted; four times as many rows would not fit."""
    monkeypatch.setattr(sys, "argv", ["bench.py"])
    args = train.parse([*flags.split(), "--dtype=bfloat16"])
    rows = rows_that_fit(args, 1024, 50257, 64, 24e9)
    found = plan.predict(args, plan.speeds_of(CARDS["4090"]), [rows, 4 * rows], 64)
    overhead = found.gradients + plan.OVERHEAD
    assert found.peaks[rows] + overhead < 24e9 < found.peaks[4 * rows] + overhead


def planned(monkeypatch, model="mdlm", V=1000, L=128, rows=4, compiled=False):
    """A micro-step of a small model on fake tensors -> (the ledger, the run)."""
    monkeypatch.setattr(sys, "argv", ["bench.py"])
    args = train.parse([f"--model={model}", "--size=tiny", f"--length={L}", "--dtype=bfloat16"])
    ledger = plan.Ledger(plan.speeds_of(CARDS["H100"]), compiled)
    with plan.fake_gpu(ledger, plan.Answers(0.5, L)):
        run = plan.Run(args, V, ledger)
        ledger.restart()
        run.micro_step(rows)
    return ledger, run


def test_a_plan_counts_the_storage_and_the_flops_of_ops():
    """A product of [64, 32] and [32, 16], something added to it, a view, in float32."""
    ledger = plan.Ledger(plan.speeds_of(CARDS["H100"]))
    with FakeTensorMode(), ledger:
        a = torch.zeros(64, 32)
        b = torch.zeros(32, 16)
        assert ledger.current == 8192 + 2048
        ledger.restart()
        c = a @ b
        d = c.view(-1) + 1
        assert ledger.current == ledger.peak == 8192 + 2048 + 2 * 4096
        del c
        assert ledger.current == 8192 + 2048 + 4096
        torch.zeros(1)
        del a, b, d
    assert ledger.current == 0 and ledger.peak == 8192 + 2048 + 2 * 4096
    flops, traffic, seconds = ledger.costs[plan.STUDENT]
    assert flops == 2 * 64 * 32 * 16 and traffic == (8192 + 2048 + 4096) + 2 * 4096 + 4
    assert seconds == pytest.approx(traffic / (0.836 * 3.35e12))               # so small a product waits for memory


def test_in_a_compiled_part_of_a_plan_only_what_enters_and_leaves_a_group_is_moved():
    ledger = plan.Ledger(plan.speeds_of(CARDS["H100"]), compiled=True)
    with FakeTensorMode(), ledger:
        a = torch.zeros(64, 32)
        b = torch.zeros(32, 16)
        c = a @ b                                          # its operands are written, and read
        ledger.restart()
        d = (c + 1) * 2 + c
        assert ledger.costs[plan.STUDENT][1] == 4096       # c is read, once
        unused = d.exp()                                   # noqa: F841, nobody reads it: a compiler leaves it out
        d.t() @ d
        assert ledger.costs[plan.STUDENT][1] == 2 * 4096 + 4096 + 1024    # d is written, and read
        d.abs().sum()
        assert ledger.costs[plan.STUDENT][1] == 2 * 4096 + 4096 + 1024 + 4096


def test_a_tensor_of_logits_raises_a_plans_peak_by_its_size(monkeypatch):
    losses = MDLM.losses

    def losses_with_logits(self, tokens, *args, **kw):
        self.logits_of_all = torch.zeros(*tokens.shape, 1000)
        return losses(self, tokens, *args, **kw)

    before, _ = planned(monkeypatch)
    monkeypatch.setattr(MDLM, "losses", losses_with_logits)
    after, _ = planned(monkeypatch)
    assert after.peak - before.peak == 4 * 128 * 1000 * 4


@pytest.mark.parametrize("model", ["mdlm", "ar"])
def test_the_flops_of_a_plan_are_those_that_the_log_counts(monkeypatch, model):
    ledger, run = planned(monkeypatch, model)
    flops = sum(ledger.costs.values())[0]
    assert flops == pytest.approx(4 * flops_per_row(run.model, None, 128), rel=0.02)


def test_a_plan_leaves_nothing_behind_also_after_an_error(cli, monkeypatch):
    before = [dict(vars(gumbel.DEVICE)), mdlm.row_losses, mdlm.compiled_flex, torch.nn.Module.to]

    def fail(self, rows):
        assert gumbel.DEVICE.planned and gumbel.DEVICE.chunk == gumbel.GPU.chunk
        raise ValueError("as a test wants it")

    monkeypatch.setattr(plan.Run, "micro_step", fail)
    with pytest.raises(ValueError, match="as a test wants it"):
        cli(bench, "plan --size=tiny --vocab_size=40 --length=16")
    assert before == [dict(vars(gumbel.DEVICE)), mdlm.row_losses, mdlm.compiled_flex, torch.nn.Module.to]
    assert type(torch.zeros(2) + 1) is torch.Tensor


@pytest.mark.parametrize("flags, parts", [
    ("--gumbel --teacher=gpt2", ["teacher, body", "teacher, head", "noise, post", "the same in the backward"]),
    pytest.param("--model=bd3lm --block_size=8 --gumbel --teacher=gpt2 --teacher_cache=4 --compile --card=a100",
                 ["noise, post"], marks=pytest.mark.slow),
    pytest.param("--model=medusa --gumbel --heads=2 --dtype=float32", ["teacher, body", "noise, post"],
                 marks=pytest.mark.slow),
    pytest.param("--kd=token --teacher=gpt2 --size=tiny", ["teacher, head"], marks=pytest.mark.slow),
    ("--noise=quantile --teacher=gpt2 --init_from=gpt2", ["teacher, body", "teacher, head", "noise, post"]),
    pytest.param("--noise=quantile --teacher=gpt2 --teacher_cache=4", ["noise, post"], marks=pytest.mark.slow)])
def test_bench_plan_prints_the_parts_of_a_step_and_what_fits(cli, monkeypatch, flags, parts):
    monkeypatch.setattr(plan, "MICRO_BATCHES", (2, 8))
    size = "" if "medusa" in flags or "init_from" in flags else "--size=tiny"
    shape = f"{size} --length=128 --vocab_size=600 --batch_size=16 --processes=2 --micro_batch_size=4 --steps=1000"
    code, out, err = cli(bench, f"plan {flags} {shape}")
    assert code == 0 and "nan" not in out, (out, err)
    for part in parts + ["student, forward", "head + cross-entropy", "student, head, ", "clipping", "sum of"]:
        assert re.search(rf"^\| {re.escape(part)}.* \| [\d.]+ \| \d+ \| \d+ \|$", out, re.MULTILINE), (part, out)
    assert re.search(r"A step on 2 x \w+, each 2 x 4 rows: \d+ ms, [\d,]+ tokens/s, MFU [\d.]+%; 1,000 steps", out)
    assert re.findall(r"^\| (\d+) \| [\d.]+ \| [\d.]+ \| yes \|$", out, re.MULTILINE) == ["2", "4", "8"]


@pytest.mark.parametrize("name, peak", [
    ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 NVL", 835e12), ("NVIDIA H100 80GB HBM3", 989e12),
    ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA L40S", 362e12), ("NVIDIA L4", 121e12), ("Tesla T4", None)])
def test_the_peak_of_a_card_is_found_by_its_name(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    found = peak_flops(argparse.Namespace(cuda=True, size=2))
    assert found == (peak and 2 * peak)


def test_the_authors_way_of_sampling_in_bench_has_the_law_of_ours():
    """Given the noise, of each token together with its neighbour's id mod 3: chi-squared, 4000 samples of each."""
    V = 30
    n = 4000
    model = bench.filled(tiny("gumbel", V=V, L=8)).eval()
    x = torch.full((n, 8), V)
    x[:, 0] = V - 1
    noise = sample_gumbel((1, 8, V), gen()).expand(n, 8, V)
    with torch.no_grad():
        theirs = bench.reference_sample(model, x, 3, noise, 1.0, gen(1), bench.Clock())
        ours, _ = model.generate(x, 3, noise=noise, generator=gen(2))
    assert (theirs < V).all() and (theirs[:, 0] == V - 1).all()
    for i in range(1, 8):
        neighbour = 1 + i % 7
        table = torch.stack([torch.bincount(s[:, i] * 3 + s[:, neighbour] % 3, minlength=3 * V)
                             for s in (theirs, ours)])
        frequent = table[:, table.sum(0) > 20]
        assert stats.chi2_contingency(frequent.numpy()).pvalue > 1e-4


def test_the_noise_on_full_tensors_in_bench_has_the_mean_of_ours():
    """softmax(noise), seen through the identity, over 20,000 draws."""
    n = 20_000
    logits = torch.randn(1, 30, generator=gen()).expand(n, 30)
    w = torch.full((n,), 3)
    embed = GumbelEmbedding(30, 30)
    embed.weight.data.copy_(torch.eye(30))
    torch.manual_seed(0)
    theirs = bench.reference_noise(logits, w, torch.eye(30))
    ours = embed.from_posterior(lambda a, b: logits[a:b], w, gen()).detach()
    assert (theirs.mean(0) - ours.mean(0)).abs().max() < 5 * (theirs.var(0) * 2 / n).sqrt().max()


# ---------------------------------------------------------------------------------------------------------------------
# gpu.py

def verdicts_of(result, path):
    """The exit code of `bench gpu`, and the rows of its file, which are those of its table."""
    code, out, err = result
    rows = json.loads(path.read_text())["rows"]
    lines = [line for line in out.splitlines() if line.startswith("| ")][1:]
    assert len(lines) == len(rows), (out, err)
    for line, row in zip(lines, rows):
        cells = [row[key] for key in ("part", "what", "expected", "found", "ok")]
        assert line.startswith("| " + " | ".join(cells) + " |")
    return code, rows


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="runs on a GPU as a command: python -m extra.bench gpu")
def test_bench_gpu_runs_in_miniature_on_a_cpu(cli, tmp_path):
    code, rows = verdicts_of(cli(bench, f"gpu --json={tmp_path}/gpu.json"), tmp_path / "gpu.json")
    assert code == 0, rows
    assert list(dict.fromkeys(row["part"] for row in rows)) == list(gpu.PARTS)
    skipped = {row["part"] for row in rows if row["ok"] == "skipped"}
    assert {"flex", "cudnn", "padding"} <= skipped and not skipped & {"compile", "bf16", "noise", "resume", "ddp"}
    assert all("skipped" in row["expected"] for row in rows if row["ok"] == "skipped")


@pytest.mark.skipif(torch.cuda.is_available(), reason="padding is skipped on a CPU")
def test_a_part_of_bench_gpu_that_raises_is_a_verdict_and_the_others_run(cli, tmp_path, monkeypatch):
    def fails(shape, folder):
        yield gpu.at_most("before it", 0, 1)
        raise RuntimeError("CUDA error: as a test wants it\nwhat else there is to say")

    monkeypatch.setitem(gpu.PARTS, "attention", fails)
    result = cli(bench, f"gpu --only=attention,padding,noise --json={tmp_path}/gpu.json")
    code, rows = verdicts_of(result, tmp_path / "gpu.json")
    assert code == 1 and [row["ok"] for row in rows[:3]] == ["ok", "not", "skipped"], rows
    assert {row["ok"] for row in rows[3:]} == {"ok"} and len(rows) > 10
    assert rows[1]["found"] == "RuntimeError: CUDA error: as a test wants it" and "Traceback" in result[2]


def doubled(monkeypatch):
    draw = gumbel.sample_exponential
    monkeypatch.setattr(gumbel, "sample_exponential", lambda *args: draw(*args).square())


def on_a_grid(monkeypatch):
    def draw(shape, generator=None, device=None):
        u = torch.rand(shape, generator=generator, device=device)
        return -torch.log1p(-u).clamp(max=-gumbel.TINY)
    monkeypatch.setattr(gumbel, "sample_exponential", draw)


def posterior_of_another_token(monkeypatch):
    posterior = gumbel.posterior_gumbel
    monkeypatch.setattr(gumbel, "posterior_gumbel", lambda logits, x, g: posterior(logits, x.roll(1), g))


def attention_off(monkeypatch):
    read = medusa.Accumulator.read
    monkeypatch.setattr(medusa.Accumulator, "read",
                        lambda self, e: read(self, e) * (1.05 if torch.is_autocast_enabled("cpu") else 1))


def nothing_compiled(monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kw: None)
    monkeypatch.setattr(GumbelEmbedding, "compile", lambda self, **kw: None)


def loss_off(monkeypatch):
    losses = mdlm.row_losses
    monkeypatch.setattr(mdlm, "row_losses",
                        lambda *args: losses(*args) * (1.03 if torch.is_autocast_enabled("cpu") else 1))


def other_draws(monkeypatch):
    seeds = iter(range(10**6))
    monkeypatch.setattr(train, "torch_seed", lambda *key: next(seeds))


def head_in_bf16(monkeypatch):
    to_logits = mdlm.to_logits
    monkeypatch.setattr(mdlm, "to_logits", lambda layer, h, exact: to_logits(layer, h, False))


def slow(monkeypatch):
    sample = bench.Sampling.sample_here
    monkeypatch.setattr(bench.Sampling, "sample_here", lambda self, n: [sample(self, n) for _ in range(4)])


@pytest.mark.slow
@pytest.mark.parametrize("part, mistake, words", [
    ("noise", doubled, "prior: variance"), ("noise", on_a_grid, "repeated"),
    ("noise", posterior_of_another_token, "other argmaxes"), ("attention", attention_off, "MATH: output"),
    ("compile", nothing_compiled, "micro-step 1"), ("heads", head_in_bf16, "head in float32"),
    ("bf16", loss_off, "losses of ten steps"), ("resume", other_draws, "embeddings"),
    ("authors", slow, "1 samples")])
def test_bench_gpu_finds_a_mistake(cli, tmp_path, monkeypatch, part, mistake, words):
    mistake(monkeypatch)
    flags = f"gpu --only={part} --miniature --json={tmp_path}/gpu.json"
    code, rows = verdicts_of(cli(bench, flags), tmp_path / "gpu.json")
    assert code == 1 and any(words in row["what"] for row in rows if row["ok"] == "not"), rows


@pytest.mark.slow
def test_bench_gpu_holds_a_step_against_the_plan(cli, tmp_path, monkeypatch):
    """As on a card of full size: this CPU is no H100."""
    monkeypatch.setattr(gpu, "FULL", gpu.MINIATURE)
    monkeypatch.setattr(gpu, "card_here", lambda cuda: CARDS["H100"])
    code, rows = verdicts_of(cli(bench, f"gpu --only=step --json={tmp_path}/gpu.json"), tmp_path / "gpu.json")
    assert code == 1 and sum(row["expected"] == "reported" for row in rows) == 6 + 2, rows
    assert {row["ok"] for row in rows if "by paper" in row["what"]} == {"not"}
    assert sum("GB, 0." in row["what"] or "GB, 1." in row["what"] for row in rows) == 2


# ---------------------------------------------------------------------------------------------------------------------
# lm_eval_model.py: the score of a completion

ROWS = rows_of(5, V=7, L=12, seed=1)                       # scored: places 5 to 9


def completion(rows, start, end):
    scored = torch.zeros_like(rows, dtype=torch.bool)
    scored[:, start:end] = True
    return scored


def test_an_ar_model_scores_a_completion_by_the_chain_rule_and_says_whether_it_is_the_argmax():
    ar = tiny_ar(V=7, L=12, seed=3)
    want = ar.log_probs(ROWS)[:, 4:9].gather(-1, ROWS[:, 5:10, None]).squeeze(-1).sum(1)
    nats, greedy = lm_eval_model.score(ar, ROWS, completion(ROWS, 5, 10))
    assert torch.allclose(nats.float(), want, atol=1e-4) and not greedy.all()
    best = ROWS[:1].clone()
    for i in range(5, 10):
        best[:, i] = ar.log_probs(best)[:, i - 1].argmax(-1)
    _, greedy = lm_eval_model.score(ar, best, completion(best, 5, 10))
    assert greedy.all()


def test_mdlm_scores_a_completion_in_one_pass_with_all_from_it_on_masked():
    plain = tiny(V=7, L=12)
    z = ROWS.masked_fill(completion(ROWS, 5, 12), 7)
    want = plain.log_probs(z).gather(-1, ROWS[:, :, None]).squeeze(-1)[:, 5:10].sum(1)
    nats, _ = lm_eval_model.score(plain, ROWS, completion(ROWS, 5, 10))
    assert torch.allclose(nats.float(), want, atol=1e-4)


def test_bd3lm_scores_a_completion_block_by_block_given_the_clean_blocks_before():
    torch.manual_seed(0)
    blocks = randomise(BD3LM(7, 12, 6, block_size=4, n_layer=2, n_embd=32, n_head=2, dropout=0.0), 1)
    want = torch.zeros(5)
    for first in (4, 8):                                   # the blocks of places 4-7 and 8-11
        start = max(5, first)
        end = first + 4
        z = ROWS.clone()
        z[:, start:end] = 7
        clean = ROWS.clone()
        clean[:, end:] = 3                                 # later blocks are not seen
        logp = blocks.log_probs(z, clean).gather(-1, ROWS[:, :, None]).squeeze(-1)
        want += logp[:, start:min(10, end)].sum(1)
    nats, _ = lm_eval_model.score(blocks, ROWS, completion(ROWS, 5, 10))
    assert torch.allclose(nats.float(), want, atol=1e-4)


@pytest.mark.slow
def test_the_score_of_a_student_with_noise_is_a_bound():
    """Its mean is E_q[log p(completion | context, noise)] + log p_teacher, at most log p(completion | context)."""
    teacher = tiny_ar(V=4, L=4, seed=2)
    student = tiny("gumbel", V=4, L=4, seed=5)
    row = torch.tensor([[3, 1, 2, 0]])
    n = 20_000
    many = row.expand(n, -1)
    scored = completion(many, 2, 4)
    of_teacher = teacher.log_probs(row)[0, [1, 2], row[0, 2:]].sum().item()
    given, _ = lm_eval_model.score(student, many, scored, teacher, True, [gen(0)] * n)
    bound, _ = lm_eval_model.score(student, many, scored, teacher, False, [gen(0)] * n)
    assert torch.allclose(bound, given + of_teacher, atol=1e-5)

    def given_noise(xi):
        z = many.masked_fill(scored, 4)
        return student.log_probs(z, xi)[:, 2:].gather(-1, many[:, 2:, None]).squeeze(-1).sum(1).double()
    with torch.no_grad():
        q = extract_parallel(teacher, many, gen(1))
        q[:, 1] = 0                                        # noise of the context is not read
        want = given_noise(q)
        prior = given_noise(sample_gumbel((n, 4, 4), gen(2)))
    assert abs(given.mean() - want.mean()) < 5 * want.std() / n ** 0.5 and given.std() > 0
    assert bound.mean() < prior.exp().mean().log() + 0.01


# ---------------------------------------------------------------------------------------------------------------------
# lm_eval_model.py: the command

TASK = """task: {task}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/{task}.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
ANSWERS = dict(zip("abcdefgh", ["fa", "hc", "ae", "cb", "gd", "bh", "eg", "df"]))


def write_task(folder, task, questions):
    """A multiple-choice task of lm-eval: questions [(text, choices, number of the right one)]."""
    lines = [json.dumps(dict(question=q, choices=choices, answer=right)) + "\n" for q, choices, right in questions]
    (folder / f"{task}.jsonl").write_text("".join(lines))
    (folder / f"{task}.yaml").write_text(TASK.format(task=task, folder=folder))


@pytest.fixture(scope="module")
def qa(tmp_path_factory):
    """A folder with models of every kind that know ANSWERS; the task `known`, which asks for these; and `unknown`, of
    labels that contradict each other: half of them are right, whatever is answered."""
    pytest.importorskip("lm_eval", reason="pip install lm_eval")
    folder = tmp_path_factory.mktemp("qa")
    (folder / "x.txt").write_text("\n".join(100 * [f"{q}>{a}" for q, a in ANSWERS.items()]))
    write_task(folder, "known", [(f"{q}>", list(ANSWERS.values()), i) for i, q in enumerate(ANSWERS)])
    write_task(folder, "unknown", 2 * [("a>", ["hh", "gg"], 0), ("a>", ["hh", "gg"], 1)])
    size = ("--data=qa --length=6 --n_layer=2 --n_embd=32 --n_head=2 --dropout=0 --batch_size=64 --lr=5e-3 --warmup=10 "
            "--eval_every=400 --eval_rows=8 --report=0 --ema=0.9")
    run_in(folder, (prepare, "text --files x.txt --tokenizer=chars --separator=\\n --out=data/qa"),
           (train, f"{size} --model=ar --steps=100 --out=out/ar"),
           (train, f"{size} --model=mdlm --steps=150 --init_from=out/ar --out=out/mdlm"),
           (train, f"{size} --model=bd3lm --block_size=3 --steps=50 --init_from=out/mdlm --out=out/bd3lm"),
           (train, f"{size} --gumbel --teacher=out/ar --steps=100 --init_from=out/ar --out=out/gumbel"))
    return folder


@pytest.mark.slow
def test_lm_eval_finds_what_models_of_every_kind_know(qa, cli, monkeypatch):
    monkeypatch.chdir(qa)
    models = "out/ar out/mdlm out/bd3lm out/gumbel"
    code, out, err = cli(lm_eval_model, f"--include_path=. --tasks=known,unknown --ckpt {models} --json=r.json")
    assert code == 0, err
    found = {(row["model"], row["task"]): row for row in json.loads(Path("r.json").read_text())["rows"]}
    for model in ("ar", "mdlm", "bd3lm", "gumbel"):
        assert found[model, "known"]["acc"] == 1 and found[model, "known"]["n"] == 8, out
        assert found[model, "mean"]["acc"] >= 0.5
        if model != "gumbel":                              # whose noise differs from question to question
            assert found[model, "unknown"]["acc"] == 0.5, out
    assert found["gumbel", "known"]["score"] == "bound" and found["ar", "known"]["score"] is None


@pytest.mark.slow
def test_lm_eval_scores_one_question_given_the_noise(qa, cli, monkeypatch):
    """One question has no standard error."""
    monkeypatch.chdir(qa)
    code, out, err = cli(lm_eval_model, "--include_path=. --tasks=known --ckpt out/gumbel --score=given_noise --n=1")
    assert code == 0 and "| given_noise |" in out and "| 1 |" in out, err


@pytest.mark.slow
def test_an_unknown_task_is_refused(qa, cli, monkeypatch):
    monkeypatch.chdir(qa)
    refused(cli(lm_eval_model, "--include_path=. --tasks=nothing --ckpt out/ar"), "--tasks", "nothing")


def test_without_lm_eval_the_package_is_named(cli, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)      # as if it were not installed
    refused(cli(lm_eval_model, "--tasks=known --ckpt out/ar"), "pip install lm_eval")


# ---------------------------------------------------------------------------------------------------------------------
# judge.py

KEY = "sk-secret-0123456789"
RATINGS = {name: 1 + i for i, name in enumerate(llm_judge.CRITERIA)}       # 1 to 5
GOOD = RATINGS | {"justification": f"fine {KEY}"}          # a server may say the key back


class Stub(http.server.BaseHTTPRequestHandler):
    """An OpenAI-compatible endpoint: its server's `script` is what it does, request by request, then it answers GOOD;
    `seen` is what came. An item is an answer's object, its text, a status, "garbage", "drop" or "hang"."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, self.headers.get("Authorization"), body))
        item = self.server.script.pop(0) if self.server.script else GOOD
        if item == "drop":
            return
        if item == "hang":
            time.sleep(1.5)                                # three times the --timeout
        content = item if isinstance(item, str) else "Here it is: " + json.dumps(item)
        answer = json.dumps({"choices": [{"message": {"content": content}}]})
        status = 200
        if item == "garbage":
            answer = "{no json"
        if isinstance(item, int):
            status = item
            answer = f"your key {KEY} is bad"
        try:
            self.send_response(status)
            self.send_header("Location", "http://127.0.0.1:9/" + KEY)      # read with a 3xx only
            self.end_headers()
            self.wfile.write(answer.encode())
        except OSError:                                    # it hung too long
            pass

    def log_message(self, *args):
        pass


@pytest.fixture
def endpoint(monkeypatch, tmp_path):
    """The stub at work, and two files of samples, four texts in all, in the working folder."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    server.script = []
    server.seen = []
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1/")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(llm_judge.judge, "__defaults__", (0.01, 3))        # no waiting between the three tries
    monkeypatch.chdir(tmp_path)
    for name, texts in {"a": ["one", "two", "three"], "b": ["four", "one"]}.items():
        lines = [dict(settings={})] + [dict(text=text) for text in texts]
        Path(name + ".jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    yield server
    server.shutdown()
    server.server_close()


JUDGE = "--samples a.jsonl b.jsonl --parallel=1 --timeout=0.5 --json=r.json --out=j.jsonl --model"


def test_a_dry_run_of_the_judge_prints_the_prompt_and_asks_nobody(endpoint, cli):
    code, out, _ = cli(llm_judge, f"{JUDGE}=m --dry_run")
    assert code == 0 and "----------\none\n----------" in out
    assert not endpoint.seen and not os.path.exists("j.jsonl")


def test_judge_gets_answers_from_a_server_that_fails_in_every_way_and_asks_again_for_the_rest(endpoint, cli):
    """At most three tries a sample: "two" gets none. A line that a crash has cut off is no answer."""
    endpoint.script = [500, "garbage", GOOD,                               # one
                       GOOD | {"style": 11}, GOOD | {"clarity": True}, "hang",             # two
                       "drop", "no object", GOOD,                          # three
                       429, GOOD | {"factuality": None}, GOOD]             # four
    code, out, err = cli(llm_judge, f"{JUDGE}=m")
    assert code == 1 and "1 of 4 samples" in err and "0.5 s" in err, err
    assert "| 1.00 ± 0.00 | 2.00 ± 0.00 | 3.00 ± 0.00 | 4.00 ± 0.00 | 5.00 ± 0.00 |" in out
    rows = json.loads(Path("r.json").read_text())["rows"]
    assert [(row["model"], row["n"]) for row in rows] == [("a", 2), ("b", 2)] and rows[0]["creativity"] == 5
    assert len(endpoint.seen) == 12 and Path("j.jsonl").read_text().count("\n") == 3

    with open("j.jsonl", "a") as f:
        f.write('{"key": "cut')
    endpoint.seen.clear()
    endpoint.script = [GOOD | {"clarity": 9.0}]
    code, out, err = cli(llm_judge, f"{JUDGE}=m")
    assert code == 0 and len(endpoint.seen) == 1, err
    assert "two" in endpoint.seen[0][2]["messages"][0]["content"]
    assert "| 3.67 ± 2.67 |" in out                        # 1, 9 and 1
    code, out, err = cli(llm_judge, f"{JUDGE}=m")
    assert code == 0 and len(endpoint.seen) == 1 and "| 3.67 ± 2.67 |" in out, err         # nothing left to ask


def test_the_key_of_the_judge_is_nowhere_but_in_the_request(endpoint, cli):
    endpoint.script = [500, "garbage", GOOD]
    code, out, err = cli(llm_judge, f"{JUDGE}=m")
    assert code == 0
    for path, authorization, body in endpoint.seen:
        assert (path, authorization, body["model"]) == ("/v1/chat/completions", f"Bearer {KEY}", "m")
    answers = Path("j.jsonl").read_text()
    assert KEY not in answers + out + err + Path("r.json").read_text() and "fine ***" in answers


@pytest.mark.parametrize("status", [401, 302, 307])
def test_a_server_that_refuses_or_redirects_ends_the_judging_without_the_key(endpoint, cli, status):
    endpoint.script = [status]
    result = cli(llm_judge, f"{JUDGE}=m")
    refused(result, str(status), "OPENAI_API_KEY")
    assert KEY not in result[1] + result[2]


@pytest.mark.parametrize("name, secret, rest", [("OPENAI_BASE_URL", "sk-in-the-wrong-place", ""),
                                                ("OPENAI_API_KEY", KEY, "\nX: y")])
def test_a_bad_setting_of_the_judge_is_refused_without_being_printed(endpoint, cli, monkeypatch, name, secret, rest):
    monkeypatch.setenv(name, secret + rest)
    result = cli(llm_judge, f"{JUDGE}=m")
    refused(result, name)
    assert secret not in result[2]


def test_a_failed_connection_to_the_judge_is_reported_without_its_address(endpoint, cli, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/" + KEY)
    code, out, err = cli(llm_judge, f"{JUDGE}=m")
    assert code == 1 and "ConnectionRefusedError" in err and KEY not in out + err


@pytest.mark.parametrize("url", ["http://[", "http://", "https:///v1", "http://x:port/v1", "ftp://x", "x", "http://:80",
                                 "http://a\tb/"])
def test_a_judge_without_an_address_is_refused_at_once(endpoint, cli, monkeypatch, url):
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    refused(cli(llm_judge, f"{JUDGE}=m"), "OPENAI_BASE_URL")
    assert not os.path.exists("j.jsonl")


@pytest.mark.parametrize("flags, names", [(f"{JUDGE}=", ["--model"]), (f"{JUDGE}=m --timeout=inf", ["--timeout"]),
                                          (f"{JUDGE}=m --timeout=1e30", ["--timeout"]),
                                          (f"{JUDGE}=m --timeout=nan", ["--timeout"])])
def test_flags_that_ask_nobody_or_wait_for_ever_are_refused(endpoint, cli, flags, names):
    refused(cli(llm_judge, flags), *names)
    assert not endpoint.seen


@pytest.mark.parametrize("text", ["3", "null", "[]", "{}", "true"])
def test_a_sample_whose_text_is_none_is_refused(endpoint, cli, text):
    Path("a.jsonl").write_text(f'{{"text": {text}}}\n')
    refused(cli(llm_judge, f"{JUDGE}=m"), "a.jsonl", "text")
    assert not endpoint.seen


@pytest.mark.parametrize("change", [dict(key=None), dict(key=3), dict(clarity="9"), dict(clarity=None), dict(style=11)])
def test_answers_of_an_earlier_run_are_checked(endpoint, cli, change):
    cli(llm_judge, f"{JUDGE}=m")
    lines = Path("j.jsonl").read_text().splitlines()
    lines[1] = json.dumps(json.loads(lines[1]) | change)
    content = "\n".join(lines) + "\n"
    Path("j.jsonl").write_text(content)
    refused(cli(llm_judge, f"{JUDGE}=m"), "--out=j.jsonl", *change)
    assert Path("j.jsonl").read_text() == content


DEEP = 100_000 * '{"a":'


@pytest.mark.parametrize("item", [DEEP, 300_000 * "{", "[" + 100_000 * "[", DEEP + "1" + 100_000 * "}"])
def test_an_answer_that_is_nested_deeply_is_no_answer(endpoint, cli, item):
    began = time.time()
    endpoint.script = 3 * [item]
    code, out, err = cli(llm_judge, f"{JUDGE}=m --timeout=20")
    assert code == 1 and "1 of 4" in err and "Traceback" not in err and time.time() - began < 10, err


def test_samples_that_are_nested_deeply_are_refused(endpoint, cli):
    Path("a.jsonl").write_text(f'{{"text": {DEEP}1\n')
    refused(cli(llm_judge, f"{JUDGE}=m"), "a.jsonl")


def test_half_a_pair_of_surrogates_is_judged_as_another_character(endpoint, cli):
    Path("a.jsonl").write_text(r'{"text": "hello \ud83d there \ud83d\ude00"}' + "\n")
    code, out, err = cli(llm_judge, f"{JUDGE}=m")
    assert code == 0, err
    asked = [body["messages"][0]["content"] for _, _, body in endpoint.seen]
    assert any("hello \ufffd there \U0001f600" in prompt for prompt in asked)


@pytest.mark.parametrize("where", ["in its headers", "in its text"])
def test_a_server_that_drips_does_not_outlast_the_timeout(endpoint, cli, monkeypatch, where):
    def drip(self):
        self.server.seen.append(None)
        self.wfile.write(b"HTTP/1.0 200 OK\r\n")
        if where == "in its text":
            self.wfile.write(b"\r\n")
        with contextlib.suppress(OSError):
            for _ in range(100):
                self.wfile.write(b"x")
                self.wfile.flush()
                time.sleep(0.1)
    monkeypatch.setattr(Stub, "do_POST", drip)
    Path("a.jsonl").write_text('{"text": "one"}\n')
    Path("b.jsonl").write_text('{"text": "one"}\n')
    began = time.time()
    code, out, err = cli(llm_judge, f"{JUDGE}=m")
    assert code == 1 and "no answer within 0.5 s" in err and time.time() - began < 4, err
    assert len(endpoint.seen) == 3


# ---------------------------------------------------------------------------------------------------------------------
# what is refused

REFUSED = [                                                # (command, flags, what the sentence names)
    (sample, "--ckpt=mdlm-owt --n=1 --prompt=700", ["--prompt", "100"]),
    (sample, "--ckpt=block.ckpt --n=1", ["5", "32"]),
    (sample, "--ckpt=bad.ckpt --n=1", ["bad.ckpt"]),
    (sample, "--ckpt=script.ckpt --n=1", ["script.ckpt"]),
    (sample, "--ckpt=empty.ckpt --n=1 --weights=raw", ["empty.ckpt"]),
    (sample, "--ckpt=short.ckpt --n=1", ["short.ckpt", "1", "40"]),
    (bench, "step --size=tiny --vocab_size=40 --length=15", ["--block_size=4", "--length=15"]),
    (bench, "sampling --size=tiny --vocab_size=40 --length=24", ["--length=24", "16"]),
    (bench, "plan --card=b300", ["--card", "b300", "h100"]),
    (bench, "plan --model=bd3lm --block_size=3", ["--block_size=3", "--length=1024"]),
    (bench, "plan --gumbel --teacher=gpt3", ["--teacher=gpt3", "gpt2-large"]),
    (bench, "plan --gumbel --length=2048", ["--length=2048", "1024"]),
    (bench, "plan --init_from=out/ar", ["--init_from=out/ar", "gpt2-large"]),
    (bench, "plan --heads=2", ["--heads=2", "medusa"]),
    (bench, "plan --batch_size=12", ["--batch_size=12", "--processes=8"]),
    (bench, "plan --micro_batch_size=48", ["--micro_batch_size=48"]),
    (bench, "gpu --only=noise,sound", ["--only=noise,sound", "'sound'", "attention", "authors"]),
    (bench, "gpu --json=no/folder.json", ["--json=no/folder.json"]),
    (llm_judge, "--samples no.jsonl --model=m", ["no.jsonl"]),
    (llm_judge, "--samples text.jsonl --model=m", ["text.jsonl", "JSON"]),
    # nobody's file is cut or appended to
    (llm_judge, "--samples b.jsonl --model=m --out=a.jsonl", ["--out=a.jsonl"]),
    (llm_judge, "--samples b.jsonl --model=m --out=one_line.json", ["--out=one_line.json"]),
]


HAS_GOLDEN = os.path.isdir(os.path.join(SHARED, "golden"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with all that REFUSED names; what is made of golden tensors, where these are."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "bad.ckpt").write_bytes(b"no zip")
    torch.save({"state_dict": {}}, folder / "empty.ckpt")
    script = torch.jit.script(torch.nn.Linear(2, 2))
    torch.jit.save(script, folder / "script.ckpt")         # torch.load would run its code
    for name, line in {"a.jsonl": '{"settings": {}}\n{"text": "one"}', "b.jsonl": '{"text": "two"}'}.items():
        (folder / name).write_text(line + "\n")
    (folder / "text.jsonl").write_text("plain text\n")
    (folder / "one_line.json").write_text('{"text": "not ours"}')
    if HAS_GOLDEN:
        published_folder(folder / "mdlm-owt")
        lightning_file(folder / "block.ckpt", "bd3lm", block_size=5)
        state = {"backbone." + k: v for k, v in golden("mdlm")["state_dict"].items()}
        torch.save({"state_dict": state, "ema": {"shadow_params": [torch.zeros(2)]}}, folder / "short.ckpt")
    return folder


def files_in(folder):
    return {path: (path.is_dir() or path.read_bytes()) for path in folder.rglob("*")}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit's
@pytest.mark.parametrize("command, flags, names", REFUSED,
                         ids=[f"{command.__name__} {flags}" for command, flags, _ in REFUSED])
def test_bad_input_is_refused_in_one_sentence_and_nothing_is_written(inputs, cli, monkeypatch, command, flags, names):
    if not HAS_GOLDEN and any(name in flags for name in ("mdlm-owt", "block.ckpt", "short.ckpt")):
        pytest.skip("the golden tensors are absent")
    monkeypatch.chdir(inputs)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/")           # nobody is asked
    before = files_in(inputs)
    refused(cli(command, flags), *names)
    assert files_in(inputs) == before


# ---------------------------------------------------------------------------------------------------------------------
# what the documents say to type

DOCUMENTS = ["README.md", "data/README.md", "extra/RESULTS.md", "extra/SPEED.md", "extra/DIFFERENCES.md", ".ci/run"]
# a shell in which a command is printed, not run: its words with \x1f between them, and \x1e after it
PRINTING = r"""
python() { printf '%s\x1f' "$@"; printf '\x1e'; }
torchrun() { while [[ $1 == --* ]]; do shift; done; python "$@"; }
command_not_found_handle() { return 0; }
set -f
"""
PARSERS = {"train.py": train.parse, "sample.py": sample.parse, "evaluate.py": evaluate.parse,
           "data/prepare.py": prepare.parse, "extra.lm_eval_model": lm_eval_model.flags().parse_args,
           "extra.judge": llm_judge.flags().parse_args, "extra.bench": bench.flags().parse_args,
           "extra.front": front.flags().parse_args, "extra.noise_use": noise_use.flags().parse_args}
NOT_PARSED = {"gumbel.py", "pytest", "venv", "extra.figures"}


def documented_commands(document):
    """The python commands of a document's code blocks, as a shell expands them: lists of words."""
    text = Path(HERE, document).read_text()
    if document == ".ci/run":
        lines = [line for line in text.splitlines() if line.startswith("python ")]
    else:
        blocks = re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        blocks += re.findall(r"(?:^    [^\n]*\n)+", text, re.MULTILINE)
        lines = [block for block in blocks if re.search(r"python|torchrun|^\s*[A-Z]+=", block)]
    shell = subprocess.run(["bash", "-c", PRINTING + "\n".join(lines)], capture_output=True, text=True,
                           env={"PATH": "/nowhere"}, executable=shutil.which("bash"))
    assert "syntax error" not in shell.stderr, shell.stderr
    return [command.split("\x1f")[:-1] for command in shell.stdout.split("\x1e")[:-1]]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_documented_command_is_parsed(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs("out")
    commands = documented_commands(document)
    assert commands or document == "extra/DIFFERENCES.md"
    for script, *words in commands:
        if script == "-m":
            script, *words = words
        if script not in NOT_PARSED:
            try:
                PARSERS[script](words)
            except (SystemExit, BadInput) as e:
                pytest.fail(f"{document}: {script} {' '.join(words)}: {e}")
