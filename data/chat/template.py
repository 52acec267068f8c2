"""The chat template: its special tokens and its Jinja text, equivalent to data/chat/rendering.py.

The Jinja text also accepts raw rows: lists of text parts, null content, other names of the thought,
`function_call`, and tool responses in any order. It neutralises special tokens itself because
servers render without data/chat/rendering.py. Arguments given as JSON text keep their escapes and
number formats.
"""

import hashlib

from data.chat.messages import FLAGS, TEXT_PARTS, THOUGHTS
from data.tokenizers.bpe import BOS, PAD

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
START_THOUGHT, END_THOUGHT = "<|start_thought|>", "<|end_thought|>"
TOOL_CALL, TOOL_RESPONSE = "<|tool_call|>", "<|tool_response|>"
RESERVED = ("<|reserved_0|>", "<|reserved_1|>")
CHAT_TOKENS = (IM_START, IM_END, START_THOUGHT, END_THOUGHT, TOOL_CALL, TOOL_RESPONSE, *RESERVED)
MARKERS = (*CHAT_TOKENS, BOS, PAD)
# Not special in tokenizer.json: decoding with skip_special_tokens keeps them, as Qwen's <think>.
SHOWN = (START_THOUGHT, END_THOUGHT, TOOL_CALL, TOOL_RESPONSE)
RESPONSE_TEMPLATE = {  # in tokenizer_config.json: transformers parses replies with it
    "defaults": {"role": "assistant"},
    "start_anchor": f"{IM_START}assistant\n",
    "fields": {
        "reasoning_content": {
            "open": START_THOUGHT,
            "close": END_THOUGHT,
            "content": "text",
            "content_args": {"strip": False},
        },
        "tool_calls": {
            "open": TOOL_CALL,
            "close_pattern": r"(?=<\|(?:tool_call|im_end|im_start|endoftext)\|>)",
            "repeats": True,
            "content": "json",
            "content_args": {"allow_non_json": True},  # a call that the token limit cut off
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {
            "close_pattern": r"\s*<\|(?:im_end|im_start|endoftext)\|>",
            "content": "text",
        },
    },
}
TEMPLATE = "chat_template.jinja"
TRAINING_TEMPLATE = "chat_template_training.jinja"  # marks the trained text
PREVIOUS_TEMPLATES = {  # sha256 of the templates in older checkpoints
    "37d777883af8dbe824847601da13a38533483dc96f5fe9f90b36bf2ce1279ba3",
}
NEUTRALISE = "".join(f"\n    | replace('{token}', '{token[0]} {token[1:]}')" for token in MARKERS)
THOUGHT = " or ".join(f"text(message['{key}'])" for key in THOUGHTS)
JINJA = """\
{%- macro safe(text) -%}
  {{- text@NEUTRALISE@ -}}
{%- endmacro -%}
{%- macro joined(content) -%}
  {%- if content is string -%}
    {{- content -}}
  {%- elif content -%}
    {%- for part in content -%}
      {%- if (part['type'] and part['type'] not in @TEXT_PARTS@) or part['text'] is not string -%}
        {{- raise_exception('Only text parts are supported in the content of a message.') -}}
      {%- endif -%}
      {{- part['text'] -}}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- macro text(content) -%}
  {{- safe(joined(content)) -}}
{%- endmacro -%}
{%- macro spaced(json) -%}
  {%- set at = namespace(quoted=false) -%}
  {%- for part in json.split('"') -%}
    {{- '' if loop.first else '"' -}}
    {%- if at.quoted -%}
      {{- part -}}
      {%- set at.quoted = (part | length - part.rstrip('\\\\') | length) % 2 == 1 -%}
    {%- else -%}
      {{- part | replace(' ', '') | replace('\\n', '') | replace('\\t', '') | replace('\\r', '')
          | replace(',', ', ') | replace(':', ': ') -}}
      {%- set at.quoted = true -%}
    {%- endif -%}
  {%- endfor -%}
{%- endmacro -%}
{%- macro reply(message) -%}
  {%- set thought = @THOUGHT@ -%}
  {%- if thought -%}
    {{- '<|start_thought|>' + thought + '<|end_thought|>' -}}
  {%- endif -%}
  {{- text(message['content']) | trim -}}
  {%- set calls = message['tool_calls'] -%}
  {%- if not calls and message['function_call'] -%}
    {%- set calls = [{'function': message['function_call']}] -%}
  {%- endif -%}
  {%- if calls -%}
    {%- for call in calls -%}
      {%- set arguments = call['function']['arguments'] -%}
      {{- '<|tool_call|>{"name": ' + safe(call['function']['name'] | tojson) + ', "arguments": ' -}}
      {%- if not arguments -%}
        {{- '{}' -}}
      {%- elif arguments is string -%}
        {{- safe(spaced(arguments)) -}}
      {%- else -%}
        {{- safe(arguments | tojson) -}}
      {%- endif -%}
      {{- '}' -}}
    {%- endfor -%}
  {%- endif -%}
  {{- '<|im_end|>' -}}
{%- endmacro -%}
{%- macro response(message) -%}
  {{- '<|im_start|>tool\\n<|tool_response|>' + text(message['content']) + '<|im_end|>\\n' -}}
{%- endmacro -%}
{{- bos_token -}}
{%- set system = '' -%}
{%- set turns = messages -%}
{%- if messages and messages[0]['role'] in ['system', 'developer'] -%}
  {%- set system = text(messages[0]['content']) | trim -%}
  {%- set turns = messages[1:] -%}
{%- endif -%}
{%- if system or tools -%}
  {{- '<|im_start|>system\\n' + system -}}
  {%- if tools -%}
    {{- ('\\n\\n' if system else '') + 'You can call these tools:' -}}
    {%- for tool in tools -%}
      {{- '\\n' + safe(tool | tojson) -}}
    {%- endfor -%}
  {%- endif -%}
  {{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- set run = namespace(calls=[], left=[]) -%}
{%- for message in turns -%}
  {%- if message['role'] == 'assistant' -%}
    {{- '<|im_start|>assistant\\n' -}}
@REPLY@
    {{- '\\n' -}}
    {%- set run.calls = message['tool_calls'] or [] -%}
  {%- elif message['role'] in ['tool', 'function'] -%}
    {%- set run.left = run.left + [message] -%}
    {%- if loop.last or turns[loop.index]['role'] not in ['tool', 'function'] -%}
      {%- for call in run.calls -%}
        {%- set found = namespace(at=-1) -%}
        {%- for one in run.left -%}
          {%- set named = not one['name'] or one['name'] == call['function']['name'] -%}
          {%- set matches = one['tool_call_id'] == call['id'] if one['tool_call_id'] else named -%}
          {%- if found.at == -1 and matches -%}
            {%- set found.at = loop.index0 -%}
          {%- endif -%}
        {%- endfor -%}
        {%- if found.at != -1 -%}
          {{- response(run.left[found.at]) -}}
          {%- set run.left = run.left[:found.at] + run.left[found.at + 1:] -%}
        {%- endif -%}
      {%- endfor -%}
      {%- for one in run.left -%}
        {{- response(one) -}}
      {%- endfor -%}
      {%- set run.left = [] -%}
      {%- set run.calls = [] -%}
    {%- endif -%}
  {%- else -%}
    {{- '<|im_start|>' + safe(message['role']) + '\\n' + (text(message['content']) | trim) + \
'<|im_end|>\\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
PLAIN_REPLY = "    {{- reply(message) -}}"
TRAINED_REPLY = """\
    {%- set flags = namespace(trained=true) -%}
    {%- for key in @FLAGS@ -%}
      {%- if message[key] is defined and message[key] is not none and not message[key] -%}
        {%- set flags.trained = false -%}
      {%- endif -%}
    {%- endfor -%}
    {%- if flags.trained -%}
      {%- generation -%}
      {{- reply(message) -}}
      {%- endgeneration -%}
    {%- else -%}
      {{- reply(message) -}}
    {%- endif -%}"""


def jinja_template(training: bool = False) -> str:
    """Return the Jinja template for transformers and llama.cpp.

    training: mark the trained text with {% generation %}, for the loss mask of transformers.
    """
    replacements = {
        "@REPLY@": TRAINED_REPLY if training else PLAIN_REPLY,
        "@NEUTRALISE@": NEUTRALISE,
        "@TEXT_PARTS@": str(list(TEXT_PARTS)),
        "@THOUGHT@": THOUGHT,
        "@FLAGS@": str(list(FLAGS)),
    }
    template = JINJA
    for name, text in replacements.items():
        template = template.replace(name, text)
    return template


def is_our_template(template: object) -> bool:
    """Return True for this template and for those of earlier versions."""
    if not isinstance(template, str):
        return False
    return (
        template == jinja_template()
        or hashlib.sha256(template.encode()).hexdigest() in PREVIOUS_TEMPLATES
    )
