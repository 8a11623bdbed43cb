"""Adapter kinds: what the keys and the configuration of an adapter mean. One file a kind."""
