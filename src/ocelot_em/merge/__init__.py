"""The merge; start reading at :mod:`ocelot_em.merge.merge`."""
