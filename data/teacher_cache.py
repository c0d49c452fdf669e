"""What the teacher says about the training rows, kept: in memory for a small dataset, on disk for a large one.
"""
import json
import math
import os
import shutil

import numpy as np
import torch
from tqdm import tqdm

from data.cli import BadInput
from data.shards import write_json
from gumbel import CHUNK


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

    def __init__(self, teacher, sha256, data, k, master=True, dtype="float32"):
        self.k = min(k, teacher.vocab_size)
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
