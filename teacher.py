"""The autoregressive teacher, and stage 1: extracting the noise behind a text (Section 4.1).

Row i of an AR model's output is the distribution of token i + 1, so the noise of position i (the noise that decided the
token there) comes from the teacher's logits at position i - 1.

Shapes: B batch, L length, V vocabulary, D width, N rows.
"""
import hashlib
import math
import os
import re
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from gumbel import DEVICE, check_draws, draw_tokens, posterior_gumbel, sample_gumbel, tf32, to_logits
from mdlm import Model, Transformer, row_losses


# ---------------------------------------------------------------------------------------------------------------------
# stage 1, as the paper has it. Training uses `CausalLM.posterior_logits` and `GumbelEmbedding.from_posterior`: the same
# draws, at the masked positions only, without a [B, L, V] tensor

def extract_parallel(teacher, tokens, generator=None):
    """The noise that would have made the teacher write `tokens` [B, L] -> [B, L, V], float32; zero at position 0 (BOS).

    One forward pass over the text, then Algorithm 1 at each position.
    """
    with torch.no_grad():
        logits = teacher.logits(teacher.hidden(tokens[:, :-1]))  # (B, L - 1, V): of positions 1 .. L - 1
    noise = posterior_gumbel(logits, tokens[:, 1:], generator)
    return F.pad(noise, (0, 0, 1, 0))


def extract_sequential(teacher, n, length=None, generator=None):
    """n texts by the teacher with the noise that produced them: tokens [n, L], noise [n, L, V], zero at position 0."""
    length = length or teacher.length
    noise = sample_gumbel((n, length, teacher.vocab_size), generator, teacher.device)
    noise[:, 0] = 0
    bos = torch.full((n, 1), teacher.bos, device=teacher.device)
    tokens, _ = teacher.generate(bos, length, noise=noise)
    return tokens, noise


# ---------------------------------------------------------------------------------------------------------------------
# the models

@dataclass
class CausalConfig:
    """What is known of any AR model."""
    vocab_size: int
    length: int                               # the longest row that it reads, BOS included
    bos: int


@dataclass
class ARConfig(CausalConfig):
    """What describes an `AR`. A checkpoint holds it as a dict."""
    n_layer: int = 12
    n_embd: int = 768
    n_head: int = 12
    dropout: float = 0.1                      # on both residual branches
    predict_bos: bool = True                  # False: BOS never occurs within a row, and is never predicted


class CausalLM(Model):
    """What every AR model here does: a teacher, a baseline of student size, a verifier or a judge.

    A subclass has `hidden`, `output_layer`, `new_cache`, `networks`, `matrices` and `extraction_flops`.
    """
    can_teach = True
    any_bos = False                           # its rows may begin with another id than its own BOS
    predict_bos = True

    def __init__(self, config):
        super().__init__(config)
        if not isinstance(self.bos, int) or not 0 <= self.bos < self.vocab_size:
            raise ValueError(f"its bos_token_id is {self.bos!r:.60}, none of its {self.vocab_size} ids")

    @property
    def device(self):
        return next(self.parameters()).device

    def logits(self, h, exact=True):
        """h [N, D] -> float32 [N, V]; `exact`: see `to_logits`."""
        logits = to_logits(self.output_layer(), h, exact)
        if not self.predict_bos:
            logits[..., self.bos] = -math.inf
        return logits

    def log_probs(self, tokens):
        """tokens [B, L] -> [B, L, V]; row i is the distribution of token i + 1."""
        return self.logits(self.hidden(tokens)).log_softmax(-1)

    def loss(self, tokens):
        """Mean negative log-likelihood in nats over the L - 1 tokens after BOS. Returns (loss, {})."""
        return self.losses(tokens).mean(), {}

    def losses(self, tokens):
        """The negative log-likelihood of each token after BOS, in nats: tokens [B, L] -> [B, L - 1]."""
        h = self.hidden(tokens[:, :-1]).flatten(0, 1)
        x = tokens[:, 1:].flatten()
        logits = partial(self.logits, exact=not self.training)
        return row_losses(logits, h, x, self.vocab_size).view(len(tokens), -1)

    forward = loss                                            # what DDP calls

    def posterior_logits(self, tokens, masked):
        """Parallel extraction, chunk by chunk: one pass over clean rows -> a function (a, b) -> float32 logits
        [b - a, V], those behind the masked tokens number a to b. What `GumbelEmbedding.from_posterior` asks for.
        tokens, masked [B, L].
        """
        with torch.no_grad():
            h = self.hidden(tokens[:, :-1])
            h = h[masked[:, 1:]]  # (N, D): the position before each masked one
        return self.logits_of_rows(h)

    def logits_of_rows(self, h):
        """h [N, D] -> a function (a, b) -> float32 logits of rows a to b. In training in bf16, a GPU's are TF32's."""
        training = torch.is_grad_enabled() and torch.is_autocast_enabled(h.device.type)
        return partial(self._logits_of_rows, h, training and DEVICE.is_gpu(h))

    @torch.no_grad()
    def _logits_of_rows(self, h, fast, a, b):
        with tf32(fast):
            return self.logits(h[a:b])

    @torch.no_grad()
    def generate(self, tokens, length=None, tau=1.0, top_p=1.0, greedy=False, noise=None, generator=None):
        """Continue tokens [B, P] (BOS first) to `length` -> (tokens [B, length], nfe [B]).

        With `noise` [B, length, V], standard Gumbel: x_i = argmax(logits / tau + noise_i), the same token as
        argmax(logits + tau * noise_i). Without, a draw of the same law by inversion, which costs less.
        """
        length = length or self.length
        B, P = tokens.shape
        check_draws(tau, top_p)
        if not 1 <= P <= length:
            raise ValueError(f"the prompt has {P} tokens, the sample {length}")
        if length > self.length:
            raise ValueError(f"{length} tokens wanted, this model was made for rows of at most {self.length}")
        cache = self.new_cache(B, length)
        x = tokens
        new = tokens                                          # what the cache has not seen
        for i in range(P, length):
            logits = self.logits(self.hidden(new, cache)[:, -1]) / tau
            xi = None
            if noise is not None:
                xi = noise[:, i]
            new = draw_tokens(logits, top_p, greedy, xi, generator)[:, None]
            x = torch.cat([x, new], 1)
        return x, torch.full((B,), length - P, device=tokens.device)


class KVCache:
    """Preallocated keys and values of all layers, [layers, 2, B, H, max_length, head_dim]; `length` of it is filled.

    `crop` and `batch_select_indices` are those of the caches of `transformers`, which can stand in.
    """

    def __init__(self, model, batch, max_length):
        weight = model.blocks[0].qkv.weight
        device = weight.device
        dtype = weight.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        head_dim = weight.shape[1] // model.n_head
        self.kv = weight.new_zeros(len(model.blocks), 2, batch, model.n_head, max_length, head_dim, dtype=dtype)
        self.length = 0

    def update(self, layer, k, v):
        """Append k, v [B, H, n, head_dim] -> all keys and values of this layer so far."""
        a = self.length
        b = a + k.shape[2]
        assert b <= self.kv.shape[4], f"KV cache holds {self.kv.shape[4]} positions, {b} wanted"
        self.kv[layer, 0, :, :, a:b] = k
        self.kv[layer, 1, :, :, a:b] = v
        return self.kv[layer, 0, :, :, :b], self.kv[layer, 1, :, :, :b]

    def crop(self, n):
        self.length += n  # crop(-3) forgets the last three positions

    def batch_select_indices(self, rows):
        self.kv = self.kv[:, :, rows]


class AR(CausalLM):
    """The student's transformer made causal. AR(vocab_size, length, bos, ...) takes the fields of `ARConfig`."""
    Config = ARConfig
    learned_positions = False                 # RoPE

    def __init__(self, *args, **kw):
        config = self.Config(*args, **kw)
        super().__init__(config)
        self.predict_bos = config.predict_bos
        learned = config.length if self.learned_positions else 0
        self.transformer = Transformer(config.vocab_size, config.vocab_size, config.n_layer, config.n_embd,
                                       config.n_head, config.dropout, causal=True, learned=learned)

    def hidden(self, tokens, cache=None):
        """tokens [B, L] -> [B, L, D]; with a KVCache, the tokens that follow what it holds."""
        return self.transformer(self.transformer.embed(tokens), cache)

    def output_layer(self):
        return self.transformer.head

    def new_cache(self, batch, length):
        return KVCache(self.transformer, batch, length)

    def flops_per_row(self, length):
        """Useful FLOPs of a row of training, forward and backward; see `MDLM.flops_per_row`."""
        return 3 * self.transformer.forward_flops(length, head_share=1.0)

    def extraction_flops(self, length, masked):
        """FLOPs of a row as a teacher reads it: one pass, the output layer where tokens are masked."""
        return self.transformer.forward_flops(length, head_share=masked)


# ---------------------------------------------------------------------------------------------------------------------
# teachers from elsewhere

GPT2_URL = "https://huggingface.co/openai-community/{}/resolve/main/model.safetensors"
GPT2_SIZES = {                                                # n_layer, n_embd, n_head
    "gpt2": (12, 768, 12),
    "gpt2-medium": (24, 1024, 16),
    "gpt2-large": (36, 1280, 20),
    "gpt2-xl": (48, 1600, 25),
}
GPT2_NAMES = {                                                # published layer -> ours
    "wte": "embed", "wpe": "positions", "ln_f": "norm", "ln_1": "norm1", "ln_2": "norm2",
    "attn.c_attn": "qkv", "attn.c_proj": "attn_out", "mlp.c_fc": "fc", "mlp.c_proj": "proj",
}
GPT2_SETTINGS = dict(model_type="gpt2", activation_function="gelu_new", layer_norm_epsilon=1e-5, n_inner=None,
                     scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, tie_word_embeddings=True)


class GPT2(AR):
    """GPT-2 of any size, from the published files: `GPT2.from_pretrained("gpt2-large")`. model(tokens) -> logits."""
    learned_positions = True
    pretrained = True

    def forward(self, tokens):
        """tokens [B, L] -> logits [B, L, V]; row i is about token i + 1."""
        return self.logits(self.hidden(tokens))

    def as_start(self):
        """What a student that begins as this model has of its config."""
        c = self.config
        return dict(n_layer=c.n_layer, n_embd=c.n_embd, n_head=c.n_head, positions=c.length)

    def input_embedding(self):
        return self.transformer.embed

    @classmethod
    def from_pretrained(cls, name_or_dir):
        """A name of GPT2_SIZES, downloaded once (to $GUMBEL_CACHE, default ~/.cache/gumbel), or a folder that holds
        model.safetensors or pytorch_model.bin (+ config.json). In evaluation mode, float32. Raises OSError, ValueError.
        """
        from extra.published import read_weights
        if name_or_dir not in GPT2_SIZES or os.path.isdir(name_or_dir):
            folder = name_or_dir
            hint = ""
        else:
            folder = download_gpt2(name_or_dir)
            hint = f" (to download it again, remove {folder})"
        try:
            return cls.from_state(*read_weights(folder))
        except (OSError, ValueError) as e:
            raise ValueError(f"{name_or_dir} is no GPT-2: {e}{hint}") from None

    @classmethod
    def from_state(cls, state, config):
        """Published names and settings -> our model. Names with and without `transformer.`, buffers left out; the
        published layers are Conv1D, stored [in, out].
        """
        for key, value in GPT2_SETTINGS.items():
            if config.get(key, value) != value:
                raise ValueError(f"its config.json has {key} = {config[key]!r}, GPT-2 has {value!r}")
        ours = {}
        for key, w in state.items():
            key = key.removeprefix("transformer.")
            is_buffer = key.endswith((".attn.bias", ".attn.masked_bias"))
            if is_buffer or key == "lm_head.weight":          # the head is the embedding
                continue
            block, layer, kind = re.fullmatch(r"(?:h\.(\d+)\.)?(.*?)\.?([^.]*)", key).groups()
            if layer not in GPT2_NAMES:
                raise ValueError(f"unknown weight {key}")
            w = w.float()
            if "c_" in layer and kind == "weight":  # a Conv1D
                w = w.t()
            prefix = f"blocks.{block}." if block else ""
            ours[f"transformer.{prefix}{GPT2_NAMES[layer]}.{kind}"] = w
        try:
            return cls._from_ours(ours, config)
        except (LookupError, TypeError, RuntimeError, ValueError) as e:
            raise ValueError(f"its weights are not GPT-2's: {str(e).splitlines()[-1].strip()}") from None

    @classmethod
    def _from_ours(cls, state, config):
        from extra.published import check_sizes
        embedding = state["transformer.embed.weight"]
        bos = config.get("bos_token_id")  # 0 is an id, too
        if len(embedding) == 50304 and bos in (None, 50256):  # nanoGPT's, llm.c's: rows to a multiple of 64
            embedding = embedding[:50257]
            config = config | {"vocab_size": 50257}           # either number may stand there
        V, D = embedding.shape
        if bos is None:
            bos = V - 1
        length = len(state["transformer.positions.weight"])
        # (a gap between these is what load_state_dict refuses)
        n_layer = len({key.split(".")[2] for key in state if key.startswith("transformer.blocks.")})
        check_sizes(config, dict(vocab_size=V, n_embd=D, n_positions=length, n_layer=n_layer))
        n_head = config.get("n_head") or max(1, D // 64)
        with torch.device("meta"):  # no memory, no initial draws: the weights replace it all
            model = cls(V, length, bos, n_layer, D, n_head, dropout=0.0)
        tied = {"transformer.embed.weight": embedding, "transformer.head.weight": embedding}
        model.load_state_dict(state | tied, assign=True)
        model.transformer.head.weight = model.transformer.embed.weight
        return model.eval().requires_grad_(False)


def gpt2_folder(name):
    """Where a published GPT-2 lies, once it is fetched."""
    cache = os.environ.get("GUMBEL_CACHE") or os.path.expanduser("~/.cache/gumbel")
    return os.path.join(cache, name)


def download_gpt2(name):
    """The folder of a published GPT-2, fetched if it is not there yet. Raises OSError."""
    folder = gpt2_folder(name)
    path = os.path.join(folder, "model.safetensors")
    if os.path.exists(path):
        return folder
    from data.files import writing
    from extra.published import server_sha256
    url = GPT2_URL.format(name)
    try:
        with writing(folder, wait=True):                      # one process fetches it, the others wait
            if not os.path.exists(path):
                torch.hub.download_url_to_file(url, path, hash_prefix=server_sha256(url))
    except (OSError, RuntimeError) as e:                      # the latter: it has another hash than the server's
        raise OSError(f"could not download {name} ({e}): go online once, or give a folder that holds its "
                      "model.safetensors or pytorch_model.bin") from None
    return folder


def model_hash(model):
    """SHA-256 of an AR model's weights as float32, first 16 hex digits: names the backbone of Medusa heads, and the
    teacher of a cache.
    """
    h = hashlib.sha256()
    for name, w in sorted(model.state_dict().items()):
        h.update(f"{name} {tuple(w.shape)} ".encode())
        h.update(w.detach().float().cpu().contiguous().numpy())
    return h.hexdigest()[:16]


def load_published(src, n_heads=None, length=None, bos=None):
    """The authors' AR model as our `AR` with equal outputs. `src`: a path or a state dict; a [MASK] row is dropped."""
    from extra.published import fold_published
    state, sizes, _, settings = fold_published(src, n_heads)
    if bos is None:
        bos = sizes["vocab_size"] - 1                         # their last id before [MASK]
    embedding = state["transformer.embed.weight"]
    state["transformer.embed.weight"] = embedding[:sizes["vocab_size"]]
    model = AR(length=length or settings.get("model_length", 1024), bos=bos, **sizes)
    model.load_state_dict(state)
    return model.eval()
