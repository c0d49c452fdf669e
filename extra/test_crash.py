"""What happens when a command is killed, when two write at once, and when the disk is full: in real processes.

    python -m pytest -q extra/test_crash.py                # CRASH_SEED=1 draws other moments

After any of these the same command is repeated, and ends with what it gives when nothing happens: weights, averages,
moments and logged losses bit for bit, shards byte for byte. Nothing half-made is left over.

In this order: processes; kill -9 at twenty random moments; two writers; a full disk.
"""
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import evaluate
import sample
import train
from data import prepare
from test_gumbel import HERE, NOISY, TEXT, refused, run_in, same_checkpoints, succeeded
from test_gumbel import cli, text_runs  # noqa: F401, the fixtures

SEED = int(os.environ.get("CRASH_SEED", 0))
SECONDS = 120                                              # in which every process here ends, or begins its work
slow = pytest.mark.slow


# ---------------------------------------------------------------------------------------------------------------------
# processes

@pytest.fixture(autouse=True)
def one_thread():
    """As in the processes that are started: another number of threads rounds differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def folders(text_runs, tmp_path):
    """Two working folders with the same data and models: one is left alone, in the other things happen."""
    found = []
    for name in ("alone", "other"):
        folder = tmp_path / name
        for part in ("data/mine", "out/ar", "out/plain"):
            shutil.copytree(text_runs / part, folder / part)
        shutil.copy(text_runs / "x.jsonl", folder)
        found.append(folder)
    return found


# prepare.py, which commits every 20,000 characters in place of 33 million tokens
SMALL_COMMITS = """
from data import prepare
from data.cli import run_main
take = prepare.take
prepare.take = lambda stream, chars: take(stream, 20_000)
prepare.COMMIT = 1
run_main(prepare.main)
"""


def command(script, flags, processes=1):
    """What starts a command: a script of the project, or "prepare", with small commits."""
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    if script == "prepare":
        launch += ["-c", SMALL_COMMITS]
    else:
        launch.append(os.path.join(HERE, script))
    return [*launch, *flags.split()]


def start(folder, line, largest_file=None):
    """A process in a folder, in a group of its own. `largest_file`: bytes, as if the disk were full beyond."""
    def limit():
        if largest_file is not None:                       # Python ignores SIGXFSZ: writes raise an OSError
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    # not a pipe, which would fill up; made before the limit, and of a process that writes less
    output = tempfile.TemporaryFile("w+", newline="")
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=HERE)
    p = subprocess.Popen(line, cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=output, preexec_fn=limit,
                         start_new_session=True)
    p.output = output
    return p


def said(p):
    """What a process has said on stderr, but for what its bars have overwritten."""
    p.output.seek(0)
    lines = p.output.read().split("\n")
    return "\n".join(line.rsplit("\r")[-1] for line in lines)


def ended(p):
    """The exit code of a process and what it said, when it has ended."""
    return p.wait(SECONDS), said(p)


def finish(folder, line):
    """Run a command to its end, which is a good one."""
    code, err = ended(start(folder, line))
    assert code == 0, err


def wait_until(sign, p):
    """Wait for sign() -> bool; False where the process ends before."""
    deadline = time.time() + SECONDS
    while not sign():
        assert time.time() < deadline, said(p)
        if p.poll() is not None:
            return False
        time.sleep(0.002)
    return True


def kill(p):
    with suppress(ProcessLookupError):                     # it has ended
        os.killpg(p.pid, signal.SIGKILL)
    p.wait()


def kill_all(p, folder):
    """Kill a process and all that run in this folder: torchrun's workers have groups of their own."""
    kill(p)
    others = [True]
    while others:                                          # one may just have been started
        others = []
        for cwd in Path("/proc").glob("[0-9]*/cwd"):
            with suppress(OSError):                        # it has ended, or is not ours
                if os.path.samefile(cwd, folder) and int(cwd.parent.name) != os.getpid():
                    others.append(int(cwd.parent.name))
        for pid in others:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def stamp(path):
    """What changes when a file is written."""
    try:
        facts = os.stat(path)
    except FileNotFoundError:
        return None
    return facts.st_mtime_ns, facts.st_size, facts.st_ino


def is_new(path, before):
    return stamp(path) not in (None, before)


def kill_repeatedly(folder, line, find, kills, longest, rng, first=2.0):
    """Start a command and kill it, so many times: once up to `first` seconds after its start, imports included, then up
    to `longest` seconds after it has written to the file that find() names (or None) for the first time.
    """
    hits = 0
    for i in range(kills):
        path = find()
        before = path and stamp(path)
        p = start(folder, line)
        if i == 0:
            time.sleep(rng.uniform(0, first))
        elif not wait_until(lambda: find() is not None and is_new(find(), before), p):
            break
        else:
            time.sleep(rng.uniform(0, longest))
        hits += p.poll() is None
        kill_all(p, folder)
    assert hits > kills / 2, f"only {hits} of {kills} processes were there to be killed: {said(p)}"


def left_over(folder):
    return [path for path in folder.rglob("*") if path.name.endswith(".tmp")]


def files_in(folder):
    """{path within the folder: bytes}."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def data_in(folder):
    """All of a working folder's data, but for the lock that a teacher's cache keeps, which names a process."""
    files = files_in(folder / "data")
    return {path: content for path, content in files.items() if not path.match("teacher-*/lock")}


def logged(folder):
    """All losses of a run, of training and of validation, by step."""
    with open(folder / "log.jsonl") as f:
        lines = [json.loads(line) for line in f]
    return [(line["step"], name, line[name]) for line in lines for name in sorted(line)
            if name == "loss" or name.startswith("val_")]


def same_runs(a, b):
    return same_checkpoints(a / "ckpt.pt", b / "ckpt.pt") and logged(a) == logged(b)


def same_results(a, b, file):
    """Whether two folders hold the same samples and the same table, but for the seconds."""
    def timeless(rows):
        return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]
    found = []
    for folder in (a, b):
        samples = {}
        for path in (folder / "out/samples").glob("*.jsonl"):
            samples[path.name] = timeless(json.loads(line) for line in path.read_text().splitlines())
        found.append((samples, timeless(json.loads((folder / file).read_text())["rows"])))
    return found[0] == found[1]


# ---------------------------------------------------------------------------------------------------------------------
# kill -9

STUDENT = f"{NOISY} {TEXT} --dropout=0.1 --micro_batch_size=4 --out=out/new"
CACHED = f"{NOISY} {TEXT} --steps=2 --teacher_cache=4 --out=out/new"
SHARDS = "--ckpt=out/ar --shards=data/new --n=600 --batch_size=4"
TABLE = "genppl --judge=out/ar --ckpt out/plain --n=400 --batch_size=8 --nfe=23 --json=table.json"
PREPARE = "text --files x.jsonl --tokenizer=bytes --out=data/new"


@slow
@pytest.mark.parametrize("processes, steps, kills", [(1, 150, 6), (2, 60, 3)])
def test_training_that_is_killed_anywhere_continues_bit_for_bit(folders, processes, steps, kills):
    """With noise, dropout and micro-batches, a checkpoint every second step; torchrun's whole group is killed."""
    alone, killed = folders
    line = command("train.py", f"{STUDENT} --steps={steps}", processes)
    finish(alone, line)
    ckpt = killed / "out/new/ckpt.pt"
    kill_repeatedly(killed, line, lambda: ckpt, kills, 0.2, random.Random(SEED + processes))
    finish(killed, line)
    assert same_runs(alone / "out/new", killed / "out/new")
    assert len({step for step, name, _ in logged(killed / "out/new") if name == "loss"}) == steps
    assert not left_over(killed)


@slow
def test_prepare_that_is_killed_anywhere_makes_the_same_shards(folders):
    """With some 200 commits."""
    alone, killed = folders
    for folder in folders:
        text = (folder / "x.jsonl").read_text()
        (folder / "x.jsonl").write_text(40 * text)
    run_in(alone, (prepare, PREPARE))
    kill_repeatedly(killed, command("prepare", PREPARE), lambda: killed / "data/new.partial/progress.json", 4, 0.1,
                    random.Random(SEED), first=0.4)
    assert not (killed / "data/new").exists()
    finish(killed, command("prepare", PREPARE))
    assert data_in(alone) == data_in(killed)


@slow
def test_a_teachers_pass_that_is_killed_anywhere_makes_the_same_cache_and_run(folders):
    alone, killed = folders
    line = command("train.py", CACHED)
    finish(alone, line)

    def done():
        return next(killed.glob("data/mine/teacher-*/done.bin"), None)
    kill_repeatedly(killed, line, done, 3, 0.1, random.Random(SEED))
    finish(killed, line)
    assert data_in(alone) == data_in(killed)
    assert same_runs(alone / "out/new", killed / "out/new")
    assert not left_over(killed)


@slow
def test_shards_of_a_teachers_text_that_are_killed_anywhere_are_the_same(folders):
    alone, killed = folders
    run_in(alone, (sample, SHARDS))
    kill_repeatedly(killed, command("sample.py", SHARDS), lambda: killed / "data/new.partial/progress.json", 2, 0.5,
                    random.Random(SEED))
    finish(killed, command("sample.py", SHARDS))
    assert data_in(alone) == data_in(killed)


@slow
def test_a_table_that_is_killed_anywhere_is_the_same_and_leaves_no_half_samples(folders):
    alone, killed = folders
    finish(alone, command("evaluate.py", TABLE))

    def half():
        return max(killed.glob("out/samples/*.tmp"), key=os.path.getmtime, default=None)
    kill_repeatedly(killed, command("evaluate.py", TABLE), half, 2, 0.1, random.Random(SEED))
    finish(killed, command("evaluate.py", TABLE))
    assert same_results(alone, killed, "table.json")
    assert not left_over(killed)


# ---------------------------------------------------------------------------------------------------------------------
# two writers

def holds(lock, p):
    """Whether a process has written its number into a lock."""
    try:
        return lock.read_text().split()[:1] == [str(p.pid)]
    except FileNotFoundError:
        return False


# a module, its script, its flags, the folder that it writes, where its lock is
WRITERS = {
    "train": (train, "train.py", f"{STUDENT} --steps=40", "out/new", "out/new/lock"),
    "prepare": (prepare, "prepare", PREPARE, "data/new", "data/new.partial/lock"),
    "shards": (sample, "sample.py", SHARDS, "data/new", "data/new.partial/lock"),
}


@slow
@pytest.mark.parametrize("end", [signal.SIGCONT, signal.SIGKILL])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_second_writer_is_refused_by_the_number_of_the_first_and_changes_nothing(folders, cli, monkeypatch, writer,
                                                                                   end):
    """The first is held once it has its lock. Then it goes on to the right end; or it is killed, and the second's
    command is repeated to the same.
    """
    alone, other = folders
    module, script, flags, out, lock = WRITERS[writer]
    run_in(alone, (module, flags))
    p = start(other, command(script, flags))
    try:
        assert wait_until(lambda: holds(other / lock, p), p), said(p)
        p.send_signal(signal.SIGSTOP)
        before = files_in(other)
        monkeypatch.chdir(other)
        began = time.time()
        refused(cli(module, flags), f"pid {p.pid} on", out, "--out")
        assert time.time() - began < 10
        assert files_in(other) == before
        p.send_signal(end)
        code, err = ended(p)
    finally:
        kill(p)
    if end == signal.SIGKILL:
        succeeded(cli(module, flags))
    else:
        assert code == 0, err
    if writer == "train":
        assert same_runs(alone / out, other / out)
    assert data_in(alone) == data_in(other)
    assert not left_over(other) and not (other / lock).exists()


@slow
def test_two_tables_at_once_draw_the_same_samples_and_neither_removes_what_the_other_writes(folders, cli, monkeypatch):
    """The first is held in the middle of its samples."""
    alone, other = folders
    run_in(alone, (evaluate, TABLE))
    p = start(other, command("evaluate.py", TABLE))
    try:
        assert wait_until(lambda: any(other.glob("out/samples/*.tmp")), p), said(p)
        p.send_signal(signal.SIGSTOP)
        half = left_over(other)
        monkeypatch.chdir(other)
        succeeded(cli(evaluate, TABLE))
        assert left_over(other) == half
        p.send_signal(signal.SIGCONT)
        code, err = ended(p)
    finally:
        kill(p)
    assert code == 0, err
    assert same_results(alone, other, "table.json")
    assert not left_over(other)


@slow
def test_two_runs_that_make_one_cache_at_once_both_get_it(folders):
    alone, other = folders
    finish(alone, command("train.py", CACHED))
    both = [start(other, command("train.py", CACHED.replace("out/new", f"out/new{i}"))) for i in range(2)]
    for p in both:
        code, err = ended(p)
        assert code == 0, err
    assert data_in(alone) == data_in(other)
    for i in range(2):
        assert same_runs(alone / "out/new", other / f"out/new{i}")
    assert not left_over(other)


# ---------------------------------------------------------------------------------------------------------------------
# a full disk

def full_disk(folder, script, flags, largest_file, *names):
    """Run a command that runs out of room: exit code 2, one sentence that holds these names, nothing half-made."""
    result = ended(start(folder, command(script, flags), largest_file))
    code, err = result
    refused((code, "", err), *names)
    assert not left_over(folder), err


@slow
def test_training_on_a_full_disk_keeps_its_checkpoint_and_continues(folders, cli, monkeypatch):
    alone, other = folders
    flags = f"{STUDENT} --steps=8"
    run_in(alone, (train, flags))
    run_in(other, (train, flags.replace("--steps=8", "--steps=4")))
    ckpt = other / "out/new/ckpt.pt"
    before = ckpt.read_bytes()
    full_disk(other, "train.py", flags, len(before) // 2, "out/new")
    assert ckpt.read_bytes() == before
    assert torch.load(ckpt, weights_only=True)["step"] == 4
    monkeypatch.chdir(other)
    succeeded(cli(train, flags))
    assert same_runs(alone / "out/new", other / "out/new")


@slow
def test_training_on_a_disk_that_is_full_from_the_first_checkpoint_on_can_be_repeated(folders, cli, monkeypatch):
    alone, other = folders
    flags = f"{STUDENT} --steps=4"
    run_in(alone, (train, flags))
    full_disk(other, "train.py", flags, 20_000, "out/new")
    monkeypatch.chdir(other)
    succeeded(cli(train, flags))
    assert same_runs(alone / "out/new", other / "out/new")


# a script, its module, its flags, the bytes that a file may have, what the sentence names
DATA_WRITERS = {
    "prepare": ("data/prepare.py", prepare, PREPARE, 40_000, "data/new"),
    "prepare with commits": ("prepare", prepare, PREPARE, 120_000, "data/new"),
    "maze": ("data/prepare.py", prepare, "maze --out=data/new", 10_000, "data/new"),
    "shards": ("sample.py", sample, SHARDS.replace("600", "100"), 2500, "data/new"),
    "teacher cache": ("train.py", train, CACHED, 100_000, "teacher-"),
}


@slow
@pytest.mark.parametrize("writer", DATA_WRITERS)
def test_data_on_a_full_disk_is_refused_and_continued_to_the_same(folders, cli, monkeypatch, writer):
    alone, other = folders
    script, module, flags, largest_file, name = DATA_WRITERS[writer]
    run_in(alone, (module, flags))
    full_disk(other, script, flags, largest_file, name)
    assert not (other / "data/new").exists()
    monkeypatch.chdir(other)
    succeeded(cli(module, flags))
    assert data_in(alone) == data_in(other)


@slow
def test_samples_on_a_full_disk_are_refused_and_can_be_repeated(folders, cli, monkeypatch):
    """No half file is left under the name, so that the same command is not refused."""
    alone, other = folders
    flags = "--ckpt=out/plain --n=64 --steps=2 --out=new.jsonl"
    run_in(alone, (sample, flags))
    full_disk(other, "sample.py", flags, 4096, "new.jsonl")
    monkeypatch.chdir(other)
    succeeded(cli(sample, flags))
    assert (alone / "new.jsonl").read_bytes() == (other / "new.jsonl").read_bytes()


@slow
def test_kept_samples_on_a_full_disk_are_refused_and_can_be_repeated(folders, cli, monkeypatch):
    alone, other = folders
    flags = TABLE.replace("23", "2")
    run_in(alone, (evaluate, flags))
    full_disk(other, "evaluate.py", flags, 4096, "out/samples")
    assert not any(other.glob("out/samples/*")) and not (other / "table.json").exists()
    monkeypatch.chdir(other)
    succeeded(cli(evaluate, flags))
    assert same_results(alone, other, "table.json")


@slow
def test_a_table_on_a_full_disk_is_refused_and_keeps_the_earlier_file(folders, cli, monkeypatch):
    """The samples are there: only the file of the table has no room."""
    _, other = folders
    flags = TABLE.replace("23", "2")
    run_in(other, (evaluate, flags))
    (kept,) = (other / "out/samples").iterdir()
    before = (other / "table.json").read_bytes()
    flags = f"{flags} --samples={kept.relative_to(other)}"
    full_disk(other, "evaluate.py", flags, len(before) // 2, "table.json")
    assert (other / "table.json").read_bytes() == before
    monkeypatch.chdir(other)
    succeeded(cli(evaluate, flags))
    assert json.loads((other / "table.json").read_text())["rows"][0]["nfe"] == 2
