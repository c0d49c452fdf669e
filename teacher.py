"""The autoregressive teacher, and stage 1: extracting the noise behind a text (Section 4.1).

Row i of an AR model's output is the distribution of token i + 1, so the noise of position i (the noise that decided the
token there) comes from the teacher's logits at position i - 1.

Shapes: B batch, L length, V vocabulary, D width, N rows.
"""
import hashlib
import math
import os
import re
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from data.cli import BadInput, optional
from gumbel import posterior_gumbel, sample_gumbel
from mdlm import KVCache, Transformer, check_draws, draw_tokens, row_losses

GPT2_URL = "https://huggingface.co/openai-community/{}/resolve/main/model.safetensors"
GPT2_SIZES = {"gpt2": (12, 768, 12), "gpt2-medium": (24, 1024, 16), "gpt2-large": (36, 1280, 20),
              "gpt2-xl": (48, 1600, 25)}                  # n_layer, n_embd, n_head


class CausalLM(nn.Module):
    """What every AR model here does: a teacher, a baseline of student size, a verifier or a judge.

    A subclass gives `config` (vocab_size, length, bos, ...), `hidden` and `output_layer`.
    """

    def __init__(self, **config):
        super().__init__()
        self.config = config
        self.vocab_size, self.length, self.bos = config["vocab_size"], config["length"], config["bos"]
        self.predict_bos = config.get("predict_bos", True)

    @property
    def device(self):
        return next(self.parameters()).device

    def new_cache(self, batch, length):
        return KVCache(self.transformer, batch, length)

    def logits(self, h, exact=True):
        """h [N, D] -> [N, V], in float32 even under autocast: a bf16 logit near -60 is off by up to a quarter.

        `exact=False` (in training, where the error averages out) follows autocast.
        """
        with torch.autocast(h.device.type, enabled=False) if exact else nullcontext():
            logits = self.output_layer()(h.float()).float()
        if not self.predict_bos:
            logits[..., self.bos] = -math.inf
        return logits

    def log_probs(self, tokens):
        """tokens [B, L] -> [B, L, V]; row i is the distribution of token i + 1."""
        return self.logits(self.hidden(tokens)).log_softmax(-1)

    def loss(self, tokens):
        """Mean negative log-likelihood in nats over the L - 1 tokens after BOS. Returns (loss, {})."""
        h = self.hidden(tokens[:, :-1]).flatten(0, 1)
        logits = partial(self.logits, exact=not self.training)
        return row_losses(logits, h, tokens[:, 1:].flatten(), self.vocab_size)[0].mean(), {}

    forward = loss                                        # what DDP calls

    def posterior_logits(self, tokens, masked):
        """One teacher pass over clean rows: (a, b) -> float32 logits [b - a, V] that produced masked tokens a to b.

        What `GumbelEmbedding.from_posterior` asks for: parallel extraction, chunk by chunk. tokens, masked [B, L].
        """
        with torch.no_grad():
            h = self.hidden(tokens[:, :-1])[masked[:, 1:]]               # (N, D): the position before each masked one
        return lambda a, b: self.logits(h[a:b])

    @torch.no_grad()
    def generate(self, tokens, length=None, tau=1.0, top_p=1.0, greedy=False, noise=None, generator=None):
        """Continue tokens [B, P] (BOS first) to `length` -> (tokens [B, length], nfe [B]), by Gumbel-max.

        x_i = argmax(logits + tau * noise_i), tau the sampling temperature. `noise` [B, length, V], drawn unless given.
        """
        length = length or self.length
        B, P = tokens.shape
        check_draws(tau, top_p)
        if not 1 <= P <= length:
            raise ValueError(f"the prompt has {P} tokens, the sample {length}")
        if length > self.length:
            raise ValueError(f"{length} tokens wanted, this model was made for rows of at most {self.length}")
        cache, x, new = self.new_cache(B, length), tokens, tokens
        for i in range(P, length):
            logits = self.logits(self.hidden(new, cache)[:, -1]) / tau
            new = draw_tokens(logits, top_p, greedy, None if noise is None else noise[:, i], generator)[:, None]
            x = torch.cat([x, new], 1)
        return x, torch.full((B,), length - P, device=tokens.device)


class AR(CausalLM):
    """The student's transformer made causal."""

    def __init__(self, vocab_size, length, bos, n_layer=12, n_embd=768, n_head=12, dropout=0.1, predict_bos=True,
                 learned=0):
        super().__init__(vocab_size=vocab_size, length=length, bos=bos, n_layer=n_layer, n_embd=n_embd, n_head=n_head,
                         dropout=dropout, predict_bos=predict_bos)
        self.transformer = Transformer(vocab_size, vocab_size, n_layer, n_embd, n_head, dropout, True, learned)

    def hidden(self, tokens, cache=None):
        """tokens [B, L] -> [B, L, D]; with a KVCache, the tokens that follow what it holds."""
        return self.transformer(self.transformer.embed(tokens), cache)

    def output_layer(self):
        return self.transformer.head


class GPT2(AR):
    """GPT-2 of any size, from the published files: `GPT2.from_pretrained("gpt2-large")`. model(tokens) -> logits."""

    def forward(self, tokens):
        """tokens [B, L] -> logits [B, L, V]; row i is about token i + 1."""
        return self.logits(self.hidden(tokens))

    @classmethod
    def from_pretrained(cls, name_or_dir):
        """A name of GPT2_SIZES, downloaded once (to $GUMBEL_CACHE, default ~/.cache/gumbel), or a folder that holds
        model.safetensors or pytorch_model.bin (+ config.json). Raises BadInput. In evaluation mode, float32.
        """
        folder = name_or_dir
        if name_or_dir in GPT2_SIZES and not os.path.isdir(name_or_dir):
            folder = os.path.join(os.environ.get("GUMBEL_CACHE") or os.path.expanduser("~/.cache/gumbel"), name_or_dir)
            path = os.path.join(folder, "model.safetensors")
            if not os.path.exists(path):
                os.makedirs(folder, exist_ok=True)
                try:
                    torch.hub.download_url_to_file(GPT2_URL.format(name_or_dir), path)
                except OSError as e:
                    raise BadInput(f"could not download {name_or_dir} ({e}): go online once, or give a folder that "
                                   "holds its model.safetensors or pytorch_model.bin") from None
        from extra.published import read_weights
        try:
            return cls.from_state(*read_weights(folder))
        except (OSError, ValueError) as e:
            again = f" (to download it again, remove {folder})" if folder != name_or_dir else ""
            raise BadInput(f"{name_or_dir} is no GPT-2: {e}{again}") from None

    @classmethod
    def from_state(cls, state, config):
        """Published names and settings -> our model. Names with and without `transformer.`, buffers left out; the
        published layers are Conv1D, stored [in, out]."""
        for key, value in dict(model_type="gpt2", activation_function="gelu_new", layer_norm_epsilon=1e-5, n_inner=None,
                               scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False,
                               tie_word_embeddings=True).items():
            if config.get(key, value) != value:
                raise ValueError(f"its config.json has {key} = {config[key]!r}, GPT-2 has {value!r}")
        state = {k.removeprefix("transformer."): v.float() for k, v in state.items()
                 if not k.endswith((".attn.bias", ".attn.masked_bias")) and k != "lm_head.weight"}
        names = {"wte": "embed", "wpe": "positions", "ln_f": "norm", "ln_1": "norm1", "ln_2": "norm2",
                 "attn.c_attn": "qkv", "attn.c_proj": "attn_out", "mlp.c_fc": "fc", "mlp.c_proj": "proj"}
        out = {}
        for key, w in state.items():
            block, name, kind = re.fullmatch(r"(?:h\.(\d+)\.)?(.*?)\.?([^.]*)", key).groups()
            if name not in names:
                raise ValueError(f"unknown weight {key}")
            prefix = f"transformer.blocks.{block}." if block else "transformer."
            out[prefix + names[name] + "." + kind] = w.t() if "c_" in name and kind == "weight" else w
        try:
            (V, D), L, bos = state["wte.weight"].shape, len(state["wpe.weight"]), config.get("bos_token_id")
            n_layer, n_head = 1 + max(int(k.split(".")[1]) for k in state if k[:2] == "h."), config.get("n_head")
            with torch.device("meta"):                     # no memory, no initial draws: the weights replace it all
                model = cls(V, L, V - 1 if bos is None else bos, n_layer, D, n_head or D // 64, 0.0, learned=L)
            out["transformer.head.weight"] = out["transformer.embed.weight"]
            model.load_state_dict(out, assign=True)
        except (KeyError, RuntimeError, ValueError) as e:
            raise ValueError(f"its weights are not GPT-2's: {str(e).splitlines()[-1].strip()}") from None
        model.transformer.head.weight = model.transformer.embed.weight
        return model.eval().requires_grad_(False)


class HF(CausalLM):
    """Any Hugging Face causal LM as a teacher, through `transformers` (optional): a name, a folder, or a .gguf file."""

    def __init__(self, name):
        transformers = optional("transformers", f"hf:{name}")
        folder, file = os.path.split(name) if name.endswith(".gguf") else (name, None)
        try:
            lm = transformers.AutoModelForCausalLM.from_pretrained(folder or ".", gguf_file=file, dtype=torch.float32)
        except (OSError, ValueError, ImportError) as e:
            why = (str(e) or type(e).__name__).splitlines()[0]
            raise BadInput(f"transformers cannot load hf:{name}: {why}") from None
        c = lm.config
        super().__init__(vocab_size=c.vocab_size, length=getattr(c, "max_position_embeddings", None) or 1 << 30,
                         bos=c.eos_token_id if c.bos_token_id is None else c.bos_token_id)
        self.lm = lm.eval().requires_grad_(False)
        self.new_cache = lambda batch, length: transformers.DynamicCache()
        probe = torch.arange(4)[None]
        if not torch.allclose(self.logits(self.hidden(probe)), lm(probe).logits, atol=1e-3):
            raise BadInput(f"hf:{name} scales or caps the logits of its output layer, which this wrapper does not: "
                           "use another teacher")

    def hidden(self, tokens, cache=None):
        return self.lm.base_model(tokens, past_key_values=cache, use_cache=cache is not None).last_hidden_state

    def output_layer(self):
        return self.lm.get_output_embeddings()


def body_to_bfloat16(teacher):
    """The frozen teacher's layers in bf16 (half the memory, no cast at each pass); embeddings and head stay float32."""
    blocks = teacher.lm.base_model if isinstance(teacher, HF) else teacher.transformer.blocks
    for m in blocks.modules():
        if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D":
            m.to(torch.bfloat16)
    return teacher


def model_hash(model):
    """SHA-256 of an AR model's weights as float32, first 16 hex digits: whose heads, whose cache."""
    h = hashlib.sha256()
    for name, w in sorted(model.state_dict().items()):
        h.update(f"{name} {tuple(w.shape)} ".encode())
        h.update(w.detach().float().cpu().contiguous().numpy())
    return h.hexdigest()[:16]


def extract_parallel(teacher, tokens, generator=None):
    """The noise that would have made the teacher write `tokens` [B, L] -> [B, L, V], float32; row 0 (BOS) is zero.

    One forward pass and Algorithm 1 at each position. For study and small vocabularies: training uses
    `GumbelEmbedding.from_posterior` with `posterior_logits`, the same draws without the [B, L, V] tensor.
    """
    with torch.no_grad():
        logits = teacher.logits(teacher.hidden(tokens[:, :-1]))
    return F.pad(posterior_gumbel(logits, tokens[:, 1:], generator), (0, 0, 1, 0))


def extract_sequential(teacher, n, length=None, generator=None):
    """n texts by the teacher with the noise that produced them: tokens [n, L], noise [n, L, V]; row 0 (BOS) is zero."""
    length = length or teacher.length
    device = teacher.device
    noise = sample_gumbel((n, length, teacher.vocab_size), generator, device)
    noise[:, 0] = 0
    tokens, _ = teacher.generate(torch.full((n, 1), teacher.bos, device=device), length, noise=noise)
    return tokens, noise


def load_published(src, n_heads=None, length=None, bos=50256):
    """The authors' AR model as our `AR` with equal outputs. `src`: a path or a state dict; a [MASK] row is dropped."""
    from extra.published import fold_published
    state, sizes, _, settings = fold_published(src, n_heads)
    length = length or settings.get("model_length", 1024)
    state["transformer.embed.weight"] = state["transformer.embed.weight"][:sizes["vocab_size"]]
    model = AR(length=length, bos=bos, **sizes)
    model.load_state_dict(state)
    return model.eval()
