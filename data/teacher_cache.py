"""What the teacher says about the training rows, kept: in memory for a small dataset, on disk for a large one.

Either stands in for the teacher in `MDLM.loss`, which asks for `posterior_logits` only. A batch is announced in two
steps: `load(rows)` reads what is known of these rows of the dataset (in the thread that reads batches ahead), and
`for_rows(loaded)` says that the next batch holds them.

Shapes: N masked tokens of a batch, V vocabulary, L length of a row with BOS, k tokens kept per position.
"""
import math
import os
import shutil

import numpy as np
import torch
from tqdm import tqdm

from data.cli import BadInput
from data.files import naming, read_json, replacing, write_json, writing
from data.run import body_to_bfloat16
from data.vocab import id_type
from gumbel import DEVICE


def teacher_of_rows(args, model, teacher, data, world):
    """What knows the teacher's answers for all training rows: a `TeacherLogits`, or with --teacher_cache a
    `TeacherCache`. None: there is no teacher, or it is asked batch by batch.
    """
    if teacher is None:
        return None
    logits = len(data) * data.length * data.meta["vocab_size"]
    if not args.teacher_cache and "teacher" in model.loss_reads and logits <= 1 << 24:
        return TeacherLogits(teacher, data)                # a small dataset: one pass for all steps
    if world.dtype == "bfloat16":
        body_to_bfloat16(teacher)                          # not before its hash is taken
    if not args.teacher_cache:
        return None
    with world.together(), world.autocast:
        cache = TeacherCache(teacher, teacher.sha256, data, args.teacher_cache, world.dtype)
        cache.fill(teacher, data, world.rank, world.size)
    if args.compile:
        cache.expand = torch.compile(truncated_logits)
    return cache


class TeacherLogits:
    """The teacher's logits at every position of a small dataset, in memory: [rows, L - 1, V] float32, on its device.

    They are exact, so that they serve token distillation as well as the noise.
    """

    @torch.no_grad()
    def __init__(self, teacher, data, batch=1024):
        """One pass of the teacher over the `Shards` data, `batch` rows at a time."""
        tokens = torch.from_numpy(data.rows(range(len(data)))).to(teacher.device)
        parts = []
        for x in tokens[:, :-1].split(batch):
            parts.append(teacher.logits(teacher.hidden(x)))
        self.table = torch.cat(parts)

    def load(self, rows):
        """What `for_rows` wants for these rows of the dataset: here the rows' numbers, since all is in memory."""
        return torch.as_tensor(rows)

    def for_rows(self, loaded):
        """The next batch holds the rows that `load` returned this for. Returns self."""
        self.rows = loaded.to(self.table.device)
        return self

    def posterior_logits(self, tokens, masked):
        """A function (a, b) -> the teacher's float32 logits [b - a, V] behind the masked tokens number a to b.

        tokens, masked [B, L], of the rows that `for_rows` named. BOS is never masked.
        """
        logits = self.table[self.rows][masked[:, 1:]]  # (N, V)
        return lambda a, b: logits[a:b]


def truncated_logits(p, ids, p_w, frequency, tokens):
    """The logarithm of the teacher's distribution as far as a cache knows it, [N, V] float32, not yet normalised.

    Known are the probabilities p [N, k] of the tokens ids [N, k], and p_w [N, 1], that of the true token [N]. The
    others share what is left of the mass by their frequency in the text [V]: s_j for token j, in place of its p_j. With
    nothing left they get -inf. The true token's entry is always finite, so that the softmax that follows, which also
    takes away the rounding of p, never gives nan.

    Noise drawn from the posterior under this distribution has a law that is off, given the text, by the total variation

        TV = d / (1 + d),   d = sum over the others of (s_j - p_j)^+   (at most the mass that is left):

    with E_0 = T_w / p_w known, the arrival time of another token, E_j + s_j E_0 in place of E_j + p_j E_0, is a shifted
    exponential either way, and the two have the same density where both are positive. Much of it is invisible to
    softmax(noise): p_j E_0 only matters to the few runners for whom E_j is as small. (An even share would be seen: it
    raises the smallest E_j of all, which are about 1 / V.)
    """
    w = tokens.unsqueeze(-1)  # (N, 1)
    w_is_extra = (ids != w).all(-1, keepdim=True)          # (N, 1): the true token is not among the k
    left = 1 - p.sum(-1, keepdim=True) - p_w.where(w_is_extra, 0)
    left = left.clamp(min=0)                               # of p as rounded, the sum may be a little above 1
    frequency_left = 1 - frequency[ids].sum(-1, keepdim=True) - frequency[w].where(w_is_extra, 0)
    frequency_left = frequency_left.clamp(min=1e-9)        # 0 where all tokens are known: nobody shares then
    log_p = (left / frequency_left).log() + frequency.log()  # (N, V)
    # in place: of all sizes here only this one counts, V is 50,257 with GPT-2
    log_p.scatter_(-1, ids, p.log())
    log_p.scatter_(-1, w, p_w.log())
    return log_p


class TeacherCache:
    """The teacher's k most probable tokens at every position of the training rows, on disk: noise without a teacher.

    Per position: the ids of the k tokens, their -log p, and that of the token which is there. All are uint16, the -log
    p in 1/2048 nat (so that they are off by less than 3e-4): 4 k + 2 bytes, 307 GB for the 9.04 G tokens of OpenWebText
    at k = 8. Of a vocabulary of more than 65,536 the ids are uint32, in a file of their own: 6 k + 2 bytes. What this
    leaves out, and what it costs: `truncated_logits`.

    It lies in a folder beside the shards that names teacher, precision, row length and k: topk.bin (the values),
    ids.bin (if any), done.bin (a byte per chunk of rows: whether it is written), frequency.npy and meta.json. It is
    written once, in chunks that any process of any run may fill in (`fill`). Raises BadInput where it cannot be
    written, or is of other data.
    """
    CHUNK_ROWS = 64
    STEPS_PER_NAT = 2048
    expand = staticmethod(truncated_logits)

    def __init__(self, teacher, sha256, data, k, dtype="float32"):
        """sha256: the hash of the teacher's weights; dtype: the precision it is run in."""
        self.k = min(k, teacher.vocab_size)
        self.folder = os.path.join(data.path, f"teacher-{sha256}-{dtype}-{data.length}-k{self.k}")
        self.meta_file = os.path.join(self.folder, "meta.json")
        self.frequency_file = os.path.join(self.folder, "frequency.npy")
        self.values_file = os.path.join(self.folder, "topk.bin")
        self.ids_file = os.path.join(self.folder, "ids.bin")
        self.done_file = os.path.join(self.folder, "done.bin")
        positions = (len(data), data.length - 1)
        self.wide = id_type(data.meta["vocab_size"]) != np.uint16      # then a place's k ids are not among its values
        n_values = self.k + 1 if self.wide else 2 * self.k + 1
        n_chunks = math.ceil(len(data) / self.CHUNK_ROWS)
        sizes = {self.values_file: 2 * n_values * math.prod(positions), self.done_file: n_chunks}
        if self.wide:
            sizes[self.ids_file] = 4 * self.k * math.prod(positions)
        # what the values are of: a folder that says otherwise is refused
        meta = dict(teacher=sha256, dtype=dtype, length=data.length, k=self.k, rows=len(data))
        meta["shards"] = data.hashes()
        if not os.path.exists(self.meta_file):
            # processes and runs share a cache: one makes its files, the others wait
            with writing(self.folder, wait=True), naming(self.folder):
                if not os.path.exists(self.meta_file):
                    self._create(data, meta, sizes)
        self._check(data, meta, sizes)
        self.frequency = self.frequency.to(teacher.device)
        self.values = np.memmap(self.values_file, "<u2", "r", shape=(*positions, n_values))
        self.done = np.memmap(self.done_file, np.uint8, "r")
        ids = self.values[..., :self.k]
        if self.wide:
            self.ids = ids = np.memmap(self.ids_file, "<u4", "r", shape=(*positions, self.k))
        for part in (ids[:self.CHUNK_ROWS], ids[-self.CHUNK_ROWS:]):
            if self.done.max(initial=0) > 1 or part.max(initial=0) >= data.meta["vocab_size"]:
                raise BadInput(f"{self.folder} is damaged: remove it, it is written again")

    def _create(self, data, meta, sizes):
        """Make the files at their full size, and meta.json last: where it is, the others are complete."""
        size = sum(sizes.values())
        free = shutil.disk_usage(data.path).free
        if free < size:
            raise BadInput(f"a cache of the teacher's {self.k} best on {data.path} takes "
                           f"{size / 1e9:.1f} GB, and {free / 1e9:.1f} are free: "
                           "choose a smaller --teacher_cache, or leave it out")
        with replacing(self.frequency_file, "wb") as f:
            np.save(f, data.frequency())
        for path, length in sizes.items():
            with open(path, "ab") as f:                    # "ab" never empties: another run may be at it
                f.truncate(length)
        write_json(self.meta_file, meta)

    def _check(self, data, meta, sizes):
        """Read the token frequencies [V]; BadInput where the files are damaged, or of other data."""
        try:
            found = read_json(self.meta_file)
            frequency = np.load(self.frequency_file)
            if frequency.shape != (data.meta["vocab_size"],) or frequency.dtype != np.float32:
                raise ValueError("frequency.npy is of another vocabulary")
            if not (frequency > 0).all() or abs(frequency.sum() - 1) > 1e-3:       # (nan is not above 0)
                raise ValueError("frequency.npy holds no frequencies")
        except (OSError, ValueError, EOFError) as e:
            raise BadInput(f"{self.folder} cannot be read ({e}): remove {self.folder}, "
                           "it is written again") from None
        self.frequency = torch.from_numpy(frequency)
        wrong_size = any(not os.path.exists(path) or os.path.getsize(path) != size
                         for path, size in sizes.items())
        if found != meta or wrong_size:
            raise BadInput(f"{self.folder} is truncated, or of other data than {data.path} holds now: "
                           "remove it, it is written again")

    # writing

    @torch.no_grad()
    def fill(self, teacher, data, rank=0, size=1):
        """The teacher's pass over the rows whose chunk is not done, shared by the processes `rank` of `size`."""
        n = len(self.done)
        # this process's share first, then what the others have left undone
        mine = range(rank, n, size)
        others = [c for c in range(n) if c not in mine]
        chunks = [c for c in [*mine, *others] if not self.done[c]]
        for c in tqdm(chunks, desc="teacher's pass", unit="chunk", disable=rank > 0 or not chunks):
            if self.done[c]:                               # by another process, meanwhile
                continue
            first = c * self.CHUNK_ROWS
            rows = range(first, min(first + self.CHUNK_ROWS, len(data)))
            ids, steps = self._read_teacher(teacher, data, rows)
            # values first, on disk: what is marked done can be trusted after any crash
            if self.wide:
                self._write(self.ids_file, first * self.ids[0].nbytes, ids.astype("<u4"))
                values = steps
            else:
                values = np.concatenate([ids, steps], 1)
            self._write(self.values_file, first * self.values[0].nbytes, values.astype("<u2"))
            self._write(self.done_file, c, b"\1")

    def _read_teacher(self, teacher, data, rows):
        """What is kept of these rows: the ids [rows * (L - 1), k], and the -log p of them and of x [.., k + 1]."""
        tokens = torch.from_numpy(data.rows(rows)).to(teacher.device)
        h = torch.cat([teacher.hidden(x) for x in tokens[:, :-1].split(8)]).flatten(0, 1)
        x = tokens[:, 1:].reshape(-1, 1)
        ids = []
        steps = []
        chunk = max(1, DEVICE.chunk // teacher.vocab_size)        # positions whose logits are held at once
        for h_part, x_part in zip(h.split(chunk), x.split(chunk)):
            logp = teacher.logits(h_part).log_softmax(-1)
            top, top_ids = logp.topk(self.k)
            logp_x = logp.gather(1, x_part)
            if not logp_x.isfinite().all():
                raise BadInput(f"the teacher gives a token in rows {rows.start} to {rows.stop} of "
                               f"{data.path} probability 0, or nan: it does not fit this text")
            nats = torch.cat([top, logp_x], 1).neg()
            ids.append(top_ids)
            steps.append((nats * self.STEPS_PER_NAT).round().clamp(0, 65535).int())
        return torch.cat(ids).cpu().numpy(), torch.cat(steps).cpu().numpy()

    def _write(self, path, offset, what):
        # written, not mapped: on a full disk a map dies of SIGBUS, and this raises an OSError
        with naming(path), open(path, "r+b") as f:
            f.seek(offset)
            f.write(what)
            f.flush()
            os.fsync(f.fileno())

    # reading

    def load(self, rows):
        """What is stored of these rows of the dataset, [B, L - 1, 2 k + 1]: the ids, then the values.

        torch moves no uint16: as int16, or, where the ids are wider, as int32.
        """
        values = self.values[rows]
        if self.wide:
            return torch.from_numpy(np.concatenate([self.ids[rows], values], -1).view(np.int32))
        return torch.from_numpy(values.view(np.int16))

    def for_rows(self, loaded):
        """The next batch holds the rows that `load` returned this for. Returns self."""
        self.loaded = loaded
        return self

    def posterior_logits(self, tokens, masked):
        """A function (a, b) -> float32 logits [b - a, V], `truncated_logits` of the masked tokens number a to b.

        tokens, masked [B, L], of the rows that `for_rows` named. BOS is never masked.
        """
        values = self.loaded.to(tokens.device, non_blocking=True)
        values = values[masked[:, 1:]]  # (N, 2 k + 1)
        if values.dtype == torch.int16:                    # which stands for uint16
            values = values.int() & 0xFFFF
        ids = values[:, :self.k].long()
        nats = values[:, self.k:].float() / self.STEPS_PER_NAT
        p, p_w = nats.neg().exp().split([self.k, 1], 1)  # (N, k), (N, 1)
        x = tokens[:, 1:][masked[:, 1:]]  # (N)
        return lambda a, b: self.expand(p[a:b], ids[a:b], p_w[a:b], self.frequency, x[a:b])
