"""The Hugging Face model that a GGUF file holds: its class, config.json, and the names and shapes of its tensors.

The functions of gguf/architectures say what a model's config and tensors become in GGUF. The inverse is found with the
same functions: classes.json lists, for each class, which config value a key comes from, and which GGUF tensors a stored
tensor becomes. A config and tensors are proposed from the file, and the family's own function must turn them into the
keys and tensors of the file; otherwise the file is refused.
"""
