"""Any causal LM of Hugging Face as a teacher, backbone, verifier or judge: `--teacher=hf:NAME`. And as a student's
network, from which every place sees all others: `--init_from=hf:NAME`.

The model is asked, and no architecture is named. Its body (`base_model`) turns tokens into states; what it makes of
states (output layer, soft cap, scale) is its own `forward`, behind a body that returns the states it is given. A model
that cannot be taken apart so is refused when it is loaded.
"""
import copy
import glob
import inspect
import os
from functools import partial

import torch
import torch.nn as nn

from data.cli import BadInput, optional
from extra.published import read_safetensors
from teacher import CausalConfig, CausalLM


def load_lm(name, dtype):
    """The model that transformers makes of a name, a folder, or a .gguf file. dtype: of its weights; "auto": that of
    its files, float32 where they have several. Raises ValueError.
    """
    transformers = optional("transformers", f"hf:{name}")
    version = transformers.__version__
    if int(version.split(".")[0]) < 5:
        raise ValueError(f"hf:{name} needs transformers 5 or later, this is {version}: pip install -U transformers")
    folder = name
    known = {}
    try:
        if name.endswith(".gguf"):
            folder, known["gguf_file"] = os.path.split(name)
            dtype = torch.float32                             # what its numbers stand for
        elif dtype == "auto":
            known["config"] = transformers.AutoConfig.from_pretrained(name)
            known["config"].dtype = None                      # what it says need not be what the files hold
        load = partial(transformers.AutoModelForCausalLM.from_pretrained, folder or ".", output_loading_info=True)
        lm, found = load(dtype=dtype, **known)
        if dtype == "auto" and not has_one_dtype(transformers.utils.cached_file(name, "config.json")):
            lm, found = load(dtype=torch.float32)
    except (OSError, ValueError, ImportError) as e:
        why = (str(e) or type(e).__name__).splitlines()[0]
        raise ValueError(f"transformers cannot load hf:{name}: {why}") from None
    if found["missing_keys"]:                                 # transformers would go on with random ones
        raise ValueError(f"hf:{name} is not complete: its files do not hold {min(found['missing_keys'])}")
    return lm.eval().requires_grad_(False)


def has_one_dtype(config_file):
    """Whether all weights in the .safetensors files beside a config.json have one type."""
    files = glob.glob(os.path.join(glob.escape(os.path.dirname(config_file)), "*.safetensors"))
    weights = [w for path in files for w in read_safetensors(path).values()]
    return len({w.dtype for w in weights if w.is_floating_point()}) == 1


def given(output_class, input_ids, **kw):
    """Stands in a model where its body was: what it gets in place of tokens are the states."""
    return output_class(last_hidden_state=input_ids)


def head_of(lm, output_class):
    """What a model makes of its body's states, which come in such an output: a function, see `head_logits`. The same
    layers, not copies.
    """
    head = copy.copy(lm)
    object.__setattr__(head, lm.base_model_prefix, partial(given, output_class))
    return head


def head_logits(head, h):
    """h [..., D] -> float32 [..., V]."""
    logits = head(h.reshape(1, -1, h.shape[-1])).logits  # (1, N, V)
    return logits.float().view(*h.shape[:-1], logits.shape[-1])


def exact_logits(head, h):
    """As `head_logits`, in float32 under autocast too: see `gumbel.to_logits`."""
    with torch.autocast(h.device.type, enabled=False):
        return head_logits(head, h.float())


def with_its_caps(lm):
    """Where attention scores have a soft cap: kernels of early versions of transformers 5 leave it out. Returns lm."""
    if getattr(lm.config.get_text_config(), "attn_logit_softcapping", None):
        lm.set_attn_implementation("eager")
    return lm


class HF(CausalLM):
    """A causal LM of Hugging Face: a name, a folder, or a .gguf file, through `transformers` (optional).

    bos: its tokenizer's; None takes what its config says. dtype: of its body's matrices, "auto" (its files') or
    float32; embeddings, norms and output layer are float32 in any case, as in our own models whose body is in bf16.
    Raises ValueError where it cannot be loaded, or does not have the parts that are asked here.
    """
    any_bos = True
    pretrained = True

    def __init__(self, name, bos=None, dtype=None):
        if dtype is None:
            # a GPU runs the body in bf16, which need not be held in more; a CPU is faster, and more exact, in float32
            dtype = "auto" if torch.cuda.is_available() else torch.float32
        lm = load_lm(name, dtype)
        c = lm.config.get_text_config()
        length = getattr(c, "max_position_embeddings", None) or 1 << 30  # none named: no bound of its own
        rope = getattr(c, "rope_parameters", None) or {}
        if rope.get("rope_type") == "longrope":               # a longer row would turn all its positions otherwise, and
            length = rope["original_max_position_embeddings"]  # so would not be what its beginning was continued to
        if bos is None:
            bos = getattr(c, "bos_token_id", None)
        if bos is None:
            bos = getattr(c, "eos_token_id", None)
        super().__init__(CausalConfig(c.vocab_size, length, bos))
        self.source = name
        self.take_apart(lm)

    def take_apart(self, lm):
        """Hold a model's body and head. ValueError where they, or its cache, do not give the logits of the whole."""
        self.lm = with_its_caps(lm)
        self.narrow = any(p.dtype != torch.float32 for p in lm.parameters())
        in_body = {id(p) for layer in self.matrices() for p in layer.parameters(recurse=False)}
        for p in lm.parameters():
            if id(p) not in in_body:                          # a tied head stays tied: one tensor
                p.data = p.data.float()
        names = inspect.signature(lm.base_model.forward).parameters
        self.cache_name = "cache" if "cache" in names else "past_key_values"  # as early 5.x called it
        x = torch.arange(6)[None] % self.vocab_size
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=self.narrow):
            want = lm(x).logits
            try:
                why = "does not compute its logits from the last states of its body (base_model) alone"
                output = lm.base_model(x)
                # no part of this module, which would hold its layers twice
                object.__setattr__(self, "head", head_of(lm, type(output)))
                error = distance(self.logits(output.last_hidden_state, exact=False), want)
                if error < 1e-3:
                    why = "gives other logits through a cache that is cut back than in one pass"
                    error = distance(self.continued(x), want)
                    if self.narrow:                           # another order of bf16 sums
                        error /= 100
            except (RuntimeError, LookupError, AttributeError, TypeError, ValueError):
                error = float("inf")
        if error > 1e-3:
            raise ValueError(f"hf:{self.source} {why}: use another teacher")

    def continued(self, x):
        """The logits of a row x [1, L] of which the cache holds more rows and tokens at first -> [1, L, V]."""
        cache = self.new_cache(2, x.shape[1])
        before = self.hidden(x[:, :-1].expand(2, -1), cache)[1:, :2]
        cache.crop(2 - (x.shape[1] - 1))
        cache.batch_select_indices(torch.tensor([1]))
        return self.logits(torch.cat([before, self.hidden(x[:, 2:], cache)], 1), exact=False)

    def hidden(self, tokens, cache=None):
        """tokens [B, L] -> [B, L, D]; with a cache, the tokens that follow what it holds."""
        if self.narrow and not torch.is_autocast_enabled(tokens.device.type):
            # float32 is wanted after all. Read again: a model has constants, too, that were rounded
            self.lm = self.head = None
            self.take_apart(load_lm(self.source, torch.float32))
            self.lm.to(tokens.device)
        output = self.lm.base_model(tokens, use_cache=cache is not None, **{self.cache_name: cache})
        return output.last_hidden_state

    def logits(self, h, exact=True):
        """h [..., D] -> float32 [..., V]; `exact`: see `gumbel.to_logits`."""
        if exact:
            return exact_logits(self.head, h)
        return head_logits(self.head, h)

    def output_layer(self):
        return self.lm.get_output_embeddings()

    def new_cache(self, batch, length):
        """A cache of all positions: one made from the model's config forgets those outside a sliding window, and cannot
        be cut back. The window is in the model's attention mask as well.
        """
        from transformers import DynamicCache
        return DynamicCache()

    def as_start(self):
        """What a student that begins as this model has of its config."""
        c = self.lm.config.get_text_config()
        if c is not self.lm.config:
            raise BadInput(f"--init_from=hf:{self.source} is more than a language model: use a model of text alone")
        return dict(n_layer=c.num_hidden_layers, n_embd=c.hidden_size, n_head=c.num_attention_heads, dropout=0.0,
                    positions=min(self.length, 1 << 20), body=self.lm.config.to_dict())

    def input_embedding(self):
        return self.lm.get_input_embeddings()

    def networks(self):
        return [self.lm.base_model]

    def matrices(self):
        """The layers of the body that hold a matrix, but for embeddings."""
        layers = [m for m in self.lm.base_model.modules() if not isinstance(m, nn.Embedding)]
        return [m for m in layers if any(p.ndim > 1 for p in m.parameters(recurse=False))]

    def extraction_flops(self, length, masked):
        """FLOPs of a row's pass, without those of attention."""
        return 2 * length * sum(p.numel() for p in self.parameters())


class Body(nn.Module):
    """A Hugging Face network in the place of a student's `mdlm.Transformer`: every place sees all others, its windows
    left out. The embedding has one row more, for [MASK], and the output layer is not tied to it. What the model does
    besides (scales, soft caps) stays.

    config: the model's, a dict. The weights are random until a checkpoint's, or those of `--init_from`, are loaded.
    ValueError where its attention is causal whatever the mask.
    """
    causal = False                                            # True: as it was trained

    def __init__(self, config):
        super().__init__()
        transformers = optional("transformers", "a student that began as a Hugging Face model")
        lm = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config),
                                                           dtype=torch.float32)
        with_its_caps(lm)
        output = lm.base_model(torch.zeros(1, 2, dtype=torch.long))
        embedding = lm.get_input_embeddings()
        layer = lm.get_output_embeddings()
        layer.weight = nn.Parameter(layer.weight.detach().clone())
        rows = embedding.weight.detach()
        embedding.weight = nn.Parameter(torch.cat([rows, rows.mean(0, keepdim=True)]))
        embedding.num_embeddings += 1
        self.lm = lm
        object.__setattr__(self, "head", head_of(lm, type(output)))     # no part of this module, as in `HF`
        self.check_sight(config["model_type"])

    @torch.no_grad()
    def check_sight(self, name):
        """ValueError unless position 0 sees the last one: attention may be causal by itself, or know no such mask."""
        self.eval()
        rows = torch.arange(8).view(2, 4) % (self.embed.num_embeddings - 1)
        rows[1, :3] = rows[0, :3]
        try:
            states = self(self.embed(rows))
            sees = not torch.equal(states[0, 0], states[1, 0])
        except (RuntimeError, LookupError, AttributeError, TypeError, ValueError):
            sees = False
        self.train()
        if not sees:
            raise ValueError(f"a {name} cannot be made to see the places to come, as a masked student must")

    @property
    def embed(self):
        """Tokens -> what the body reads."""
        return self.lm.get_input_embeddings()

    @property
    def blocks(self):
        return self.lm.base_model

    def forward(self, h, wanted=None):
        """Input embeddings h [B, L, D] -> hidden states [B, L, D], or [N, D]: those at the places `wanted` [B, L]."""
        L = h.shape[1]
        mask = None
        if not self.causal:
            mask = h.new_zeros(1, 1, L, L)                    # is added to the scores: nothing is hidden
        position_ids = torch.arange(L, device=h.device)[None]
        output = self.lm.base_model(inputs_embeds=h, attention_mask=mask, position_ids=position_ids, use_cache=False)
        h = output.last_hidden_state
        if wanted is None:
            return h
        return h[wanted]

    def logits(self, h, exact):
        """h [N, D] -> float32 [N, V]; `exact`: see `gumbel.to_logits`."""
        if exact:
            return exact_logits(self.head, h)
        return head_logits(self.head, h)

    def forward_flops(self, length, head_share, passes=1):
        """As `mdlm.Transformer.forward_flops`, without those of attention."""
        layer = self.lm.get_output_embeddings().weight.numel()
        embeddings = self.embed.weight.numel()
        body = sum(p.numel() for p in self.parameters()) - layer - embeddings
        return 2 * length * (passes * body + head_share * layer)


def distance(a, b):
    """The mean difference of logits, in standard deviations of b."""
    return ((a.float() - b.float()).abs().mean() / b.float().std()).item()
