"""What the files of a run are called that tell of it."""

ABOUT = "dataflex_run.json"
ROWS = "dataflex_rows.parquet"
PLAN = "dataflex_plan.json"
SUMMARY = "dataflex_summary.json"
WARNINGS = "dataflex_warnings.jsonl"
TRAINING_LOG = "trainer_log.jsonl"
MIXTURE = "mixture.jsonl"
TEST = "test.parquet"


def name_of(name: str, verb: str) -> str:
    """Return what a file is called that a verb writes: `train` has the plain name, others are named in theirs."""
    stem, dot, ending = name.rpartition(".")
    return name if verb == "train" else f"{stem}_{verb}{dot}{ending}"
