"""The commands of `rode`, one module each: `add_parser(commands, **options)`, and what runs.

They import torch and what needs it only when they run, so that `rode --help` does not wait for it.
"""
