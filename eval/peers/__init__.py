"""Programs by others, each run by the Python of its own environment; none imports more of this project than
:mod:`eval.peers.record`, which needs the standard library only.

Quantizers are run by ``python -m eval.bench_gptq`` or ``eval.bench_awq``: a script takes ``MODEL WINDOWS OUT BITS GROUP
SYMMETRIC``, writes the artifact to ``OUT`` and what it cost to ``OUT.json``. :mod:`eval.peers.vllm_generate` runs artifacts.
"""
