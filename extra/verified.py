"""Decoding with an autoregressive verifier: adaptive parallel decoding (APD, Israel et al. 2025), and exact decoding.

The student drafts several tokens in one call, the verifier reads the draft in one call, and the part on which both
agree is kept. Both use the same Gumbel noise, so that they agree more often than two independent draws would. What APD
writes is a compromise of the two; exact decoding writes, token for token, what the verifier writes alone.

Shapes: B batch, b rows that are not finished, L length, V vocabulary, N drafted tokens of all rows.
"""
import math

import torch

from bd3lm import BD3LM, BlockDenoiser
from data.cli import BadInput
from gumbel import DEVICE, draw_tokens, nucleus, sample_gumbel
from mdlm import Denoiser

DRAFTS = ("every", "once", "never")                        # when the student drafts, in exact decoding


def generate_verified(model, tokens, verifier, options, generator=None):
    """`generate_apd` or `generate_exact`, as the options of `sample.sampling_options` say. Raises BadInput."""
    sampling = dict(tau=options["tau"], top_p=options["top_p"], greedy=options["greedy"], generator=generator)
    if options["sampler"] == "exact":
        if not are_beginnings(tokens, model.mask_id):
            raise BadInput("--prompt has a token after a [MASK], which --sampler=exact cannot fill in: leave it out")
        return generate_exact(model, tokens, verifier, options["draft"], **sampling)
    return generate_apd(model, tokens, verifier, options["apd_ratio"], options["max_lookahead"],
                        resample_noise=options.get("resample_noise", False), **sampling)


# ---------------------------------------------------------------------------------------------------------------------
# APD


@torch.no_grad()
def generate_apd(model, tokens, verifier, ratio=0.5, max_lookahead=10, tau=1.0, top_p=1.0, greedy=False, noise=None,
                 resample_noise=False, generator=None):
    """Fill in the [MASK]s of tokens [B, L], left to right -> (tokens [B, L], nfe [B], verifier calls [B]).

    model: an MDLM. verifier: an AR model of the same vocabulary; nfe does not count its calls. ratio: the weight of the
    student's logits beside the verifier's. max_lookahead: a round drafts the masked ones of that many positions.
    greedy: zeta = 0. The other arguments are those of `MDLM.generate`. Raises ValueError for values out of range.
    """
    model.check_sampling(tokens, tau, top_p, noise, resample_noise)
    if not 0 <= ratio <= 1 or max_lookahead < 1:
        raise ValueError(f"ratio must lie in [0, 1] and max_lookahead be at least 1, got {ratio}, {max_lookahead}")
    denoiser = Denoiser(model, tokens == model.mask_id, tau, noise, resample_noise, generator)
    x = tokens.clone()
    nfe = torch.zeros(len(x), dtype=torch.long, device=x.device)
    rows = unfinished(x, model.mask_id)
    while len(rows):
        # 1. draft the next masked positions, each by itself: x_i = argmax(student_i + zeta_i)
        z = x[rows]
        drafted = next_masked(z == model.mask_id, max_lookahead)  # (b, L)
        student = denoiser.logits(denoiser.hidden(z, rows, drafted)).double()  # (N, V)
        if top_p < 1:
            student = nucleus(student, top_p)
        zeta = torch.zeros_like(student)
        if not greedy:
            zeta = sample_gumbel(student.shape, generator, x.device)
        draft = (student + zeta).argmax(-1)  # (N)
        filled = z.masked_scatter(drafted, draft)

        # 2. verify, in one call: y_i = argmax(ratio student_i + (1 - ratio) AR_i + the same zeta_i)
        ar = verify(verifier, filled, drafted, model.mask_id)  # (N, V)
        target = ratio * student + (1 - ratio) * ar.double()
        target = torch.where(student == -math.inf, student, target)           # ratio 0 would make it 0 * inf = nan
        agrees = (target + zeta).argmax(-1) == draft

        # 3. accept the longest prefix of the draft with x_i = y_i, and its first token in any case
        accepted = leading(drafted, agrees)
        x[rows] = torch.where(accepted, filled, z)
        nfe[rows] += 1
        rows = unfinished(x, model.mask_id)
    verifier_calls = nfe.clone()                           # one with each network call
    return x, nfe, verifier_calls


def unfinished(x, mask_id):
    """The rows of x [B, L] that hold a [MASK] -> their indices [b]."""
    return (x == mask_id).any(1).nonzero().squeeze(1)


def next_masked(masked, n):
    """Of masked [b, L], what lies among the n positions from each row's first masked one on -> [b, L]."""
    position = torch.arange(masked.shape[1], device=masked.device)
    first = masked.int().argmax(1, keepdim=True)
    return masked & (position < first + n)


def verify(verifier, filled, drafted, mask_id):
    """The verifier's logits of the drafted tokens [N, V]: filled [b, L] with the draft in place, drafted [b, L] bool.

    It reads what precedes a token, so the [MASK]s after a row's draft do not matter: they become BOS, an id it knows.
    """
    end = int(drafted.nonzero()[:, 1].max())               # what stands there or beyond is read for no drafted token
    text = filled[:, :end]
    h = verifier.hidden(text.masked_fill(text == mask_id, verifier.bos))
    return verifier.logits(h[drafted[:, 1:end + 1]])       # position i is predicted at i - 1


def leading(drafted, agrees):
    """Which drafted positions [b, L] are accepted: agrees [N], in their order -> [b, L]."""
    first = drafted.int().argmax(1, keepdim=True)
    no_objection = torch.ones_like(drafted).masked_scatter(drafted, agrees)
    no_objection.scatter_(1, first, True)
    so_far = no_objection.cumprod(1).bool()
    return drafted & so_far


# ---------------------------------------------------------------------------------------------------------------------
# infilling: several drafts, of which the verifier chooses one

@torch.no_grad()
def choose_draft(model, tokens, verifier, n_drafts, generator=None, **sampling):
    """Fill in the [MASK]s of tokens [B, L] n_drafts times, and draw one of the results by p(row) under the verifier ->
    (tokens [B, L], nfe [B], verifier calls [B]). What stands right of a gap counts as well: an AR model, which cannot
    fill in itself, can say which filling fits. sampling: what `model.generate` reads.
    """
    drafts = []
    scores = []
    nfe = torch.zeros(len(tokens), dtype=torch.long, device=tokens.device)
    for _ in range(n_drafts):
        draft, calls = model.generate(tokens, generator=generator, **sampling)
        drafts.append(draft)
        scores.append(-verifier.losses(draft).double().sum(1))  # (B): log p, but for a constant that all share
        nfe += calls
    weights = torch.stack(scores, 1).softmax(1)  # (B, n_drafts)
    chosen = torch.multinomial(weights, 1, generator=generator).squeeze(1)
    rows = torch.arange(len(tokens), device=tokens.device)
    return torch.stack(drafts)[chosen, rows], nfe, torch.full_like(nfe, n_drafts)


# ---------------------------------------------------------------------------------------------------------------------
# exact decoding

@torch.no_grad()
def generate_exact(model, tokens, verifier, draft="every", tau=1.0, top_p=1.0, greedy=False, noise=None,
                   generator=None):
    """Continue the given beginnings of tokens [B, L] (then [MASK]s) as the verifier alone would, in fewer of its calls
    -> (tokens [B, L], nfe [B], verifier calls [B], positions that the student computed [B], and the verifier [B]).

    Noise xi is drawn once, of the kind that the student reads (what follows is of Gumbel noise). The student, an MDLM
    or BD3LM, drafts all that is missing (BD3-LM: the rest of the block): one that reads noise reads tau * xi and takes
    its argmax; a noise-blind one takes argmax(log q + xi), with the verifier's temperature and nucleus. The verifier,
    an AR model, reads the draft in one pass and forms what it would write itself: y_i = argmax(filter(logits_i / tau) +
    xi_i). Accepted are the draft x up to the first x_i != y_i, and y there; where a draft is accepted whole, y of the
    place after it. So the text is `verifier.generate(noise=xi)`, but for places where the two best sums are so close
    that one pass and many cached steps round to different tokens.

    The usual test of a draft, u < p / q, would be biased here: it needs a redraw that is independent of the draft, and
    noise that both share is not Gumbel any more, given that a draft was rejected.

    draft: "every" round; "once" at each place, the verifier's own last y are the next draft; "never": these alone, from
    argmax xi on (Jacobi iteration). greedy: xi = 0 (quantile: 1/2). noise [B, L, V], standard Gumbel (quantile: [B, L],
    uniform): in place of the draw; drawn or given, it is held: the verifier needs it where the student has read it.
    Raises ValueError for values out of range, for rows longer than the verifier's, and for a [MASK] before a given
    token.
    """
    state = ExactDecoding(model, tokens, verifier, draft, tau, top_p, greedy, noise, generator)
    while len(state.rows):
        state.draft()
        state.verify()
    return state.result()


def are_beginnings(tokens, mask_id):
    """Whether in no row of tokens [B, L] a given one stands after a [MASK]."""
    masked = tokens == mask_id
    return not (masked[:, :-1] & ~masked[:, 1:]).any()


class ExactDecoding:
    """A batch of rows that `generate_exact` continues, each at its own pace:

        position   0 ........ p .......... end ......... L
        x          known text | draft      | unread

    The verifier's cache holds known text of all rows: it is cut back to the slowest, the others compute from there on
    again. The student has none: a call of MDLM computes the whole row, one of BD3-LM the block and all before it.
    `rows` are those of the batch that are not complete; everything else is of all B.
    """

    def __init__(self, model, tokens, verifier, draft, tau, top_p, greedy, noise, generator):
        B, L = tokens.shape
        V = model.mask_id
        model.check_sampling(tokens, tau, top_p, None, False)
        if draft not in DRAFTS:
            raise ValueError(f"unknown draft {draft!r}: one of {', '.join(DRAFTS)}")
        if L > verifier.length:
            raise ValueError(f"rows of {L} tokens, the verifier was made for at most {verifier.length}")
        if not are_beginnings(tokens, V):
            raise ValueError("what is given must be a beginning: a token stands after a [MASK]")
        masked = tokens == V
        if greedy:
            if model.quantile:
                noise = torch.full((1, 1), 0.5, dtype=torch.float64, device=tokens.device).expand(B, L)
            else:
                noise = torch.zeros(1, 1, 1, device=tokens.device).expand(B, L, V)
        elif noise is None:
            noise = model.fresh_noise((B, L), generator, tokens.device)
        self.model = model
        self.verifier = verifier
        self.when = draft
        self.tau = tau
        self.top_p = top_p
        self.greedy = greedy
        self.L = L
        self.p = (~masked).sum(1)
        self.end = self.p.clone()
        self.rows = (self.p < L).nonzero().squeeze(1)
        self.cache = verifier.new_cache(len(self.rows), L)
        self.held = 0  # positions of which the cache holds keys and values
        self.x, self.noise = tokens.clone(), noise
        if isinstance(model, BD3LM):
            self.x, self.noise, _ = model.whole_blocks(tokens, noise, generator)
        self.nfe, self.verifier_calls, self.positions, self.verifier_positions = self.p.new_zeros(4, B)
        # the student: with noise that tells it the tokens, its argmax is its draft (unpaired noise tells it nothing)
        self.student_greedy = greedy or model.paired
        self.student_noise = None if model.noise_embed is None else self.noise
        self.denoiser = None
        if draft == "never":
            # what the noise would draw if all tokens were equally likely
            guess = (noise * V).long() if model.quantile else noise.argmax(-1)
            self.x[:, :L] = torch.where(masked, guess, tokens)
            self.end = self.end.clamp(min=L)
        elif not isinstance(model, BD3LM):
            self.denoiser = Denoiser(model, masked, tau, self.student_noise)

    def result(self):
        """What `generate_exact` returns."""
        return self.x[:, :self.L], self.nfe, self.verifier_calls, self.positions, self.verifier_positions

    def draft(self):
        """The student writes from p on, in the rows whose draft is used up, or in all of them."""
        rows = self.rows
        if self.when != "every":
            rows = rows[self.p[rows] >= self.end[rows]]
        size = self.x.shape[1]
        if isinstance(self.model, BD3LM):
            size = self.model.block_size
        starts = self.p[rows] // size * size
        for a in starts.unique().tolist():                  # rows in one block share a call; MDLM: all do, a = 0
            self.draft_block(a, a + size, rows[starts == a])

    def draft_block(self, a, b, rows):
        """One call of the student: these rows have the positions a to b drafted, from p on."""
        places = torch.arange(b, device=rows.device)
        drafted = places >= self.p[rows, None]  # (n, b)
        z = self.x[rows, :b].masked_fill(drafted, self.model.mask_id)
        if self.denoiser is not None:
            h = self.denoiser.hidden(z, rows, drafted)
        else:
            noise = None if self.student_noise is None else self.student_noise[rows, a:b]
            block = BlockDenoiser(self.model, z[:, :a], z[:, a:], None, self.tau, noise, False, None)
            h = block.hidden(z[:, a:], slice(None), drafted[:, a:])
        tokens = self.choose(self.model, h, rows, drafted, 0, self.student_greedy)
        self.x[rows, :b] = z.masked_scatter(drafted, tokens)
        self.end[rows] = min(b, self.L)
        self.nfe[rows] += 1
        self.positions[rows] += b

    def verify(self):
        """One call of the verifier: it reads the drafts, p moves on, and its y stand in place of what was drafted."""
        rows = self.rows
        p = self.p[rows, None]
        end = self.end[rows, None]
        # the state of a place predicts the next one: known text from the slowest row's last token on, and the drafts
        start = min(self.held, int(p.min()) - 1)
        stop = min(int(end.max()), self.L - 1)
        if start < self.held:
            self.cache.crop(start - self.held)
        text = self.x[rows, start:stop]
        text = text.masked_fill(text == self.model.mask_id, self.verifier.bos)  # after a draft: any id that it knows
        h = self.verifier.hidden(text, self.cache)  # (b, stop - start, D)
        self.held = stop
        self.verifier_calls[rows] += 1
        self.verifier_positions[rows] += stop - start

        # y of the draft and of the place after it
        places = torch.arange(start + 1, stop + 1, device=rows.device)
        read = (places >= p) & (places <= end)
        x = self.x[rows, start + 1:stop + 1]
        y = x.masked_scatter(read, self.choose(self.verifier, h[read], rows, read, start + 1, self.greedy))
        self.x[rows, start + 1:stop + 1] = y

        # the draft is right up to the first x_i != y_i; y_i there is right whatever was drafted
        wrong = (x != y) & (places < end)
        first_wrong = torch.where(wrong, places, end).amin(1)
        self.p[rows] = (first_wrong + 1).clamp(max=self.L)
        open_rows = (self.p[rows] < self.L).nonzero().squeeze(1)
        if 0 < len(open_rows) < len(rows):
            self.cache.batch_select_indices(open_rows)
        self.rows = rows[open_rows]

    def choose(self, network, h, rows, wanted, first, greedy):
        """A network's tokens [N]: states h [N, D] of the places `wanted` [b, n] of these rows, the first of which is
        the position `first`, and their noise.
        """
        row, place = wanted.nonzero(as_tuple=True)
        chunk = max(1, DEVICE.chunk // self.model.vocab_size)  # [N, V] is never held
        tokens = []
        for h_part, row_part, place_part in zip(h.split(chunk), rows[row].split(chunk), (first + place).split(chunk)):
            xi = self.noise[row_part, place_part]
            tokens.append(draw_tokens(network.logits(h_part) / self.tau, self.top_p, greedy, xi))
        return torch.cat(tokens)
