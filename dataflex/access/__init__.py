"""Features of rows for whoever asks: the stores first, then what computes them."""
