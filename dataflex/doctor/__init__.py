"""Whether a run can work in this environment; imports nothing that could be broken into this process."""
