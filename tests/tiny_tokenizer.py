"""A tokenizer of a few dozen words, with a chat template, for tests that start from texts."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

SPECIAL = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
WORDS = (
    "name : the Blue Spice Golden Palace Punter Type pub coffee shop food Thai English price cheap high near park "
    "city centre is a in serves it has with not and | . <user> <assistant> <end>"
)
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] }} <end> {% endgeneration %}{% else %}{{ message['content'] }} <end> {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)


def tiny_tokenizer(*, adds: str = "", **special: str | None) -> PreTrainedTokenizerBase:
    """Words between spaces.

    Args:
        adds: Special tokens that it puts around texts by itself: `"bos"`, `"eos"`, both or none.
        **special: Special tokens that are different from `SPECIAL`; `None` for none.
    """
    words = [*SPECIAL.values(), *dict.fromkeys(WORDS.split())]
    fast = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    fast.pre_tokenizer = WhitespaceSplit()
    if adds:
        single = " ".join([*(["<s>"] if "bos" in adds else []), "$A", *(["</s>"] if "eos" in adds else [])])
        fast.post_processor = TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    names = {name: token for name, token in {**SPECIAL, **special}.items() if token is not None}
    return PreTrainedTokenizerFast(tokenizer_object=fast, chat_template=TEMPLATE, **names)
