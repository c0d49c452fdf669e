"""Which sampling flags go together, and which of them decide what a model draws: a flag that nothing reads is refused.

`args`: the flags of sample.py or evaluate.py; `model`: a `mdlm.Model`.
"""
from data.cli import BadInput, refuse_unread
from data.shards import knows_success

# the samplers that ask an AR model, and the flags that they alone read
VERIFIED = {"apd": ("verifier", "apd_ratio", "max_lookahead"), "exact": ("verifier", "draft")}
COUNTS = ("nfe", "verifier_calls", "positions", "verifier_positions")  # what `generate` counts, in this order
# the flags that only some samplers read
SAMPLING_FLAGS = ("sampler", "steps", "nfe", "order", "remask", "verifier", "apd_ratio", "max_lookahead", "draft",
                  "drafts", "resample_noise", "tau", "top_p", "accept", "epsilon", "delta", "stop_at_eos", "no_cache")


def resolve_sampling(args, model):
    """{tau, top_p}: those of the flags, or the defaults for this model's data."""
    is_text = not knows_success(model.meta)     # success is of the model as it is
    tau = args.tau
    if tau is None:
        # exact: the verifier's
        tau = model.default_tau() if is_text and args.sampler != "exact" else 1.0
    if model.quantile:                          # it has no other
        tau = 1.0
    top_p = args.top_p
    if top_p is None:
        top_p = 0.9 if is_text else 1.0
        if model.quantile and args.sampler == "exact":     # in a nucleus, u means another token than in training
            top_p = 1.0
    return dict(tau=tau, top_p=top_p)


def check_sampling_flags(args):
    """Refuse flags that do not go together, before a model is loaded."""
    drafts = args.drafts > 1
    for flag, samplers in dict(order=["fixed"], remask=["remdm"], verifier=list(VERIFIED), apd_ratio=["apd"],
                               max_lookahead=["apd"], draft=["exact"]).items():
        where = f"--sampler={' or '.join(samplers)}"
        read = [flag] if args.sampler in samplers else ()
        if flag == "verifier":
            where += ", or --drafts above 1"
            read = [flag] if drafts else read
        refuse_unread([flag], read, f"without {where}")
    if args.sampler == "remdm" and not args.remask:
        raise BadInput("--sampler=remdm needs --remask above 0, as in --remask=0.05: "
                       "at 0 it is --sampler=ancestral")
    if (args.sampler in VERIFIED or drafts) and not args.verifier:
        asks = f"--drafts={args.drafts}" if drafts else f"--sampler={args.sampler}"
        raise BadInput(f"{asks} needs --verifier: an AR checkpoint of the same vocabulary, or gpt2")
    fills_in = "masked" in vars(args) or vars(args).get("infill") is not None
    if drafts and (args.sampler in VERIFIED or not fills_in):
        raise BadInput(f"--drafts={args.drafts} is for infilling by a sampler that asks no --verifier: leave it out")
    if args.sampler == "exact" and fills_in:
        raise BadInput("--sampler=exact continues a --prompt, as its verifier would: take another sampler for --infill")


def flags_read(args, model, greedy):
    """The SAMPLING_FLAGS that decide what this model draws, greedily or not: those that its `generate` reads, but for
    what the other flags make idle.
    """
    # what the model takes
    read = set(model.generate_reads)
    if "cached" in read:
        read.add("no_cache")                               # (the flag says it the other way round)
    if model.fills_masks and model.noise_embed is None:
        read -= {"tau", "resample_noise"}

    # what the way of sampling asks besides, and what it settles by itself
    read |= set(VERIFIED.get(args.sampler, ()))
    if args.drafts > 1 and model.fills_masks:
        read |= {"drafts", "verifier"}
    if args.sampler in (*VERIFIED, "first_hitting"):       # a call for each token, or as many as it takes
        read.discard("steps")
    if "steps" in read:
        read.add("nfe")
    if args.sampler == "exact":                            # the text is the verifier's
        read.add("tau")
        read -= {"resample_noise", "stop_at_eos", "no_cache"}
    if model.quantile:
        read.discard("tau")
    if vars(args).get("accept", "typical") != "typical":
        read -= {"epsilon", "delta"}

    # what does not matter to an argmax
    if greedy and args.sampler != "apd":                   # the likeliest token lies in every nucleus
        read.discard("top_p")
    if greedy and (args.sampler == "exact" or not model.fills_masks):  # and is the likeliest at any temperature
        read -= {"tau", "accept", "epsilon", "delta"}
    return read


def check_sampling_read(args, drawn, read=()):
    """BadInput for a sampling flag that none of `drawn`, (model, greedy), reads; `read`: what else does."""
    read = set(read)
    for model, greedy in drawn:
        read |= flags_read(args, model, greedy)
    names = ", ".join(dict.fromkeys(model.name for model, _ in drawn))
    refuse_unread(SAMPLING_FLAGS, read, f"on what is drawn from {names or 'these'}")


def sampling_shown(args, model, greedy):
    """tau and top_p as a table has them: None where they have no effect."""
    read = flags_read(args, model, greedy)
    return {name: value if name in read else None for name, value in resolve_sampling(args, model).items()}
