"""The page about runs: facts, pictures, and the template that holds them."""
