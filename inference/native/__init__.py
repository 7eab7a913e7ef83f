"""Decode without an interpreter between its parts: one C++ function a token, compiled when it is first asked for."""
