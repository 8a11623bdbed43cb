"""The kernels in C: compiled where there is a compiler; without them torch does the same, slower."""

from setuptools import Extension, setup

FLAGS = ["-O3", "-ffp-contract=off", "-fno-math-errno"]
setup(
    ext_modules=[
        Extension(
            "mergeforge._kernels",
            ["mergeforge/kernels.c"],
            libraries=["m"],
            extra_compile_args=FLAGS,
            optional=True,
        )
    ],
)
