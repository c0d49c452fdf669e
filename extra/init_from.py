"""Starting from the weights of another model: train.py's --init_from."""
import torch

from data.cli import BadInput, Parser

SHAPE = ("n_layer", "n_embd", "n_head")                     # what a pretrained start decides


def initial_weights(model, source, name):
    """--init_from=name: the weights of `source` into `model`; BadInput where they do not fit.

    What reads the noise is optional: it stays new where the source has none, is left out where the model has none.
    """
    if source.pretrained:
        begin_beside_pretrained(model, source)
    reads_noise = ("noise_embed.", "accumulator.")
    own = model.state_dict()
    state = {key: weight for key, weight in own.items() if key.startswith(reads_noise)}
    for key, weight in source.state_dict().items():
        if key in own or not key.startswith(reads_noise):
            state[key] = weight
    # an AR model's embedding has no row of [MASK], the last one: the new model's own stays
    ids = "transformer.embed.weight"
    if ids in own and ids in state and state[ids].shape == own[ids][:-1].shape:
        state[ids] = torch.cat([state[ids], own[ids][-1:]])
    for key in [*own, *state]:
        here = list(own[key].shape) if key in own else "nothing"
        there = list(state[key].shape) if key in state else "nothing"
        if here != there:
            raise BadInput(f"--init_from={name} is another kind or shape of network ({key} is {there} there, {here} "
                           "here): give the same flags of the network and vocabulary, or leave --init_from out")
    model.load_state_dict(state)


# ---------------------------------------------------------------------------------------------------------------------
# models that others have trained

def config_of_start(args, source):
    """What a pretrained model, GPT-2, decides of a student's config; BadInput where flags ask for another network.

    Noise is added to what stands for [MASK] unless --inject says otherwise: so the new student is what it began as.
    """
    there = source.config
    given = Parser.given
    if "size" in given:
        raise BadInput(f"--size={args.size} is decided by --init_from={args.init_from}: leave it out")
    for name in SHAPE:
        if name in given and getattr(args, name) != getattr(there, name):
            raise BadInput(f"--{name}={getattr(args, name)} does not fit --init_from={args.init_from}, which has "
                           f"{getattr(there, name)}: leave it out")
    if args.length is not None and args.length > there.length:
        raise BadInput(f"--length={args.length} is more than the {there.length} positions of "
                       f"--init_from={args.init_from}: choose a smaller one")
    known = {name: getattr(there, name) for name in SHAPE}
    known["positions"] = there.length
    if args.gumbel and "inject" not in given:
        known["inject"] = "add"
    return known


@torch.no_grad()
def begin_beside_pretrained(model, source):
    """What a pretrained model has no weights for: [MASK] begins at the mean of all embeddings; noise that is added
    begins at zero, noise that stands in the place of [MASK] at the root mean square of the embeddings.
    """
    embedding = source.transformer.embed.weight
    model.transformer.embed.weight[-1] = embedding.mean(0)
    if model.noise_embed is None:
        return
    scale = 0.0
    if model.config.inject == "replace":
        g = model.noise_embed.from_prior(256, generator=torch.Generator().manual_seed(0))
        scale = embedding.square().mean().sqrt() / g.square().mean().sqrt()
    for weight in model.noise_embed.parameters():
        weight.mul_(scale)
