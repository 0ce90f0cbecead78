"""Which layout a model should have on a number of GPUs: memory, time, cost, and the reasons.

Memory is that of `scaling.memory`, FLOPs those of `scaling.forecast`, and `config.rules` decides
which layouts are legal. This package adds the rates of devices and links (`cluster`), the seconds
of an iteration (`seconds`), and the ranking (`ranking`).
"""
