"""Checkpoint recycling (MoE Jetpack): experts sampled out of a dense predecessor's feed-forward layers.

``recycle.recycle`` is the whole chain; ``probe`` and ``statistics`` measure activations, ``graph`` and ``louvain``
partition neurons, ``indices`` and ``indices_v2`` choose them, ``weights`` and ``dual_path`` gather. ``options`` holds
the records that YAML fills and imports no torch.
"""
