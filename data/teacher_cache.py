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
from extra.quantile import interval_of
from gumbel import DEVICE


def teacher_of_rows(args, model, teacher, data, world):
    """What knows the teacher's answers for all training rows: a `TeacherLogits`, or with --teacher_cache a
    `TeacherCache` or a `QuantileCache`. None: there is no teacher, or it is asked batch by batch.
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
        if model.quantile:
            cache = QuantileCache(teacher.sha256, data, world.dtype)
        else:
            cache = TeacherCache(teacher, teacher.sha256, data, args.teacher_cache, world.dtype)
        cache.fill(teacher, data, world.rank, world.size)
    if args.compile and not model.quantile:
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


class RowsOnDisk:
    """Some numbers for each place of the training rows, on disk, as a teacher gives them: what both caches below share.

    They lie in a folder beside the shards that names teacher, precision, row length and what is stored: a file for each
    kind of number, done.bin (a byte per chunk of rows: whether it is written) and meta.json. They are written once, in
    chunks that any process of any run may fill in (`fill`). A subclass has `read_teacher`, and what batches ask for.
    Raises BadInput where the folder cannot be written, or is of other data.
    """
    CHUNK_ROWS = 64

    def __init__(self, sha256, data, dtype, name, stored, columns):
        """sha256: the hash of the teacher's weights; dtype: the precision it is run in; name, stored: what is stored,
        as the folder's name and as meta.json say it; columns: {file: (type of its numbers, how many a place)}.
        """
        self.vocab_size = data.meta["vocab_size"]
        self.folder = os.path.join(data.path, f"teacher-{sha256}-{dtype}-{data.length}-{name}")
        self.meta_file = self.path("meta.json")
        self.done_file = self.path("done.bin")
        n_chunks = math.ceil(len(data) / self.CHUNK_ROWS)
        sizes = {self.done_file: n_chunks}
        shapes = {}
        for file, (number, width) in columns.items():
            shapes[file] = (len(data), data.length - 1, width)
            sizes[self.path(file)] = np.dtype(number).itemsize * math.prod(shapes[file])
        # what the values are of: a folder that says otherwise is refused
        meta = dict(teacher=sha256, dtype=dtype, length=data.length) | stored | dict(rows=len(data))
        meta["shards"] = data.hashes()
        if not os.path.exists(self.meta_file):
            # processes and runs share a cache: one makes its files, the others wait
            with writing(self.folder, wait=True), naming(self.folder):
                if not os.path.exists(self.meta_file):
                    self._create(data, meta, sizes)
        self._check(data, meta, sizes)
        self.done = np.memmap(self.done_file, np.uint8, "r")
        self.columns = {}
        for file, (number, _) in columns.items():
            self.columns[file] = np.memmap(self.path(file), number, "r", shape=shapes[file])
        rows = np.arange(len(data))
        ends = np.concatenate([rows[:self.CHUNK_ROWS], rows[-self.CHUNK_ROWS:]])
        if self.done.max(initial=0) > 1 or not self.is_sound(self.load(ends)):
            raise BadInput(f"{self.folder} is damaged: remove it, it is written again")

    def path(self, name):
        return os.path.join(self.folder, name)

    def _create(self, data, meta, sizes):
        """Make the files at their full size, and meta.json last: where it is, the others are complete."""
        size = sum(sizes.values())
        free = shutil.disk_usage(data.path).free
        if free < size:
            raise BadInput(f"a cache of the teacher's answers on {data.path} takes "
                           f"{size / 1e9:.1f} GB, and {free / 1e9:.1f} are free: "
                           "leave --teacher_cache out, or choose a smaller one (quantile noise: all have one size)")
        self.prepare(data)
        for path, length in sizes.items():
            with open(path, "ab") as f:                    # "ab" never empties: another run may be at it
                f.truncate(length)
        write_json(self.meta_file, meta)

    def prepare(self, data):
        """Write what depends on the data alone."""

    def _check(self, data, meta, sizes):
        """BadInput where the files are damaged, or of other data."""
        try:
            found = read_json(self.meta_file)
            self.read_prepared()
        except (OSError, ValueError, EOFError) as e:
            raise BadInput(f"{self.folder} cannot be read ({e}): remove {self.folder}, "
                           "it is written again") from None
        wrong_size = any(not os.path.exists(path) or os.path.getsize(path) != size
                         for path, size in sizes.items())
        if found != meta or wrong_size:
            raise BadInput(f"{self.folder} is truncated, or of other data than {data.path} holds now: "
                           "remove it, it is written again")

    def read_prepared(self):
        """Read what `prepare` has written. Raises OSError, ValueError or EOFError where it is damaged."""

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
            # values first, on disk: what is marked done can be trusted after any crash
            for file, values in self.values_of(teacher, data, rows).items():
                column = self.columns[file]
                self._write(self.path(file), first * column[0].nbytes, values.astype(column.dtype))
            self._write(self.done_file, c, b"\1")

    def values_of(self, teacher, data, rows):
        """What is stored of these rows: {file: [rows * (L - 1), numbers a place]}."""
        tokens = torch.from_numpy(data.rows(rows)).to(teacher.device)
        h = torch.cat([teacher.hidden(x) for x in tokens[:, :-1].split(8)]).flatten(0, 1)
        x = tokens[:, 1:].flatten()
        parts = []
        chunk = max(1, DEVICE.chunk // teacher.vocab_size)        # positions whose logits are held at once
        for h_part, x_part in zip(h.split(chunk), x.split(chunk)):
            try:
                parts.append(self.read_teacher(teacher.logits(h_part), x_part))
            except ValueError as e:
                raise BadInput(f"the teacher gives a token in rows {rows.start} to {rows.stop} of "
                               f"{data.path} {e}: it does not fit this text") from None
        return {file: torch.cat([part[file] for part in parts]).cpu().numpy() for file in parts[0]}

    def _write(self, path, offset, what):
        # written, not mapped: on a full disk a map dies of SIGBUS, and this raises an OSError
        with naming(path), open(path, "r+b") as f:
            f.seek(offset)
            f.write(what)
            f.flush()
            os.fsync(f.fileno())

    # reading

    def for_rows(self, loaded):
        """The next batch holds the rows that `load` returned this for. Returns self."""
        self.loaded = loaded
        return self


class TeacherCache(RowsOnDisk):
    """The teacher's k most probable tokens at every position of the training rows, on disk: noise without a teacher.

    Per position: the ids of the k tokens, their -log p, and that of the token which is there. All are uint16, the -log
    p in 1/2048 nat (so that they are off by less than 3e-4): 4 k + 2 bytes, 307 GB for the 9.04 G tokens of OpenWebText
    at k = 8. They are in topk.bin; ids of a vocabulary of more than 65,536 are uint32, in ids.bin: 6 k + 2 bytes. What
    this leaves out, and what it costs: `truncated_logits`. frequency.npy: how often the text has each token.
    """
    STEPS_PER_NAT = 2048
    expand = staticmethod(truncated_logits)

    def __init__(self, teacher, sha256, data, k, dtype="float32"):
        self.k = min(k, teacher.vocab_size)
        self.wide = id_type(teacher.vocab_size) != np.uint16
        columns = {"topk.bin": ("<u2", 2 * self.k + 1)}
        if self.wide:
            columns = {"ids.bin": ("<u4", self.k), "topk.bin": ("<u2", self.k + 1)}
        super().__init__(sha256, data, dtype, f"k{self.k}", dict(k=self.k), columns)
        self.frequency = self.frequency.to(teacher.device)

    def prepare(self, data):
        with replacing(self.path("frequency.npy"), "wb") as f:
            np.save(f, data.frequency())

    def read_prepared(self):
        frequency = np.load(self.path("frequency.npy"))
        if frequency.shape != (self.vocab_size,) or frequency.dtype != np.float32:
            raise ValueError("frequency.npy is of another vocabulary")
        if not (frequency > 0).all() or abs(frequency.sum() - 1) > 1e-3:           # (nan is not above 0)
            raise ValueError("frequency.npy holds no frequencies")
        self.frequency = torch.from_numpy(frequency)       # [V]

    def read_teacher(self, logits, tokens):
        """The teacher's logits [N, V] behind tokens [N] -> {file: [N, numbers a place]}. Raises ValueError."""
        logp = logits.log_softmax(-1)
        top, ids = logp.topk(self.k)
        logp_x = logp.gather(1, tokens[:, None])
        if not logp_x.isfinite().all():
            raise ValueError("probability 0, or nan")
        nats = torch.cat([top, logp_x], 1).neg()
        steps = (nats * self.STEPS_PER_NAT).round().clamp(0, 65535).long()
        if self.wide:
            return {"ids.bin": ids, "topk.bin": steps}
        return {"topk.bin": torch.cat([ids, steps], 1)}

    def load(self, rows):
        """What is stored of these rows of the dataset, [B, L - 1, 2 k + 1]: the ids, then the values.

        torch moves no uint16: as int16, or, where the ids are wider, as int32.
        """
        values = self.columns["topk.bin"][rows]
        if self.wide:
            return torch.from_numpy(np.concatenate([self.columns["ids.bin"][rows], values], -1).view(np.int32))
        return torch.from_numpy(values.view(np.int16))

    def is_sound(self, loaded):
        ids = unsigned(loaded)[..., :self.k]
        return bool(((ids >= 0) & (ids < self.vocab_size)).all())

    def posterior_logits(self, tokens, masked):
        """A function (a, b) -> float32 logits [b - a, V], `truncated_logits` of the masked tokens number a to b.

        tokens, masked [B, L], of the rows that `for_rows` named. BOS is never masked.
        """
        values = self.loaded.to(tokens.device, non_blocking=True)
        values = unsigned(values[masked[:, 1:]])  # (N, 2 k + 1)
        ids = values[:, :self.k].long()
        nats = values[:, self.k:].float() / self.STEPS_PER_NAT
        p, p_w = nats.neg().exp().split([self.k, 1], 1)  # (N, k), (N, 1)
        x = tokens[:, 1:][masked[:, 1:]]  # (N)
        return lambda a, b: self.expand(p[a:b], ids[a:b], p_w[a:b], self.frequency, x[a:b])


def unsigned(x):
    """What torch holds as int16 in place of uint16, as int32; int32 as it is."""
    if x.dtype == torch.int32:
        return x
    return x.int() & 0xFFFF


class QuantileCache(RowsOnDisk):
    """Where the quantile noise of each token of the training rows lies (`interval_of`): 12 bytes a token, 108 GB for
    OpenWebText, and exact. In beginning.bin and length.bin.
    """

    def __init__(self, sha256, data, dtype="float32"):
        columns = {"beginning.bin": ("<f8", 1), "length.bin": ("<f4", 1)}
        super().__init__(sha256, data, dtype, "quantile", dict(noise="quantile"), columns)

    def read_teacher(self, logits, tokens):
        """The teacher's logits [N, V] behind tokens [N] -> {file: [N, 1]}. Raises ValueError."""
        beginning, length = interval_of(logits, tokens)
        if not beginning.isfinite().all():
            raise ValueError("probability 0, or nan")
        return {"beginning.bin": beginning[:, None], "length.bin": length[:, None]}

    def load(self, rows):
        """The beginnings and lengths of these rows of the dataset, [B, L - 1, 2] float64."""
        parts = [self.columns[file][rows].astype(np.float64) for file in ("beginning.bin", "length.bin")]
        return torch.from_numpy(np.concatenate(parts, -1))

    def is_sound(self, loaded):
        beginning, length = loaded.unbind(-1)
        return bool(((beginning >= 0) & (length >= 0) & (beginning + length < 1)).all())      # (nan is not)

    def posterior_logits(self, tokens, masked):
        """In the place of logits, the intervals of the masked tokens, ([N], [N]): see `QuantileEmbedding.posterior`."""
        interval = self.loaded.to(tokens.device, non_blocking=True)[masked[:, 1:]]
        beginning, length = interval.unbind(-1)
        return beginning, length.float()
