"""Training itself, on torch, transformers and peft.

Unlike all others, modules of this package import these at module level. They are loaded only after
`mergeforge.train.environment.check_packages` has found the packages.
"""
