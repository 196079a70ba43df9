"""A page to look at adapters with, and what it does, in plain functions: `slora app` and `slora compare`."""
