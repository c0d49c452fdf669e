"""Tokenizers: text to token ids and back.
"""
import os

import numpy as np

from data.cli import BadInput, optional


class Tokenizer:
    """encode(list of str) -> list of id arrays; decode(ids) -> str. name: "gpt2" (tiktoken); "bytes" (ids 0..255, any
    file); "chars:" + the characters it knows; "hf:NAME" (a Hugging Face name, folder or .gguf file, through
    `transformers`); "maze"; "ids", numbers as they are, for a checkpoint that names no tokenizer.
    """

    def __init__(self, name, vocab_size=None):
        self.name, self.vocab_size, self.bos, self.chars = name, vocab_size, None, None
        if name == "gpt2":
            import tiktoken
            try:
                self.bpe = tiktoken.get_encoding("gpt2")
            except Exception as e:                       # tiktoken lets through whatever its download raised
                raise BadInput(f"tiktoken could not fetch its GPT-2 files ({type(e).__name__}): go online once, or set "
                               "TIKTOKEN_CACHE_DIR to a folder that holds them") from None
            self.vocab_size, self.bos = 50257, 50256
        elif name == "bytes":
            self.vocab_size, self.bos = 257, 256
        elif name == "maze" or name.startswith("chars:"):
            self.chars = "UDLR." if name == "maze" else name[6:]
            self.vocab_size, self.bos = len(self.chars) + 1, len(self.chars)
        elif name.startswith("hf:"):
            transformers = optional("transformers", f"tokenizer {name}")
            folder, file = os.path.split(name[3:]) if name.endswith(".gguf") else (name[3:], None)
            try:
                self.bpe = transformers.AutoTokenizer.from_pretrained(folder or ".", gguf_file=file)
            except (OSError, ValueError, ImportError) as e:
                raise BadInput(f"transformers cannot load the tokenizer {name}: {str(e).splitlines()[0]}") from None
            try:                                         # a model may have a few ids more than its tokenizer
                known = transformers.AutoConfig.from_pretrained(folder or ".", gguf_file=file).vocab_size
            except (OSError, ValueError, AttributeError):
                known = 0                                # no model beside it
            self.vocab_size = max(len(self.bpe), known)
            self.bos = self.bpe.eos_token_id if self.bpe.bos_token_id is None else self.bpe.bos_token_id
            if self.bos is None:
                raise BadInput(f"tokenizer {name} has neither BOS nor EOS, and rows begin with one")
        elif name != "ids":
            raise BadInput(f"unknown tokenizer {name!r}: one of gpt2, bytes, hf:NAME, and for `text` chars")
        if (self.vocab_size or 0) > 1 << 16:
            raise BadInput(f"tokenizer {name[:40]} has {self.vocab_size} ids, but shards hold at most 65536")

    def encode(self, texts):
        if self.name == "gpt2":                          # tiktoken releases the GIL: real threads, order kept
            rows = self.bpe.encode_ordinary_batch(texts, num_threads=os.cpu_count())
        elif self.name.startswith("hf:"):
            rows = self.bpe(texts, add_special_tokens=False, verbose=False)["input_ids"]
        elif self.name == "bytes":
            rows = [np.frombuffer(text.encode("utf-8", "surrogateescape"), dtype=np.uint8) for text in texts]
        elif self.name == "ids":
            rows = [text.split() for text in texts]
        else:
            ids = {c: i for i, c in enumerate(self.chars)}
            try:
                rows = [[ids[c] for c in text] for text in texts]
            except KeyError as e:
                raise BadInput(f"the character {e} is not among the tokenizer's {len(ids)}: "
                               f"{' '.join(self.chars[:60])!r}") from None
        return [np.array(row, dtype=np.uint16) for row in rows]

    def decode(self, ids):
        """Ids of one row, without BOS in front -> text."""
        ids = [int(i) for i in ids if self.name == "ids" or i < self.vocab_size]
        if self.name == "bytes":
            return bytes(i for i in ids if i < 256).decode("utf-8", "replace")
        if self.name == "ids":
            return " ".join(map(str, ids))
        if self.chars is not None:
            return "".join(self.chars[i] for i in ids if i != self.bos)
        return self.bpe.decode(ids)
