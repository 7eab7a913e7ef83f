"""quantize: FP16 language-model checkpoints to quantized artifacts, each proven in the program that will run it."""

__version__ = "0.1.0"
