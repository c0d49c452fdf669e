"""Samples on disk, one .jsonl file for each row of a table: the settings first, then an object for each sample.

evaluate.py writes them, and reads them with --samples=FILE; extra/judge.py sends them to a judge.
"""
import hashlib
import json
import math
import os

from data.cli import BadInput
from data.files import check_fields, list_of, naming, replacing, whole


def write_samples(folder, settings, samples):
    """Write the settings and the samples, as they come, to a .jsonl file of the folder -> a list of the samples.

    Other settings have another file; it appears when it is complete. BadInput where the folder cannot be written.
    """
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
    model = os.path.basename(settings["model"])
    name = f"{model}-{settings['decode']}-{settings['steps']}-{key}.jsonl"
    path = os.path.join(folder, name)
    with naming(folder):
        os.makedirs(folder, exist_ok=True)
    written = []
    # (another process may be drawing the same)
    with replacing(path, like=r".+-[0-9a-f]{12}\.jsonl") as f:
        f.write(json.dumps(dict(settings=settings)) + "\n")
        for sample in samples:
            f.write(json.dumps(sample) + "\n")
            written.append(sample)
    return written


def write_sample(out, sample):
    """Append a sample, a dict, to an open file, which goes if that fails."""
    with naming(out.name):
        try:
            out.write(json.dumps(sample) + "\n")
        except OSError:                         # half a file would only be in the way of the next try
            os.remove(out.name)
            raise


def names_file(path):
    """Whether --samples names a file to read; else it is a folder to write to."""
    return path.endswith(".jsonl")


# settings that say where and when samples were drawn, not how: they may differ from those of the flags
WHERE_DRAWN = {"path", "batch", "dtype", "device"}


def read_samples(path, settings, vocab_size):
    """The samples of a file that `write_samples` wrote, for a row with these settings; BadInput if it has others."""
    remedy = "name one that evaluate.py wrote, or a folder to write to"
    try:
        with open(path) as f:
            first, *samples = [json.loads(line) for line in f]
        found = first["settings"]
        found.items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise BadInput(f"--samples={path} is no file of samples ({type(e).__name__}): {remedy}") from None
    wanted = json.loads(json.dumps(settings))   # as they come back from a file
    for name, value in wanted.items():
        if name not in WHERE_DRAWN and found.get(name, "nothing said") != value:
            raise BadInput(f"--samples={path} was drawn with {name} {found.get(name)}, these flags ask "
                           f"for {value}: make them the same, or draw anew into a folder")
    if len(samples) != settings["n"]:
        raise BadInput(f"--samples={path} holds {len(samples)} of its {settings['n']} samples: "
                       "draw anew into a folder")
    ids = whole(0, vocab_size - 1)
    fields = dict(text=str, seconds=(lambda v: type(v) in (int, float) and 0 <= v < math.inf), nfe=whole(),
                  tokens=lambda v: list_of(ids)(v) and len(v) == settings["length"] - 1)
    for i, sample in enumerate(samples, start=2):
        check_fields(f"--samples={path}, line {i},", sample, fields, remedy)
        of_verified = ("verifier_calls" in sample, "positions" in sample)
        if of_verified != ("verifier" in settings, "draft" in settings):
            raise BadInput(f"--samples={path}, line {i}, is of another sampler: {remedy}")
    return samples
