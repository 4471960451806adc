"""Prefect flows: each stage one of its own name and module, and their chain `reproduce`; the script `ldm`."""
