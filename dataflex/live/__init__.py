"""The model in a trainer's hands: which state it is in, its moments, what a checkpoint's weights were trained on."""
