"""The PEFT methods other than LoRA, one file each; the presence of a file registers its method."""
