"""What a run leaves in its folder for people and programs to read; neither torch nor LLaMA-Factory is needed for it."""
