"""Results: a Markdown table on stdout, and with --json=FILE the same rows in a file.
"""
import time

from data.cli import git_commit
from data.files import write_json

# every table's columns: the key in a row, and its title; what has no column is in --json only. A fraction is named in
# PERCENT, too, and other numbers in DIGITS, unless one digit is right
COLUMNS = dict(
    # nfe: the steps asked for; nfe_counted: the network calls that they took
    model="model", decode="decode", kind="what", nfe="NFE", nfe_counted="calls",
    verifier_calls="verifier", positions="positions", verifier_positions="verifier's positions",
    # the maze, words, molecules
    success="success %", stderr="±", success_by_length="at the data's lengths %",
    distinct_per_1000="distinct per 1000", distinct="distinct", canonical="distinct, canonical", effective="effective",
    in_data="of these in the data %", held_out="of these held out %", mean_length="length",
    particles="particles", fewest_particles="at least",
    validity_mass="validity mass %", agree="map agreement, paths %", agree_position="positions %",
    # text
    tau="τ", top_p="top_p", gen_ppl="GenPPL", gen_ppl_stderr="±", mauve="MAUVE", mauve_std="±",
    recovered="recovered %", entropy="entropy", entropy_set="entropy of the set",
    distinct_1="distinct-1", distinct_2="distinct-2", distinct_3="distinct-3",
    # likelihood
    nll="nats per token", nll_stderr="±", teacher_nll="teacher's nats", ppl="perplexity (bound)")
RUN_COLUMNS = dict(n="n", seconds="seconds", precision="precision", device="device", seed="seed",
                   git="commit")
PERCENT = {"success", "stderr", "success_by_length", "in_data", "held_out", "validity_mass", "agree",
           "agree_position", "recovered", "acc", "acc_norm"}
# behind the point, where it is not 1
DIGITS = dict(tau=2, top_p=2, gen_ppl=2, gen_ppl_stderr=2, entropy=2, entropy_set=2, distinct_1=3,
              distinct_2=3, distinct_3=3, nll=3, nll_stderr=3, teacher_nll=3, ppl=2, mauve=3,
              mauve_std=3, calls_per_token=3, agreement=3, speedup=2, tokens_per_s=0,
              alone_tokens_per_s=0)


def print_table(rows, columns, digits=DIGITS):
    """Flat dicts as a Markdown table, `columns` {key: title}; a column that no row has is left out. Fractions become %.
    A standard error (key + "_stderr") stands behind its value, unless it has a column of its own.
    """
    shown = {}                              # most tables have few of all the columns
    for key, title in columns.items():
        if any(row.get(key) is not None for row in rows):
            shown[key] = title
    print("| " + " | ".join(shown.values()) + " |")
    print("|" + "---|" * len(shown))
    for row in rows:
        cells = []
        for key in shown:
            error = None                    # that stands in this cell
            if f"{key}_stderr" not in columns:
                error = row.get(f"{key}_stderr")
            cells.append(format_cell(key, row.get(key), error, digits.get(key, 1)))
        print("| " + " | ".join(cells) + " |", flush=True)


def format_cell(key, value, error, digits):
    """A value as text; with its standard error, if there is one."""
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    numbers = [value]
    if error is not None:
        numbers.append(error)
    if key in PERCENT:
        numbers = [100 * number for number in numbers]
    return " ± ".join(f"{number:.{digits}f}" for number in numbers)


def report(args, rows, note, columns=COLUMNS, digits={}, table=None, began=0.0, device="cpu",
           dtype="float32"):
    """Print the rows, or a `table` made of them, with what they were measured on, and write them to args.json."""
    facts = dict(precision=dtype, device=device_name(device), seed=args.seed, git=git_commit())
    rows = [row | facts for row in rows]
    printed = rows                          # the file has every row, a table may show their means
    if table is not None:
        printed = [row | facts for row in table]
    if args.json:                           # first: a closed terminal does not lose what was measured
        meta = dict(n=args.n, seconds=round(time.time() - began, 1), **facts, args=vars(args))
        write_json(args.json, dict(meta=meta, rows=rows))
    print_table(printed, columns | RUN_COLUMNS, DIGITS | digits)
    print("\n" + note)


def device_name(device):
    if device == "cuda":
        import torch                        # here alone: a table of ratings needs none
        return torch.cuda.get_device_name()
    return device
