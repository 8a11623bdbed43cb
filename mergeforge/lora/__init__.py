"""LoRA adapters made from models or from other adapters: extract and combine."""
