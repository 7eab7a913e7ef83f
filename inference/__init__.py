"""A readable inference engine: Llama-family decoders in plain tensor code, at every precision the artifacts come in."""
