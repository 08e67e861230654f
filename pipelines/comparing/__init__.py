"""Several methods trained and measured alike: what is compared, how it is run, what came out."""
