"""How a variant runs: readable versions of the arithmetic inside the programs that load the artifacts."""
