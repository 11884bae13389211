"""The merge: the story is in :mod:`ocelot_em.merge.merge`."""
