"""`rode demo`: a small LLaVA-RoDE trained on drawn plates, from packages on PyPI alone."""
