"""PEFT's key names, its adapter_config.json, and its adapter methods (one file per method in kinds/)."""
