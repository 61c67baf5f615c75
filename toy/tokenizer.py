"""Train byte-level BPE tokenizers for the embedded world; any text has ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

_WORD = r" ?[A-Za-z_]+| ?[0-9.]+| ?[^A-Za-z_0-9.\s]+|\s"


def train_tokenizer(
    texts: Iterable[str],
    *,
    size: int,
    special: Sequence[str],
    words: Sequence[str] = (),
    pad: str,
    eos: str,
    end_with_eos: bool,
) -> PreTrainedTokenizerFast:
    """Train BPE over bytes with at most ``size`` entries before the added ones.

    special       Control tokens, which are never split.
    words         Ordinary strings of one token each (fixed pieces of the answer).
    end_with_eos  Every encoded text ends in ``eos``, as T5's do.
    """
    core = Tokenizer(models.BPE())
    splitters = [
        pre_tokenizers.Split(Regex(_WORD), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    core.pre_tokenizer = pre_tokenizers.Sequence(splitters)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        min_frequency=2,
    )
    core.train_from_iterator(texts, trainer)

    # The added tokens get the ids after the trained ones.
    controls = [AddedToken(token, special=True, normalized=False) for token in special]
    core.add_special_tokens(controls)
    pieces = [AddedToken(word, special=False, normalized=False) for word in words]
    core.add_tokens(pieces)
    if end_with_eos:
        core.post_processor = processors.TemplateProcessing(
            single=f"$A {eos}", special_tokens=[(eos, core.token_to_id(eos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=pad,
        eos_token=eos,
        clean_up_tokenization_spaces=False,
    )
