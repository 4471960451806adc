"""Prefect flows: each stage a flow of its own name and module, chained by `reproduce`; and the console script `ldm`."""
