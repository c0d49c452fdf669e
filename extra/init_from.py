"""Starting from the weights of another model: train.py's --init_from."""
import torch

from data.cli import BadInput, Parser

SHAPE = ("n_layer", "n_embd", "n_head")
# what a pretrained start (GPT-2, a model of Hugging Face) decides of a student's config
DECIDED = (*SHAPE, "positions", "body")


def initial_weights(model, source, name):
    """--init_from=name: the weights of `source` into `model`; BadInput where they do not fit.

    What reads the noise is optional: it stays new where the source has none, is left out where the model has none.
    """
    weights = source.state_dict()
    if source.pretrained:
        if not model.fills_masks:
            raise BadInput(f"--init_from={name} is a start for masked students: use --model=mdlm or --model=bd3lm")
        begin_beside_pretrained(model, source)
        if model.config.body:                              # the network of Hugging Face is a part of the student's
            weights = {f"transformer.{key}": weight for key, weight in weights.items()}
    reads_noise = ("noise_embed.", "accumulator.")
    own = model.state_dict()
    state = {key: weight for key, weight in own.items() if key.startswith(reads_noise)}
    for key, weight in weights.items():
        if key in own or not key.startswith(reads_noise):
            state[key] = weight
    # an AR model's embedding has no row of [MASK], the last one: the new model's own stays
    if source.can_teach and model.fills_masks:
        [ids] = [key for key, weight in model.named_parameters() if weight is model.transformer.embed.weight]
        if ids in state and state[ids].shape == own[ids][:-1].shape:
            state[ids] = torch.cat([state[ids], own[ids][-1:]])
    for key in [*own, *state]:
        here = list(own[key].shape) if key in own else "nothing"
        there = list(state[key].shape) if key in state else "nothing"
        if here != there:
            raise BadInput(f"--init_from={name} is another kind or shape of network ({key} is {there} there, {here} "
                           "here): give the same flags of the network and vocabulary, or leave --init_from out")
    model.load_state_dict(state)


def known_of(source):
    """What is known of the network that a run begins with; of none, nothing."""
    if source is None:
        return {}
    return source.as_start() if source.pretrained else vars(source.config)


def config_of_start(args, source, old):
    """What the beginning of a masked student decides of its config; BadInput where flags ask for another network.

    source: the model that it starts from, or None; old: that one's config, or, of a run that goes on, its own.
    """
    if source is None:
        return {name: old[name] for name in (*DECIDED, "shift", "inject") if name in old}
    known = dict(shift=old.get("shift", source.can_teach))  # an AR output is about the next token
    if source.pretrained:
        known |= source.as_start()
    elif old.get("positions"):                              # a student that began so
        known |= {name: old[name] for name in DECIDED}
        if old["body"]:
            known["dropout"] = 0.0
    else:
        return known
    check_flags(args, known)
    # noise is added to what stands for [MASK] unless --inject says otherwise: so the new student is what it began as
    if args.gumbel and "inject" not in Parser.given:
        known["inject"] = old["inject"] if old.get("noise") else "add"
    return known


def check_flags(args, known):
    """BadInput where flags ask for another network than a pretrained start brings, DECIDED."""
    given = Parser.given
    start = f"--init_from={args.init_from}"
    has_body = known.get("body") is not None
    if has_body and args.block_size:
        raise BadInput(f"--model={args.model} needs our own transformer, and {start} brings one of Hugging Face: "
                       "use --model=mdlm")
    for name in ("size", "dropout") if has_body else ("size",):
        if name in given:
            raise BadInput(f"--{name}={given[name]} is decided by {start}: leave it out")
    for name in SHAPE:
        if name in given and getattr(args, name) != known[name]:
            raise BadInput(f"--{name}={given[name]} does not fit {start}, which has {known[name]}: leave it out")
    if args.length is not None and args.length > known["positions"]:
        raise BadInput(f"--length={args.length} is more than the {known['positions']} positions of {start}: choose a "
                       "smaller one")


@torch.no_grad()
def begin_beside_pretrained(model, source):
    """What a pretrained model has no weights for: [MASK] begins at the mean of all embeddings; noise that is added
    begins at zero, noise that stands in the place of [MASK] at the root mean square of what the network reads.
    """
    embedding = source.input_embedding()
    model.transformer.embed.weight[-1] = embedding.weight.float().mean(0)
    if model.noise_embed is None:
        return
    scale = 0.0
    if model.config.inject == "replace":
        tokens = embedding(torch.arange(source.vocab_size, device=source.device)).float()
        g = model.noise_embed.from_prior(256, generator=torch.Generator().manual_seed(0))
        scale = tokens.square().mean().sqrt().item() / g.square().mean().sqrt()
    for weight in model.noise_embed.parameters():
        weight.mul_(scale)
