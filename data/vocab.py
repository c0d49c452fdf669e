"""Tokenizers: text to token ids and back; and whether two of them are the same.

`Tokenizer(name)` is what the project uses. One small class for each kind does the work, below it.
"""
import hashlib
import itertools
import json
import os

import numpy as np

from data.cli import BadInput, optional
from data.molecules import smiles_tokens

MOST_IDS = 1 << 31                                         # torch, which has no uint32, reads them as int32
# what a fingerprint is taken from: scripts, spaces, digits, newlines, an emoji made of several characters
PROBE = ("Hello, world! It's 2024; don't  stop\t(now)\n\n  x_1 = 3.14159 * 100000 naïve café Straße ¿Qué? "
         "Привет мир, Καλημέρα, שלום, مرحبا, "
         "नमस्ते, 你好世界, こんにちは, 안녕하세요 "
         "\U0001f468\u200d\U0001f469\u200d\U0001f467 \r\nEND ")


class Tokenizer:
    """Tokenizer(name): text to ids and back. `vocab_size` ids, of which `bos` begins a row and separates documents.

    name: "gpt2" (through tiktoken); "bytes" (any file, no download); "chars:" and the characters it knows; "smiles:"
    and the tokens it knows, a space between each two; "hf:" and a Hugging Face name, folder or .gguf file (through
    transformers); "maze"; or "ids", numbers as they are, for a checkpoint that names no tokenizer: its `vocab_size`
    must be given where it matters, and it has no BOS.
    `chars`: the characters of a tokenizer of characters, else None. Raises BadInput.
    """

    def __init__(self, name, vocab_size=None):
        self.name = name
        self.codec = make_codec(name, vocab_size)
        self.vocab_size = self.codec.vocab_size
        self.bos = self.codec.bos
        self.chars = self.codec.chars
        self.ends = {self.bos, getattr(self.codec, "eos", self.bos)}   # the ids that separate documents
        if (self.vocab_size or 0) > MOST_IDS:
            raise BadInput(f"tokenizer {name[:40]} has {self.vocab_size} ids, "
                           f"but shards hold at most {MOST_IDS}")

    def encode(self, texts):
        """A list of str -> a list of arrays of ids, without BOS, as they lie on disk (`id_type`)."""
        dtype = id_type(self.vocab_size)
        return [np.array(row, dtype=dtype) for row in self.codec.encode(texts)]

    def decode(self, ids):
        """The ids of one row -> str. BOS, EOS and the like are no text."""
        ids = [int(i) for i in ids]
        if self.name != "ids":                             # [MASK] stands for no text; as a number it is shown
            ids = [i for i in ids if i < self.vocab_size]
        return self.codec.decode(ids)

    def fingerprint(self):
        """16 hex digits that say what this tokenizer does: a hash of its tokens by id and of a fixed text, encoded.

        It does not depend on names and paths. "ids", which says nothing about what the ids mean, has None.
        """
        tokens = self.codec.tokens()
        if tokens is None:
            return None
        # the tokens alone would not tell how a text is split into them; what a codec does not know, it would refuse
        probe = getattr(self.codec, "probe", PROBE)
        ids = [int(i) for i in self.codec.encode([probe])[0]]          # (numpy's and torch's ids are no JSON)
        content = json.dumps([sorted(tokens.items()), ids])
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def id_type(vocab_size):
    """How an id of a vocabulary lies on disk: uint16 up to 65,536 ids (and where their number is None), else uint32."""
    return np.dtype("<u4" if (vocab_size or 0) > 1 << 16 else "<u2")


def make_codec(name, vocab_size=None):
    """The object that does a tokenizer's work: the one place that reads its name."""
    if name == "gpt2":
        return GPT2()
    if name == "bytes":
        return Bytes()
    if name == "maze":
        return Characters("UDLR.")                         # the fifth is PAD
    if name == "ids":
        return Numbers(vocab_size)
    if name.startswith("chars:"):
        return Characters(name.removeprefix("chars:"))
    if name.startswith("smiles:"):
        return Smiles(name.removeprefix("smiles:").split())
    if name.startswith("hf:"):
        return HuggingFace(name.removeprefix("hf:"))
    raise BadInput(f"unknown tokenizer {name!r}: one of gpt2, bytes, hf:NAME, and for `text` chars")


# ---------------------------------------------------------------------------------------------------------------------
# the kinds. Each has vocab_size, bos, chars (None where it is not made of characters), encode(texts) -> sequences of
# ids, decode(ids) -> str, and tokens() -> {id: token as text}. An id that stands for no text is not among these

class GPT2:
    """GPT-2's byte-pair encoding, through tiktoken. BOS, EOS and document separator are one id."""
    vocab_size = 50257
    bos = 50256
    chars = None

    def __init__(self):
        import tiktoken                                    # here alone: bytes and characters do without
        try:
            self.bpe = tiktoken.get_encoding("gpt2")
        except Exception as e:                             # tiktoken lets through whatever its download raised
            raise BadInput(f"tiktoken could not fetch its GPT-2 files ({type(e).__name__}): go online once, or set "
                           "TIKTOKEN_CACHE_DIR to a folder that holds them") from None

    def encode(self, texts):
        # tiktoken releases the GIL: real threads, and the order is kept
        return self.bpe.encode_ordinary_batch(texts, num_threads=os.cpu_count())

    def decode(self, ids):
        return self.bpe.decode([i for i in ids if i != self.bos])

    def tokens(self):
        # as GPT-2's published vocab.json writes them, so that Hugging Face's GPT-2 has the same fingerprint
        letters = byte_letters()
        tokens = {self.bos: "<|endoftext|>"}
        for i in range(self.bos):
            tokens[i] = "".join(letters[b] for b in self.bpe.decode_single_token_bytes(i))
        return tokens


def byte_letters():
    """The characters that stand for the 256 bytes in GPT-2's files: a printable byte stands for itself, the others are
    numbered from 256 on.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = itertools.count(256)
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


class Bytes:
    """The bytes of UTF-8, ids 0 to 255, and BOS. Takes any file: bytes that are not UTF-8 come as lone surrogates."""
    vocab_size = 257
    bos = 256
    chars = None

    def encode(self, texts):
        return [np.frombuffer(text.encode("utf-8", "surrogateescape"), dtype=np.uint8) for text in texts]

    def decode(self, ids):
        # a model may write half a character
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")

    def tokens(self):
        return dict(enumerate(byte_letters()))             # JSON holds no bytes


class Characters:
    """A given string of characters, ids by place, and BOS after the last."""

    def __init__(self, chars):
        self.chars = chars
        self.vocab_size = len(chars) + 1
        self.bos = len(chars)
        self.ids = {c: i for i, c in enumerate(chars)}
        self.probe = "".join(c for c in PROBE if c in chars)

    def encode(self, texts):
        try:
            return [[self.ids[c] for c in text] for text in texts]
        except KeyError as e:
            raise BadInput(f"the character {e} is not among the tokenizer's {len(self.ids)}: "
                           f"{' '.join(self.chars[:60])!r}") from None

    def decode(self, ids):
        return "".join(self.chars[i] for i in ids if i != self.bos)

    def tokens(self):
        return dict(enumerate(self.chars))


class Smiles:
    """A given list of the tokens of SMILES strings, ids by place, and BOS after the last. See data/molecules.py."""
    chars = None

    def __init__(self, tokens):
        self.list = tokens
        self.probe = "".join(tokens)
        self.vocab_size = len(tokens) + 1
        self.bos = len(tokens)
        self.ids = {token: i for i, token in enumerate(tokens)}

    def encode(self, texts):
        rows = [smiles_tokens(text) for text in texts]
        for token in itertools.chain(*rows):
            if token not in self.ids:
                raise BadInput(f"the token {token!r:.40} is not among the tokenizer's {len(self.ids)}: "
                               f"{' '.join(self.list)[:120]}")
        return [[self.ids[token] for token in row] for row in rows]

    def decode(self, ids):
        return "".join(self.list[i] for i in ids if i != self.bos)

    def tokens(self):
        return dict(enumerate(self.list))


class Numbers:
    """Ids as numbers with spaces between them: for a checkpoint that names no tokenizer."""
    bos = None
    chars = None

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size

    def encode(self, texts):
        return [text.split() for text in texts]

    def decode(self, ids):
        return " ".join(map(str, ids))

    def tokens(self):
        return None


class HuggingFace:
    """Any tokenizer of Hugging Face, through transformers (optional): by name, folder, or .gguf file."""
    chars = None

    def __init__(self, where):
        name = f"hf:{where}"
        transformers = optional("transformers", f"tokenizer {name}")
        # of a .gguf file, transformers wants the folder and the file in it
        folder, file = os.path.split(where) if where.endswith(".gguf") else (where, None)
        folder = folder or "."
        try:
            self.bpe = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
        except Exception as e:                             # damaged files fail in a hundred ways
            why = (str(e) or "-").splitlines()[0]
            raise BadInput(f"transformers cannot load the tokenizer {name} ({type(e).__name__}): {why}") from None
        if len(self.bpe) < 2:                              # what transformers makes of a folder without its files
            raise BadInput(f"{name} holds no tokenizer: name one with --tokenizer, or add its tokenizer.json")
        try:
            config = transformers.AutoConfig.from_pretrained(folder, gguf_file=file)
            of_model = int(config.get_text_config().vocab_size)
        except Exception:                                  # no model beside it, or a damaged one
            of_model = 0
        self.vocab_size = max(len(self.bpe), of_model)     # a model may have a few ids more than its tokenizer
        self.bos = self.bpe.bos_token_id
        if self.bos is None:                               # as GPT-2, which has one id for both
            self.bos = self.bpe.eos_token_id
        if type(self.bos) is not int or not 0 <= self.bos < self.vocab_size:
            raise BadInput(f"tokenizer {name} has the BOS (or EOS) {self.bos}, and rows begin with one of its "
                           f"{self.vocab_size} ids: correct its tokenizer_config.json")
        self.eos = self.bpe.eos_token_id
        # what "<s>" in a text is: characters, each with its id
        self.spelled = {}
        for i in {*self.bpe.all_special_ids} - {self.bpe.unk_token_id} | {self.bos}:
            ids = self.bpe.convert_tokens_to_ids([*self.bpe.convert_ids_to_tokens(i)])
            self.spelled[i] = [j for j in ids if j not in (None, self.bos)]

    def encode(self, texts):
        # verbose: it warns of rows longer than its model's, which is not what reads them
        rows = self.bpe(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        # control tokens may be among the words that its model knows (Unigram's are)
        return [[j for i in row for j in self.spelled.get(i, [i])] for row in rows]

    def decode(self, ids):
        return self.bpe.decode(ids, skip_special_tokens=True)

    def tokens(self):
        return {i: token for token, i in self.bpe.get_vocab().items()}


# ---------------------------------------------------------------------------------------------------------------------
# from one vocabulary to another; are two the same?

def translate(row, a, b):
    """The ids of a row of tokenizer a -> those of b, through text, an EOS for an EOS. No text: one EOS."""
    ids = []
    for is_end, run in itertools.groupby(map(int, row), a.ends.__contains__):
        if is_end:
            ids += [b.bos for _ in run]
        else:
            ids += b.encode([a.decode(run)])[0].tolist()
    if set(ids) <= {b.bos}:
        return [b.bos]
    return ids


def named_size(name, otherwise):
    """(vocab_size, bos) as a tokenizer's name alone tells them, nothing loaded; `otherwise` where it does not."""
    if name == "ids" or name.startswith("hf:"):
        return otherwise
    codec = GPT2 if name == "gpt2" else make_codec(name)
    return codec.vocab_size, codec.bos


def same_tokenizer(meta_a, meta_b):
    """Whether the ids of two datasets or models mean the same, by their meta: True, False, or None: it cannot be told.

    Fingerprints decide where both have one, whatever the names. Old datasets have none: an equal name that says all
    (it is no "hf:" path, no "ids") is the same tokenizer then.
    """
    a = meta_a.get("fingerprint")
    b = meta_b.get("fingerprint")
    if a and b:
        return a == b
    name = meta_a["tokenizer"]
    if name == meta_b["tokenizer"] and name != "ids" and not name.startswith("hf:"):
        return True
    return None


def add_fingerprint(meta):
    """meta with the fingerprint of the tokenizer that it names, where it has none yet: for a foreign model.

    Without one still where that tokenizer cannot be had, or is "ids".
    """
    if meta.get("fingerprint"):
        return meta
    try:
        fingerprint = Tokenizer(meta["tokenizer"], meta["vocab_size"]).fingerprint()
    except BadInput:                                       # a model may come without its tokenizer
        fingerprint = None
    return meta | {"fingerprint": fingerprint} if fingerprint else meta
