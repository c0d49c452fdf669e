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
"""
import time

import torch
from tqdm import tqdm

from data.cli import BadInput, Parser, check_output, number, optional, run_main
from data.vocab import Tokenizer
from evaluate import load_teacher, report
from medusa import Medusa
from sample import device_and_dtype, load_model, loading_flags, torch_seed
from teacher import CausalLM

TASKS = "arc_easy,arc_challenge,boolq,hellaswag,piqa,openbookqa,winogrande"                              # Figure 4


@torch.no_grad()
def score(model, tokens, scored, teacher=None, given_noise=False, generator=None):
    """log p of the tokens in `scored` given the others -> (nats [B], whether each of them is the argmax [B]).

    tokens [B, L], scored [B, L] bool, the end of each row. BD3-LM: L is a multiple of the block; what follows `scored`
    in its last block is masked and not scored. `teacher`, for a student with noise; `given_noise` leaves its term out.
    """
    x, source = tokens[scored], model if isinstance(model, CausalLM) else teacher
    ar = source.posterior_logits(tokens, scored) if source else None             # the AR model's logits, in chunks

    def log_p(logits):
        return logits.log_softmax(-1).gather(-1, x[:, None]).squeeze(1).double()

    def per_row(v):
        return torch.zeros_like(tokens, dtype=v.dtype).masked_scatter(scored, v).sum(1)
    if source is model:
        logits = ar(0, len(x))                                                                              # (N, V)
    else:
        after, g = scored.cumsum(1) > 0, None              # everything from the completion on
        if model.noise_embed is not None:
            rest = after & ~scored
            g = torch.zeros(*tokens.shape, model.noise_embed.weight.shape[0], device=tokens.device)
            rows = (model.noise_embed.from_posterior(ar, x, generator) if ar else
                    model.noise_embed.from_prior(len(x), generator=generator))                       # unpaired noise
            g[scored] = rows.to(g.dtype)                   # (of another dtype under autocast)
            g[rest] = model.noise_embed.from_prior(int(rest.sum()), generator=generator).to(g.dtype)
        logits = model.logits(model.hidden(tokens.masked_fill(after, model.mask_id), g, tokens, scored))
    nats = log_p(logits)
    if teacher is not None and not given_noise:
        nats = nats + log_p(ar(0, len(x)))
    return per_row(nats), per_row((logits.argmax(-1) != x).long()) == 0


def language_model(model, teacher, given_noise, draws, batch_size, seed):
    """The model as an `lm_eval` LM, for tasks that compare likelihoods."""
    from lm_eval.api.model import TemplateLM
    tokenizer = Tokenizer(model.meta["tokenizer"], model.config["vocab_size"])
    block = getattr(model, "block_size", 1)
    device = next(model.parameters()).device

    class Model(TemplateLM):
        @property
        def eot_token_id(self):
            return model.bos

        def tok_encode(self, string, add_special_tokens=None, **kw):
            return tokenizer.encode([string])[0].tolist()

        def _loglikelihood_tokens(self, requests, disable_tqdm=False, **kw):
            rows, groups, out = [], {}, [None] * len(requests)
            for i, (_, context, completion) in enumerate(requests):
                context = context[1:] if context[:1] == [model.bos] else context         # lm-eval's, if it is empty
                ids = [model.bos] + (context + completion)[1 - model.length:]             # too long: the end of it
                rows.append((ids, min(len(completion), len(ids) - 1)))
                # a bidirectional network would read padding: rows of one length at a time (of one number of blocks)
                groups.setdefault(-(-len(ids) // block) * block, []).append(i)
            bar = tqdm(total=len(rows), desc=model.name, unit="completion", disable=disable_tqdm)
            for length, members in sorted(groups.items(), reverse=True):
                for a in range(0, len(members), batch_size):
                    some = members[a:a + batch_size]
                    tokens = torch.full((len(some), length), model.bos, device=device)
                    scored = torch.zeros_like(tokens, dtype=torch.bool)
                    for j, (ids, n) in enumerate(rows[i] for i in some):
                        tokens[j, :len(ids)] = torch.tensor(ids)
                        scored[j, len(ids) - n:len(ids)] = True
                    generator = torch.Generator(device).manual_seed(torch_seed(seed, length, a))
                    results = [score(model, tokens, scored, teacher, given_noise, generator) for _ in range(draws)]
                    nats = torch.stack([r[0] for r in results]).mean(0).tolist()
                    for i, value, greedy in zip(some, nats, results[0][1].tolist()):
                        out[i] = (value, greedy)
                    bar.update(len(some))
            bar.close()
            return out

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            raise BadInput("whole texts are scored by evaluate.py ppl, not by lm-eval tasks")

        def generate_until(self, requests, disable_tqdm=False):
            raise BadInput("only tasks that compare likelihoods are supported, no generation")
    return Model()


def main(argv=None):
    parser = Parser(description="Zero-shot multiple choice with lm-eval.")
    parser.add_argument("--ckpt", nargs="+", required=True, help="checkpoints or run directories")
    parser.add_argument("--tasks", default=TASKS, help=f"comma list of lm-eval tasks; default: {TASKS}")
    parser.add_argument("--include_path", help="folder with tasks of your own, as lm-eval's YAML files")
    parser.add_argument("--n", type=number(int, 1), help="only the first n questions of each task")
    parser.add_argument("--batch_size", type=number(int, 1), default=32, help="completions at once")
    parser.add_argument("--teacher", help="of students with noise; default: the one that they were trained with")
    parser.add_argument("--score", choices=["bound", "given_noise"], default="bound",
                        help="students with noise; given_noise is no likelihood: the noise knows the answer")
    parser.add_argument("--draws", type=number(int, 1), default=1, help="of the noise, averaged")
    parser.add_argument("--json", help="also write the rows to this file")
    loading_flags(parser)
    args, began = parser.parse_args(argv), time.time()
    optional("lm_eval", "extra.lm_eval_model")
    if args.json:
        check_output("--json", args.json)
    device, dtype, autocast = device_and_dtype(args.dtype)
    models = [load_model(path, args.weights, device) for path in args.ckpt]
    for model in models:
        if isinstance(model, Medusa):
            raise BadInput(f"--ckpt: {model.name} holds Medusa heads, which score nothing: give its backbone")
    teachers = [load_teacher(args, model, model.meta, model.length, device) for model in models]
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    tasks, manager = args.tasks.split(","), TaskManager(include_path=args.include_path)
    if unknown := set(tasks) - set(manager.all_tasks):
        raise BadInput(f"--tasks: lm-eval knows no {', '.join(sorted(unknown))}: correct it, or set --include_path")
    rows = []
    for model, teacher in zip(models, teachers):
        start = time.perf_counter()
        lm = language_model(model, teacher, args.score == "given_noise", args.draws, args.batch_size, args.seed)
        try:
            with autocast:
                found = simple_evaluate(lm, tasks=tasks, num_fewshot=0, limit=args.n, task_manager=manager)
        except (OSError, ValueError) as e:                 # of a download
            raise BadInput(f"--tasks={args.tasks}: {(str(e) or type(e).__name__).splitlines()[0]}") from None
        facts = dict(model=model.name, score=None if teacher is None else args.score)
        of_model = [dict(facts, task=task, n=found["n-samples"][task]["effective"],
                         **{k.removesuffix(",none"): v for k, v in found["results"][task].items()
                            if k.endswith(",none") and isinstance(v, float)})    # (no error of one question: "N/A")
                    for task in found["n-samples"]]        # (not the groups, which the results hold as well)
        scores = [row["acc"] for row in of_model if "acc" in row]
        if len(scores) > 1:
            of_model.append(dict(facts, task="mean", acc=sum(scores) / len(scores)))
        of_model[-1]["seconds"] = time.perf_counter() - start
        rows += of_model
    report(args, rows, "zero-shot, one step; by length: completions compared per character.\n"
           "seconds: for all tasks of a model.",
           dict(model="model", task="task", score="score", acc="accuracy %", acc_norm="by length %"),
           began=began, device=device, dtype=dtype)


if __name__ == "__main__":
    run_main(main)
