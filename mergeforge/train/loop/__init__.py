"""Training itself: what runs once torch, transformers and peft are there.

Modules of this package import these at their head, unlike all others: they are loaded only after
`mergeforge.train.requirements.check` has found the extra `train`.
"""
