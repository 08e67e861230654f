"""Signs that a run is not what it seems are said where they are, and nowhere else."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dataflex import signs
from dataflex.llamafactory.sanity import judge_records, sample

SIGNS = ("unknown token", "does not come back", "truncated by cutoff_len", "mean supervised loss")


def said(caplog: pytest.LogCaptureFixture) -> dict[str, list[str]]:
    """Return the warnings logged so far by their sign, and forget them."""
    found = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and r.name.startswith("dataflex")]
    caplog.clear()
    return {sign: kept for sign in SIGNS if (kept := [text for text in found if sign in text])}


@pytest.fixture(scope="session")
def folders(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Make a model that has learned something twice: its unknown token also pads, and of one no blank is known."""
    from examples.quickstart import model, pool

    base = tmp_path_factory.mktemp("sane")
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny.model)
    rows = json.loads((tiny.dataset_dir / "pool.json").read_text())[:60]
    taught = model.new_model(tokenizer, hidden=64, layers=2, seed=0)
    model.pretrain(taught, tokenizer, ["".join(pool.turns(r)) for r in rows], steps=25, batch=4, block=64, rate=1e-2)
    found = {name: base / name for name in ("sound", "twofold", "blankless")}
    for name, folder in found.items():
        model.save(taught, tokenizer, folder)
        if name != "sound":
            _spoil(folder, name == "blankless")
    return found


def _spoil(folder: Path, is_blankless: bool) -> None:
    """Make `<|endoftext|>`, which pads, the unknown token as well; perhaps take all blanks out of the vocabulary."""
    path = folder / "tokenizer.json"
    spec = json.loads(path.read_text("utf-8"))
    spec["model"]["unk_token"] = "<|endoftext|>"
    if is_blankless:
        spec["model"]["vocab"] = {
            f"unused{i}" if "Ġ" in token else token: i for token, i in spec["model"]["vocab"].items()
        }
        spec["model"]["merges"] = [pair for pair in spec["model"]["merges"] if "Ġ" not in "".join(pair)]
    path.write_text(json.dumps(spec), "utf-8")
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"unk_token": "<|endoftext|>"}))


PLAIN: dict[str, Any] = {"train_type": "static", "component_name": None, "warmup_step": None, "update_step": None}
PLAIN |= {"update_times": None, "eval_dataset": None, "max_steps": 1, "dataflex": None, "save_strategy": "no"}
ONCE: dict[str, Any] = {"update_times": 1, "update_step": 1, "warmup_step": 1, "save_strategy": "no"}


def test_a_sound_run_is_told_nothing(workspace: Any, folders: Any, caplog: pytest.LogCaptureFixture) -> None:
    """With features and without, on records and on tokens, though the token that pads is also the unknown one."""
    keys = {"model_name_or_path": str(folders["twofold"]), "cutoff_len": 256}
    workspace.run("train", workspace.write("selected", **keys, **ONCE))
    assert said(caplog) == {}
    keys |= {"tokenized_path": str(workspace.folder / "tokens")}
    for turn in ("untouched", "tokenized"):
        workspace.run("train", workspace.write(turn, **PLAIN | keys))
        assert said(caplog) == {}


@pytest.mark.slow
def test_a_tokenizer_without_blanks_is_found(workspace: Any, folders: Any, caplog: pytest.LogCaptureFixture) -> None:
    """As the tokenizer of a real model once was; by embeddings alone, by LLaMA-Factory's own training, by tokens."""
    keys: dict[str, Any] = {"model_name_or_path": str(folders["blankless"]), "cutoff_len": 40}
    section = {"store": str(workspace.folder / "store")}
    workspace.run("featurize", workspace.write("embedded", component_name="rds_plus", **keys, dataflex=section))
    found = said(caplog)
    assert list(found) == list(SIGNS)
    assert [len(found[sign]) for sign in SIGNS] == [1, 1, 2, 1]  # the target rows are cut as well
    assert "unknown token '<|endoftext|>'; expected at most 1%" in found["unknown token"][0]
    keys |= {"tokenized_path": str(workspace.folder / "tokens")}
    workspace.run("train", workspace.write("untouched", **PLAIN | keys))
    assert list(said(caplog)) == list(SIGNS)
    workspace.run("train", workspace.write("tokenized", **PLAIN | keys))
    assert list(said(caplog)) == ["unknown token", "mean supervised loss"]


@pytest.mark.slow
def test_a_model_that_guesses_is_said_once_and_a_new_one_may(
    workspace: Any, tiny: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """By the first step, or by what a pass for embeddings reads besides where there is no step."""
    section = {"store": str(workspace.folder / "store")}
    workspace.run("featurize", workspace.write("embedded", component_name="rds_plus", cutoff_len=256, dataflex=section))
    (text,) = said(caplog)["mean supervised loss"]
    assert "the features' pass over 62 rows by base is 6." in text
    assert f"expected well below {0.9 * math.log(512):.2f}" in text
    workspace.run("train", workspace.write("selected", cutoff_len=256, **ONCE))
    (text,) = said(caplog)["mean supervised loss"]
    assert "of the first step is 6." in text
    workspace.run("train", workspace.write("new", **PLAIN, cutoff_len=256, train_from_scratch=True))
    assert said(caplog) == {}


@pytest.mark.parametrize(
    "name", ["default", "qwen3", "qwen3_nothink", "llama3", "gemma", "mistral", "deepseekr1", "phi4"]
)
def test_no_template_gives_a_false_alarm(tiny: Any, folders: Any, caplog: pytest.LogCaptureFixture, name: str) -> None:
    """Of records with thoughts, calls of tools, several turns, and what templates add spelled out in a text."""
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args

    call = json.dumps([{"name": "find", "arguments": {"where": "a  b"}}])
    turns = [
        ("user", "Where?"),
        ("function", call),
        ("observation", '{"at": 3}'),
        ("assistant", "<think>\n?\n</think>\n\nAt 3."),
    ]
    answers = ["<think>\n\n</think>\n\nYes", "  two\tof\r\n them ", "<|im_end|> and <|endoftext|>", "é ß 漢字 🙂 ﬁ"]
    records = [
        {
            "_prompt": [{"role": role, "content": text} for role, text in (*turns, ("user", "And?"))],
            "_response": [{"role": "assistant", "content": answer}],
        }
        for answer in answers
    ]
    tokenizer = AutoTokenizer.from_pretrained(folders["twofold"])
    keys = {"model_name_or_path": str(tiny.model), "template": name, "dataset": "pool", "do_train": True}
    data_args = get_train_args({**keys, "stage": "sft", "output_dir": "out", "use_cpu": True, "report_to": "none"})[1]
    get_template_and_fix_tokenizer(tokenizer, data_args)
    judge_records(records, tokenizer)
    assert said(caplog) == {}


def test_a_mean_loss_is_held_against_guessing() -> None:
    assert signs.loss_warning(0.89 * math.log(1000), 1000, "it") is None
    assert signs.loss_warning(0.9 * math.log(1000), 1000, "it") is not None
    assert "is nan nats" in str(signs.loss_warning(math.nan, 1000, "it"))


def trained(unknown: str, normalizer: Any = None, texts: str = "the cat sat on the mat") -> PreTrainedTokenizerFast:
    """Return a tokenizer of the kind that sentencepiece makes, of the letters of a text alone."""
    made = Tokenizer(models.BPE(unk_token=unknown))
    made.normalizer = normalizer
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.train_from_iterator([texts], trainers.BpeTrainer(vocab_size=60, special_tokens=[unknown, "</s>"]))
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token=unknown, eos_token="</s>", pad_token=unknown)


def test_words_that_a_vocabulary_lacks_are_counted_and_do_not_come_back() -> None:
    tokenizer = trained("<unk>")
    assert signs.unknown_in_texts(["the cat", " the mat <unk> sat"], tokenizer)[0] == 0  # the text itself spells it
    assert signs.text_warning(["the cat", " the  mat", "the mat"], tokenizer) is None
    assert signs.unknown_in_texts(["the dog", "the cat"], tokenizer)[0] == 2
    warning = signs.text_warning(["the cat", "the dog sat"], tokenizer)
    assert warning is not None
    assert warning.startswith("the supervised text of 1 of 2 rows does not come back")
    assert "'the dog sat' comes back as 'the <unk>o<unk> sat'" in warning
    assert signs.unknown_warning(1, 100, tokenizer) is None
    assert "2 of 100 tokens of the text (2%)" in str(signs.unknown_warning(2, 100, tokenizer))


def test_texts_are_compared_as_tokenizers_may_change_them_and_no_further() -> None:
    plain, lower = normalizers.NFKC(), normalizers.Lowercase()
    assert signs.text_warning(["  ﬁt at ①", "½"], trained("<unk>", plain, "fit at 1 2⁄ ⁄")) is None
    assert signs.text_warning(["Cat"], trained("<unk>", lower)) is not None


def test_only_the_inside_of_an_answer_tells_what_is_unknown_where_texts_are_not_known() -> None:
    tokenizer = trained("<unk>")
    unknown, known = tokenizer.unk_token_id, tokenizer.convert_tokens_to_ids("t")
    row = {"input_ids": [unknown, known, known, unknown, unknown], "labels": [-100, known, known, unknown, -100]}
    assert signs.unknown_in_tokens([row], tokenizer, -100) == (0, 2)
    row = {"input_ids": [known, unknown, known, unknown], "labels": [-100, unknown, known, unknown]}
    assert signs.unknown_in_tokens([row, row], tokenizer, -100) == (2, 4)


@pytest.mark.parametrize(
    ("lengths", "cut", "expected"),
    [
        ([8, 8, 8, 8], [1, 1, 1, 0], "all 4 rows of it have the same length, 8 tokens, 3 of them as truncated"),
        ([8, 8, 8, 8], [0, 0, 0, 0], None),  # alike, but not by cutoff_len
        ([8, 8, 8, 3], [1, 1, 1, 0], "3 of 4 rows of it are truncated by cutoff_len 8"),
        ([8, 8, 5, 3], [1, 1, 0, 0], None),
        ([8], [1], "1 of 1 rows of it are truncated"),
        ([], [], None),
    ],
)
def test_cuts_are_said_from_more_than_half_on(lengths: list[int], cut: list[int], expected: str | None) -> None:
    found = signs.length_warning("it", np.array(lengths), np.array(cut, bool), 8)
    assert (found is None) if expected is None else (found or "").startswith(expected)


def test_a_sample_is_evenly_spaced() -> None:
    assert sample(list(range(3))) == [0, 1, 2]
    assert sample([]) == []
    assert sample(list(range(1000))) == list(range(0, 1000, 10))


@pytest.mark.parametrize(
    ("logs", "said"), [({"loss": 1.0, "grad_norm": math.nan}, 1), ({"loss": math.inf}, 1), ({"loss": 2.0}, 0)]
)
def test_a_training_that_has_lost_its_weights_says_so_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, logs: dict[str, float], said: int
) -> None:
    """Transformers logs a loss that is no number as 0, and the run would end as if all was well."""
    from transformers import Trainer

    from dataflex.trainers.first_step import FirstStepJudged

    logged: list[dict[str, float]] = []
    monkeypatch.setattr(Trainer, "log", lambda self, logs: logged.append(logs))
    trainer: Any = FirstStepJudged.__new__(FirstStepJudged)
    trainer.args, trainer.state = SimpleNamespace(fp16=False), SimpleNamespace(global_step=7)
    for _ in range(2):
        trainer.log(dict(logs))
    assert caplog.text.count("step 7: ") == said
    assert logged == [logs, logs]
