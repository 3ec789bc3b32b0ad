"""Adds the two top-level folders that are installed inside the package; everything else is in pyproject.toml.

kernels/ stays a plain folder (no __init__.py): Hugging Face ships a package of that name.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["gspn2_diffusion", "gspn2_diffusion.*"]),
        "gspn2_diffusion.kernels",
        "gspn2_diffusion.pipelines",
    ],
    package_dir={
        "gspn2_diffusion": "gspn2_diffusion",
        "gspn2_diffusion.kernels": "kernels",
        "gspn2_diffusion.pipelines": "pipelines",
    },
)
