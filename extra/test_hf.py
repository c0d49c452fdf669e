"""The tests of hf.py: models of Hugging Face as teachers, backbones, verifiers and judges.

The models are small and random, but not as they are initialised: an untrained model's logits are about 0.1, and no soft
cap, window or position shows in them. These have logits with a standard deviation of 5, some beyond the soft cap, and
every property that is tested has a twin: the same weights with the property switched off, whose logits differ by more
than 1e-2. So what is equal to 1e-4 has the property.
"""
import functools
import json
import math
import os
import re
import sys
import zlib
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")           # no test reaches a hub; read when its library is imported
transformers = pytest.importorskip("transformers", minversion="5", reason="pip install 'transformers>=5'")

import torch
from safetensors.torch import load_file, save_file

import data.run
import evaluate
import sample
import train
from data import prepare
from data.cli import BadInput
from data.shards import read_meta
from data.vocab import Tokenizer
from extra import hf
from extra.hf import HF
from extra.init_from import initial_weights
from extra.verified import generate_exact, verify
from gumbel import sample_gumbel
from mdlm import MDLM
from medusa import Medusa
from teacher import model_hash
from test_gumbel import DOCS, TINY, gen, refused, succeeded, tiny
from test_gumbel import cli, text_file  # noqa: F401, the fixtures

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

V, D, L, BOS = 61, 32, 16, 60
SIZES = dict(vocab_size=V, hidden_size=D, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=2, head_dim=16, max_position_embeddings=64, bos_token_id=BOS, eos_token_id=1,
             pad_token_id=None)
LLAMA3 = dict(rope_type="llama3", rope_theta=50.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)
LAYERS = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
LOCAL_AND_GLOBAL = dict(sliding_attention=dict(rope_type="default", rope_theta=20.0),
                        full_attention=dict(rope_type="linear", rope_theta=300.0, factor=4.0))
KINDS = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig,
              dict(rope_parameters=LLAMA3, attention_bias=True, mlp_bias=True, tie_word_embeddings=False)),
    "qwen3": (transformers.Qwen3ForCausalLM, transformers.Qwen3Config,
              dict(rope_parameters=dict(rope_type="linear", rope_theta=50.0, factor=3.0), use_sliding_window=True,
                   sliding_window=4, layer_types=LAYERS, attention_bias=True, tie_word_embeddings=True)),
    "gemma2": (transformers.Gemma2ForCausalLM, transformers.Gemma2Config,
               dict(rope_parameters=dict(rope_type="default", rope_theta=50.0), sliding_window=4, layer_types=LAYERS,
                    final_logit_softcapping=6.0, attn_logit_softcapping=1.5, query_pre_attn_scalar=5)),
    "gemma3": (transformers.Gemma3ForCausalLM, transformers.Gemma3TextConfig,
               dict(rope_parameters=LOCAL_AND_GLOBAL, sliding_window=4, layer_types=LAYERS, query_pre_attn_scalar=5,
                    final_logit_softcapping=6.0)),
}
SMALL = "--gumbel --length=12 --steps=3 --batch_size=4 --n_layer=1 --report=0"
every_kind = pytest.mark.parametrize("kind", KINDS)


# ---------------------------------------------------------------------------------------------------------------------
# what the tests share

def build(kind, weights=None, **changes):
    """A model of this kind: weights by their names, so that those of a twin are equal; `weights(lm)` changes them."""
    model_class, config_class, settings = KINDS[kind]
    torch.manual_seed(0)
    lm = model_class(config_class(**SIZES | settings | changes)).eval().requires_grad_(False)
    for name, p in lm.named_parameters():
        noise = torch.randn(p.shape, generator=gen(zlib.crc32(name.encode())))
        if p.ndim == 1:                                    # norms and biases, around 1 or 0
            p.add_(noise, alpha=0.3)
        elif p.shape[0] == V:                              # so that logits have a standard deviation of 5
            p.copy_(noise * 5 / math.sqrt(D))
        else:
            p.copy_(noise * 1.5 / math.sqrt(p.shape[1]))
    if weights:
        weights(lm)
    return with_its_caps(lm)


def with_its_caps(lm):
    """Early versions of transformers 5 leave an attention soft cap out by default."""
    if getattr(lm.config, "attn_logit_softcapping", None):
        lm.set_attn_implementation("eager")
    return lm


def rows(n=6, length=L, seed=0):
    x = torch.randint(V, (n, length), generator=gen(seed))
    x[:, 0] = BOS
    return x


def own(lm, x):
    """A model's own logits of rows [B, L], all at once -> [B, L, V]."""
    with torch.no_grad():
        return lm(x, use_cache=False).logits


def distance(a, b):
    return (a - b).abs().max().item()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """saved(kind) -> (its folder, the model that transformers reads from it), each once."""
    known = {}

    def of(kind):
        if kind not in known:
            folder = str(tmp_path_factory.mktemp(kind))
            build(kind).save_pretrained(folder)
            lm = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            known[kind] = folder, with_its_caps(lm)
        return known[kind]
    return of


class Watched(HF):
    """Compares the logits of every call, with and without cache, with the model's own on the whole text so far."""

    theirs = ()
    calls = 0
    crops = 0                                              # those that leave more than the window
    most = 0.0                                             # difference of logits

    def watch(self, lm):
        self.theirs = [lm]                                 # (in a list: it is no part of this model)
        self.calls = self.crops = 0
        return self

    def new_cache(self, batch, length):
        cache = super().new_cache(batch, length)
        cache.text = torch.zeros(batch, 0, dtype=torch.long)
        crop, select = cache.crop, cache.batch_select_indices

        def crop_both(n):
            crop(n)
            cache.text = cache.text[:, :n]
            self.crops += cache.text.shape[1] >= 4

        def select_both(some):
            select(some)
            cache.text = cache.text[some]
        cache.crop = crop_both
        cache.batch_select_indices = select_both
        return cache

    def hidden(self, tokens, cache=None):
        h = super().hidden(tokens, cache)
        text = tokens
        if cache is not None:
            text = cache.text = torch.cat([cache.text, tokens], 1)
        for lm in self.theirs:
            self.calls += 1
            want = own(lm, text)[:, -tokens.shape[1]:]
            self.most = max(self.most, distance(self.logits(h), want))
        return h


def text_of(lm, start, length, noise):
    """What a model writes from noise [B, length, V], one whole pass a token."""
    x = start
    for i in range(start.shape[1], length):
        x = torch.cat([x, (own(lm, x)[:, -1] + noise[:, i]).argmax(-1, keepdim=True)], 1)
    return x


# ---------------------------------------------------------------------------------------------------------------------
# the logits are the model's own

@every_kind
def test_extraction(saved, kind):
    folder, lm = saved(kind)
    model = HF(folder)
    x = rows()
    want = own(lm, x)
    masked = torch.rand(x.shape, generator=gen()) < 0.5
    masked[:, 0] = False
    got = model.posterior_logits(x, masked)(0, int(masked.sum()))
    assert got.dtype == torch.float32
    assert distance(got, want[:, :-1][masked[:, 1:]]) < 1e-4
    assert distance(model.log_probs(x), want.log_softmax(-1)) < 1e-4
    assert (model.vocab_size, model.bos, model.length) == (V, BOS, 64)
    assert not any(p.requires_grad for p in model.parameters())
    # they are such that a property shows
    before_cap = lm.get_output_embeddings()(lm.base_model(x).last_hidden_state)
    assert 4 < before_cap.std() < 7
    if "gemma" in kind:
        assert 0.1 < (before_cap.abs() > 6).float().mean() < 0.5 and want.abs().max() < 6


@every_kind
def test_generation_with_a_cache(saved, kind):
    """Past the window; rows at their own pace are cut back and chosen among."""
    folder, lm = saved(kind)
    model = Watched(folder).watch(lm)
    x = rows(5)
    noise = sample_gumbel((5, L, V), gen(1))
    text, _ = model.generate(x[:, :2], L, noise=noise)
    assert torch.equal(text, text_of(lm, x[:, :2], L, noise))
    assert model.calls == L - 2 and model.most < 1e-4
    cache = model.new_cache(5, L)
    model.hidden(x[:, :9], cache)
    for back, some, n in ((3, [0, 1, 3, 4], 5), (6, [2, 0], 7), (1, [1], 4)):
        cache.crop(-back)
        cache.batch_select_indices(torch.tensor(some))
        x = x[some].roll(1, 1)                             # another text from here on
        model.hidden(x[:, :n], cache)
    assert model.crops == 3 and model.most < 1e-4


@every_kind
@pytest.mark.parametrize("cached", [True, False])
def test_medusas_backbone(saved, kind, cached):
    folder, lm = saved(kind)
    model = Watched(folder).watch(lm)
    heads = Medusa(V, L, BOS, D, heads=3).attach(model, start=True)
    x = rows(5)
    noise = sample_gumbel((5, L, V), gen(2))
    assert distance(heads.log_probs(x)[:, :, 0], own(lm, x).log_softmax(-1)) < 1e-4
    text = text_of(lm, x[:, :2], L, noise)
    heads.draft = functools.partial(right_now_and_then, noise, text)
    written, nfe, _, accepted = heads.decode(x[:, :2], L, accept="exact", noise=noise, cached=cached)
    assert torch.equal(written, text)
    assert len(nfe.unique()) > 1 and 0 < accepted.sum()    # rows of several paces
    assert model.calls > 3 and model.most < 1e-4
    assert not cached or model.crops > 2


def right_now_and_then(noise, text, h, xi, tau):
    """Proposals of three heads [b, 3]: those of the text itself in the places of row r that r + 2 does not divide."""
    proposals = torch.zeros(len(h), 3, dtype=torch.long)
    for i, first in enumerate(xi[:, 0]):
        r, p = (noise == first).all(2).nonzero()[0].tolist()   # the noise tells which row this is, and where it is
        for k, place in enumerate(range(p + 1, min(p + 4, L))):
            if place % (r + 2):
                proposals[i, k] = text[r, place]
    return proposals


@every_kind
@pytest.mark.parametrize("draft", ["every", "never"])
def test_verifier(saved, kind, draft):
    """Exact decoding writes what the model alone writes; APD asks it for logits of drafts."""
    folder, lm = saved(kind)
    model = Watched(folder).watch(lm)
    start = rows(6)
    for row, given in zip(start, (1, 4, 2, 9, 15, 1)):
        row[given:] = V
    noise = sample_gumbel((6, L, V), gen(3))
    text, _, calls, *_ = generate_exact(tiny(V=V, L=L), start, model, draft, noise=noise)
    want = []
    for row, xi in zip(start, noise):
        want.append(text_of(lm, row[row < V][None], L, xi[None]))
    assert torch.equal(text, torch.cat(want))
    assert len(calls.unique()) > 2 and model.crops > 2 and model.most < 1e-4
    drafted = torch.zeros(6, L, dtype=torch.bool)
    drafted[:, 5:9] = True
    x = rows(6, seed=4)
    assert distance(verify(model, x, drafted, V), own(lm, x)[:, :-1][drafted[:, 1:]]) < 1e-4


def without_biases(lm):
    for name, p in lm.named_parameters():
        if name.endswith("bias"):
            p.zero_()


def neutral(pattern):
    """A change of weights: the norms of this name multiply by one."""
    def change(lm):
        for name, p in lm.named_parameters():
            if re.search(pattern, name):
                p.fill_(0.0 if "Gemma" in type(lm).__name__ else 1.0)     # Gemma's multiply by 1 + weight
    return change


def unscaled(lm):
    """Gemma multiplies embeddings by sqrt(D); the output layer keeps its own."""
    embedding = lm.get_input_embeddings()
    embedding.weight = torch.nn.Parameter(embedding.weight / math.sqrt(D), requires_grad=False)


DEFAULT_ROPE = dict(rope_type="default", rope_theta=10000.0)
TWINS = [
    ("llama", None, dict(rope_parameters=DEFAULT_ROPE)),
    ("llama", None, dict(rope_parameters=dict(rope_type="default", rope_theta=50.0))),
    ("llama", without_biases, {}),
    ("llama", neutral(r"layernorm|norm\."), {}),
    ("qwen3", None, dict(rope_parameters=dict(rope_type="linear", rope_theta=50.0, factor=1.0))),
    ("qwen3", None, dict(rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=3.0))),
    ("qwen3", None, dict(layer_types=4 * ["full_attention"])),
    ("qwen3", None, dict(sliding_window=5)),
    ("qwen3", neutral(r"[qk]_norm"), {}),
    ("qwen3", without_biases, {}),
    ("gemma2", None, dict(final_logit_softcapping=None)),
    ("gemma2", None, dict(attn_logit_softcapping=None)),
    ("gemma2", None, dict(layer_types=4 * ["full_attention"])),
    ("gemma2", None, dict(sliding_window=5)),
    ("gemma2", None, dict(query_pre_attn_scalar=16)),
    ("gemma2", None, dict(rope_parameters=DEFAULT_ROPE)),
    ("gemma2", unscaled, dict(tie_word_embeddings=False)),
    ("gemma2", neutral(r"feedforward_layernorm"), {}),
    ("gemma3", None, dict(final_logit_softcapping=None)),
    ("gemma3", None, dict(layer_types=4 * ["full_attention"])),
    ("gemma3", None, dict(sliding_window=5)),
    ("gemma3", None, dict(rope_parameters=LOCAL_AND_GLOBAL | dict(sliding_attention=DEFAULT_ROPE))),
    ("gemma3", None, dict(rope_parameters=LOCAL_AND_GLOBAL | dict(full_attention=DEFAULT_ROPE))),
    ("gemma3", unscaled, dict(tie_word_embeddings=False)),
    ("gemma3", neutral(r"[qk]_norm"), {}),
]


@pytest.mark.parametrize("twin", range(len(TWINS)))
def test_each_property_shows(saved, tmp_path, twin):
    """Its logits are another model's without it, and the wrapper gives those too."""
    kind, weights, changes = TWINS[twin]
    lm = build(kind, weights, **changes)
    if weights is unscaled:
        lm.lm_head.weight.copy_(saved(kind)[1].lm_head.weight)
    lm.save_pretrained(tmp_path)
    model = HF(str(tmp_path))
    x = rows()
    assert distance(model.log_probs(x), own(lm, x).log_softmax(-1)) < 1e-4
    of_whole = own(saved(kind)[1], x).log_softmax(-1)
    assert (model.log_probs(x) - of_whole).abs().max() > 1e-2
    assert (model.log_probs(x) - of_whole).abs().mean() > 1e-3


@pytest.mark.parametrize("cls, config", [
    (transformers.CohereForCausalLM, transformers.CohereConfig(**SIZES, logit_scale=0.3)),
    (transformers.GraniteForCausalLM, transformers.GraniteConfig(**SIZES, logits_scaling=3.0)),
    (transformers.MixtralForCausalLM, transformers.MixtralConfig(**SIZES, num_local_experts=4)),
    (transformers.GPT2LMHeadModel, transformers.GPT2Config(vocab_size=V, n_embd=D, n_layer=2, n_head=2,
                                                           bos_token_id=BOS, eos_token_id=BOS)),
    (transformers.Gemma3ForConditionalGeneration, transformers.Gemma3Config(
        text_config=SIZES | KINDS["gemma3"][2] | dict(final_logit_softcapping=None), image_token_id=59,
        boi_token_id=58, eoi_token_id=57, mm_tokens_per_image=4,
        vision_config=dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                           image_size=16, patch_size=4)))])
def test_others_that_behave(tmp_path, cls, config):
    """A scale of the logits; experts; a text model within one that sees: nothing here knows of them."""
    torch.manual_seed(0)
    lm = cls(config).eval()
    lm.get_output_embeddings().weight.data.normal_()
    lm.save_pretrained(tmp_path)
    model = Watched(str(tmp_path)).watch(lm)
    assert (model.vocab_size, model.bos) == (V, BOS)
    assert distance(model.log_probs(rows()), own(lm, rows()).log_softmax(-1)) < 1e-4
    model.generate(rows(2, 2), 12, generator=gen())
    assert model.most < 1e-4


def test_a_row_is_as_long_as_positions_mean_the_same(tmp_path):
    """"longrope" has other frequencies in rows beyond a length: what a cache holds is then wrong."""
    rope = dict(rope_type="longrope", rope_theta=50.0, short_factor=4 * [1.0], long_factor=4 * [4.0],
                original_max_position_embeddings=8)
    torch.manual_seed(0)
    lm = transformers.Phi3ForCausalLM(transformers.Phi3Config(
        **SIZES | dict(head_dim=8, pad_token_id=0), rope_parameters=rope, original_max_position_embeddings=8)).eval()
    for p in lm.parameters():
        if p.ndim > 1:
            p.data.mul_(10)
    lm.save_pretrained(tmp_path)
    model = Watched(str(tmp_path)).watch(lm)
    assert model.length == 8
    model.generate(rows(2, 2), generator=gen())
    assert model.most < 1e-4
    cache = model.new_cache(2, 9)
    model.hidden(rows(2, 8), cache)
    model.hidden(rows(2, 1), cache)                        # the ninth
    assert model.most > 1e-2


# ---------------------------------------------------------------------------------------------------------------------
# types and hashes

def save_bf16(kind, folder):
    build(kind).to(torch.bfloat16).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_a_bf16_body_stays_so_and_its_head_is_exact(tmp_path, kind):
    """The same numbers, bit for bit, as those of a float32 model whose body was cast, as other teachers' are."""
    folder = save_bf16(kind, tmp_path)
    model = HF(folder, dtype="auto")
    wide = HF(folder, dtype=torch.float32)
    assert model.narrow and not wide.narrow
    # tied or not, the hash is that of the values in the file
    hashes = {model_hash(model), model_hash(wide)}
    stored = load_file(tmp_path / "model.safetensors")
    state = {name.removeprefix("lm."): w for name, w in model.state_dict().items()}
    assert len(hashes) == 1 and stored.keys() <= state.keys()
    assert all(torch.equal(w.float(), state[name].float()) for name, w in stored.items())
    in_body = [layer.weight for layer in model.matrices()]
    assert len(in_body) == 4 * 7 and all(w.dtype == torch.bfloat16 for w in in_body)
    assert model.output_layer().weight.dtype == torch.float32
    tied = kind == "gemma3"
    assert (model.output_layer().weight is model.lm.get_input_embeddings().weight) == tied
    x = rows()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        data.run.body_to_bfloat16(wide)
        h = model.hidden(x)
        got = model.logits(h)
        if kind == "llama":                                # (Gemma's scale of embeddings is rounded, too, in bf16)
            assert torch.equal(got, wide.logits(wide.hidden(x)))
    if kind == "llama":
        assert torch.equal(got, (h.float() @ model.output_layer().weight.T))
    assert got.dtype == torch.float32 and model.narrow
    # where float32 is wanted, it is float32's
    want = own(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), x)
    assert 1e-3 < (got - want).abs().mean() < 0.3
    assert distance(model.logits(model.hidden(x)), want) < 1e-4 and not model.narrow
    assert {model_hash(model)} == hashes


def test_the_hash_of_a_model_is_what_it_was(saved):
    """Heads and caches bear it."""
    import hashlib
    folder, lm = saved("gemma2")
    h = hashlib.sha256()
    for name, w in sorted(lm.state_dict(prefix="lm.").items()):
        h.update(f"{name} {tuple(w.shape)} ".encode())
        h.update(w.numpy())
    assert model_hash(HF(folder)) == model_hash(HF(folder, dtype="auto")) == h.hexdigest()[:16]


@pytest.mark.parametrize("what", ["float32 in bf16's name", "two types"])
def test_the_type_is_that_of_the_files(saved, tmp_path, what):
    """Not what config.json says, and not that of the first weight alone: no value is rounded."""
    lm = build("llama")
    lm.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | dict(dtype="bfloat16")))
    weights = load_file(tmp_path / "model.safetensors")
    if what == "two types":
        first = min(weights)
        weights[first] = weights[first].bfloat16()
        save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
        lm.load_state_dict({name: w.float() for name, w in weights.items()})
    model = HF(str(tmp_path), dtype="auto")
    assert not model.narrow and distance(model.log_probs(rows()), own(lm, rows()).log_softmax(-1)) < 1e-4


def test_a_cpu_reads_float32_and_a_gpu_the_files_type(tmp_path, monkeypatch):
    folder = save_bf16("llama", tmp_path)
    assert not HF(folder).narrow
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert HF(folder).narrow


# ---------------------------------------------------------------------------------------------------------------------
# refusals

def test_what_is_not_supported_is_named(tmp_path, monkeypatch):
    """Before anything is computed with it: transformers itself, a state that cannot be cut back, a head that cannot be
    had alone, files without all weights."""
    small = dict(vocab_size=V, hidden_size=D, num_hidden_layers=2, bos_token_id=BOS)
    transformers.MambaForCausalLM(transformers.MambaConfig(**small)).save_pretrained(tmp_path / "mamba")
    transformers.OPTForCausalLM(transformers.OPTConfig(
        **small, num_attention_heads=2, ffn_dim=48, word_embed_proj_dim=D)).save_pretrained(tmp_path / "opt")
    lm = build("llama")
    lm.save_pretrained(tmp_path / "holes")
    weights = load_file(tmp_path / "holes" / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "holes" / "model.safetensors", {"format": "pt"})
    for name, why in (("mamba", "through a cache that is cut back"), ("opt", "the last states of its body"),
                      ("holes", "do not hold lm_head.weight"), ("nowhere", "cannot load")):
        with pytest.raises(ValueError, match=why) as e:
            HF(f"{tmp_path}/{name}")
        assert f"hf:{tmp_path}/{name}" in str(e.value) and "\n" not in str(e.value)
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.1")
    with pytest.raises(ValueError, match="hf:x needs transformers 5 or later, this is 4.57.1: pip install -U"):
        HF("x")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(BadInput, match="hf:x needs transformers: pip install transformers"):
        HF("x")


@pytest.mark.parametrize("part", ["head", "attention", "cache"])
def test_a_wrapper_that_were_wrong_would_refuse(saved, monkeypatch, part):
    """The check at the start: what would not be the model's own logits is not used."""
    folder, _ = saved("gemma2")
    if part == "head":
        monkeypatch.setattr(HF, "logits", lambda self, h, exact=True: self.output_layer()(h))
    elif part == "attention":
        monkeypatch.setattr(hf, "given", lambda output, input_ids, **kw: output(last_hidden_state=input_ids * 1.01))
    else:
        monkeypatch.setattr(HF, "new_cache", lambda self, *args: transformers.DynamicCache(config=self.lm.config))
    with pytest.raises(ValueError, match="through a cache" if part == "cache" else "the last states"):
        HF(folder)


# ---------------------------------------------------------------------------------------------------------------------
# vocabularies, BOS, and the commands

@pytest.fixture
def llama(tmp_path, monkeypatch):
    """A folder, the current one, with a small Llama and its tokenizer in lm/ -> the transformers model."""
    tokenizers = pytest.importorskip("tokenizers")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    lm = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=120, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=True)).eval()
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.train_from_iterator([" ".join(DOCS)], tokenizers.trainers.BpeTrainer(
        vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"]))
    lm.resize_token_embeddings(bpe.get_vocab_size() + 3)   # padded, as many models are
    lm.save_pretrained("lm")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained("lm")
    return lm


def test_teaches_on_shards_of_its_tokenizer(llama, cli, text_file):  # noqa: F811
    """A student is trained and sampled from; a backbone, a verifier, a judge; what does not fit is refused."""
    n = llama.config.vocab_size
    succeeded(cli(prepare, f"text --files {text_file} --tokenizer=hf:lm --out=data/mine"))
    succeeded(cli(prepare, f"text --files {text_file} --tokenizer=bytes --out=data/b"))
    meta, _ = read_meta("data/mine")
    assert (meta["tokenizer"], meta["vocab_size"], meta["bos"]) == ("hf:lm", n, 1)
    flags = f"--length=12 --steps=3 {TINY}"
    succeeded(cli(train, f"--gumbel --teacher=hf:lm --data=data/mine --out=out/a {flags}"))
    assert "sample 0" in succeeded(cli(sample, "--ckpt=out/a --n=1 --steps=3"))[0]
    exactly = "--sampler=exact --verifier=hf:lm"
    assert "sample 0" in succeeded(cli(sample, f"--ckpt=out/a --n=1 {exactly}"))[0]
    assert "nfe 8" in succeeded(cli(sample, "--ckpt=hf:lm --n=1 --length=9"))[0]
    assert "| hf:lm |" in succeeded(cli(evaluate, "ppl --ckpt=hf:lm --data=data/mine --length=12"))[0]
    succeeded(cli(train, f"--model=medusa --teacher=hf:lm --data=data/mine --out=out/m {SMALL}"))
    assert "sample 0" in succeeded(cli(sample, "--ckpt=out/m --n=1 --length=9"))[0]
    flags = f"--gumbel {flags}"
    refused(cli(train, f"--teacher=hf:lm --data=data/b --out=out/b {flags}"), "--teacher=hf:lm", str(n), "257")
    refused(cli(train, f"--teacher=hf:nowhere --data=data/mine --out=out/b {flags}"), "hf:nowhere")


def test_rows_begin_with_the_bos_of_the_data(llama, cli, text_file, capsys):  # noqa: F811
    """A model whose vocabulary fits takes it, with a line where it has another one; one of less ids is refused."""
    succeeded(cli(prepare, f"text --files {text_file} --tokenizer=hf:lm --out=data/mine"))
    meta, _ = read_meta("data/mine")
    n = meta["vocab_size"]
    llama.save_pretrained("other")
    Tokenizer("hf:lm").codec.bpe.save_pretrained("other")
    settings = json.loads(Path("other/tokenizer_config.json").read_text())
    Path("other/tokenizer_config.json").write_text(json.dumps(settings | dict(bos_token="</s>")))
    x = torch.tensor([[1, 5, 9, 3]])
    model = sample.load_ar("--teacher", "hf:other", meta, 12)
    err = capsys.readouterr().err
    assert [line for line in err.splitlines() if "BOS 2" in line and "data 1" in line and "hf:other" in line]
    assert model.bos == model.config.bos == model.meta["bos"] == 1
    assert distance(model.log_probs(x), own(llama, x).log_softmax(-1)) < 1e-4
    sample.check_vocabulary("--teacher=hf:other", model, meta)
    assert "BOS" not in capsys.readouterr().err
    sample.load_ar("--teacher", "hf:lm", meta, 12)
    assert capsys.readouterr().err == ""
    flags = f"--gumbel --length=12 --steps=3 {TINY}"
    err = succeeded(cli(train, f"--teacher=hf:other --data=data/mine --out=out/a {flags}"))[1]
    assert err.count("BOS") == 1
    llama.resize_token_embeddings(n - 9)                   # fewer rows than the tokenizer has ids
    llama.save_pretrained("small")
    with pytest.raises(BadInput, match=f"hf:small has vocab_size {n - 9}, the data {n}"):
        sample.load_ar("--teacher", "hf:small", meta, 12)
    # of our own models and GPT-2, the BOS is what they were trained with
    ours = tiny(V=n)
    ours.meta = dict(meta)
    with pytest.raises(BadInput, match=f"bos {n - 1}, the data 1"):
        sample.check_vocabulary("x", ours, meta)


def test_a_padded_vocabulary_is_the_models(llama):
    """Of a text model within another too."""
    n = llama.config.vocab_size
    bpe = Tokenizer("hf:lm").codec.bpe
    assert len(bpe) == n - 3 and Tokenizer("hf:lm").vocab_size == n == HF("lm").vocab_size
    whole = transformers.Gemma3Config(text_config=SIZES | dict(vocab_size=n + 5))
    whole.save_pretrained("seeing")
    bpe.save_pretrained("seeing")
    assert Tokenizer("hf:seeing").vocab_size == n + 5


# ---------------------------------------------------------------------------------------------------------------------
# students that begin as such a model

def student_from(source, **kw):
    """As train.py makes it."""
    model = MDLM(V, L, BOS, **source.as_start(), shift=True, **kw)
    initial_weights(model, source, "x")
    return model.eval()


@every_kind
def test_a_student_made_causal_is_the_model(saved, kind):
    """On clean rows everywhere; on noised rows at the first masked place, which sees what the model sees."""
    folder, lm = saved(kind)
    model = student_from(HF(folder))
    model.transformer.causal = True
    x = rows()
    want = own(lm, x).log_softmax(-1)[:, :-1]
    with torch.no_grad():
        found = model.logits(model.hidden(x)).log_softmax(-1)[:, 1:]
        assert distance(found, want) < 1e-4
        for i, first in enumerate((1, 5, 9, 15)):
            z = x[i:i + 1].clone()
            z[:, first::2] = V
            found = model.logits(model.hidden(z)).log_softmax(-1)[0, first]
            assert distance(found, want[i, first - 1]) < 1e-4


@every_kind
def test_a_student_sees_the_whole_row(saved, kind):
    """Past the window, from its last token to position 0; and reads [MASK] at the mean of all embeddings."""
    model = student_from(HF(saved(kind)[0]))
    x = rows()
    other = x.clone()
    other[:, -1] = (x[:, -1] + 1) % V
    first = torch.zeros(x.shape, dtype=torch.bool)
    first[:, 1] = True                                     # with `shift`, read at position 0
    with torch.no_grad():
        assert (model.hidden(x, wanted=first) - model.hidden(other, wanted=first)).abs().amax(1).min() > 1e-3
        embed = model.transformer.embed
        assert distance(embed(torch.tensor([V]))[0], embed(torch.arange(V)).mean(0)) < 1e-5
    assert model.transformer.lm.get_output_embeddings().weight.data_ptr() != embed.weight.data_ptr()


@every_kind
@pytest.mark.parametrize("noise", ["gumbel", "quantile"])
def test_noise_that_is_added_begins_by_saying_nothing(saved, kind, noise):
    """The fresh student with noise is the fresh one without, whatever the noise, and learns from it; in place of [MASK]
    it begins at the scale of what the network reads."""
    source = HF(saved(kind)[0])
    plain = student_from(source)
    noisy = student_from(source, noise=noise, inject="add")
    x = rows(3)
    z = x.masked_fill(torch.rand(x.shape, generator=gen(1)) < 0.5, V)
    z[:, 0] = BOS
    t = torch.full((3,), 0.5)
    want, _ = plain.loss(x, t, z=z)
    found, _ = noisy.loss(x, t, z=z, noise=noisy.fresh_noise(x.shape, gen(2)))
    assert torch.equal(found, want)
    found.backward()
    assert noisy.noise_embed.weight.grad.abs().max() > 1e-6
    replaced = student_from(source, noise=noise, inject="replace")
    g = replaced.noise_embed.from_prior(2000, generator=gen(3))
    read = source.input_embedding()(torch.arange(V))
    assert 0.9 < (g.square().mean() / read.square().mean()).sqrt() < 1.1


def test_a_student_of_a_bf16_model_begins_with_its_values(tmp_path):
    source = HF(save_bf16("gemma3", tmp_path), dtype="auto")
    model = student_from(source)
    stored = load_file(tmp_path / "model.safetensors")
    state = model.state_dict()
    for name, weight in stored.items():
        assert torch.equal(state[f"transformer.lm.{name}"][:len(weight)], weight.float()), name
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("config, why", [
    (transformers.GPTNeoConfig(vocab_size=V, hidden_size=D, num_layers=2, num_heads=2, bos_token_id=BOS,
                               attention_types=[[["global"], 2]], max_position_embeddings=64), "gpt_neo"),
    (transformers.BloomConfig(vocab_size=V, hidden_size=D, n_layer=2, n_head=2, bos_token_id=BOS), "bloom")])
def test_a_network_that_stays_causal_is_no_students(config, why):
    """Whatever mask it is given; or knows no mask of that kind."""
    with pytest.raises(ValueError, match=f"a {why} cannot be made to see the places to come"):
        MDLM(V, L, BOS, body=config.to_dict())


def test_a_model_that_sees_is_no_start(tmp_path):
    """Its other parts would be trained as well, and get no gradient."""
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16,
                  patch_size=4)
    whole = transformers.Gemma3Config(text_config=SIZES, vision_config=vision, image_token_id=59, boi_token_id=58,
                                      eoi_token_id=57, mm_tokens_per_image=4)
    transformers.Gemma3ForConditionalGeneration(whole).save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="--init_from=hf:.* more than a language model"):
        HF(str(tmp_path)).as_start()


def test_a_folder_without_a_tokenizer_has_none(tmp_path):
    """transformers would make one of a single token."""
    transformers.GPT2Config(vocab_size=V, bos_token_id=BOS).save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="tokenizer"):
        Tokenizer(f"hf:{tmp_path}")


def test_commands_train_and_sample_such_students(llama, cli, text_file, monkeypatch):  # noqa: F811
    """Without the model's weights from the second command on; blocks, other shapes and dropout are refused."""
    succeeded(cli(prepare, f"text --files {text_file} --tokenizer=hf:lm --out=data/mine"))
    flags = "--data=data/mine --length=12 --batch_size=4 --warmup=1 --log_every=1 --eval_rows=8 --report=0"
    command = f"--model=mdlm --init_from=hf:lm --gumbel --teacher=hf:lm {flags} --out=out/a"
    no = f"--init_from=hf:lm {flags} --steps=2 --out=out/no"
    for wrong, word in (("--model=bd3lm --block_size=4", "hf:lm"), ("--n_embd=48", "--n_embd=48"),
                        ("--dropout=0.1", "--dropout"), ("--size=tiny", "--size")):
        refused(cli(train, f"{no} {wrong}"), "--init_from", word)
    succeeded(cli(train, f"{command} --steps=2"))
    model = sample.load_model("out/a")
    assert model.config.inject == "add" and model.config.shift and model.config.n_embd == 32
    weights = torch.load("out/a/ckpt.pt", weights_only=True)
    assert weights["config"]["body"]["model_type"] == "llama"
    os.rename("lm/model.safetensors", "away")
    assert "sample 0" in succeeded(cli(sample, "--ckpt=out/a --n=1 --steps=3"))[0]
    succeeded(cli(sample, "--ckpt=out/a --n=1 --steps=3 --dtype=bfloat16"))
    os.rename("away", "lm/model.safetensors")              # the teacher
    _, err = succeeded(cli(train, f"{command} --steps=4"))
    assert "continuing at step 2" in err
    succeeded(cli(evaluate, "ppl --ckpt out/a --n=4"))
    assert "sample 0" in succeeded(cli(sample, "--ckpt=out/a --n=1 --sampler=exact --verifier=hf:lm"))[0]
    succeeded(cli(train, f"--model=mdlm --init_from=out/a {flags} --steps=1 --out=out/plain"))
    assert sample.load_model("out/plain").config.body["model_type"] == "llama"
