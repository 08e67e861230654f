"""Components by name: registered, loaded, made ours by an adapter, their parameters, and their code as an identity."""
