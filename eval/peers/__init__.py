"""Quantizers by others, each run in a process of its own by ``python -m eval.bench_gptq`` or ``eval.bench_awq``.

A script takes ``MODEL WINDOWS OUT BITS GROUP SYMMETRIC``, imports nothing of this project but :mod:`eval.peers.record` (which
needs the standard library only), writes the artifact to ``OUT`` and what it cost to ``OUT.json``.
"""
