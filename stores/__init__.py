"""Stores of feature values: Parquet and JSON files, exact search over them, FAISS indexes derived from them."""

if __name__ == "stores":
    raise ImportError('this folder is the package "dataflex.stores": write `import dataflex.stores`')
