"""Containers: the bytes on disk, one file each; their registry is :mod:`exports.containers`.

Nothing is imported here, so that what needs no torch (the GGUF modules) starts without it.
"""
