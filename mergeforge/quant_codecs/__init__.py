"""Codecs of quantized weights: what the bytes of each format mean. Pure torch, one file per family of formats.

Each function takes packed rows and their scales and returns float32 values. They are exact enough that one rounding
gives the 16-bit values of the format's own library. Nothing here reads files.
"""
