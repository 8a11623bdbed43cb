"""The companion: trains the adapters that the engine merges. Needs the extra `train`.

settings -> planning -> running -> flow: what is asked for, what is decided, the run, and what follows it. Torch's part
lies in `steps/`.
"""
