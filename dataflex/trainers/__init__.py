"""How a run is fed: rounds of rows, their journal, their checkpoints, and the trainer that joins them."""
