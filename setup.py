"""The C++ kernels; all else is declared in pyproject.toml.

Optional: without a compiler the install succeeds, and the ops run in PyTorch.
"""

from glob import glob

from setuptools import Extension, setup

FLAGS = ["-O3", "-std=c++17", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]

setup(
    ext_modules=[
        Extension(
            "motab_kernels.cpu._kernels",
            sources=sorted(glob("motab_kernels/cpu/*.cpp")),
            depends=sorted(glob("motab_kernels/cpu/*.h")),
            extra_compile_args=FLAGS,
            extra_link_args=["-fopenmp"],
            optional=True,
        )
    ]
)
