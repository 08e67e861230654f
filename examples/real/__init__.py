"""The demo on a real pretrained model and real instruction data, and the data that the evidence is made of."""
