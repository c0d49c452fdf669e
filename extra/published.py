"""Weights that other projects published: safetensors, torch files, Lightning checkpoints, the authors' networks.

In this order: one function per file format, `read_weights`, which tells them apart, and `fold_published`, which turns
the authors' networks into ours. Nothing here knows a class of ours: `mdlm.load_published`, `bd3lm.load_published` and
`teacher.load_published` pass the result to their own.
"""
import json
import os
import zipfile

import numpy as np
import torch
import torch.nn.functional as F
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals


# ---------------------------------------------------------------------------------------------------------------------
# safetensors

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
    data = np.memmap(path, np.uint8, mode="c")             # copy-on-write: torch wants writable memory
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    tensors = {}
    try:
        header = json.loads(data[8:start].tobytes())
        for name, entry in header.items():
            if name == "__metadata__":                     # strings of the writer's, no tensor
                continue
            a, b = entry["data_offsets"]                   # counted from the end of the header
            values = torch.from_numpy(data[start + a:start + b])
            tensors[name] = values.view(DTYPES[entry["dtype"]]).view(entry["shape"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as e:
        why = f"{type(e).__name__}: {e}"
        raise ValueError(f"{path} is no complete safetensors file ({why})") from None
    return tensors


# ---------------------------------------------------------------------------------------------------------------------
# torch files. A pickle can run any code while it is read, and these come from strangers

class Inert:
    """Stand-in for every class that is pickled in a foreign file: keeps the attributes, runs no code."""
    state = None

    def __init__(self, *args, **kw):
        pass

    def __setstate__(self, state):
        self.state = state

    def __setitem__(self, key, value):                     # how pickle fills what was a kind of dict
        pass


def load_inert(path):
    """All that a torch file holds, with an `Inert` for every object that torch would not load safely."""
    zipped = zipfile.is_zipfile(path)
    classes = []
    if zipped:                                             # files of torch < 1.6 are no archives: tensors only
        classes = get_unsafe_globals_in_checkpoint(path)
    with safe_globals([(Inert, name) for name in classes]):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)


def read_torch(path):
    """A torch file, or a Lightning .ckpt -> (its state dict, all that it holds). Raises ValueError if it is neither."""
    is_lightning = path.endswith(".ckpt")
    kind = "torch file"
    if is_lightning:
        kind = "Lightning checkpoint"
    try:
        contents = load_inert(path)
        if is_lightning:
            return contents["state_dict"], contents
        return contents.get("state_dict", contents), contents
    except Exception as e:                                 # foreign files fail in a dozen ways
        why = (str(e) or type(e).__name__).splitlines()[0]
        raise ValueError(f"{path} is not a readable {kind}: {why}") from None


# ---------------------------------------------------------------------------------------------------------------------
# the authors' Lightning checkpoints: EMA weights without names, settings in a pickled OmegaConf tree

SETTINGS = {                                               # our name -> where the authors' configuration has it
    "model_length": "model.length",
    "n_heads": "model.n_heads",
    "block_size": "block_size",
    "inject": "model.gumbel_inject_mode",
}


def read_lightning(path, weights=None):
    """The authors' .ckpt -> (state dict, settings); `weights` as in `read_weights`."""
    state, contents = read_torch(path)
    network = {}
    for name, w in state.items():
        # the frozen teacher, and a number of the training's, are saved beside the network
        if name.startswith("teacher_model.") or "sampling_eps" in name:
            continue
        network[name.replace("_orig_mod.", "")] = w        # what torch.compile puts into a name
    ema = contents.get("ema") or {}
    shadow = ema.get("shadow_params")
    if weights == "ema" or weights is None and shadow:
        network |= named_ema(path, network, shadow)
    hyper = contents.get("hyper_parameters") or {}
    settings = {}
    for name, where in SETTINGS.items():
        value = omegaconf_value(hyper.get("config"), where)
        if value is not None:
            settings[name] = value
    return network, settings


def named_ema(path, network, shadow):
    """The EMA weights by name: the list `shadow` has the order of the network's parameters, without its buffers."""
    names = [name for name in network if not name.endswith(("inv_freq", "block_diff_mask"))]
    if not shadow:
        raise ValueError(f"{path} holds no EMA weights: use --weights=raw")
    # the order is all that tells them apart: every shape must fit
    if [w.shape for w in shadow] != [network[name].shape for name in names]:
        raise ValueError(f"{path}: its {len(shadow)} EMA tensors do not match the {len(names)} of its network")
    return dict(zip(names, shadow))


def omegaconf_value(config, path):
    """The number or text at a path like "model.length" of an OmegaConf tree that was read as `Inert`s, or None."""
    try:
        value = omegaconf_content(config)
        for key in path.split("."):
            value = omegaconf_content(value[key])
    except (KeyError, TypeError, AttributeError):          # no such key, or no such tree
        return None
    if isinstance(value, str) and value.startswith("${"):  # a reference, as in block_size: ${model.length}
        return omegaconf_value(config, value[2:-1])
    if isinstance(value, (int, str)):
        return value
    return None


def omegaconf_content(node):
    """What an OmegaConf node holds: its children by name, or, of a leaf, the value. Plain values are themselves."""
    if not isinstance(node, Inert):
        return node
    state = node.state or {}
    return state.get("_content", state.get("_val"))


# ---------------------------------------------------------------------------------------------------------------------
# any of these

def read_weights(path, weights=None):
    """Published weights -> (state dict, settings). Raises OSError, or ValueError with what is wrong.

    path: a .safetensors or torch file; a folder that holds one under the name that Hugging Face gives it (settings: its
    config.json); or a Lightning .ckpt of the authors' code.
    weights: of a .ckpt, "raw" or "ema"; None takes EMA where the file has them.
    """
    path = str(path)
    settings = {}
    if os.path.isdir(path):
        settings = read_config(path)
        path = weights_in_folder(path)
    if path.endswith(".safetensors"):
        return read_safetensors(path), settings
    if path.endswith(".ckpt"):
        return read_lightning(path, weights)
    state, _ = read_torch(path)
    return state, settings


def weights_in_folder(folder):
    for name in ("model.safetensors", "pytorch_model.bin"):
        path = os.path.join(folder, name)
        if os.path.exists(path):
            return path
    raise ValueError(f"{folder} holds neither model.safetensors nor pytorch_model.bin")


def read_config(folder):
    """config.json of a folder of Hugging Face's as a dict; empty if there is none."""
    path = os.path.join(folder, "config.json")
    if not os.path.exists(path):
        return {}
    with open(path) as f:
        return json.load(f)


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
    theirs = {name.removeprefix("backbone."): w.float() for name, w in src.items()}
    try:
        state, sizes = fold_network(theirs, n_heads or settings.get("n_heads"))
    except KeyError as e:
        raise ValueError(f"not a published MDLM, BD3-LM or AR checkpoint: it lacks {e}") from None
    return state, sizes, theirs.get("gumbel_noise_embed.linear.weight"), settings


def fold_network(theirs, n_heads):
    embedding = theirs["vocab_embed.embedding"]
    rows, D = embedding.shape                              # rows: V + 1, the last that of [MASK]
    if not n_heads:
        head_dim = 2 * len(theirs["rotary_emb.inv_freq"])
        n_heads = D // head_dim
    c = adaln_input(theirs)
    ours = {"embed.weight": embedding}
    n_layer = 0
    while f"blocks.{n_layer}.norm1.weight" in theirs:
        ours |= fold_block(theirs, f"blocks.{n_layer}.", c)
        n_layer += 1
    ours |= fold_output_layer(theirs, c, vocab_size=rows - 1)
    state = {"transformer." + name: w for name, w in ours.items()}
    return state, dict(vocab_size=rows - 1, n_layer=n_layer, n_embd=D, n_head=n_heads, dropout=0.0)


def adaln_input(theirs):
    """What all adaLN layers read: c = silu(W2 silu(W1 e + b1) + b2) [C]. None for AR networks, which have no adaLN."""
    if "sigma_map.mlp.0.weight" not in theirs:
        return None
    c = torch.cat([torch.ones(128), torch.zeros(128)])     # e, the sinusoidal embedding of 0: cosines, then sines
    for layer in ("sigma_map.mlp.0", "sigma_map.mlp.2"):
        c = F.silu(F.linear(c, theirs[layer + ".weight"], theirs[layer + ".bias"]))
    return c


def modulation(theirs, layer, c, n_vectors):
    """The vectors [D] that an adaLN layer computes from c, in the order shift, scale, gate, shift, scale, gate."""
    if c is None:                                          # no adaLN: vectors that change nothing
        D = theirs["vocab_embed.embedding"].shape[1]
        identity = [0.0, 0.0, 1.0, 0.0, 0.0, 1.0]
        return [torch.full((D,), value) for value in identity[:n_vectors]]
    vectors = F.linear(c, theirs[layer + ".weight"], theirs[layer + ".bias"])
    return vectors.chunk(n_vectors)


def fold_block(theirs, block, c):
    """One transformer block; `block` is the prefix of its names, the same in theirs and in ours."""
    layer = block + "adaLN_modulation"
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation(theirs, layer, c, 6)
    return {
        # attention
        block + "norm1.weight": theirs[block + "norm1.weight"] * (1 + scale1),
        block + "norm1.bias": shift1,
        block + "qkv.weight": theirs[block + "attn_qkv.weight"],
        block + "attn_out.weight": gate1[:, None] * theirs[block + "attn_out.weight"],
        # MLP
        block + "norm2.weight": theirs[block + "norm2.weight"] * (1 + scale2),
        block + "norm2.bias": shift2,
        block + "fc.weight": theirs[block + "mlp.0.weight"],
        block + "fc.bias": theirs[block + "mlp.0.bias"],
        block + "proj.weight": gate2[:, None] * theirs[block + "mlp.2.weight"],
        block + "proj.bias": gate2 * theirs[block + "mlp.2.bias"],
    }


def fold_output_layer(theirs, c, vocab_size):
    """The last LayerNorm and the output layer, without its row for [MASK], whose logit is -inf."""
    shift, scale = modulation(theirs, "output_layer.adaLN_modulation", c, 2)
    return {
        "norm.weight": theirs["output_layer.norm_final.weight"] * (1 + scale),
        "norm.bias": shift,
        "head.weight": theirs["output_layer.linear.weight"][:vocab_size],
        "head.bias": theirs["output_layer.linear.bias"][:vocab_size],
    }
