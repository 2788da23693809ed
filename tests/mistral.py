"""The real Mistral v0.3 tokenizer, and Mistral-7B's shape, without the Hub.

The tokenizer is built from the SentencePiece file that mistral-common ships; `test_tokens.py`
compares its ids with mistral-common's own. The shape is that of
mistralai/Mistral-7B-Instruct-v0.3's config.json.
"""

from importlib.util import find_spec
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import MistralConfig, PreTrainedTokenizerFast


def sentencepiece_model():
    """Mistral v0.3's SentencePiece model (`SentencePieceProcessor`), as mistral-common ships it."""
    from sentencepiece import SentencePieceProcessor

    data = Path(find_spec("mistral_common").submodule_search_locations[0]) / "data"
    return SentencePieceProcessor(
        model_file=str(data / "mistral_instruct_tokenizer_240323.model.v3")
    )


def merges(pieces: list[str], score: dict[str, float]) -> list[tuple[str, str]]:
    """BPE merges of a SentencePiece vocabulary, best score first."""
    place = {piece: i for i, piece in enumerate(pieces)}
    found = []
    for piece in sorted(pieces, key=lambda piece: -score[piece]):
        pairs = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        found += sorted(
            (p for p in pairs if p[0] in place and p[1] in place),
            key=lambda p: (place[p[0]], place[p[1]]),
        )
    return found


def mistral_tokenizer() -> PreTrainedTokenizerFast:
    """The v0.3 tokenizer (32,768 ids: 771 control and byte pieces, then the words) as a fast
    tokenizer.
    """
    spm = sentencepiece_model()
    ids = range(spm.get_piece_size())
    pieces = [spm.id_to_piece(i) for i in ids]
    score = {pieces[i]: spm.get_score(i) for i in ids}
    words = [
        pieces[i] for i in ids if not (spm.is_control(i) or spm.is_unknown(i) or spm.is_byte(i))
    ]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(
        models.BPE(
            vocabulary, merges(words, score), unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    control = [pieces[i] for i in ids if spm.is_control(i) or spm.is_unknown(i)]
    backend.add_special_tokens(
        [AddedToken(piece, special=True, normalized=False) for piece in control]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def mistral_config() -> MistralConfig:
    """Mistral-7B-Instruct-v0.3's shape: 7.25 billion weights."""
    return MistralConfig(
        vocab_size=32768,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=32768,
        rope_theta=1e6,
        sliding_window=None,
        rms_norm_eps=1e-5,
    )
