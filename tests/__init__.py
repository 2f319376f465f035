"""A package by name: torch-fidelity installs one called `tests`, which would hide a folder without this file."""
