"""URL lists and bytes in, batches out; and the artifact store that every stage of the pipeline uses.

Nothing is imported here, so ``import datasets`` costs nothing and each name has one home:
see ``datasets/README.md``.
"""

__all__: list[str] = []
