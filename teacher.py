"""The autoregressive teacher, and stage 1: extracting the noise behind a text (Section 4.1).

Row i of an AR model's output is the distribution of token i + 1, so the noise of position i (the noise that decided the
token there) comes from the teacher's logits at position i - 1.

Shapes: B batch, L length, V vocabulary, D width, N rows.
"""
import hashlib
import json
import math
import os
import re
import shutil
from contextlib import nullcontext
from functools import partial

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from data.prepare import BadInput, optional, write_json
from gumbel import CHUNK, posterior_gumbel, sample_gumbel
from mdlm import KVCache, Transformer, check_draws, draw_tokens, fold_published, read_weights, row_losses

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


class LogitsTable:
    """The teacher's logits on every row of a small dataset, computed once: [rows, L - 1, V] float32 on the device.

    In place of the teacher in `MDLM.loss`: `table.at(table.load(rows))` says which rows the batch holds. In float32.
    """

    @torch.no_grad()
    def __init__(self, teacher, data, batch=1024):
        rows = torch.from_numpy(data.rows(range(len(data)))).to(teacher.device)
        self.table = torch.cat([teacher.logits(teacher.hidden(x)) for x in rows[:, :-1].split(batch)])

    def load(self, rows):
        return torch.as_tensor(rows)

    def at(self, rows):
        self.rows = rows.to(self.table.device)
        return self

    def posterior_logits(self, tokens, masked):
        logits = self.table[self.rows][masked[:, 1:]]
        return lambda a, b: logits[a:b]


class TeacherCache:
    """What the teacher said about every position of the training rows, on disk: from then on noise needs no teacher.

    Per position the ids of its k most probable tokens, their -log p and that of the token which is there, in uint16 (of
    1/2048 nat): 4 k + 2 bytes, 307 GB for the 9.04 G tokens of OpenWebText at k = 8. These k + 1 enter the posterior
    T_j = E_j + p_j E_0 as they are; the others share the rest of the mass by their frequency in the text, s_j. Given
    the text, the noise's law is then off by

        TV = d / (1 + d),   d = sum over the others of (s_j - p_j)^+   (< the rest of the mass),

    beside the rounding (under 3e-4): with E_0 = T_w / p_w known both laws are shifted exponentials, of one density
    where both are positive. Much of it is invisible to softmax(noise): p_j E_0 only matters to the few runners for
    whom E_j is as small. (An even share would be seen: it raises the smallest E_j of all, which are about 1 / V.)

    In place of the teacher in `MDLM.loss`, as `LogitsTable`. Written once, in chunks of rows that any process of any
    run may fill in (`fill`); in a folder beside the shards that names teacher, row length and k. Raises BadInput.
    """
    CHUNK, SCALE = 64, 2048                                # rows; values of a nat

    def __init__(self, teacher, data, k, master=True, dtype="float32"):
        self.k, sha256 = min(k, teacher.vocab_size), model_hash(teacher)
        self.folder = os.path.join(data.path, f"teacher-{sha256}-{dtype}-{data.length}-k{self.k}")
        shape, n = (len(data), data.length - 1, 2 * self.k + 1), math.ceil(len(data) / self.CHUNK)
        size = 2 * math.prod(shape)
        meta = dict(teacher=sha256, dtype=dtype, length=data.length, k=self.k, rows=len(data), shards=data.hashes())
        meta_file, frequency, values, done = [os.path.join(self.folder, f) for f in (
            "meta.json", "frequency.npy", "topk.bin", "done.bin")]
        try:
            if master and not os.path.exists(meta_file):
                if (free := shutil.disk_usage(data.path).free) < size:
                    raise BadInput(f"a cache of the teacher's {self.k} best on {data.path} takes {size / 1e9:.1f} GB, "
                                   f"and {free / 1e9:.1f} are free: choose a smaller --teacher_cache, or leave it out")
                os.makedirs(self.folder, exist_ok=True)
                np.save(frequency, data.frequency())
                for path, length in ((values, size), (done, n)):
                    with open(path, "ab") as f:            # (never emptied: another run may be at it)
                        f.truncate(length)
                write_json(f"{meta_file}.{os.getpid()}", meta)
                os.replace(f"{meta_file}.{os.getpid()}", meta_file)
        except OSError as e:
            raise BadInput(f"{self.folder} cannot be written ({e.strerror}): make {data.path} writable, or leave "
                           "--teacher_cache out") from None
        try:
            with open(meta_file) as f:
                there = json.load(f)
            self.frequency = torch.from_numpy(np.load(frequency)).to(teacher.device)               # (V)
        except (OSError, ValueError) as e:
            raise BadInput(f"{self.folder} cannot be read ({e}): remove {self.folder}, it is written again") from None
        if there != meta or [os.path.getsize(f) for f in (values, done) if os.path.exists(f)] != [size, n]:
            raise BadInput(f"{self.folder} is truncated, or of other data than {data.path} holds now: remove it, it is "
                           "written again")
        self.values = np.memmap(values, "<u2", "r", shape=shape)
        self.done = np.memmap(done, np.uint8, "r")

    @torch.no_grad()
    def fill(self, teacher, data, rank=0, size=1):
        """The teacher's pass over the rows whose chunk is not done: this process's share of them, then the others'."""
        n = len(self.done)
        chunks = [c for c in dict.fromkeys((*range(rank, n, size), *range(n))) if not self.done[c]]
        for c in tqdm(chunks, desc="teacher's pass", unit="chunk", disable=rank > 0 or not chunks):
            if self.done[c]:                               # by another process, meanwhile
                continue
            rows = range(len(data))[c * self.CHUNK:(c + 1) * self.CHUNK]
            tokens = torch.from_numpy(data.rows(rows)).to(teacher.device)
            h = torch.cat([teacher.hidden(some[:, :-1]) for some in tokens.split(8)]).flatten(0, 1)
            part, new = max(1, CHUNK // teacher.vocab_size), []
            for h, x in zip(h.split(part), tokens[:, 1:].reshape(-1, 1).split(part)):
                logp = teacher.logits(h).log_softmax(-1)
                top, ids = logp.topk(self.k)
                own = logp.gather(1, x)
                if not own.isfinite().all():
                    raise BadInput(f"the teacher gives a token in rows {rows.start} to {rows.stop} of {data.path} "
                                   "probability 0, or nan: it does not fit this text")
                nats = (torch.cat([top, own], 1) * -self.SCALE).round_().clamp_(0, 65535)
                new.append(torch.cat([ids, nats.long()], 1).cpu().numpy().astype("<u2"))
            # written, not mapped: a full disk is an error, not a SIGBUS; values first: what is marked done is on disk
            try:
                for name, at, what in (("topk.bin", rows.start * self.values[0].nbytes, np.concatenate(new)),
                                       ("done.bin", c, b"\1")):
                    with open(os.path.join(self.folder, name), "r+b") as f:
                        f.seek(at)
                        f.write(what)
                        f.flush()
                        os.fsync(f.fileno())
            except OSError as e:
                raise BadInput(f"{self.folder} cannot be written ({e.strerror}): make room, and repeat the command to "
                               "continue") from None

    def load(self, rows):
        return torch.from_numpy(self.values[rows].view(np.int16))

    def at(self, values):
        self.now = values
        return self

    def posterior_logits(self, tokens, masked):
        v = self.now.to(tokens.device, non_blocking=True)[masked[:, 1:]].int() & 65535             # (N, 2 k + 1)
        ids, p = v[:, :self.k].long(), (v[:, self.k:].float() / -self.SCALE).exp_()
        return lambda a, b: (p[a:b, :-1], ids[a:b], p[a:b, -1:], self.frequency)


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
    state, sizes, _, settings = fold_published(src, n_heads)
    length = length or settings.get("model_length", 1024)
    state["transformer.embed.weight"] = state["transformer.embed.weight"][:sizes["vocab_size"]]
    model = AR(length=length, bos=bos, **sizes)
    model.load_state_dict(state)
    return model.eval()
