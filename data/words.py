"""Words: a list of them, one a row, a letter a token. Success is a word of the list, held-out ones included.
"""
import os
import re
import string

from data.cli import BadInput
from data.documents import expand, stream_files

ROW = 11                                                   # tokens of a row: with BOS 12, which blocks divide
WORD = re.compile(rf"[a-z]{{3,{ROW}}}")                    # no names, which are not lower case, and no apostrophes
LETTERS = string.ascii_lowercase
SYSTEM_LIST = "/usr/share/dict/words"


def read_words(files=None):
    """The distinct words of these files, one a line, those of 3 to 11 lower-case letters, in their order; by default
    the system's list. Raises BadInput.
    """
    if not files and not os.path.exists(SYSTEM_LIST):
        raise BadInput(f"words come from {SYSTEM_LIST}, which is not here: apt-get install wamerican (macOS has a "
                       "list), or give one with --files")
    paths = expand(files or [SYSTEM_LIST])
    words = {}                                             # as an ordered set
    for _, text, _ in stream_files(paths, separator="\n"):
        text = text.strip()
        if WORD.fullmatch(text):
            words[text] = None
    return list(words)
