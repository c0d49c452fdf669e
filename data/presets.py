"""Defaults of a run that its data and model bring: train.py's flags, where these say nothing else.
"""
# where all flags on the left are so: later lines win over earlier ones, explicit flags over all
PRESETS = [
    ({"model": "medusa"},                                  # Appendix C.2
     dict(dropout=0.0, batch_size=256, lr=1e-3, schedule="cosine", steps=20_000)),
    ({"data": "lm1b"}, dict(length=128)),
    ({"data": "maze"},                                     # maze_skewed counts as maze
     dict(length=None, n_layer=4, n_embd=128, n_head=4, dropout=0.0, batch_size=128, lr=1e-3,
          steps=1600, warmup=100, schedule="cosine", eval_every=500, save_every=200, log_every=20)),
    ({"data": "maze", "model": "ar"}, dict(n_layer=8, n_head=8, batch_size=64, lr=2e-3, steps=1200)),
    ({"data": "maze", "model": "bd3lm"}, dict(length=12)),  # 11 is prime: rows get one more PAD
    ({"data": "maze", "model": "mdlm", "gumbel": True}, dict(t_one=0.5)),
    ({"data": "maze", "model": "bd3lm", "gumbel": True}, dict(t_one=0.5)),
    ({"data": "molecules"},
     dict(length=None, n_layer=4, n_embd=128, n_head=4, dropout=0.0, batch_size=256, lr=3e-3,
          steps=5000, warmup=100, schedule="cosine", eval_every=1000, save_every=500)),
    ({"data": "molecules", "model": "ar"}, dict(lr=2e-3, steps=3000)),
    ({"data": "molecules", "model": "mdlm", "gumbel": True}, dict(mask_suffix=1.0)),
    ({"data": "words"},
     dict(length=None, n_layer=4, n_embd=128, n_head=4, dropout=0.1, batch_size=256, lr=3e-3,
          steps=2500, warmup=100, schedule="cosine", eval_every=1000, save_every=500)),
    ({"data": "words", "model": "ar"}, dict(lr=2e-3, steps=3000)),
    ({"data": "words", "model": "mdlm", "gumbel": True}, dict(mask_suffix=1.0)),
    # students of the teacher's shape start from its weights
    ({"data": "molecules", "model": "mdlm"}, dict(init_from="teacher")),
    ({"data": "words", "model": "mdlm"}, dict(init_from="teacher")),
    ({"model": "medusa"}, dict(n_layer=1)),                # on these as well
]
MAZES = ("maze", "maze_skewed")
# data that a run makes where they are not there, with a teacher that it trains where it needs one
EMBEDDED = (*MAZES, "words", "molecules")
