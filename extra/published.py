"""Weights that other projects published: safetensors, torch files, Lightning checkpoints, the authors' networks.

Knows no class of ours: `mdlm.load_published`, `bd3lm.load_published` and `teacher.load_published` pass their own.
"""
import json
import os
import zipfile

import numpy as np
import torch
import torch.nn.functional as F
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals


# ---------------------------------------------------------------------------------------------------------------------
# files: safetensors, torch files, Lightning checkpoints

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(path):
    """A .safetensors file -> {name: tensor}, memmapped: 8 bytes of header size, a JSON header, then the data."""
    data, out = np.memmap(path, np.uint8, mode="c"), {}    # copy-on-write: torch wants writable memory
    n = 8 + int.from_bytes(data[:8].tobytes(), "little")
    try:
        for name, t in json.loads(data[8:n].tobytes()).items():
            if name != "__metadata__":
                a, b = t["data_offsets"]
                out[name] = torch.from_numpy(data[n + a:n + b]).view(DTYPES[t["dtype"]]).view(t["shape"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as e:
        raise ValueError(f"{path} is no complete safetensors file ({type(e).__name__}: {e})") from None
    return out


class _Inert:
    """What any class of a Lightning file's pickled configuration becomes: holds its state, runs nothing."""

    def __init__(self, *args, **kw):
        pass

    def __setstate__(self, state):
        if isinstance(state, dict):
            self.__dict__.update(state)

    def __setitem__(self, key, value):
        pass


def _setting(config, path):
    """The value at a path, like model.length, of an OmegaConf tree read as `_Inert`s (children in `_content`, a leaf
    in `_val`), or None."""
    node = config
    for key in path.split("."):
        node = getattr(node, "_content", node)
        node = node.get(key) if isinstance(node, dict) else None
    node = getattr(node, "_val", node)
    if isinstance(node, str) and node.startswith("${"):    # as in block_size: ${model.length}
        return _setting(config, node[2:-1])
    return node if isinstance(node, (int, str)) else None


def read_torch(path):
    """A torch file -> (its state dict, all it holds), no class in it executed: unknown ones become `_Inert`."""
    lightning = path.endswith(".ckpt")
    try:
        zipped = zipfile.is_zipfile(path)
        with safe_globals([(_Inert, name) for name in (get_unsafe_globals_in_checkpoint(path) if zipped else [])]):
            ckpt = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        return ckpt["state_dict"] if lightning else ckpt.get("state_dict", ckpt), ckpt
    except Exception as e:                                 # foreign files fail in a dozen ways
        raise ValueError(f"{path} is not a readable {'Lightning checkpoint' if lightning else 'torch file'}: "
                         f"{(str(e) or type(e).__name__).splitlines()[0]}") from None


def read_weights(path, weights=None):
    """Published weights -> (state dict, settings): a .safetensors or torch file, a folder with one of them as Hugging
    Face names it (settings: its config.json), or the authors' Lightning .ckpt. ValueError says what is wrong.

    `weights`, of a .ckpt: "raw", or "ema", whose `shadow_params` are a list in the order of the network's parameters;
    None: EMA where the file has them.
    """
    path, settings = str(path), {}
    if os.path.isdir(path):
        names = [n for n in ("model.safetensors", "pytorch_model.bin") if os.path.exists(os.path.join(path, n))]
        if not names:
            raise ValueError(f"{path} holds neither model.safetensors nor pytorch_model.bin")
        if os.path.exists(config := os.path.join(path, "config.json")):
            with open(config) as f:
                settings = json.load(f)
        path = os.path.join(path, names[0])
    if path.endswith(".safetensors"):
        return read_safetensors(path), settings
    state, ckpt = read_torch(path)
    if not path.endswith(".ckpt"):
        return state, settings
    # Lightning: EMA weights without names, settings in a pickled OmegaConf tree
    state = {k.replace("_orig_mod.", ""): v for k, v in state.items()
             if not k.startswith("teacher_model.") and "sampling_eps" not in k}
    shadow = (ckpt.get("ema") or {}).get("shadow_params")
    if weights == "ema" or weights is None and shadow:
        names = [k for k in state if not k.endswith(("inv_freq", "block_diff_mask"))]                  # not the buffers
        if not shadow:
            raise ValueError(f"{path} holds no EMA weights: use --weights=raw")
        if [p.shape for p in shadow] != [state[k].shape for k in names]:
            raise ValueError(f"{path}: its {len(shadow)} EMA tensors do not match the {len(names)} of its network")
        state |= dict(zip(names, shadow))
    config = (ckpt.get("hyper_parameters") or {}).get("config")
    names = dict(model_length="model.length", n_heads="model.n_heads", block_size="block_size",
                 inject="model.gumbel_inject_mode")
    return state, {k: v for k, path in names.items() if (v := _setting(config, path)) is not None}


# ---------------------------------------------------------------------------------------------------------------------
# the authors' networks

def fold_published(src, n_heads=None):
    """A published checkpoint (path or state dict) -> (our state dict, sizes, their state dict, its file's settings).

    Their adaLN has a constant input (no time conditioning), so it folds into LayerNorm and output projections exactly:
        c = silu(W2 silu(W1 e + b1) + b2),  e = [1] * 128 ++ [0] * 128   (sinusoidal embedding of sigma = 0)
        per block (shift, scale, gate) x 2 = A c + a: LN weight <- norm (1 + scale), bias <- shift, output *= gate
    AR files have no adaLN. The output layer's [MASK] row is dropped: its logit is -inf.
    """
    src, settings = (src, {}) if isinstance(src, dict) else read_weights(src)
    src = {k.removeprefix("backbone."): v.float() for k, v in src.items()}
    try:
        rows, D = src["vocab_embed.embedding"].shape
        n_heads = n_heads or settings.get("n_heads") or D // (2 * len(src["rotary_emb.inv_freq"]))

        def silu(i, x):
            return F.silu(F.linear(x, src[f"sigma_map.mlp.{i}.weight"], src[f"sigma_map.mlp.{i}.bias"]))

        def modulation(name, n):                          # n vectors of D, or the identity
            if "sigma_map.mlp.0.weight" not in src:
                return [torch.full((D,), v) for v in (0.0, 0.0, 1.0, 0.0, 0.0, 1.0)[:n]]
            c = silu(2, silu(0, torch.cat([torch.ones(128), torch.zeros(128)])))
            return F.linear(c, src[name + ".weight"], src[name + ".bias"]).chunk(n)

        out, n_layer = {"embed.weight": src["vocab_embed.embedding"]}, 0
        while (b := f"blocks.{n_layer}.") + "norm1.weight" in src:
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation(b + "adaLN_modulation", 6)
            out |= {b + "norm1.weight": src[b + "norm1.weight"] * (1 + scale_a), b + "norm1.bias": shift_a,
                    b + "qkv.weight": src[b + "attn_qkv.weight"],
                    b + "attn_out.weight": gate_a[:, None] * src[b + "attn_out.weight"],
                    b + "norm2.weight": src[b + "norm2.weight"] * (1 + scale_m), b + "norm2.bias": shift_m,
                    b + "fc.weight": src[b + "mlp.0.weight"], b + "fc.bias": src[b + "mlp.0.bias"],
                    b + "proj.weight": gate_m[:, None] * src[b + "mlp.2.weight"],
                    b + "proj.bias": gate_m * src[b + "mlp.2.bias"]}
            n_layer += 1
        shift, scale = modulation("output_layer.adaLN_modulation", 2)
        out |= {"norm.weight": src["output_layer.norm_final.weight"] * (1 + scale), "norm.bias": shift,
                "head.weight": src["output_layer.linear.weight"][:rows - 1],
                "head.bias": src["output_layer.linear.bias"][:rows - 1]}
    except KeyError as e:
        raise ValueError(f"not a published MDLM, BD3-LM or AR checkpoint: it lacks {e}") from None
    return {"transformer." + k: v for k, v in out.items()}, dict(
        vocab_size=rows - 1, n_layer=n_layer, n_embd=D, n_head=n_heads, dropout=0.0), src, settings
