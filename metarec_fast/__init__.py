"""Fast vector quantization and transferable sequential recommendation for PyTorch."""

__version__ = "0.1.0"
