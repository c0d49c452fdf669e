"""Starting from the weights of another model: train.py's --init_from."""
import torch

from data.cli import BadInput


def initial_weights(model, source, name):
    """--init_from=name: the weights of `source` into `model`; BadInput where they do not fit.

    What reads the noise is optional: it stays new where the source has none, is left out where the model has none.
    """
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
