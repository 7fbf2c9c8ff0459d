"""Chat templates of many shapes, tokenizers of three kinds, and chats for them."""

from helpers import train_bpe
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from tinymamba.chat_template import ChatTemplate
from tinymamba.openai_api import Message
from tinymamba.tokenizer import EOS_TOKEN, SimpleTokenizer

SHAPES = {
    "ChatML": """{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
    "Llama 2": """{% if messages[0]['role'] == 'system' %}
{% set loop_messages = messages[1:] %}{% set system = messages[0]['content'] %}
{% else %}{% set loop_messages = messages %}{% set system = false %}{% endif %}
{% for message in loop_messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if loop.index0 == 0 and system != false %}
{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] %}
{% else %}{% set content = message['content'] %}{% endif %}
{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{%- elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}
{% endfor %}""",
    "Llama 3": """{{- bos_token }}{%- if not date_string is defined %}
{%- set date_string = strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' %}
{%- endif %}{%- for message in messages %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
{%- if loop.first and message.role == 'system' %}{{- 'Today: ' + date_string + '\\n' }}{%- endif %}
{{- message.content | trim + '<|eot_id|>' }}{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}""",
    "Mistral": """{{ bos_token }}{% for m in messages %}
{%- if m.role == 'user' %}{{- '[INST]' + m.content + '[/INST]' -}}
{%- elif m.role == 'system' %}{{- '[INST]' ~ m.content ~ '\\n\\n' -}}
{%- else %}{{- m.content ~ eos_token -}}{% endif %}{% endfor %}""",
    "Gemma": """{{ bos_token }}{% for message in messages %}
{% if message['role'] == 'assistant' %}{% set role = 'model' %}
{% else %}{% set role = 'user' %}{% endif %}
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}""",
    "Phi-3": """{% for message in messages %}
{%- if message['role'] == 'system' and message['content'] %}
{{ '<|system|>\\n' + message['content'] + '<|end|>\\n' }}{% elif message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + '<|end|>\\n' }}{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n' + message['content'] + '<|end|>\\n' }}{% endif %}{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}""",
    "Phi-4-mini": """{% for message in messages %}
{%- if message['role'] == 'system' and 'tools' in message and message['tools'] is not none %}
{{- '<|system|>' + message['content'] + message['tools'] + '<|end|>' }}
{%- else %}{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}
{%- endfor %}{{- '<|assistant|>' if add_generation_prompt else eos_token }}""",
    "Zephyr": """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}""",
    "Vicuna": """{%- set ns = namespace(system='A chat. ') %}{%- for m in messages %}
{%- if m.role == 'system' %}{%- set ns.system = m.content + ' ' %}{%- endif %}{%- endfor %}
{{- bos_token + ns.system }}{%- for m in messages if m.role != 'system' %}
{{- ('USER: ' if m.role == 'user' else 'ASSISTANT: ') + m.content }}
{{- ' ' if m.role == 'user' else eos_token }}{%- endfor %}
{%- if add_generation_prompt %}{{- 'ASSISTANT:' }}{%- endif %}""",
    "Alpaca": """{% for message in messages %}{% if message.role == 'user' %}### Instruction:
{{ message.content | trim }}

{% elif message.role == 'assistant' %}### Response:
{{ message.content | trim }}{{ eos_token }}

{% else %}{{ message.content }}

{% endif %}{% endfor %}{% if add_generation_prompt %}### Response:
{% endif %}""",
    "DeepSeek": """{% if not add_generation_prompt is defined %}
{% set add_generation_prompt = false %}{% endif %}
{% set ns = namespace(is_first=true, system_prompt='') %}
{%- for message in messages %}{%- if message['role'] == 'system' %}
{%- set ns.system_prompt = ns.system_prompt + message['content'] %}{%- endif %}{%- endfor -%}
{{ bos_token }}{{ ns.system_prompt }}{%- for message in messages %}
{%- if message['role'] == 'user' %}{{- '<｜User｜>' + message['content'] }}
{%- elif message['role'] == 'assistant' and message['content'] is not none %}
{%- set content = message['content'] %}
{%- if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
{{- '<｜Assistant｜>' + content + eos_token }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<｜Assistant｜><think>\\n' }}{%- endif %}""",
    "Qwen 2.5": """{%- if tools %}{{- '<|im_start|>system\\n# Tools\\n' }}
{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}{{- '<|im_end|>\\n' }}
{%- elif messages[0].role != 'system' %}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}{%- if (message.role == 'user') or
 (message.role == 'system') or (message.role == 'assistant' and not message.tool_calls) %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}""",
    "Qwen 3": """{%- set ns = namespace(multi_step=true, last=messages | length - 1) %}
{%- for message in messages[::-1] %}
{%- if ns.multi_step and message.role == 'user' and not (
 message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
{%- set ns.multi_step = false %}{%- set ns.last = messages | length - 1 - loop.index0 %}
{%- endif %}{%- endfor %}
{%- for message in messages %}{%- set content = message.content %}
{%- if message.role == 'assistant' %}{%- set reasoning = '' %}
{%- if message.reasoning_content is string %}{%- set reasoning = message.reasoning_content %}
{%- elif '</think>' in content %}
{%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}
{%- if loop.index0 > ns.last %}
{%- set content = '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content %}
{%- endif %}{%- endif %}
{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}""",
    "tools are none": """{% if tools is defined and tools is not none %}
{{ 'TOOLS ' ~ tools | tojson }}
{% endif %}{% if documents %}{{ documents[0].title }}{% endif %}
{% if tools is undefined %}UNDEFINED{% endif %}
{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}""",
    "Command-R": """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}
{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}
{% if system_message != false %}
{{ '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' + system_message + '<|END_OF_TURN_TOKEN|>' }}
{%- endif %}{% for message in loop_messages %}{% set content = message['content'] %}
{% if message['role'] == 'user' %}
{{ '<|START_OF_TURN_TOKEN|><|USER_TOKEN|>' + content.strip() + '<|END_OF_TURN_TOKEN|>' }}
{%- elif message['role'] == 'assistant' %}
{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' + content.strip() + '<|END_OF_TURN_TOKEN|>' }}
{%- endif %}{% endfor %}
{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}""",
    "Falcon": """{% for message in messages %}{% if not loop.first %}{{ '\\n' }}{% endif %}
{% if message['role'] == 'system' %}{{ 'System: ' + message['content'] }}
{%- elif message['role'] == 'user' %}{{ 'User: ' + message['content'] }}
{%- elif message['role'] == 'assistant' %}{{ 'Falcon: ' + message['content'] }}{% endif %}
{% endfor %}{% if add_generation_prompt %}{{ '\\n' + 'Falcon:' }}{% endif %}""",
    "OLMo": """{{ eos_token }}{% for message in messages %}
{% if message['role'] == 'system' %}{{ '<|system|>\\n' + message['content'] + '\\n' }}
{%- elif message['role'] == 'user' %}{{ '<|user|>\\n' + message['content'] + '\\n' }}
{%- elif message['role'] == 'assistant' %}
{% if not loop.last %}{{ '<|assistant|>\\n' + message['content'] + eos_token + '\\n' }}
{%- else %}{{ '<|assistant|>\\n' + message['content'] + eos_token }}{% endif %}{% endif %}
{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{% endfor %}""",
    "generation": """{% for message in messages %}{% if message.role == 'assistant' %}
<|assistant|>{% generation %}{{ message.content + eos_token }}{% endgeneration %}
{%- else %}<|{{ message.role }}|>{{ message.content }}{% endif %}{% endfor %}
{% if add_generation_prompt %}<|assistant|>{% endif %}""",
    "break and continue": """{% for m in messages %}{% if m.role == 'system' %}
{% continue %}{% endif %}{% if loop.index > 30 %}{% break %}{% endif %}
<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>""",
    "strftime_now": """{{ strftime_now('%Y-%m-%d') }}{% for m in messages %}
<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>""",
    "tojson": """{{ messages | tojson }}{% for m in messages %}<|{{ m.role }}|>
{{- m.content | tojson }}{{ {'text': m.content} | tojson(indent=2) }}<|end|>{% endfor %}""",
    "split": """{% for m in messages %}<|{{ m.role }}|>{% for line in m['content'].split('\\n') %}
> {{ line }}
{% endfor %}{{ m.content.split(' ') | length }}<|end|>{% endfor %}<|assistant|>""",
    "in and length": """{% for m in messages %}
{% if 'o' in m.content and m.content | length > 5 %}long {{ m.content | length }}{% endif %}
{{ m.content[:3] }}|{{ m.content }}|{{ m.content[-1:] }}<|end|>{% endfor %}<|assistant|>""",
    "macro": """{%- macro turn(message, end='<|end|>') -%}
{{ '<|' ~ message.role ~ '|>' }}{{ message.content }}{{ end }}{%- endmacro -%}
{%- for message in messages %}{{ turn(message) }}{{ turn(message, end=eos_token) }}{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}""",
    "parts": """{% for m in messages %}<|{{ m.role }}|>{% if m.content is string %}{{ m.content }}
{%- else %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}<|end|>
{% endfor %}{% set x = dict(a=1) %}{{ x.a }}{{ unk_token }}{{ pad_token }}""",
    "system first": """{% if messages[0].role not in ['system', 'user'] %}
{{ raise_exception('the first must be system or user') }}{% endif %}
{% for m in messages %}{{ m.role | upper }}: {{ m.content | trim | replace('\\r', '') }}
{{ eos_token if m.role == 'assistant' }}
{% endfor %}{{ 'ASSISTANT:' }}""",
}  # fmt: skip

SPECIAL = [EOS_TOKEN, "<s>", "</s>", "<unk>", "<pad>", "<|im_start|>", "<|im_end|>", "<|end|>"]
SPECIAL += ["<|user|>", "<|system|>", "<|assistant|>", "<|start_header_id|>", "<|end_header_id|>"]
SPECIAL += ["<|eot_id|>", "[INST]", "[/INST]", "<start_of_turn>", "<end_of_turn>", "<｜User｜>"]
SPECIAL += ["<｜Assistant｜>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"]
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}

CHATS = [
    [("user", "Hello")],
    [("system", "Be kind."), ("user", " Grüße aus Köln, für dich \n")],
    [("user", "\n\nimport os\n"), ("assistant", "  ok é "), ("user", 'Say "日本" <b>&\'x\'</b>')],
    [("system", ""), ("user", "\tb\\n"), ("assistant", "<think>\nh\n</think>\n\ny"), ("user", "")],
    [("user", "a < b [c] | d > e"), ("assistant", "🙂 e\u0301"), ("user", "one\n\n\ntwo   three ")],
]  # fmt: skip
TALK = [
    ("user", "Hi <|im_end|></s>"),
    ("assistant", "a <|end|>"),
    ("user", "b"),
    ("assistant", "c"),
]


def byte_bpe():
    """GPT-2's kind, with two tokens that are added but not special."""
    bpe = train_bpe(*SPECIAL)
    bpe.add_tokens(["<think>", "</think>", "\n\n"])
    return bpe


def spaced_bpe():
    """Llama's kind: one more space before the text, unknown characters, specials in its words."""
    words = [*SPECIAL, *"▁abcdefghijklmnopqrstuvwxyz<>|/[]_", "▁H", "in", "▁in"]
    merges = [("▁", "H"), ("i", "n"), ("▁", "in")]
    vocabulary = {word: i for i, word in enumerate([*words, "H", *"INSTUE"])}
    bpe = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    bpe.decoder = decoders.Metaspace(prepend_scheme="first")
    strips = [AddedToken(token, normalized=False, rstrip=token == "<|end|>") for token in SPECIAL]
    bpe.add_special_tokens(strips[4:])  # "<unk>", "</s>" and so on only tokenizer_config.json names
    return bpe


def lower_wordpiece():
    """BERT's kind: lower case, no spaces."""
    words = ["[UNK]", *SPECIAL, *"abcdefghijklmnopqrstuvwxyz<>|/[]_.,:#"]
    words += ["##" + c for c in "abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {word: i for i, word in enumerate(words)}
    pieces = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    pieces.normalizer = normalizers.BertNormalizer(lowercase=True)
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces.add_special_tokens(SPECIAL)
    return pieces


KINDS = {make.__name__: make().to_str() for make in (byte_bpe, spaced_bpe, lower_wordpiece)}


def template_of(text: str, content: str = KINDS["byte_bpe"], names: dict = NAMES) -> ChatTemplate:
    record = {"name": "tokenizer.json", "content": content, "chat_template": text}
    return ChatTemplate(SimpleTokenizer.from_dict({**record, "special_tokens": names}))


def messages_of(chat) -> list[Message]:
    return [Message(role=role, content=content) for role, content in chat]
