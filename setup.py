"""Everything is declared in pyproject.toml; setuptools asks for this file when it builds extensions."""

from setuptools import setup

setup()
