"""Molecules: QM9's, written as SMILES, one a row. Success is a string that is a molecule, by `partialsmiles`.

Up to nine heavy atoms (C N O F), so that 22 tokens are enough; a row has 23, and with BOS 24, which blocks divide.
"""
import importlib.util
import os
import re

import numpy as np
from tqdm import tqdm

from data.cli import BadInput, optional
from data.documents import expand, stream_files

ROW = 23                                                   # tokens of a row, EOS included
QM9_FILES = ("qm9_part1.csv", "qm9_part2.csv", "qm9_part3.csv")
FIELD = "SMILES"                                           # a .csv's column
# what a SMILES string is made of (Schwaller et al. 2018): an atom in brackets, an atom of two letters, a chirality, a
# ring number of two digits; else a character
TOKEN = re.compile(r"\[[^\]]*\]|Br|Cl|@@|%\d\d|.")


def smiles_tokens(text):
    """A SMILES string -> the list of its tokens."""
    return TOKEN.findall(text)


def read_molecules(files=None):
    """The distinct SMILES strings of these files (.smi or text: the first word of a line; .csv: the column SMILES), in
    their order; by default QM9, as the package `qm9pack` brings it. Raises BadInput.
    """
    paths = expand(files) if files else qm9_paths()
    strings = {}                                           # as an ordered set
    for _, text, _ in stream_files(paths, separator="\n", field=FIELD):
        words = text.split()                               # (a .smi line goes on with the molecule's name)
        if words:
            strings[words[0]] = None
    return list(strings)


def qm9_paths():
    """Where QM9's tables lie. The package is not imported: it would ask for pandas."""
    package = importlib.util.find_spec("qm9pack")
    if package is None:
        raise BadInput("molecules are QM9's, from the package qm9pack: pip install --no-deps qm9pack (104 MB), or give "
                       "your own with --files")
    folder = os.path.join(package.submodule_search_locations[0], "data")
    return expand([os.path.join(folder, name) for name in QM9_FILES])


def valid_molecules(strings):
    """Strings [N] -> [N] bool: whether each is a molecule: its syntax, rings and valences. '' is none."""
    partialsmiles = optional("partialsmiles", "evaluate.py success on molecules")
    known = {}                                             # each distinct one is parsed once
    for text in tqdm(dict.fromkeys(strings), desc="molecules", unit="", leave=False, mininterval=1, delay=2):
        known[text] = is_molecule(partialsmiles, text)
    return np.array([known[text] for text in strings], dtype=bool)


def is_molecule(partialsmiles, text):
    if not text:
        return False
    try:
        partialsmiles.ParseSmiles(text, partial=False)
    except partialsmiles.Error:
        return False
    return True


def canonical(strings):
    """Valid strings -> their canonical forms, by rdkit, or None where rdkit is not installed. A string that rdkit
    refuses stays as it is.
    """
    if importlib.util.find_spec("rdkit") is None:
        return None
    from rdkit import Chem, RDLogger
    RDLogger.DisableLog("rdApp.*")                         # it prints a line for each string that it refuses
    forms = []
    for text in strings:
        molecule = Chem.MolFromSmiles(text)
        forms.append(text if molecule is None else Chem.MolToSmiles(molecule))
    return forms
