"""Medusa (Cai et al. 2024): heads on a frozen AR backbone that draft several tokens at once, with or without noise.

From the hidden state h_j of position j, head 0 (the backbone's own output layer) draws token j + 1; head k = 1 .. K
guesses token j + 1 + k, without knowing what head 0 drew. With Gumbel Distillation (Section 5.2) head k also reads the
noise of positions j + 1 .. j + 1 + k: what the backbone would draw is then a function of what the head sees.

    a_k = h_j [+ c_jk]        logits_k = W_k (a_k + SiLU(U_k a_k + b_k))
    c_jk = output k of a small causal transformer over e_{j+1} .. e_{j+1+K},   e_i = W softmax(noise^i)

Noise of the past is not read: it says nothing that the text does not. The backbone is teacher, verifier and feature
extractor at once: one call of it verifies a draft and yields the hidden state for the next one.

Shapes: B batch, L row length, T sample length, V vocabulary, D the backbone's width, K heads.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from gumbel import GumbelEmbedding, sample_gumbel
from mdlm import Block, check_draws, draw_tokens, nucleus, rope_tables, row_losses

ACCEPT = ("typical", "exact", "greedy")


class Head(nn.Module):
    """One residual layer, which starts as the identity, and an output layer, which starts as the backbone's."""

    def __init__(self, vocab_size, n_embd, bias):
        super().__init__()
        self.fc = nn.Linear(n_embd, n_embd)
        self.out = nn.Linear(n_embd, vocab_size, bias=bias)
        nn.init.zeros_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)

    def forward(self, a):
        return self.out(a + F.silu(self.fc(a))).float()


class Accumulator(nn.Module):
    """The small causal transformer over the noise embeddings of K + 1 positions. Its output starts at zero, so that
    the heads start as those without noise. Heads of attention: of 64 channels where the width allows.
    """

    def __init__(self, n_embd, n_layer, dropout):
        super().__init__()
        self.n_head = max(h for h in range(1, max(1, n_embd // 64) + 1) if n_embd % (2 * h) == 0)
        self.blocks = nn.ModuleList(Block(n_embd, self.n_head, dropout) for _ in range(n_layer))
        self.norm = nn.LayerNorm(n_embd)
        self.out = nn.Linear(n_embd, n_embd, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, e):
        """e [N, K + 1, D] -> c [N, K + 1, D]; place k has seen e_0 .. e_k."""
        rope = rope_tables(torch.arange(e.shape[1], device=e.device), e.shape[2] // self.n_head)
        for block in self.blocks:
            e = block(e, rope, None, True)
        return self.out(self.norm(e))


def typical(logits, candidates, epsilon=0.09, delta=0.3):
    """Typical acceptance (Section C.2): p(x) > min(epsilon, delta exp(-H(p))). [..., V], [...] -> bool [...]."""
    p = logits.softmax(-1)
    threshold = (delta * torch.exp(-torch.special.entr(p).sum(-1))).clamp(max=epsilon)
    return p.gather(-1, candidates[..., None]).squeeze(-1) > threshold


def keep(rows, cache, *tensors):
    """Those rows of the cache (or None) and of the tensors; nothing is copied where all of them stay."""
    if len(rows) == len(tensors[0]):
        return tensors
    if cache is not None and len(rows):
        cache.batch_select_indices(rows)
    return [t[rows] for t in tensors]


class Medusa(nn.Module):
    """K heads for a frozen backbone, which is no part of the module: `attach` it before use.

    `backbone`, `sha256`: the name under which it was loaded, and its `model_hash`, kept with the heads. `bias`:
    whether its output layer has one. `noise`: as in MDLM.
    """

    def __init__(self, vocab_size, length, bos, n_embd, heads=3, n_layer=1, dropout=0.0, noise=None, predict_bos=True,
                 bias=False, backbone=None, sha256=None):
        super().__init__()
        self.config = dict(vocab_size=vocab_size, length=length, bos=bos, n_embd=n_embd, heads=heads, n_layer=n_layer,
                           dropout=dropout, noise=noise, predict_bos=predict_bos, bias=bias, backbone=backbone,
                           sha256=sha256)
        if heads < 1 or length < heads + 2:
            raise ValueError(f"rows of {length} tokens, BOS included, are too short for {heads} heads")
        self.vocab_size, self.length, self.bos, self.predict_bos = vocab_size, length, bos, predict_bos
        self.heads = nn.ModuleList(Head(vocab_size, n_embd, bias) for _ in range(heads))
        self.noise_embed = GumbelEmbedding(vocab_size, n_embd, noise) if noise else None
        self.accumulator = Accumulator(n_embd, n_layer, dropout) if noise else None

    def attach(self, backbone, start=False):
        """Use this AR model (a `CausalLM`); `start`: output layers start as its own. ValueError if it does not fit."""
        layer = backbone.output_layer()
        if tuple(layer.weight.shape) != (self.vocab_size, self.config["n_embd"]):
            raise ValueError(f"these heads are for a backbone of {self.vocab_size} ids and width "
                             f"{self.config['n_embd']}, this one has {' and '.join(map(str, layer.weight.shape))}")
        if start:
            for head in self.heads:
                head.out.load_state_dict(layer.state_dict())
        object.__setattr__(self, "backbone", backbone)        # neither trained nor saved with the heads
        return self

    # training

    def condition(self, h, e):
        """a [..., K, D] of hidden states h [..., D] and noise embeddings e [..., K + 1, D] or None."""
        a = h[..., None, :].expand(*h.shape[:-1], len(self.heads), h.shape[-1])
        return a if e is None else a + self.accumulator(e.flatten(0, -3)).view(e.shape)[..., 1:, :]

    def windows(self, e):
        """Noise embeddings e [B, n, D] of positions 1 .. n -> for each j = 0 .. n - 1 those of j + 1 .. j + 1 + K,
        [B, n, K + 1, D], zero beyond n."""
        K = len(self.heads)
        return F.pad(e, (0, 0, 0, K)).unfold(1, K + 1, 1).transpose(2, 3)

    def logits(self, k, a):
        """Head k = 1 .. K: a [..., D] -> float32 logits [..., V]."""
        logits = self.heads[k - 1](a)
        if not self.predict_bos:
            logits[..., self.bos] = -torch.inf
        return logits

    def loss(self, tokens, noise=None, generator=None):
        """Mean over the heads of their cross-entropies, in nats: head k's, at offset k + 1, averaged over its L - 1 - k
        positions of each row. Returns (loss, {"nll_head1": ..}).

        tokens [B, L]. Heads with noise draw it from its posterior under the backbone, unless given as noise [B, L, V].
        """
        B, L = tokens.shape
        with torch.no_grad():
            h = self.backbone.hidden(tokens[:, :-1])                                            # (B, L - 1, D)
        e = None
        if self.noise_embed is not None:
            rows = h.flatten(0, 1)
            e = self.noise_embed(noise[:, 1:]) if noise is not None else self.noise_embed.from_posterior(
                lambda a, b: self.backbone.logits(rows[a:b]), tokens[:, 1:].flatten(), generator).view(h.shape)
            e = self.windows(e)
        a = self.condition(h, e)                                                                # (B, L - 1, K, D)
        losses = {}
        for k in range(1, len(self.heads) + 1):
            n = L - 1 - k
            losses[f"nll_head{k}"] = row_losses(lambda a, k=k: self.logits(k, a), a[:, :n, k - 1].flatten(0, 1),
                                                tokens[:, 1 + k:].flatten(), self.vocab_size)[0].mean()
        return sum(losses.values()) / len(losses), {name: v.item() for name, v in losses.items()}

    forward = loss                                            # what DDP calls

    def log_probs(self, tokens, noise=None):
        """tokens [B, L], noise [B, >= L, V] -> [B, L, K + 1, V]: at j, k head k's distribution of token j + 1 + k.

        Noise that is not given, beyond its end, enters as a zero embedding, as it does beyond the row in training.
        """
        if (noise is None) != (self.noise_embed is None):
            raise ValueError("these heads were built " + ("with noise: give it" if noise is None else "without noise"))
        h, e = self.backbone.hidden(tokens), None
        if noise is not None:
            e = self.noise_embed(noise[:, 1:])
            e = self.windows(F.pad(e, (0, 0, 0, max(0, tokens.shape[1] - e.shape[1]))))[:, :tokens.shape[1]]
        a = self.condition(h, e)
        return torch.stack([self.backbone.logits(h)] + [self.logits(k, a[:, :, k - 1])
                                                        for k in range(1, len(self.heads) + 1)], 2).log_softmax(-1)

    # decoding

    def draft(self, h, noise, tau):
        """The heads' proposals after hidden states h [B, D], noise [B, K + 1, V] of the next positions -> [B, K]."""
        a = self.condition(h, None if self.noise_embed is None else self.noise_embed(noise, tau))
        return torch.stack([self.logits(k, a[:, k - 1]).argmax(-1) for k in range(1, len(self.heads) + 1)], 1)

    def generate(self, *args, **kw):
        """As `decode`, without its statistics -> (tokens [B, T], backbone calls [B])."""
        return self.decode(*args, **kw)[:2]

    @torch.no_grad()
    def decode(self, tokens, length=None, tau=1.0, top_p=1.0, accept="typical", epsilon=0.09, delta=0.3, noise=None,
               cached=True, generator=None):
        """Continue tokens [B, P] (BOS first) to `length` -> (tokens [B, T], nfe [B], verified [B, K], accepted [B, K]).

        Head 0 draws argmax(logits / tau + noise) (after the nucleus `top_p`), the others propose their argmax, one
        backbone call verifies them. A candidate is accepted if all before it were and
            typical   it is not unlikely under the backbone's distribution there: see `typical`
            exact     it is what the backbone draws there, with the same noise: the text is then what the backbone alone
                      would have written
            greedy    it is the backbone's argmax; head 0 takes its argmax too. No noise is drawn: heads with noise,
                      which never saw this, read zeros
        nfe counts backbone calls, that for the prompt included. verified, accepted: how often head k's candidate was
        looked at and taken, in drafts that end within the sample. `noise` [B, T, V]: drawn once per position unless
        given. Rows go at their own pace: each call computes anew what the slowest row has not reached.
        """
        backbone, K, V, T = self.backbone, len(self.heads), self.vocab_size, length or self.length
        B, P, device = *tokens.shape, tokens.device
        if accept not in ACCEPT:
            raise ValueError(f"unknown accept {accept!r}: one of {', '.join(ACCEPT)}")
        check_draws(tau, top_p)
        if not 1 <= P <= T <= backbone.length:
            raise ValueError(f"the prompt has {P} tokens, the sample {T}, the backbone's rows {backbone.length}")
        nfe = torch.zeros(B, dtype=torch.long, device=device)
        verified, accepted = nfe.new_zeros(B, K), nfe.new_zeros(B, K)
        if P == T:
            return tokens, nfe, verified, accepted

        def fresh(n):
            return torch.zeros(n, V, device=device) if accept == "greedy" else sample_gumbel((n, V), generator, device)

        def own(logits, xi):                                  # the backbone's choice: [..., V], [..., V] -> [...]
            return draw_tokens(logits.flatten(0, -2), top_p, accept == "greedy", xi.flatten(0, -2)).view(xi.shape[:-1])
        x = F.pad(tokens, (0, T + K - P), value=self.bos)     # known up to p, then the draft
        p, rows, places = nfe + P, torch.arange(B, device=device), torch.arange(K + 1, device=device)
        cache = backbone.new_cache(B, T) if cached else None
        h = backbone.hidden(tokens, cache)[:, -1]             # (b, D) of the last known token
        logits = backbone.logits(h) / tau                     # (b, V) of the next one
        nfe, held = nfe + 1, P
        noise = None if noise is None else F.pad(noise, (0, 0, 0, K))
        xi = fresh(B * (K + 1)).view(B, K + 1, V) if noise is None else noise[:, P:P + K + 1]
        while len(rows):
            # draft: positions p .. p + K
            at = p[rows, None] + places                                                             # (b, K + 1)
            new = torch.cat([own(logits, xi[:, 0])[:, None], self.draft(h, xi, tau)], 1)            # (b, K + 1)
            x[rows[:, None], at] = new
            # rows for which head 0's token was the last are complete
            go = (p[rows] + 1 < T).nonzero().squeeze(1)
            rows, at, new, xi = keep(go, cache, rows, at, new, xi)
            if not len(rows):
                break
            # verify: one backbone call, from where the slowest row is
            start, end = int(p[rows].min()) if cached else 0, min(T, int(at.max()) + 1)
            if cached and start < held:                       # what was rejected leaves the cache
                cache.crop(start - held)
            h = backbone.hidden(x[rows, start:end], cache)
            held = end
            h = h.gather(1, (at.clamp(max=end - 1) - start)[:, :, None].expand(-1, -1, h.shape[2]))
            logits = backbone.logits(h) / tau                                                       # (b, K + 1, V)
            nfe[rows] += 1
            candidate, z = new[:, 1:], logits[:, :-1]
            ok = (typical(nucleus(z, top_p) if top_p < 1 else z, candidate, epsilon, delta) if accept == "typical" else
                  candidate == own(z, xi[:, 1:]))
            ok = (ok & (at[:, 1:] < T)).cumprod(1)                                                  # (b, K)
            n = ok.sum(1)
            whole = (at[:, -1:] < T).long()
            verified[rows] += whole * F.pad(ok[:, :-1], (1, 0), value=1)
            accepted[rows] += whole * ok
            # head 0's token and the accepted ones are known; the next draft starts from the last of them
            p[rows] += 1 + n
            i = torch.arange(len(rows), device=device)
            go = (p[rows] < T).nonzero().squeeze(1)
            rows, n, h, logits, xi = keep(go, cache, rows, n, h[i, n], logits[i, n], xi)
            if noise is not None:
                xi = noise[rows[:, None], p[rows, None] + places]
            else:                                             # keep the noise of positions not yet decided
                kept = places + 1 + n[:, None]
                xi = xi.gather(1, kept.clamp(max=K)[:, :, None].expand(-1, -1, V))
                xi[kept > K] = fresh(int((kept > K).sum()))
        return x[:, :T], nfe, verified, accepted
