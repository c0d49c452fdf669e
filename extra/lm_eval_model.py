"""Zero-shot multiple choice through lm-eval (pip install lm_eval): Figure 4, Section D.2.

    python -m extra.lm_eval_model --ckpt out/openwebtext-mdlm-gumbel out/openwebtext-mdlm
    python -m extra.lm_eval_model --ckpt=out/mine-ar --tasks=mytask --include_path=DIR        # DIR/mytask.yaml

A masked model scores a completion in one pass in which all of it is masked and the context is given. BD3-LM does so
block by block, each given the clean blocks before it: all of its blocks at once, in the training pass.

A student with noise needs noise. Its score is the bound of `evaluate.py ppl`,

    log p(completion | context) >= E_q[log p(completion | context, noise)] + log p_teacher(completion | context),

q the posterior of the noise under the teacher (KL to the prior: the second term). `--score=given_noise` leaves the
teacher's term out. That is no likelihood: the noise was drawn given the completion, and gives the answer away, for a
wrong answer as well as for the right one. The paper does not say which it used.

Shapes: B batch, L length, V vocabulary, D width, N scored tokens of all rows.
"""
import time
from functools import partial

import torch
from tqdm import tqdm

from data.cli import BadInput, Parser, number, optional, refuse_unread, run_main
from data.files import check_output
from data.report import report
from data.run import allow_changing_shapes, device_and_dtype
from data.vocab import Tokenizer
from extra.scores import sum_per_row
from sample import cast_body, load_model, load_teacher, loading_flags, torch_seed

TASKS = "arc_easy,arc_challenge,boolq,hellaswag,piqa,openbookqa,winogrande"      # Figure 4


# ---------------------------------------------------------------------------------------------------------------------
# the score of a batch of completions

@torch.no_grad()
def score(model, tokens, scored, teacher=None, given_noise=False, generators=None):
    """log p of the completions given their contexts -> (nats [B], whether each of its tokens is the argmax [B]).

    tokens [B, L]; scored [B, L] bool: the completion, the end of each row. BD3-LM: L is a multiple of the block; what
    follows the completion in its last block is masked and not scored. `teacher`: of a student with noise, whose term
    `given_noise` leaves out. generators: one for each row's noise, so that no other row changes its score.
    """
    x = tokens[scored]                                     # (N)
    teacher_logits = None
    if teacher is not None:
        teacher_logits = teacher.posterior_logits(tokens, scored)
    if model.can_teach:
        # an AR model: the chain rule, each token given those before it
        logits = model.posterior_logits(tokens, scored)(0, len(x))  # (N, V)
    else:
        # a masked model: nothing is seen from the completion on
        masked = scored.cumsum(1) > 0
        g = None
        if model.noise_embed is not None:
            g = noise_of_completions(model.noise_embed, tokens, scored, masked, teacher_logits, generators)
        z = tokens.masked_fill(masked, model.mask_id)
        logits = model.logits(model.hidden(z, g, clean=tokens, wanted=scored))  # (N, V)
    nats = log_p(logits, x)
    if teacher is not None and not given_noise:
        nats = nats + log_p(teacher_logits(0, len(x)), x)
    mistakes = sum_per_row((logits.argmax(-1) != x).long(), scored)
    return sum_per_row(nats, scored), mistakes == 0


def noise_of_completions(noise_embed, tokens, scored, masked, teacher_logits, generators):
    """Noise embeddings g [B, L, D]: of the scored tokens from the posterior of the noise (for noise that is unpaired,
    from the prior), of what is masked after them from the prior, and zero elsewhere.
    """
    D = noise_embed.weight.shape[0]
    g = torch.zeros(*tokens.shape, D, device=tokens.device)
    first = 0                                              # of a row's scored tokens, its number among all
    for g_row, x, is_scored, is_masked, generator in zip(g, tokens, scored, masked, generators):
        n = int(is_scored.sum())
        if teacher_logits is None:
            of_scored = noise_embed.from_prior(n, generator=generator)
        else:
            of_scored = noise_embed.from_posterior(partial(part_from, teacher_logits, first), x[is_scored], generator)
        first += n
        rest = is_masked & ~is_scored
        of_rest = noise_embed.from_prior(int(rest.sum()), generator=generator)
        g_row[is_scored] = of_scored.to(g.dtype)           # under autocast it may come in bfloat16
        g_row[rest] = of_rest.to(g.dtype)
    return g


def part_from(logits, first, a, b):
    return logits(first + a, first + b)


def log_p(logits, x):
    """logits [N, V], tokens x [N] -> their log-probabilities [N], float64, to be summed."""
    return logits.log_softmax(-1).gather(-1, x[:, None]).squeeze(1).double()


# ---------------------------------------------------------------------------------------------------------------------
# all completions of a task

class Scorer:
    """Scores lists of (context, completion), both lists of token ids, in batches of rows of one length."""

    def __init__(self, model, teacher, given_noise, draws, batch_size, seed):
        """draws: of the noise, over which scores are averaged. The other arguments are those of the command."""
        self.model = model
        self.teacher = teacher
        self.given_noise = given_noise
        self.draws = draws
        self.batch_size = batch_size
        self.seed = seed
        self.tokenizer = Tokenizer(model.meta["tokenizer"], model.vocab_size)
        self.block_size = vars(model).get("block_size", 1)  # BD3-LM reads whole blocks

    def score_all(self, pairs, show_bar=True):
        """-> for each pair (log p of the completion in nats, whether greedy decoding would write it)."""
        rows = [self.make_row(context, completion) for context, completion in pairs]
        # a bidirectional network would read padding: rows of one length at a time (of one number of blocks)
        of_length = {}
        for i, (ids, _) in enumerate(rows):
            length = -(-len(ids) // self.block_size) * self.block_size
            of_length.setdefault(length, []).append(i)
        results = [None] * len(rows)
        bar = tqdm(total=len(rows), desc=self.model.name, unit="completion", disable=not show_bar)
        for length, members in sorted(of_length.items(), reverse=True):      # the longest first: memory fails early
            for a in range(0, len(members), self.batch_size):
                chosen = members[a:a + self.batch_size]
                scores = self.score_batch([rows[i] for i in chosen], length)
                for i, result in zip(chosen, scores):
                    results[i] = result
                bar.update(len(chosen))
        bar.close()
        return results

    def make_row(self, context, completion):
        """-> (ids of the row: BOS, context, completion; how many of them are scored)."""
        if context[:1] == [self.model.bos]:                # lm-eval's own, in place of an empty context
            context = context[1:]
        text = context + completion
        ids = [self.model.bos] + text[1 - self.model.length:]               # if it is too long, its end
        return ids, min(len(completion), len(ids) - 1)

    def score_batch(self, rows, length):
        """Rows of `make_row` that are padded to `length` -> [(nats, whether it is greedy)]."""
        device = next(self.model.parameters()).device
        tokens = torch.full((len(rows), length), self.model.bos, device=device)
        scored = torch.zeros_like(tokens, dtype=torch.bool)
        for i, (ids, n) in enumerate(rows):
            tokens[i, :len(ids)] = torch.tensor(ids)
            scored[i, len(ids) - n:len(ids)] = True
        # a request is known by its tokens: its noise is the same in any batch
        seeds = [torch_seed(self.seed, *ids) for ids, _ in rows]
        generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        nats = []
        greedy = []
        for _ in range(self.draws):
            result = score(self.model, tokens, scored, self.teacher, self.given_noise, generators)
            nats.append(result[0])
            greedy.append(result[1])
        mean = torch.stack(nats).mean(0)
        return list(zip(mean.tolist(), greedy[0].tolist()))


def language_model(scorer):
    """The scorer as an `lm_eval` LM, for tasks that compare likelihoods."""
    from lm_eval.api.model import TemplateLM

    class Model(TemplateLM):
        """What lm-eval asks of a model. In here because the package is optional."""

        @property
        def eot_token_id(self):
            return scorer.model.bos

        def tok_encode(self, string, add_special_tokens=None, **kw):
            return scorer.tokenizer.encode([string])[0].tolist()

        def _loglikelihood_tokens(self, requests, disable_tqdm=False, **kw):
            pairs = [(context, completion) for _, context, completion in requests]
            return scorer.score_all(pairs, show_bar=not disable_tqdm)

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            raise BadInput("whole texts are scored by evaluate.py ppl, not by lm-eval tasks")

        def generate_until(self, requests, disable_tqdm=False):
            raise BadInput("only tasks that compare likelihoods are supported, no generation")

    return Model()


# ---------------------------------------------------------------------------------------------------------------------
# the command

def flags():
    parser = Parser(description="Zero-shot multiple choice with lm-eval.")
    parser.add_argument("--ckpt", nargs="+", required=True, help="checkpoints or run directories")
    parser.add_argument("--tasks", default=TASKS, help=f"comma list of lm-eval tasks; default: {TASKS}")
    parser.add_argument("--include_path", help="folder with tasks of your own, as lm-eval's YAML files")
    parser.add_argument("--n", type=number(int, 1), help="only the first n questions of each task")
    parser.add_argument("--batch_size", type=number(int, 1, 2**20), default=32, help="completions at once")
    parser.add_argument("--teacher",
                        help="of students with noise; default: the one that they were trained with")
    parser.add_argument("--score", choices=["bound", "given_noise"], default="bound",
                        help="students with noise; given_noise is no likelihood: the noise knows the answer")
    parser.add_argument("--draws", type=number(int, 1), default=1, help="of the noise, averaged")
    parser.add_argument("--json", help="also write the rows to this file")
    loading_flags(parser)
    return parser


def find_tasks(args):
    """-> (the names in --tasks, lm-eval's register of tasks)."""
    from lm_eval.tasks import TaskManager
    manager = TaskManager(include_path=args.include_path)
    tasks = args.tasks.split(",")
    unknown = set(tasks) - set(manager.all_tasks)
    if unknown:
        raise BadInput(f"--tasks: lm-eval knows no {', '.join(sorted(unknown))}: "
                       "correct it, or set --include_path")
    return tasks, manager


def evaluate_model(args, model, teacher, tasks, manager, autocast):
    """-> the table's rows of a model: one for each task and, of several, their mean."""
    from lm_eval import simple_evaluate
    began = time.perf_counter()
    scorer = Scorer(model, teacher, args.score == "given_noise", args.draws, args.batch_size, args.seed)
    lm = language_model(scorer)
    try:
        with autocast:
            found = simple_evaluate(lm, tasks=tasks, num_fewshot=0, limit=args.n, task_manager=manager)
    except (OSError, ValueError) as e:                     # of a download
        why = (str(e) or type(e).__name__).splitlines()[0]
        raise BadInput(f"--tasks={args.tasks}: {why}") from None
    facts = dict(model=model.name, score=None)
    if teacher is not None:
        facts["score"] = args.score
    rows = []
    for task, n in found["n-samples"].items():             # its results hold groups of tasks as well
        row = dict(facts, task=task, n=n["effective"])
        for key, value in found["results"][task].items():
            metric, _, filtered = key.partition(",")       # as in "acc_stderr,none"
            if filtered == "none" and isinstance(value, float):             # "N/A": the error of one question
                row[metric] = value
        rows.append(row)
    accuracies = [row["acc"] for row in rows if "acc" in row]
    if len(accuracies) > 1:
        rows.append(dict(facts, task="mean", acc=sum(accuracies) / len(accuracies)))
    rows[-1]["seconds"] = time.perf_counter() - began
    return rows


def main(argv=None):
    began = time.time()
    args = flags().parse_args(argv)
    optional("lm_eval", "extra.lm_eval_model")
    if args.json:
        check_output("--json", args.json)
    device, dtype, autocast = device_and_dtype(args.dtype)
    allow_changing_shapes()
    models = [load_model(path, args.weights, device) for path in args.ckpt]
    for model in models:
        if model.drafts:
            raise BadInput(f"--ckpt: {model.name} holds Medusa heads, which score nothing: give its backbone")
    reads_noise = any(model.noise_embed is not None for model in models)
    refuse_unread(["teacher", "score", "draws"], ["teacher", "score", "draws"] if reads_noise else (),
                  "without a student that reads noise")
    with autocast:
        teachers = [load_teacher(args, model, model.meta, model.length, device) for model in map(cast_body, models)]
    tasks, manager = find_tasks(args)
    rows = []
    for model, teacher in zip(models, teachers):
        rows += evaluate_model(args, model, teacher, tasks, manager, autocast)
    note = ("zero-shot, one step; by length: completions compared per character.\n"
            "seconds: for all tasks of a model.")
    columns = dict(model="model", task="task", score="score", acc="accuracy %", acc_norm="by length %")
    report(args, rows, note, columns, began=began, device=device, dtype=dtype)


if __name__ == "__main__":
    run_main(main)
