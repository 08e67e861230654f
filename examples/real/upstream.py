r"""Public instruction data: where it is published, under which licence, and how its records become rows.

A row is named by its source, its split and its locator there. Every record is turned into the three texts of a row
(instruction, input, output) in the same way, whatever it is used for: outer blanks and control characters go, line
ends become `\n`. Nothing here is drawn at random.
"""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple


class Texts(NamedTuple):
    """What a row says."""

    instruction: str
    input: str
    output: str


Records = Iterator[tuple[str, Any]]
"""Locators (unique within a file) and what is found there."""


@dataclass(frozen=True)
class Source:
    """A published data set, at one commit."""

    repository: str
    commit: str
    licence: str
    files: dict[str, str]
    """Split to path; `all` where upstream has no splits."""
    wordings: tuple[str, ...]
    """Instructions that are ours, which a row names by number; empty where the instruction is upstream's own text."""
    records: Callable[[str], Records]
    """Reads a file's text."""
    texts: Callable[[Any, str], Texts]
    """Makes a record's texts with an instruction of `wordings`, or the empty string."""

    def url(self, split: str) -> str:
        """Return where a split's file is published."""
        return f"https://raw.githubusercontent.com/{self.repository}/{self.commit}/{self.files[split]}"


def clean(text: str) -> str:
    r"""Return the text without outer blanks, with `\n` as line end and no other control character than the tab."""
    text = text.replace("\r\n", "\n")
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc").strip()


def row_id(source: str, split: str, locator: str) -> str:
    """Return the name of a row: `gsm8k:train-4`, or `mbpp:601` where upstream has no splits."""
    return f"{source}:{locator}" if split == "all" else f"{source}:{split}-{locator}"


def _json_lines(text: str) -> Records:
    """Read objects, one a line, by position (from 0)."""
    for position, line in enumerate(line for line in text.split("\n") if line.strip()):
        yield str(position), json.loads(line)


def _mbpp(text: str) -> Records:
    for _, record in _json_lines(text):
        yield str(record["task_id"]), record


def _csv(text: str) -> Records:
    """Read records below the head by position (from 0); one may span lines."""
    reader = csv.reader(io.StringIO(text, newline=""))
    next(reader)
    for position, record in enumerate(reader):
        yield str(position), record


def _by_key(text: str) -> Records:
    yield from json.loads(text).items()


def _by_qid(text: str) -> Records:
    for record in json.loads(text):
        yield record["qid"], record


def _gsm8k_texts(record: Any, _: str) -> Texts:
    # `<<48/2=24>>` tells a calculator what to compute; a model that has none would learn to write both.
    answer = re.sub(r"<<.*?>>", "", record["answer"])
    return Texts(clean(record["question"]), "", clean(answer))


def _mbpp_texts(record: Any, _: str) -> Texts:
    tests = "\n".join(["Your code should pass these tests:", *record["test_list"]])
    return Texts(clean(record["text"]), _code(tests), _code(record["code"]))


def _code(text: str) -> str:
    return "\n".join(line.rstrip() for line in clean(text).replace("\t", "    ").split("\n"))


def _banking77_texts(record: Any, instruction: str) -> Texts:
    query, intent = record
    return Texts(instruction, clean(query), clean(intent))


def _pubmedqa_texts(record: Any, instruction: str) -> Texts:
    abstract = " ".join(clean(part) for part in record["CONTEXTS"])
    answer = f"{record['final_decision'].capitalize()}. {clean(record['LONG_ANSWER'])}"
    return Texts(instruction, f"Question: {clean(record['QUESTION'])}\n\nAbstract: {abstract}", answer)


def _strategyqa_texts(record: Any, instruction: str) -> Texts:
    facts = " ".join(clean(fact) for fact in record["facts"])
    return Texts(instruction, clean(record["question"]), f"{'Yes' if record['answer'] else 'No'}. {facts}")


SOURCES = {
    "gsm8k": Source(
        repository="openai/grade-school-math",
        commit="3101c7d5072418e28b9008a6636bde82a006892c",
        licence="MIT",
        files={"train": "grade_school_math/data/train.jsonl", "test": "grade_school_math/data/test.jsonl"},
        wordings=(),
        records=_json_lines,
        texts=_gsm8k_texts,
    ),
    "mbpp": Source(
        repository="google-research/google-research",
        commit="2251e8c67a7fe7d6348714967ee101080b28e956",
        licence="CC-BY-4.0",
        files={"all": "mbpp/mbpp.jsonl"},
        wordings=(),
        records=_mbpp,
        texts=_mbpp_texts,
    ),
    "banking77": Source(
        repository="PolyAI-LDN/task-specific-datasets",
        commit="57ec275d8078af65b7731c2a98be812d844a6d6b",
        licence="CC-BY-4.0",
        files={"train": "banking_data/train.csv", "test": "banking_data/test.csv"},
        wordings=(
            "Classify the intent of this bank customer message.",
            "What is the banking intent of the following query? Answer with the intent label.",
            "Read the customer's message to the bank's support chat and name the matching intent.",
            "Assign a banking support category to the message.",
        ),
        records=_csv,
        texts=_banking77_texts,
    ),
    "pubmedqa": Source(
        repository="pubmedqa/pubmedqa",
        commit="1cbae8e92f72f20c8d3747cbb3bf5bc53554d997",
        licence="MIT",
        files={"all": "data/ori_pqal.json"},
        wordings=(
            "Answer the biomedical research question from the abstract: yes, no or maybe, then give the conclusion.",
            "You are given a medical abstract without its conclusion. Answer the question and state the conclusion.",
            "Based on the study abstract, decide whether the answer is yes, no or maybe and justify it.",
        ),
        records=_by_key,
        texts=_pubmedqa_texts,
    ),
    "strategyqa": Source(
        repository="eladsegal/strategyqa",
        commit="1ba1e97452e189569357876f2854b01357ffbe37",
        licence="MIT",
        files={"train": "data/strategyqa/train.json", "dev": "data/strategyqa/dev.json"},
        wordings=(
            "Answer yes or no and list the facts you used.",
            "Yes or no? Explain with the relevant facts.",
            "Decide whether the answer is yes or no, with supporting facts.",
        ),
        records=_by_qid,
        texts=_strategyqa_texts,
    ),
}
