"""Quantised weights as numbers: what the bytes of each format mean. Pure torch, one file a format.

Each function takes packed rows and their scales, and gives float32 values; that is exact enough to be
rounded once to the 16-bit dtype that the format's own library would give. Nothing here reads files.
"""
