"""What a run will need and cost, told before anything is computed."""
