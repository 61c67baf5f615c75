"""Byte-level BPE tokenizers for the embedded world: any text has ids, the world's own words are one token each."""

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
    """BPE over bytes with at most ``size`` entries before the added ones.

    special       control tokens, never split, never produced from ordinary text by the caller's care
    words         ordinary strings that are one token each (fixed pieces of the judge's answer)
    end_with_eos  every encoded text ends in ``eos``, as T5's do
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORD), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size,
            initial_alphabet=alphabet,
            show_progress=False,
            min_frequency=2,
        ),
    )
    core.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special]
    )
    core.add_tokens(
        [AddedToken(word, special=False, normalized=False) for word in words]
    )
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
