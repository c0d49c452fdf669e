"""Detokenisers: undo the spaces that old corpora have around punctuation, as the field does for perplexity.

They are GPT-2's and Megatron's, the set of kuleshov-group/mdlm: lists of (pattern, replacement), applied in turn. The
order matters, and oddities stay as they are, since published figures were measured with them.
"""
import re


def detokenize(text, rules):
    """Apply the (pattern, replacement) pairs in turn."""
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


STRIP = (r"^\s+|\s+\Z", "")

WIKITEXT = [
    (r"s '", "s'"),
    # numbers: @-@ @,@ @.@ are what was inside them
    (" @-@ ", "-"), (" @,@ ", ","), (r" @\.@ ", "."),
    # punctuation
    (" : ", ": "), (" ; ", "; "), (r" \. ", ". "), (" ! ", "! "), (r" \? ", "? "), (" , ", ", "),
    # brackets and quotes: no spaces inside
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
    # headings
    (r"= = = =", "===="), (r"= = =", "==="), (r"= =", "=="),
    (" \u00b0 ", "\u00b0"), (r" \n", "\n"), (r"\n ", "\n"), (" N ", " 1 "), (" 's", "'s"),
]

PTB = [
    STRIP,
    (" 's", "'s"), ("s ' ", "s' "), (" n't", "n't"), (r" \n ", "\n"), (r"\\/", "/"),
    # N stands for a number. Neighbours share a space, so that one pass leaves every second of them
    *[(" N ", " 1 ")] * 10,
    (r"\$ 1", "$1"), (r"# 1", "#1"), ("<unk>", "?"),
]

LM1B = [
    STRIP,
    ("http : / / ", "http://"), ("https : / / ", "https://"),
    (r" '(\w+)", r"'\1"), (r" (\w+) \. ", r" \1. "), (r" (\w+) \.$", r" \1."),
    # punctuation, within a line and at its end
    (r" \? ", "? "), (r" \?$", "?"), (" ! ", "! "), (" !$", "!"), (" , ", ", "),
    (" : ", ": "), (" ; ", "; "), (" / ", "/"),
    # quotes and brackets: no spaces inside
    (r'" ([^"]+) "', r'"\1"'), (r"' ([^']+) '", r"'\1'"),
    (r"\( ([^\(\)]+) \)", r"(\1)"), (r"\[ ([^\[\]]+) \]", r"[\1]"),
    (r"\$ ", "$"), ("\u00a3 ", "\u00a3"),
]

SCIENTIFIC = WIKITEXT + LM1B[1:]                           # without STRIP

LAMBADA = [("[\u201c\u201d]", '"'), STRIP, (r"\A", "\n")]
