"""Runs of several processes: what they see is compared, a stop is agreed upon, gradients and weights are equal."""
import os
import shutil
import socket
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

import sample
import train
from bd3lm import BD3LM
from data.cli import BadInput
from extra.test_crash import SECONDS, folders, one_thread, same_runs  # noqa: F401
from test_gumbel import HERE, NOISY, TEXT, jsonl
from test_gumbel import cli, text_runs  # noqa: F401, the fixtures

slow = pytest.mark.slow
BLOCKS = (f"--model=bd3lm {NOISY} {TEXT} --clip_search --dropout=0.1 --micro_batch_size=4 --steps=8 --out=out/new")

# train.py, in which a process gets a SIGTERM in a certain call
WITH_A_STOP = """
import os, signal, sys
import torch
import train
from bd3lm import BD3LM
from data.cli import run_main

place, number, rank = sys.argv.pop(1).split(":")
calls = {"micro-step": 0, "validation": 0, "clip search": 0}
searching = []
losses, search = BD3LM.losses, train.search_clip

def counted(self, *args, **kw):
    here = "micro-step" if self.training else "clip search" if searching else "validation"
    calls[here] += 1
    if (here, calls[here]) == (place, int(number)) and os.environ.get("RANK", "0") == rank:
        os.kill(os.getpid(), signal.SIGTERM)
    return losses(self, *args, **kw)

def searched(*args):
    searching.append(1)
    try:
        return search(*args)
    finally:
        searching.clear()

BD3LM.losses, train.search_clip = counted, searched
run_main(train.main)
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_all(code, flags, folders):
    """Run train.py (`code`: a program in its place) as processes 0, 1 .. of a run, each in a folder: as if these were
    on machines of their own -> [(exit code, stderr)].
    """
    port = free_port()
    running = []
    for rank, folder in enumerate(folders):
        env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=HERE)
        if len(folders) > 1:
            env |= dict(RANK=str(rank), WORLD_SIZE=str(len(folders)), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                        LOCAL_RANK="0")
        line = [sys.executable, "-c", code or "import train; train.run_main(train.main)", *flags]
        running.append(subprocess.Popen(line, cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                        text=True))
    ends = []
    for p in running:
        _, err = p.communicate(timeout=SECONDS)
        ends.append((p.returncode, err))
    return ends


def timeless(path):
    """The lines of a log but for what depends on the clock and on memory."""
    clock = {"tokens_per_s", "data_wait_s", "peak_gb"}
    lines = jsonl(path)[1:]                                # the first holds the flags
    return [{name: value for name, value in line.items() if name not in clock} for line in lines]


# one after the other: before step 1, within step 3, after step 4, again after step 4, after the last step; which call,
# in which process
PLACES = ["clip search:25:0", "micro-step:{call}:{last}", "validation:1:0", "clip search:30:{last}",
          "validation:{second}:{last}"]


def run_one(cli, place, flags, folder):  # noqa: F811
    """As `run_all` in a single process, which is this one; place: where it gets a signal, or None."""
    with pytest.MonkeyPatch.context() as m:
        m.chdir(folder)
        if place:
            m.setattr(BD3LM, "losses", BD3LM.losses)       # (put back afterwards)
            m.setattr(train, "search_clip", train.search_clip)
            m.setattr(sys, "argv", ["train.py", place])
            exec(WITH_A_STOP.replace("run_main(train.main)", ""), {})
        code, _, err = cli(train, " ".join(flags))
    return [(code, err)]


@slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_stop_loses_nothing_wherever_it_comes(cli, folders, processes):  # noqa: F811
    """A signal to one process, within a step's accumulation, a validation, a clip search: all processes end as one
    does, and the same command goes on: to the run that was left alone.
    """
    alone, other = folders
    flags = BLOCKS.split()

    def train_in(folder, place=None):
        if processes == 1:
            return run_one(cli, place, flags, folder)
        return run_all(WITH_A_STOP if place else None, [place, *flags] if place else flags, [folder] * processes)
    assert [code for code, _ in train_in(alone)] == [0] * processes
    for place, step in zip(PLACES[:9 // processes], (0, 2, 4, 4, 8)):
        place = place.format(last=processes - 1, call=10 // processes, second=4 - processes)
        ends = train_in(other, place)
        assert [code for code, _ in ends] == [143] * processes, (place, ends)
        assert f"stopped at step {step}, saved" in ends[0][1], (place, ends)
    for _ in range(3 - processes):                         # the second time there is nothing left to do
        assert [code for code, _ in train_in(other)] == [0] * processes
    assert same_runs(alone / "out/new", other / "out/new")
    assert timeless(alone / "out/new/log.jsonl") == timeless(other / "out/new/log.jsonl")
    clips = [sample.load_checkpoint(str(folder / "out/new"))["clip"] for folder in folders]
    assert clips[0] == clips[1]


def other_run(folder):
    """The run of the first machine alone."""
    ends = run_all(None, [*f"--model=mdlm {NOISY} {TEXT} --steps=2 --out=out/new".split()], [folder])
    assert ends[0][0] == 0, ends


def other_teacher(folder):
    path = folder / "out/ar/ckpt.pt"
    ckpt = torch.load(path, weights_only=True)
    ckpt["ema"]["transformer.norm.bias"] += 1
    torch.save(ckpt, path)


def no_teacher(folder):
    shutil.rmtree(folder / "out/ar")


@slow
@pytest.mark.parametrize("change,words", [
    (other_run, ["checkpoint of step 2", "of no step"]), (other_teacher, ["teacher"]),
    (no_teacher, ["process 1 of 2", "out/ar"])])
def test_machines_that_see_different_files_train_nothing(folders, change, words):  # noqa: F811
    """Two processes, a folder each. (Other shards: see below.)"""
    one, two = folders
    change(one if change is other_run else two)
    ends = run_all(None, f"--model=mdlm {NOISY} {TEXT} --steps=4 --out=out/new".split(), [one, two])
    for code, err in ends:
        assert code == 2 and "Traceback" not in err, err
    for word in words:
        assert word in ends[0][1]
    if change is other_run:
        assert sample.load_checkpoint(str(one / "out/new"))["step"] == 2
    else:
        assert not (one / "out/new/ckpt.pt").exists()
    assert not (two / "out/new/ckpt.pt").exists()


def test_processes_meet_after_files_are_fetched_and_wait_as_long_as_that_takes(folders, monkeypatch):  # noqa: F811
    """For each other hours, so that a slow download or a teacher's pass does no harm; for gradients ten minutes."""
    events = []

    def gather(found, mine):
        events.append("compare")
        found[:] = [mine] * len(found)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, timeout: events.append((backend, timeout)))
    monkeypatch.setattr(dist, "new_group", lambda backend, timeout: events.append((backend, timeout)) or "gradients")
    monkeypatch.setattr(dist, "all_gather_object", gather)
    for name in ("load_ar", "load_model", "model_hash"):
        function = getattr(train, name)
        monkeypatch.setattr(train, name, lambda *args, _f=function, _n=name, **kw: events.append(_n) or _f(*args, **kw))
    monkeypatch.chdir(folders[0])
    monkeypatch.setenv("WORLD_SIZE", "2")
    flags = f"--model=mdlm {NOISY} {TEXT} --init_from=out/plain --noise=gumbel --out=out/new"
    monkeypatch.setattr(train, "new_model", lambda *args: torch.nn.Linear(1, 1))
    train.start(train.parse(flags.split()), train.World("float32"))
    assert events == ["load_ar", "model_hash", "load_model", ("gloo", timedelta(hours=12)),
                      ("gloo", timedelta(minutes=10)), "compare"]


@pytest.mark.parametrize("error", [BadInput("no such thing"), OSError("disk"), ZeroDivisionError()])
def test_what_fails_in_one_process_fails_in_all(monkeypatch, error):
    """In the one as it is, in the others as a sentence that says where; what they see differently is refused."""
    world = train.World("float32")
    world.size = 2
    monkeypatch.setattr(world, "connect", lambda: None)
    others = (None, {})

    def gather(found, mine):
        found[:] = [mine, others]
    monkeypatch.setattr(dist, "all_gather_object", gather)
    with pytest.raises(type(error)), world.together():
        raise error
    others = (str(error) or "ZeroDivisionError", {})
    with pytest.raises(BadInput, match=f"process 1 of 2: {str(error) or 'ZeroDivisionError'}"), world.together():
        pass
    others = (None, {"teacher": "abc", "shards": 1})
    with world.together() as seen:
        seen |= {"teacher": None, "shards": 1}
    assert seen["teacher"] == "abc"                        # what this process did not know
    with pytest.raises(BadInput, match="sees the shards 2, process 1 1"), world.together() as seen:
        seen |= {"teacher": None, "shards": 2}


# train.py, in which each process writes what it holds after each backward pass and each step
WITH_A_RECORD = """
import hashlib, os, sys
import torch
import train
from data.cli import run_main

step = torch.optim.AdamW.step

def digest(tensors):
    h = hashlib.sha256()
    for x in tensors:
        h.update(x.detach().numpy().tobytes())
    return h.hexdigest()

def recorded(self, *args, **kw):
    parameters = [p for group in self.param_groups for p in group["params"]]
    gradients = digest(p.grad for p in parameters)
    step(self, *args, **kw)
    with open(f"record{os.environ['RANK']}", "a") as f:
        f.write(f"{gradients} {digest(parameters)}\\n")

torch.optim.AdamW.step = recorded
if os.environ.get("BACKEND"):
    compile_module = torch.nn.Module.compile
    torch.nn.Module.compile = lambda self, *a, **kw: compile_module(self, *a, backend=os.environ["BACKEND"], **kw)
run_main(train.main)
"""


@slow
@pytest.mark.parametrize("flags", [f"--model=mdlm {NOISY} --micro_batch_size=4",
                                   f"--model=bd3lm {NOISY} --clip_search --micro_batch_size=8"])
def test_gradients_and_weights_are_equal_in_all_processes_at_every_step(folders, flags):  # noqa: F811
    folder, _ = folders
    ends = run_all(WITH_A_RECORD, f"{flags} {TEXT} --steps=5 --out=out/new".split(), [folder] * 2)
    assert [code for code, _ in ends] == [0, 0], ends
    records = [(folder / f"record{rank}").read_text().splitlines() for rank in (0, 1)]
    assert len(records[0]) == 5 and records[0] == records[1]
    assert len(set(records[0])) == 5                       # the weights did move
