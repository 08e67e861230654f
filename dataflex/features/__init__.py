"""What one example is turned into: loss, embedding, projected gradient."""
