"""Trains the small vocabulary of this directory and records what transformers makes of it.

Writes vocab.json, merges.txt and expected.json beside itself; tokenizer_config.json is written by hand, in the style
of Dream 7B (ids of the added tokens with a gap, so that a tokenizer which numbers them by itself is caught).
Recorded with transformers 4.46.3 and tokenizers 0.20.3:

    python record.py
"""

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

HERE = Path(__file__).parent
VOCAB_SIZE = 456  # 256 bytes and 200 merges; the first added token of tokenizer_config.json follows

SENTENCES = [
    "The quick brown fox jumps over the lazy dog, and the dog isn't amused.",
    "She's bought 16 more buttons; they're in 4 bags with 11 buttons each. I'll count: 4*11=44!",
    "def add(a, b):\n    return a + b\n\n\nfor i in range(10):\n    print(add(i, i))\n",
    "Diffusion language models fill masked tokens in parallel, block by block.",
    "Café, naïve, façade, Zürich: every résumé has its accents.",
    "你好，世界。扩散语言模型。你好吗？",
    "Привет, мир! 😀 👍🏽",
    "I've seen that we'd said it's what they'll do; DON'T SHOUT, WE'RE HERE.",
]

TEXTS = [
    "",
    "Hello world",
    "  two leading spaces",
    "trailing spaces   ",
    "a\n\n\nb \n c\r\n\r\nd",
    "\tdef f(x):\n\t\treturn x  # tab",
    "it's we'll I'd they've you're I'm don't",
    "IT'S WE'LL I'D THEY'VE YOU'RE I'M DON'T",
    "1234567 3.14 ١٢٣ ½ Ⅷ",
    "你好，世界。語言",
    "😀 👍🏽👨‍👩‍👧 ok",
    "cafe\u0301 nai\u0308ve A\u030a \u1112\u1161\u11ab \ufb01",  # decomposed; the last is a ligature, which NFC keeps
    "<|im_start|>user\nHi<|im_end|>\n<|mask|><|mask|> <|endoftext|>",
    "x<|beginoftext|> y <tool_call> <|im_start |> <|mask|",
    " \u00a0\u3000\u2028 nbsp",
    "!!!???\n\n... --> 'quoted' \"s\" ’s",
    "   \n   \n x   y\t\t z \n",
    "ſ'S ʼs K'ſ",  # (?i:'s) also matches 'ſ' (U+017F)
    "\u0000\u0007\u007f\ufeff",
]

MESSAGES = ["How many buttons?", "  {{ not a template }} <b>&amp;</b> \"q\" \n", "", "你好<|im_end|>"]

# (template, message): what HF templates use of Jinja and of Python's methods. None prints a bare boolean, which
# minijinja writes as true where Jinja writes True.
TEMPLATES = [
    ("{% for m in messages %}\n  {% if m['role'] == 'user' %}\n{{ m.content | trim }}\n  {% endif %}\n{% endfor %}\nend\n", " hi "),
    ("{{ bos_token }}{{ sep_token }}{{ eos_token }}{{ mask_token }}{{ additional_special_tokens | length }}", "-"),
    ("{% set c = messages[-1]['content'] %}{{ c.strip().upper().replace('A', 'b') }}|{{ c.split(',')[-1] }}|{{ 'yes' if c.startswith(' a') else 'no' }}", " a,b "),
    ("{% if tools is not none %}tools{% endif %}{% if documents %}documents{% endif %}{{ '<b>&' }}{{ messages[0].content }}", "<i>'"),
    ("{% for i in range(5) %}{% if i == 1 %}{% continue %}{% elif i == 3 %}{% break %}{% endif %}{{ loop.index0 }}{{ i }},{% endfor %}", "-"),
    ("{%- set ns = namespace(n=0) -%}\n{%- for m in messages -%}\n{%- set ns.n = ns.n + 1 -%}\n{%- endfor -%}\n{{ ns.n ~ '' }}\n{%- macro f(x) %}[{{ x }}]{% endmacro %}{{ f(messages[0]['content']) }}", "m"),
    ("{{ messages[0].items() | list | length }}{{ messages[0].get('content') }}{{ messages[0].get('name', 'none') }}{{ 1 if 'user' in messages[0].values() else 0 }}", "k"),
]


def train():
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.NFC()
    trained.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(SENTENCES, trainer)
    assert trained.get_vocab_size() == VOCAB_SIZE
    trained.model.save(str(HERE))


def record():
    tokenizer = Qwen2Tokenizer.from_pretrained(HERE)
    user = lambda message: [{"role": "user", "content": message}]
    render = lambda message, **more: tokenizer.apply_chat_template(
        user(message), tokenize=False, add_generation_prompt=True, **more)
    texts = []
    for text in TEXTS:
        ids = tokenizer.encode(text)
        # Decoding the first half of the ids may cut a character in two.
        half = ids[: len(ids) // 2]
        texts.append({"text": text, "ids": ids, "decoded": tokenizer.decode(ids, skip_special_tokens=True),
                      "half": tokenizer.decode(half, skip_special_tokens=True)})
    chats = [{"message": m, "prompt": render(m), "ids": tokenizer.encode(render(m))} for m in MESSAGES]
    templates = [{"template": t, "message": m, "prompt": render(m, chat_template=t)} for t, m in TEMPLATES]
    expected = {"texts": texts, "chats": chats, "templates": templates}
    (HERE / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


train()
record()
