"""Medusa (Cai et al. 2024): heads on a frozen AR backbone that draft several tokens at once, with or without noise.

From the hidden state h_j of position j, head 0 (the backbone's own output layer) draws token j + 1; head k = 1 .. K
guesses token j + 1 + k, without knowing what head 0 drew. With Gumbel Distillation (Section 5.2) head k also reads the
noise of positions j + 1 .. j + 1 + k: what the backbone would draw is then a function of what the head sees.

    a_k = h_j [+ c_jk]        logits_k = W_k (a_k + SiLU(U_k a_k + b_k))
    c_jk = output k of a small causal transformer over e_{j+1} .. e_{j+1+K},   e_i = W softmax(noise^i)

Noise of the past is not read: given the text, it is independent of what comes next. The backbone is teacher, verifier
and feature extractor at once: one call of it verifies a draft and yields the hidden state for the next one.

Shapes: B batch, b its rows that are not complete, L row length, T sample length, V vocabulary, D width of the backbone,
K heads.
"""
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from gumbel import GumbelEmbedding, check_draws, draw_tokens, nucleus, sample_gumbel, to_logits
from mdlm import Block, Model, rope_tables, row_losses, zero

ACCEPT = ("typical", "exact", "greedy")


# ---------------------------------------------------------------------------------------------------------------------
# the heads

@dataclass
class MedusaConfig:
    """What describes Medusa heads. A checkpoint holds it as a dict."""
    vocab_size: int
    length: int                               # tokens of a training row, BOS included
    bos: int
    n_embd: int                               # the backbone's width
    heads: int = 3                            # K, beside the backbone's own
    n_layer: int = 1                          # layers of the transformer that reads the noise
    dropout: float = 0.0                      # in it
    noise: str | None = None                  # the kind of noise that the heads read, of gumbel.KINDS; None: none
    predict_bos: bool = True                  # False: BOS never occurs within a row, and is never predicted
    bias: bool = False                        # whether the backbone's output layer has one
    backbone: str | None = None               # the name under which the backbone was loaded
    sha256: str | None = None                 # and its `teacher.model_hash`


class Head(nn.Module):
    """One residual layer, which starts as the identity, and an output layer, which starts as the backbone's."""

    def __init__(self, vocab_size, n_embd, bias):
        super().__init__()
        self.fc = nn.Linear(n_embd, n_embd)
        self.out = nn.Linear(n_embd, vocab_size, bias=bias)
        zero(self.fc)

    def forward(self, a):
        return to_logits(self.out, a + F.silu(self.fc(a)), exact=not self.training)


class Accumulator(nn.Module):
    """The small causal transformer over the noise embeddings of K + 1 positions. Its output starts at zero, so that
    the heads start as those without noise.
    """
    MOST_NUMBERS = 2**30

    def __init__(self, n_embd, n_layer, dropout):
        super().__init__()
        self.n_head = max(1, n_embd // 64)  # attention heads of 64 channels where the width allows;
        while n_embd % (2 * self.n_head):  # RoPE needs an even number of channels in each
            self.n_head -= 1
        self.blocks = nn.ModuleList(Block(n_embd, self.n_head, dropout) for _ in range(n_layer))
        self.norm = nn.LayerNorm(n_embd)
        self.out = nn.Linear(n_embd, n_embd, bias=False)
        zero(self.out)

    def forward(self, e):
        """e [N, K + 1, D] -> c [N, K + 1, D]; place k has seen e_0 .. e_k."""
        # in parts: FlashAttention's backward pads each of the N rows to 128 places, and counts all numbers in 32 bits
        rows = max(1, self.MOST_NUMBERS // (128 * e.shape[2]))
        return torch.cat([self.read(part) for part in e.split(rows)])

    def read(self, e):
        places = torch.arange(e.shape[1], device=e.device)
        rope = rope_tables(places, e.shape[2] // self.n_head)
        for block in self.blocks:
            e = block(e, rope, mask=None, causal=True)
        return self.out(self.norm(e))


class Medusa(Model):
    """K heads for a frozen backbone, which is no part of the module: `attach` it before use.

    Medusa(vocab_size, length, bos, n_embd, ...) takes the fields of `MedusaConfig`.
    """
    Config = MedusaConfig
    drafts = True
    loss_name = "nll_heads"
    loss_reads = ("generator",)
    generate_reads = Model.generate_reads + ("accept", "epsilon", "delta", "cached")

    def __init__(self, *args, **kw):
        super().__init__(self.Config(*args, **kw))
        config = self.config
        if config.heads < 1 or config.length < config.heads + 2:
            raise ValueError(f"rows of {config.length} tokens, BOS included, are too short for {config.heads} heads")
        self.heads = nn.ModuleList(Head(config.vocab_size, config.n_embd, config.bias) for _ in range(config.heads))
        self.accumulator = None
        if config.noise:
            self.noise_embed = GumbelEmbedding(config.vocab_size, config.n_embd, config.noise)
            self.accumulator = Accumulator(config.n_embd, config.n_layer, config.dropout)

    def attach(self, backbone, start=False):
        """Use this AR model (a `CausalLM`); `start`: output layers start as its own. ValueError if it does not fit."""
        layer = backbone.output_layer()
        V, D = layer.weight.shape
        if (V, D) != (self.vocab_size, self.config.n_embd):
            raise ValueError(f"these heads are for a backbone of {self.vocab_size} ids and width "
                             f"{self.config.n_embd}, this one has {V} and {D}")
        if start:
            for head in self.heads:
                head.out.load_state_dict(layer.state_dict())
        object.__setattr__(self, "backbone", backbone)  # neither trained nor saved with the heads
        return self

    # what the heads read

    def windows(self, e):
        """Noise embeddings e [B, n, D] of positions 1 .. n -> for each j = 0 .. n - 1 those of j + 1 .. j + 1 + K,
        [B, n, K + 1, D], zero beyond n.
        """
        K = len(self.heads)
        return F.pad(e, (0, 0, 0, K)).unfold(1, K + 1, 1).transpose(2, 3)

    def condition(self, h, e):
        """a [..., K, D] of hidden states h [..., D] and noise embeddings e [..., K + 1, D] or None."""
        K = len(self.heads)
        a = h[..., None, :].expand(*h.shape[:-1], K, h.shape[-1])
        if e is None:
            return a
        c = self.accumulator(e.flatten(0, -3)).view(e.shape)
        return a + c[..., 1:, :]

    def logits(self, k, a):
        """Head k = 1 .. K: a [..., D] -> float32 logits [..., V]."""
        logits = self.heads[k - 1](a)
        if not self.config.predict_bos:
            logits[..., self.bos] = -torch.inf
        return logits

    def log_probs(self, tokens, noise=None):
        """tokens [B, L], noise [B, >= L, V] -> [B, L, K + 1, V]: at j, k head k's distribution of token j + 1 + k.

        Noise that is not given, beyond its end, enters as a zero embedding, as it does beyond the row in training.
        """
        if self.noise_embed is None and noise is not None:
            raise ValueError("these heads were built without noise")
        if self.noise_embed is not None and noise is None:
            raise ValueError("these heads were built with noise: give it")
        L = tokens.shape[1]
        h = self.backbone.hidden(tokens)
        e = None
        if noise is not None:
            e = self.noise_embed(noise[:, 1:])
            e = F.pad(e, (0, 0, 0, max(0, L - e.shape[1])))
            e = self.windows(e)[:, :L]
        a = self.condition(h, e)
        logits = [self.backbone.logits(h)]
        for k in range(1, len(self.heads) + 1):
            logits.append(self.logits(k, a[:, :, k - 1]))
        return torch.stack(logits, 2).log_softmax(-1)

    # training

    def loss(self, tokens, noise=None, generator=None):
        """Mean over the heads of their cross-entropies, in nats: head k's, at offset k + 1, averaged over its L - 1 - k
        positions of each row. Returns (loss, {"nll_head1": ..}).

        tokens [B, L]. Heads with noise draw it from its posterior under the backbone, unless given as noise [B, L, V].
        """
        L = tokens.shape[1]
        with torch.no_grad():
            h = self.backbone.hidden(tokens[:, :-1])  # (B, L - 1, D)
        e = None
        if self.noise_embed is not None:
            e = self.windows(self.embed_noise(tokens, h, noise, generator))  # (B, L - 1, K + 1, D)
        a = self.condition(h, e)  # (B, L - 1, K, D)
        losses = {}
        for k in range(1, len(self.heads) + 1):
            n = L - 1 - k  # places from which token j + 1 + k lies in the row
            a_k = a[:, :n, k - 1].flatten(0, 1)
            x = tokens[:, 1 + k:].flatten()
            losses[f"nll_head{k}"] = row_losses(partial(self.logits, k), a_k, x, self.vocab_size).mean()
        loss = sum(losses.values()) / len(losses)
        return loss, {name: v.item() for name, v in losses.items()}

    forward = loss                                            # what DDP calls

    def embed_noise(self, tokens, h, noise, generator):
        """Embeddings of the noise of positions 1 .. L - 1 [B, L - 1, D]: of `noise`, or of draws from its posterior."""
        if noise is not None:
            return self.noise_embed(noise[:, 1:])
        rows = h.flatten(0, 1)
        e = self.noise_embed.from_posterior(self.backbone.logits_of_rows(rows), tokens[:, 1:].flatten(), generator)
        return e.view(h.shape)

    # decoding

    def draft(self, h, noise, tau):
        """The heads' proposals after hidden states h [b, D], noise [b, K + 1, V] of the next positions -> [b, K]."""
        e = None
        if self.noise_embed is not None:
            e = self.noise_embed(noise, tau)
        a = self.condition(h, e)
        proposals = [self.logits(k, a[:, k - 1]).argmax(-1) for k in range(1, len(self.heads) + 1)]
        return torch.stack(proposals, 1)

    def generate(self, tokens, length=None, greedy=False, accept="typical", **kw):
        """As `decode`, without its statistics -> (tokens [B, T], backbone calls [B]); `greedy`: accept="greedy"."""
        if greedy:
            accept = "greedy"
        x, nfe, _, _ = self.decode(tokens, length, accept=accept, **kw)
        return x, nfe

    @torch.no_grad()
    def decode(self, tokens, length=None, tau=1.0, top_p=1.0, accept="typical", epsilon=0.09, delta=0.3, noise=None,
               cached=True, generator=None):
        """Continue tokens [B, P] (BOS first) to `length` -> (tokens [B, T], nfe [B], verified [B, K], accepted [B, K]).

        Head 0 draws argmax(logits / tau + noise) (after the nucleus `top_p`), the others propose their argmax, one
        backbone call verifies them. A candidate is accepted if all before it were and
            typical   it is not unlikely under the backbone's distribution there: see `typical`
            exact     it is what the backbone draws there, with the same noise: the text is then what the backbone alone
                      would have written
            greedy    it is the backbone's argmax; head 0 takes its argmax too. There is no noise then: heads with noise
                      read noise of zeros (a flat softmax), an input that they were not trained on
        nfe counts backbone calls, that for the prompt included. verified, accepted: how often head k's candidate was
        looked at and taken, in drafts that end within the sample. `noise` [B, T, V]: drawn once per position unless
        given. Rows go at their own pace: the cache is cut back to the slowest row, the others recompute from there.
        """
        B, P = tokens.shape
        T = length or self.length
        if accept not in ACCEPT:
            raise ValueError(f"unknown accept {accept!r}: one of {', '.join(ACCEPT)}")
        check_draws(tau, top_p)
        if not 1 <= P <= T <= self.backbone.length:
            raise ValueError(f"the prompt has {P} tokens, the sample {T}, the backbone's rows {self.backbone.length}")
        state = Decoding(self, tokens, T, tau, top_p, accept, epsilon, delta, noise, cached, generator)
        while len(state.rows):
            state.draft()
            state.drop_complete_rows()
            if len(state.rows):
                state.verify()
        return state.x[:, :T], state.nfe, state.verified, state.accepted

    # what commands ask

    def networks(self):
        """The backbone's, and what draws and reads the noise."""
        networks = self.backbone.networks()
        if self.accumulator is not None:
            networks += [self.noise_embed, self.accumulator]
        return networks

    def matrices(self):
        return self.backbone.matrices()

    def flops_per_row(self, length):
        """Useful FLOPs of a row of training; the noise, and K + 1 places of the accumulator, at every position."""
        heads = sum(p.numel() for p in self.heads.parameters())
        total = 6 * length * heads
        if self.noise_embed is not None:
            accumulator = sum(p.numel() for p in self.accumulator.parameters())
            total += 6 * length * (len(self.heads) + 1) * accumulator
            total += 4 * length * self.noise_embed.weight.numel()
        return total


# ---------------------------------------------------------------------------------------------------------------------
# decoding

def typical(logits, candidates, epsilon=0.09, delta=0.3):
    """Typical acceptance (Section C.2): p(x) > min(epsilon, delta exp(-H(p))). [..., V], [...] -> bool [...]."""
    p = logits.softmax(-1)
    entropy = torch.special.entr(p).sum(-1)
    threshold = (delta * torch.exp(-entropy)).clamp(max=epsilon)
    return p.gather(-1, candidates[..., None]).squeeze(-1) > threshold


class Decoding:
    """A batch of rows that Medusa continues, each at its own pace. One round of a row, K = 3:

        position   .. p - 1 |  p      p + 1   p + 2   p + 3
        text         known  |  x0      c1      c2      c3      draft: head 0's token, candidates of heads 1 .. 3,
        made from     h     | xi_0    xi_1    xi_2    xi_3     by the state h of p - 1 and the noise of p .. p + 3
                            |         c1 ok?  c2 ok?  c3 ok?   verify, all in one backbone call; a candidate is
                            |                                  accepted if all before it are
        n of them are accepted: p moves on by 1 + n, h is the state of the last one, and its logits with the noise that
        was drawn for the new p already give the next x0.

    `rows` are the rows of the batch that are not complete; h [b, D], logits [b, V], xi [b, K + 1, V] are theirs; x, p,
    nfe, verified and accepted are of all B.
    """

    def __init__(self, model, tokens, T, tau, top_p, accept, epsilon, delta, noise, cached, generator):
        B, P = tokens.shape
        device = tokens.device
        self.model = model
        self.K = len(model.heads)
        self.T = T
        self.tau = tau
        self.top_p = top_p
        self.accept = accept
        self.epsilon = epsilon
        self.delta = delta
        self.generator = generator
        self.nfe = torch.zeros(B, dtype=torch.long, device=device)
        self.verified = self.nfe.new_zeros(B, self.K)
        self.accepted = self.nfe.new_zeros(B, self.K)
        self.x = F.pad(tokens, (0, T + self.K - P), value=model.bos)  # known up to p, then the draft
        self.p = self.nfe + P
        self.rows = torch.arange(B, device=device)
        self.places = torch.arange(self.K + 1, device=device)
        if P == T:
            self.rows = self.rows[:0]                          # nothing to write
            return
        self.cache = None
        if cached:
            self.cache = model.backbone.new_cache(B, T)
        self.held = P  # positions of which the cache holds keys and values
        self.h = model.backbone.hidden(tokens, self.cache)[:, -1]
        self.logits = model.backbone.logits(self.h) / tau
        self.nfe += 1
        self.noise = None
        if noise is not None:
            self.noise = F.pad(noise, (0, 0, 0, self.K))  # beyond the sample: no candidate that counts reads it
            self.xi = self.noise[:, P:P + self.K + 1]
        else:
            self.xi = self.fresh_noise(B * (self.K + 1)).view(B, self.K + 1, -1)

    def fresh_noise(self, n):
        V = self.model.vocab_size
        if self.accept == "greedy":
            return torch.zeros(n, V, device=self.x.device)
        return sample_gumbel((n, V), self.generator, self.x.device)

    def choose(self, logits, xi):
        """What the backbone itself writes: logits [..., V], noise xi [..., V] -> tokens [...]."""
        greedy = self.accept == "greedy"
        tokens = draw_tokens(logits.flatten(0, -2), self.top_p, greedy, xi.flatten(0, -2))
        return tokens.view(xi.shape[:-1])

    def draft(self):
        """Write positions p .. p + K of every row: head 0's token, then the candidates."""
        first = self.choose(self.logits, self.xi[:, 0])  # (b)
        candidates = self.model.draft(self.h, self.xi, self.tau)  # (b, K)
        positions = self.p[self.rows, None] + self.places  # (b, K + 1)
        self.x[self.rows[:, None], positions] = torch.cat([first[:, None], candidates], 1)

    def drop_complete_rows(self):
        """A row of which head 0's token was the last needs no call any more."""
        self.select((self.p[self.rows] + 1 < self.T).nonzero().squeeze(1))

    def select(self, some):
        """Go on with these of the rows."""
        if len(some) == len(self.rows):
            return  # nothing is copied where all of them stay
        if self.cache is not None and len(some):
            self.cache.batch_select_indices(some)
        self.rows = self.rows[some]
        self.h = self.h[some]
        self.logits = self.logits[some]
        self.xi = self.xi[some]

    def verify(self):
        """One backbone call for the drafts; then p, h, logits and xi are those of the next round."""
        rows = self.rows
        positions = self.p[rows, None] + self.places  # (b, K + 1)
        states = self.backbone_states(positions)  # (b, K + 1, D)
        logits = self.model.backbone.logits(states) / self.tau  # (b, K + 1, V)
        self.nfe[rows] += 1

        candidates = self.x[rows[:, None], positions[:, 1:]]  # (b, K)
        fine = self.acceptable(logits[:, :-1], candidates) & (positions[:, 1:] < self.T)
        fine = fine.cumprod(1)                                 # accepted: a prefix
        n = fine.sum(1)
        # counted in drafts that end within the sample: head k is looked at if head k - 1 was accepted
        whole = (positions[:, -1:] < self.T).long()
        looked_at = F.pad(fine[:, :-1], (1, 0), value=1)
        self.verified[rows] += whole * looked_at
        self.accepted[rows] += whole * fine

        # head 0's token and the accepted ones are known; the next draft starts from the last of them
        self.p[rows] += 1 + n
        i = torch.arange(len(rows), device=rows.device)
        self.h = states[i, n]
        self.logits = logits[i, n]
        unfinished = (self.p[rows] < self.T).nonzero().squeeze(1)
        self.select(unfinished)
        self.advance_noise(n[unfinished])

    def backbone_states(self, positions):
        """The backbone's hidden states [b, K + 1, D] at these positions [b, K + 1], from where the slowest row is."""
        start = 0
        end = min(self.T, int(positions.max()) + 1)
        if self.cache is not None:
            start = int(self.p[self.rows].min())
            if start < self.held:                              # what was rejected leaves the cache
                self.cache.crop(start - self.held)
        h = self.model.backbone.hidden(self.x[self.rows, start:end], self.cache)
        self.held = end
        where = positions.clamp(max=end - 1) - start  # beyond the sample: any state, it is not read
        return h.gather(1, where[:, :, None].expand(-1, -1, h.shape[2]))

    def acceptable(self, logits, candidates):
        """Which candidates [b, K] pass under the backbone's logits [b, K, V] of their positions."""
        if self.accept == "typical":
            if self.top_p < 1:
                logits = nucleus(logits, self.top_p)
            return typical(logits, candidates, self.epsilon, self.delta)
        return candidates == self.choose(logits, self.xi[:, 1:])

    def advance_noise(self, n):
        """The noise of the next K + 1 positions, after n + 1 were decided. That of positions not yet decided is kept:
        what was accepted so far depends on it (through the heads, or by comparison), so that a fresh draw after a
        rejection would not follow the backbone's distribution.
        """
        if self.noise is not None:
            self.xi = self.noise[self.rows[:, None], self.p[self.rows, None] + self.places]
            return
        place = self.places + 1 + n[:, None]  # (b, K + 1)
        V = self.xi.shape[2]
        self.xi = self.xi.gather(1, place.clamp(max=self.K)[:, :, None].expand(-1, -1, V))
        new = place > self.K
        self.xi[new] = self.fresh_noise(int(new.sum()))
