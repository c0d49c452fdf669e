"""What a run of the paper lacks on a fresh machine, said at once: its data and its teacher, what they weigh, and the
commands that get them.
"""
import importlib.util
import os

from data.cli import BadInput
from teacher import GPT2_SIZES, gpt2_folder

# GB of shards, GB of text that is streamed for them
DATA = {"openwebtext": (18, 40), "lm1b": (2, 4)}
TEACHERS = {"gpt2": 0.5, "gpt2-medium": 1.5, "gpt2-large": 3.2, "gpt2-xl": 6.4}            # GB, as published


def refuse(data, teacher):
    """BadInput for a run whose data folder is not there, and is one that `prepare.py` makes by name. teacher: what
    --teacher names, or the paper's; None where none is read.
    """
    name = os.path.basename(os.path.normpath(data))
    if name not in DATA:
        return
    shards, text = DATA[name]
    packages = "" if importlib.util.find_spec("datasets") else "pip install datasets && "
    lacks = [f"the data {data}, {shards} GB: `{packages}python data/prepare.py {name}` (streams {text} GB of text)"]
    if teacher in GPT2_SIZES and not os.path.exists(os.path.join(gpt2_folder(teacher), "model.safetensors")):
        lacks.append(f"the teacher {teacher}, {TEACHERS[teacher]} GB: fetched when training starts, or now by "
                     f"`python sample.py --ckpt={teacher} --n=1 --length=2`")
    elif teacher and teacher not in GPT2_SIZES and not teacher.startswith("hf:") and not os.path.exists(teacher):
        lacks.append(f"the teacher {teacher}, which is no file or folder here")
    raise BadInput(f"not here yet: {'; '.join(lacks)}")
