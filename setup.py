"""The C library: compiled where there is a compiler. Without it torch computes the same bytes, more slowly."""

import hashlib
from pathlib import Path

from setuptools import Extension, setup

SOURCE = hashlib.sha256(Path(__file__).parent.joinpath("mergeforge", "native", "kernels.c").read_bytes()).hexdigest()

FLAGS = ["-O3", "-ffp-contract=off", "-fno-math-errno"]
setup(
    ext_modules=[
        Extension(
            "mergeforge.native._kernels",
            ["mergeforge/native/kernels.c"],
            define_macros=[("SOURCE", f'"{SOURCE}"')],
            libraries=["m"],
            extra_compile_args=FLAGS,
            optional=True,
        )
    ],
)
