"""The one part in C, which setup.cfg cannot name; everything else is there.

Where it cannot be built (another system than Linux, no C compiler, no Python headers) pip goes on
without it: `pt-deploy serve` then reads requests in Python, says so, and serves less.
"""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "mlflow_pt_deploy.serving._front",
            ["mlflow_pt_deploy/serving/_front.c"],
            py_limited_api=True,  # of 3.11, as _front.c says
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
