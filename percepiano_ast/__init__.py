"""Listen to a piano performance and say how it is played: AST, SSAST and PercePiano in JAX."""

__version__ = "0.1.0"
