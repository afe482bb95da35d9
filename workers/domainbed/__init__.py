"""DomainBed's protocol: seeds, hyper-parameters, splits, sampling, sweeps, model selection, result tables.

Gulrajani and Lopez-Paz, "In Search of Lost Domain Generalization", ICLR 2021 (arXiv 2007.01434), and the variant of
GMoE (ICLR 2023, arXiv 2206.04046). See ``docs/domainbed.md``. Nothing here imports torch before it is called.
"""
