"""Load a tokenizer by name: from a folder, the Hub, or by training on documents."""

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path

from smollm_jax.runtime.errors import SourceTimeout, UserError, one_line, require
from smollm_jax.runtime.files import expand_home, named_failure
from smollm_jax.runtime.retry import WAYS_OUT, be_quiet, download_snapshot
from smollm_jax.tokenizer.tokenizer import CHAT_TOKENS, EOS, FILES, SpecialTokens, Tokenizer

BYTES = 256
LONGEST_WORD = 4_096  # bytes: the trainer's time grows with the square of a word's length


def load_tokenizer(
    name: str, *, documents: Iterable[str] | None = None, special_tokens: SpecialTokens = "text"
) -> Tokenizer:
    """Load the tokenizer of a folder or Hub id. For `train:VOCAB[:chat]`, train one on `documents`.

    Raises `UserError` if there is none, or the Hub does not answer.
    """
    folder = check_tokenizer(name)
    if name.startswith("train:"):
        require(documents is not None, f"--tokenizer {name} needs documents to be trained on")
        size, colon, _ = name.removeprefix("train:").partition(":")
        return train_tokenizer(documents or (), int(size), special_tokens=special_tokens, chat=bool(colon))
    return Tokenizer(_download(name) if folder is None else folder, special_tokens=special_tokens)


def check_tokenizer(name: str) -> Path | None:
    """Return the folder of a local name, None for `train:VOCAB[:chat]` or a Hub id.

    Does not ask the Hub. Raises `UserError` if there is no such folder, or VOCAB is no size.
    """
    if name.startswith("train:"):
        size, colon, more = name.removeprefix("train:").partition(":")
        require(
            size.isdecimal() and int(size) > BYTES and (more == "chat" or not colon),
            f"--tokenizer {name}: expected train:VOCAB or train:VOCAB:chat, such as train:4096, with VOCAB of "
            f"{BYTES + 1} or more",
        )
        return None
    folder = expand_home(name)
    if not (folder.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1):
        return None
    require(folder.is_dir(), f"no tokenizer folder {folder}; give a folder, a Hub id or train:VOCAB")
    return folder


def _download(repo: str) -> Path:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        be_quiet()
        return download_snapshot(repo, FILES)
    except SourceTimeout as error:
        reason = f"{error}; {WAYS_OUT}"
    except GatedRepoError:
        reason = f"{repo} is gated: accept its terms on the Hub and set HF_TOKEN"
    except RepositoryNotFoundError:
        reason = f"{repo}: no such folder here and no such repository on the Hub"
    except Exception as error:  # its kind differs between releases of three libraries, and with the environment
        reason = f"{repo} cannot be fetched from the Hub ({one_line(error)}); {WAYS_OUT}"
    raise UserError(f"--tokenizer {reason}")


def train_tokenizer(
    documents: Iterable[str], vocab_size: int, *, special_tokens: SpecialTokens = "text", chat: bool = False
) -> Tokenizer:
    """Train a byte-level BPE of `vocab_size` entries, eos first. See Sennrich et al. 2016, Radford et al. 2019.

    With `chat` it has ChatML's tokens too, for a model that is to be fine-tuned on conversations.
    """
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Fast

    fast = Fast(models.BPE())
    words, pieces = pre_tokenizers.ByteLevel(add_prefix_space=False), Regex(f".{{{LONGEST_WORD}}}")
    fast.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.Split(pieces, "isolated")])
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, *(CHAT_TOKENS if chat else ())],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    fast.train_from_iterator(documents, trainer)
    fast.pre_tokenizer = words
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), EOS),
        "clean_up_tokenization_spaces": False,
    }
    with tempfile.TemporaryDirectory(prefix="tokenizer-", ignore_cleanup_errors=True) as folder:
        with named_failure(f"{folder}, a temporary folder"):
            Path(folder, "tokenizer.json").write_text(fast.to_str(pretty=True), encoding="utf-8")
            Path(folder, "tokenizer_config.json").write_text(
                json.dumps(settings, indent=2) + "\n", encoding="utf-8"
            )
        return Tokenizer(folder, special_tokens=special_tokens)
