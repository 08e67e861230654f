"""Search over the vectors of stores: exact top-k, and nearest neighbours by FAISS, whose indexes are derived."""
