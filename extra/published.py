"""Weights that other projects published: files of their formats, settings, tokenizers, the authors' networks.

Nothing here knows a class of ours: `mdlm.load_published` and its like pass what `fold_published` returns to their own.
"""
import hashlib
import http.client
import itertools
import json
import math
import os
import re
import urllib.error
import urllib.request
import zipfile

import numpy as np
import torch
import torch.nn.functional as F
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from data.cli import say_once
from data.files import check_archive, check_fields, fits, is_file_name, read_json, whole
from extra.judge import NoRedirect


# ---------------------------------------------------------------------------------------------------------------------
# formats of files. A pickle can run any code while it is read, and these come from strangers

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_safetensors(path):
    """A .safetensors file -> {name: tensor}, memory-mapped. Raises ValueError if the file is not complete.

    The format: the size of the header in 8 bytes, the header (JSON: name -> dtype, shape, offsets), the data.
    """
    tensors = {}
    try:
        data = np.memmap(path, np.uint8, mode="c")         # copy-on-write: torch wants writable memory
        start = 8 + int.from_bytes(data[:8].tobytes(), "little")
        header = json.loads(data[8:start].tobytes(), object_pairs_hook=unique_names)
        header.pop("__metadata__", None)                   # strings of the writer's, no tensor
        end = 0                                            # of the tensors so far, counted from that of the header
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            a, b = entry["data_offsets"]
            dtype = DTYPES[entry["dtype"]]
            size = math.prod(entry["shape"]) * dtype.itemsize
            # the format leaves no room between two tensors
            if not all(map(whole(), entry["shape"])) or (a, b) != (end, end + size):
                raise ValueError(f"{name} does not lie where its shape says")
            tensors[name] = torch.from_numpy(data[start + a:start + b]).view(dtype).view(entry["shape"])
            end = b
        if start + end != len(data):
            raise ValueError(f"it has {len(data)} bytes, its header describes {start + end}")
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as e:
        raise ValueError(f"{path} is no complete safetensors file ({type(e).__name__}: {e})") from None
    return tensors


def unique_names(pairs):
    """A JSON object, in which no name may stand twice."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name stands twice in its header")
    return dict(pairs)


class Inert:
    """Stand-in for every class that is pickled in a foreign file: keeps the attributes, runs no code."""
    state = None

    def __init__(self, *args, **kw):
        pass

    def __setstate__(self, state):
        self.state = state

    def __setitem__(self, key, value):                     # how pickle fills what was a kind of dict
        pass

    def __getitem__(self, key):                            # as of OmegaConf's nodes
        return self.state["_content"][key]


def load_inert(path):
    """All that a torch file holds, with an `Inert` for every object that torch would not load safely."""
    zipped = zipfile.is_zipfile(path)
    classes = []
    if zipped:                                             # files of torch < 1.6 are no archives: tensors only
        check_archive(path)
        classes = get_unsafe_globals_in_checkpoint(path)
    with safe_globals([(Inert, name) for name in classes]):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)


def read_torch(path):
    """A torch file -> (its state dict, what a Lightning .ckpt holds besides). Raises ValueError if it is neither."""
    try:
        state = load_inert(path)
    except Exception as e:                                 # foreign files fail in a dozen ways
        why = (str(e) or type(e).__name__).splitlines()[0]
        raise ValueError(f"{path} is not a readable torch file: {why}") from None
    rest = {}
    if isinstance(state, dict) and "state_dict" in state:
        rest = state
        state = rest["state_dict"]
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds no weights by name")
    return state, rest


# ---------------------------------------------------------------------------------------------------------------------
# settings

def one_of(*values):
    return lambda value: value in values


# What our networks compute, by the names of the authors' configurations: any other value is refused. From
# configs/config.yaml, algo/*.yaml, model/*.yaml and data/*.yaml of hxixixh/gumbel-distill, kuleshov-group/bd3lms,
# kuleshov-group/mdlm and s-sahoo/duo, and models/hf/configuration_bd3lm.py; bos_token_id, n_head, n_layer, n_embd and
# n_positions are GPT-2's. (tie_word_embeddings, which all have, is read by none of their models/dit.py.)
SETTINGS = {
    "model_type": one_of("mdlm", "mdlm_gumbel", "bd3lm", "bd3lm_gumbel", "ar", "gpt2"),
    "parameterization": one_of("subs", "ar"),
    "diffusion": one_of("absorbing_state"),
    "time_conditioning": one_of(False),
    "backbone": one_of("dit", "dit_gumbel", "dit_gumbel_v2", "hf_dit", "ar"),
    "tokenizer": one_of("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "openai-community/gpt2"),
    "inject": one_of("replace", "add"),
    **dict.fromkeys(("causal", "cross_attn", "use_gaussian", "use_uniform"), bool),
    **dict.fromkeys(("n_heads", "n_head", "hidden_dim", "n_embd"), whole(1, 65536)),
    **dict.fromkeys(("model_length", "block_size", "n_positions", "vocab_size"), whole(1, 2**20)),
    **dict.fromkeys(("n_blocks", "n_layer"), whole(1, 1000)),
    "bos_token_id": whole(),
}
OTHER_NAMES = {                                            # in some of these files
    "model_type": "algo.name", "tokenizer": "tokenizer_name_or_path", "inject": "gumbel_inject_mode",
    "causal": "causal_attention", "hidden_dim": "hidden_size", "model_length": "length",
}


def settings_of(path, config):
    """The settings in a configuration, a tree, of the file at `path`, by the names of SETTINGS. Raises ValueError."""
    settings = {}
    for name, check in SETTINGS.items():
        for branch, leaf in itertools.product(("", "algo.", "model.", "data."), (name, OTHER_NAMES.get(name, name))):
            value = omegaconf_value(config, branch + leaf)
            if value is None:
                continue
            if not fits(check, value):
                raise ValueError(f"{path} has {branch}{leaf} = {value!r:.60}, which no model here has: they are MDLM, "
                                 "BD3-LM and AR, without time conditioning and of GPT-2's tokenizer, and GPT-2")
            settings.setdefault(name, value)
    return settings


def omegaconf_value(config, path):
    """What stands at a path like "model.length" of a tree of dicts, or of OmegaConf's that was read as `Inert`s; None
    if there is no such path, or it is a reference, as in block_size: ${model.length}, that leads nowhere.
    """
    for _ in range(9):                                     # a reference may lead to another, or in a circle
        value = config
        try:
            for key in path.split("."):
                value = value[key]
            if isinstance(value, Inert):                   # a leaf, or a tree
                value = value.state.get("_val", value)
        except (LookupError, TypeError, AttributeError):   # no such key, or no such tree
            return None
        if not (isinstance(value, str) and value.startswith("${")):
            return value
        path = value[2:-1]
    return None


# ---------------------------------------------------------------------------------------------------------------------
# any of these

REMEDY = "put the published one there"
WEIGHTS = ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "pytorch_model.bin.index.json")
# saved beside the weights: masks, and numbers of the training's
NO_WEIGHTS = (".attn.bias", ".attn.masked_bias", "block_diff_mask", "sampling_eps_min", "sampling_eps_max")


def read_weights(path, weights=None):
    """Published weights -> (state dict, without "backbone." or "transformer.", settings). Raises OSError, or ValueError
    or BadInput with what is wrong.

    path: a .safetensors or torch file, as the authors' .ckpt, or a folder with one of WEIGHTS. What it does not say, a
    config.json beside it does. weights: "raw" or "ema"; None takes EMA where the file has them.
    """
    path = str(path)
    if os.path.isdir(path):
        names = [name for name in WEIGHTS if os.path.exists(os.path.join(path, name))]
        if not names:
            raise ValueError(f"{path} holds neither model.safetensors nor pytorch_model.bin")
        path = os.path.join(path, names[0])
    settings = {}
    config = os.path.join(os.path.dirname(path), "config.json")
    if os.path.exists(config):
        found = read_json(config)
        check_fields(config, found, {}, REMEDY)
        named = {name: value for name, value in found.items() if value is not None}
        settings = named | settings_of(config, named)
    found, rest = read_file(path)
    settings |= settings_of(path, omegaconf_value(rest, "hyper_parameters.config"))
    state = {}
    for name, w in found.items():
        name = str(name).replace("_orig_mod.", "")         # what torch.compile puts into a name
        if name.startswith("teacher_model.") or name.endswith(NO_WEIGHTS):
            continue
        if not isinstance(w, torch.Tensor) or not w.is_floating_point():
            raise ValueError(f"{path}: {name:.60} is no weight: these are real numbers")
        state[name.removeprefix("backbone.").removeprefix("transformer.")] = w
    if rest and weights == "ema" or weights is None and rest.get("ema"):
        state |= named_ema(path, state, omegaconf_value(rest, "ema.shadow_params"))
    return state, settings


def read_file(path):
    """A file of weights, or an index, which names the file of each -> as `read_torch`."""
    if path.endswith(".safetensors"):
        return read_safetensors(path), {}
    if not path.endswith(".index.json"):
        return read_torch(path)
    index = read_json(path)
    check_fields(path, index, {"weight_map": dict}, REMEDY)
    files = index["weight_map"]
    state = {}
    for file in set(filter(is_file_name, files.values())):
        part, _ = read_file(os.path.join(os.path.dirname(path), file))
        state |= {name: w for name, w in part.items() if files.get(name) == file}
    if state.keys() != files.keys():
        raise ValueError(f"{path} names weights that no file beside it holds")
    return state, {}


def named_ema(path, state, shadow):
    """The EMA weights by name: the list `shadow` has the order of the network's parameters, without its buffers."""
    names = [name for name in state if not name.endswith("inv_freq")]
    if not shadow or not isinstance(shadow, list):
        raise ValueError(f"{path} holds no EMA weights: use --weights=raw")
    # the order is all that tells them apart: every shape must fit
    if [getattr(w, "shape", None) for w in shadow] != [state[name].shape for name in names]:
        raise ValueError(f"{path}: its {len(shadow)} EMA tensors do not match the {len(names)} of its network")
    return dict(zip(names, shadow))


def server_sha256(url):
    """The SHA-256 that Hugging Face's server states of a file; None where it states none, or is not to be reached."""
    request = urllib.request.Request(url, method="HEAD")
    try:
        headers = urllib.request.build_opener(NoRedirect).open(request, timeout=10).headers
    except urllib.error.HTTPError as e:                    # also what is made of a redirection: it states it, too
        headers = e.headers
    except (OSError, ValueError, http.client.HTTPException):
        return None
    stated = re.fullmatch('"?([0-9a-f]{64})"?', headers.get("X-Linked-Etag", ""))
    return stated and stated[1]


# ---------------------------------------------------------------------------------------------------------------------
# what weights do not say

ADALN = "output_layer.adaLN_modulation.weight"             # what reads the noise level, which AR networks do not have


def describe(state, settings):
    """One of the authors' networks -> (its kind in our table of models, the arguments of that kind's `load_published`).

    Raises ValueError where settings contradict the weights or each other, and where neither say what decides the
    computation: then with the line that a config.json beside the file has to hold.
    """
    embedding = state.get("vocab_embed.embedding", torch.zeros(0))
    if embedding.ndim != 2 or len(embedding) < 3:
        raise ValueError("not a published MDLM, BD3-LM, AR or GPT-2 checkpoint: it lacks their embedding")
    rows, D = embedding.shape
    blocks = {name.split(".")[1] for name in state if name.startswith("blocks.")}
    is_ar = ADALN not in state
    found = dict(vocab_size=rows, hidden_dim=D, n_blocks=len(blocks), causal=is_ar)
    found["parameterization"] = "ar" if is_ar else "subs"
    frequencies = state.get("rotary_emb.inv_freq", torch.zeros(0))
    if frequencies.numel():
        found["n_heads"] = D // (2 * frequencies.numel())
    check_sizes(settings, found)

    # what the weights may not tell
    n_heads = (settings | found).get("n_heads")
    length = settings.get("model_length", 1024)
    block_size = settings.get("block_size")
    said = settings.get("model_type", "").removesuffix("_gumbel")
    if is_ar or said == "mdlm" and block_size is None:
        block_size = length
    if not n_heads or not block_size:
        line = {name: settings[name] for name in ("model_type", "model_length") if name in settings}
        line |= dict(block_size=block_size or math.gcd(4, length), n_heads=n_heads or math.gcd(D // 2, 12))
        raise ValueError("nothing says what its block_size (MDLM: its length) or its n_heads is: write what is true "
                         f"of it to config.json beside it, as in {json.dumps(line)}")
    kind = "bd3lm"
    if is_ar:
        kind = "ar"
    elif block_size == length:
        kind = "mdlm"                                      # also a BD3-LM that has one block
    if said not in ("", kind) and (said, kind) != ("bd3lm", "mdlm"):
        raise ValueError(f"its settings say {said}, its weights and block_size {block_size} of {length} {kind}")
    if kind == "bd3lm" and settings.get("cross_attn") is False:
        raise ValueError(f"its settings have cross_attn = False, and block_size {block_size} of {length} needs it")
    if "model_length" not in settings:
        say_once(f"nothing says what its model_length is: rows of {length} tokens are taken")

    known = dict(n_heads=n_heads, length=length, bos=rows - 2)             # their ids end with BOS and [MASK]
    if kind != "ar":
        known["inject"] = settings.get("inject")
    if kind == "bd3lm":
        known["block_size"] = block_size
    for noise in ("uniform", "gaussian"):                  # the latter wins in gumbel-distill's diffusion.py
        if settings.get(f"use_{noise}") and "gumbel_noise_embed.linear.weight" in state:
            known["noise"] = noise
    return kind, known


def check_sizes(settings, found):
    """ValueError unless what the settings name is what is `found` in the weights."""
    for name, value in found.items():
        if settings.get(name, value) != value:
            raise ValueError(f"its settings have {name} = {settings[name]!r}, its weights {value!r}")


GPT2_TOKENS_SHA256 = "08f8f6dd8cd5c8a2cbde73c001e63acca2f66f142d2a289a37921fb0f737e770"


def tokenizer_of(path, settings, model):
    """The name of the tokenizer of published weights: by their settings, or by what lies beside them."""
    folder = path
    if not os.path.isdir(path):
        folder = os.path.dirname(path) or "."
    names = (os.path.join(folder, name) for name in ("tokenizer.json", "vocab.json"))
    files = list(filter(os.path.exists, names))
    is_gpt2_size = (model.vocab_size, model.bos) == (50257, 50256)
    if is_gpt2_size and ("tokenizer" in settings or files and has_gpt2_tokens(files[0])):
        return "gpt2"
    if files:
        return f"hf:{folder}"
    if not is_gpt2_size:
        return "ids"                                       # nothing names one
    say_once(f"{path} comes without a tokenizer: its 50257 ids are taken for GPT-2's")
    return "gpt2"


def has_gpt2_tokens(file):
    """Whether this vocab.json or tokenizer.json has GPT-2's tokens by id. `vocab` refuses a damaged one."""
    try:
        tokens = read_json(file)
        if file.endswith("tokenizer.json"):
            tokens = tokens["model"]["vocab"]
        by_id = sorted((i, token) for token, i in tokens.items() if i < 50257)
    except (ValueError, LookupError, TypeError, AttributeError):
        return False
    return hashlib.sha256(json.dumps(by_id).encode()).hexdigest() == GPT2_TOKENS_SHA256


# ---------------------------------------------------------------------------------------------------------------------
# the authors' networks: MDLM, BD3-LM and AR, DiTs whose adaLN folds into the layers around it
#
# adaLN scales and shifts what each LayerNorm returns, and gates each branch, by vectors that are computed from the
# noise level. Their networks are not conditioned on it: its input is the constant 0, and so are the vectors. Scale and
# shift become weight and bias of the LayerNorm, the gate a factor of the branch's output layer: exactly.

def fold_published(src, n_heads=None):
    """A published checkpoint, a path or a state dict (names with or without "backbone.") -> its parts, for our classes:

    the state dict of our network, in float32; its sizes {vocab_size, n_layer, n_embd, n_head, dropout}; the weight of
    the noise embedding [D, V], or None; the settings of its file, as `read_weights` returns them.
    n_heads: None reads it from the settings, or from the network's rotary frequencies. Raises OSError, ValueError.
    """
    settings = {}
    if not isinstance(src, dict):
        src, settings = read_weights(src)
    theirs = {name.removeprefix("backbone."): w.float() for name, w in src.items() if not name.endswith(NO_WEIGHTS)}
    noise_weight = theirs.pop("gumbel_noise_embed.linear.weight", None)
    try:
        state, sizes = fold_network(theirs, n_heads or settings.get("n_heads"))
    except KeyError as e:
        raise ValueError(f"not a published MDLM, BD3-LM or AR checkpoint: it lacks {e}") from None
    # what is left out would change the meaning of the others
    for name in theirs.keys() - {"vocab_embed.embedding", "rotary_emb.inv_freq"}:
        raise ValueError(f"unknown weight {name}")
    return state, sizes, noise_weight, settings


def fold_network(theirs, n_heads):
    """Our state dict and its sizes; what is folded is taken out of `theirs`."""
    embedding = theirs["vocab_embed.embedding"]
    rows, D = embedding.shape                              # rows: V + 1, the last that of [MASK]
    if not n_heads:
        n_heads = D // (2 * len(theirs["rotary_emb.inv_freq"]))
    c = adaln_input(theirs)
    ours = {"embed.weight": embedding}
    n_layer = 0
    while f"blocks.{n_layer}.norm1.weight" in theirs:
        ours |= fold_block(theirs, f"blocks.{n_layer}.", c)
        n_layer += 1
    shift, scale = modulation(theirs, "output_layer.adaLN_modulation", c, 2)
    V = rows - 1                                           # the output layer goes without [MASK], whose logit is -inf
    ours |= {
        "norm.weight": theirs.pop("output_layer.norm_final.weight") * (1 + scale),
        "norm.bias": shift,
        "head.weight": theirs.pop("output_layer.linear.weight")[:V],
        "head.bias": theirs.pop("output_layer.linear.bias")[:V],
    }
    state = {"transformer." + name: w for name, w in ours.items()}
    return state, dict(vocab_size=V, n_layer=n_layer, n_embd=D, n_head=n_heads, dropout=0.0)


def adaln_input(theirs):
    """What all adaLN layers read: c = silu(W2 silu(W1 e + b1) + b2) [C]. None for AR networks, which have no adaLN."""
    if ADALN not in theirs:
        return None
    c = torch.cat([torch.ones(128), torch.zeros(128)])     # e, the sinusoidal embedding of 0: cosines, then sines
    for layer in ("sigma_map.mlp.0", "sigma_map.mlp.2"):
        c = F.silu(F.linear(c, theirs.pop(layer + ".weight"), theirs.pop(layer + ".bias")))
    return c


def modulation(theirs, layer, c, n_vectors):
    """The vectors [D] that an adaLN layer computes from c, in the order shift, scale, gate, shift, scale, gate."""
    if c is None:                                          # no adaLN: vectors that change nothing
        D = theirs["vocab_embed.embedding"].shape[1]
        identity = 2 * [torch.zeros(D), torch.zeros(D), torch.ones(D)]
        return identity[:n_vectors]
    vectors = F.linear(c, theirs.pop(layer + ".weight"), theirs.pop(layer + ".bias"))
    return vectors.chunk(n_vectors)


def fold_block(theirs, block, c):
    """One transformer block; `block` is the prefix of its names, the same in theirs and in ours."""
    layer = block + "adaLN_modulation"
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation(theirs, layer, c, 6)
    return {
        block + "norm1.weight": theirs.pop(block + "norm1.weight") * (1 + scale1),
        block + "norm1.bias": shift1,
        block + "qkv.weight": theirs.pop(block + "attn_qkv.weight"),
        block + "attn_out.weight": gate1[:, None] * theirs.pop(block + "attn_out.weight"),
        block + "norm2.weight": theirs.pop(block + "norm2.weight") * (1 + scale2),
        block + "norm2.bias": shift2,
        block + "fc.weight": theirs.pop(block + "mlp.0.weight"),
        block + "fc.bias": theirs.pop(block + "mlp.0.bias"),
        block + "proj.weight": gate2[:, None] * theirs.pop(block + "mlp.2.weight"),
        block + "proj.bias": gate2 * theirs.pop(block + "mlp.2.bias"),
    }
