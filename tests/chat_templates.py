"""Chat templates of published models and the tokens that they use, by the model's name; shortened ones in capitals."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ChatModel:
    """A model's template, its tokenizer's special tokens, and expected renderings.

    `prompt` is the rendering of 'Hi', `response` of the answer 'Yes', `system` of 'Be brief.' followed by 'Hi'.
    """

    template: str
    bos: str | None
    eos: str
    special: tuple[str, ...]  # other special tokens in the template
    prompt: str
    response: str
    system: str | None  # the prompt after a system turn; None: refused
    has_tools: bool = False


LLAMA_2 = """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}\
{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}\
{% set system_message = false %}{% endif %}{% for message in loop_messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% if loop.index0 == 0 and system_message != false %}\
{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}\
{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}\
{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}\
{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""

LLAMA_3 = """{% set loop_messages = messages %}{% for message in loop_messages %}\
{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + \
'<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

MISTRAL = """{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}\
{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}{% else %}\
{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"""

GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}\
{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}\
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"""

CHATML = """{% for message in messages %}\
{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

ZEPHYR = """{% for message in messages %}
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
{% endfor %}"""

_QWEN_TOOLS = """\
    {{- "# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\nYou are provided with \
function signatures within <tools></tools> XML tags:\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:\\n<tool_call>\\n{\\"name\\": <function-name>, \\"arguments\\": <args-json-object>}\
\\n</tool_call><|im_end|>\\n" }}
"""

_QWEN_TOOL_RESPONSE = """\
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' }}
        {{- message.content }}
        {{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
"""

QWEN_2_5 = f"""\
{{%- if tools %}}
    {{{{- '<|im_start|>system\\n' }}}}
    {{%- if messages[0]['role'] == 'system' %}}
        {{{{- messages[0]['content'] }}}}
    {{%- else %}}
        {{{{- 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' }}}}
    {{%- endif %}}
    {{{{- "\\n\\n" }}}}
{_QWEN_TOOLS}\
{{%- else %}}
    {{%- if messages[0]['role'] == 'system' %}}
        {{{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}}}
    {{%- else %}}
        {{{{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.\
<|im_end|>\\n' }}}}
    {{%- endif %}}
{{%- endif %}}
{{%- for message in messages %}}
    {{%- if (message.role == "user") or (message.role == "system" and not loop.first) or \
(message.role == "assistant" and not message.tool_calls) %}}
        {{{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}}}
    {{%- elif message.role == "assistant" %}}
        {{{{- '<|im_start|>' + message.role }}}}
        {{%- if message.content %}}
            {{{{- '\\n' + message.content }}}}
        {{%- endif %}}
        {{%- for tool_call in message.tool_calls %}}
            {{%- if tool_call.function is defined %}}
                {{%- set tool_call = tool_call.function %}}
            {{%- endif %}}
            {{{{- '\\n<tool_call>\\n{{"name": "' }}}}
            {{{{- tool_call.name }}}}
            {{{{- '", "arguments": ' }}}}
            {{{{- tool_call.arguments | tojson }}}}
            {{{{- '}}\\n</tool_call>' }}}}
        {{%- endfor %}}
        {{{{- '<|im_end|>\\n' }}}}
{_QWEN_TOOL_RESPONSE}\
{{%- if add_generation_prompt %}}
    {{{{- '<|im_start|>assistant\\n' }}}}
{{%- endif %}}
"""

QWEN_3 = f"""\
{{%- if tools %}}
    {{{{- '<|im_start|>system\\n' }}}}
    {{%- if messages[0].role == 'system' %}}
        {{{{- messages[0].content + '\\n\\n' }}}}
    {{%- endif %}}
{_QWEN_TOOLS}\
{{%- else %}}
    {{%- if messages[0].role == 'system' %}}
        {{{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}}}
    {{%- endif %}}
{{%- endif %}}
{{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}}
{{%- for message in messages[::-1] %}}
    {{%- set index = (messages|length - 1) - loop.index0 %}}
    {{%- if ns.multi_step_tool and message.role == "user" and message.content is string and \
not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}}
        {{%- set ns.multi_step_tool = false %}}
        {{%- set ns.last_query_index = index %}}
    {{%- endif %}}
{{%- endfor %}}
{{%- for message in messages %}}
    {{%- if message.content is string %}}
        {{%- set content = message.content %}}
    {{%- else %}}
        {{%- set content = '' %}}
    {{%- endif %}}
    {{%- if (message.role == "user") or (message.role == "system" and not loop.first) %}}
        {{{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}}}
    {{%- elif message.role == "assistant" %}}
        {{%- set reasoning_content = '' %}}
        {{%- if message.reasoning_content is string %}}
            {{%- set reasoning_content = message.reasoning_content %}}
        {{%- else %}}
            {{%- if '</think>' in content %}}
                {{%- set reasoning_content = \
content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}}
                {{%- set content = content.split('</think>')[-1].lstrip('\\n') %}}
            {{%- endif %}}
        {{%- endif %}}
        {{%- if loop.index0 > ns.last_query_index %}}
            {{%- if loop.last or (not loop.last and reasoning_content) %}}
                {{{{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + \
'\\n</think>\\n\\n' + content.lstrip('\\n') }}}}
            {{%- else %}}
                {{{{- '<|im_start|>' + message.role + '\\n' + content }}}}
            {{%- endif %}}
        {{%- else %}}
            {{{{- '<|im_start|>' + message.role + '\\n' + content }}}}
        {{%- endif %}}
        {{%- if message.tool_calls %}}
            {{%- for tool_call in message.tool_calls %}}
                {{%- if (loop.first and content) or (not loop.first) %}}
                    {{{{- '\\n' }}}}
                {{%- endif %}}
                {{%- if tool_call.function %}}
                    {{%- set tool_call = tool_call.function %}}
                {{%- endif %}}
                {{{{- '<tool_call>\\n{{"name": "' }}}}
                {{{{- tool_call.name }}}}
                {{{{- '", "arguments": ' }}}}
                {{%- if tool_call.arguments is string %}}
                    {{{{- tool_call.arguments }}}}
                {{%- else %}}
                    {{{{- tool_call.arguments | tojson }}}}
                {{%- endif %}}
                {{{{- '}}\\n</tool_call>' }}}}
            {{%- endfor %}}
        {{%- endif %}}
        {{{{- '<|im_end|>\\n' }}}}
{_QWEN_TOOL_RESPONSE}\
{{%- if add_generation_prompt %}}
    {{{{- '<|im_start|>assistant\\n' }}}}
    {{%- if enable_thinking is defined and enable_thinking is false %}}
        {{{{- '<think>\\n\\n</think>\\n\\n' }}}}
    {{%- endif %}}
{{%- endif %}}
"""

LLAMA_3_1 = """\
{{- bos_token }}{%- if messages[0].role == "system" %}{%- set system = messages[0].content | trim %}
{%- set messages = messages[1:] %}{%- else %}{%- set system = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" + system + "<|eot_id|>" }}
{%- if tools %}{#- before the first question #}
    {{- "<|start_header_id|>user<|end_header_id|>\\n\\n" }}
    {%- for tool in tools %}{{- tool | tojson + "\\n\\n" }}{%- endfor %}
    {{- messages[0].content | trim + "<|eot_id|>" }}{%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if "tool_calls" in message %}
        {%- if message.tool_calls | length != 1 %}{{- raise_exception("one call at a time") }}{%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}
        {{- '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + "}<|eot_id|>" }}
    {%- elif message.role == "tool" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" + message.content | tojson + "<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>" + message.role + "<|end_header_id|>\\n\\n" + message.content | trim + "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}{%- endif %}"""

MISTRAL_V3 = """\
{%- if messages[0].role == "system" %}{%- set system = messages[0].content %}
{%- set messages = messages[1:] %}{%- endif %}
{%- set questions = messages | selectattr("role", "equalto", "user") | list %}{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == "user" %}{#- the last question holds tools and system text #}
        {%- if tools and message == questions[-1] %}
            {{- "[AVAILABLE_TOOLS] " + tools | tojson + "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system is defined %}{{- "[INST] " + system + "\\n\\n" + message.content + "[/INST]" }}
        {%- else %}{{- "[INST] " + message.content + "[/INST]" }}{%- endif %}
    {%- elif message.tool_calls is defined %}
        {{- "[TOOL_CALLS] " + message.tool_calls | map(attribute="function") | list | tojson + eos_token }}
    {%- elif message.role == "assistant" %}{{- " " + message.content | trim + eos_token }}
    {%- elif message.role == "tool" %}{{- '[TOOL_RESULTS] {"content": ' + message.content + "}[/TOOL_RESULTS]" }}
    {%- endif %}
{%- endfor %}"""

GEMMA_3 = """\
{{ bos_token }}{%- if messages[0].role == "system" %}{%- set start = messages[0].content + "\\n\\n" %}
{%- set messages = messages[1:] %}{%- else %}{%- set start = "" %}{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") != (loop.index0 % 2 == 0) %}{{ raise_exception("roles must alternate") }}
    {%- endif %}
    {{- "<start_of_turn>" + ("model" if message.role == "assistant" else message.role) + "\\n" }}
    {{- (start if loop.first else "") + message.content | trim + "<end_of_turn>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<start_of_turn>model\\n" }}{%- endif %}"""

SMOLLM_2 = """\
{% for message in messages %}{% if loop.first and message.role != "system" %}\
{{ "<|im_start|>system\\nYou are SmolLM.<|im_end|>\\n" }}{% endif %}\
{{ "<|im_start|>" + message.role + "\\n" + message.content + "<|im_end|>" + "\\n" }}{% endfor %}\
{% if add_generation_prompt %}{{ "<|im_start|>assistant\\n" }}{% endif %}"""

_IM = ("<|im_start|>", "<|im_end|>")
_QWEN_SYSTEM = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
_IM_TURN = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
_IM_SYSTEM = f"<|im_start|>system\nBe brief.<|im_end|>\n{_IM_TURN}"
_HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>")
_LLAMA_3_TURN = (
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
)

MODELS = {
    "meta-llama/Llama-2-7b-chat-hf": ChatModel(
        LLAMA_2, "<s>", "</s>", (), "<s>[INST] Hi [/INST]", " Yes </s>",
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]",
    ),
    "meta-llama/Meta-Llama-3-8B-Instruct": ChatModel(
        LLAMA_3, "<|begin_of_text|>", "<|eot_id|>", _HEADERS, f"<|begin_of_text|>{_LLAMA_3_TURN}", "Yes<|eot_id|>",
        f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>{_LLAMA_3_TURN}",
    ),
    "mistralai/Mistral-7B-Instruct-v0.2": ChatModel(
        MISTRAL, "<s>", "</s>", (), "<s>[INST] Hi [/INST]", "Yes</s>", None
    ),
    "Qwen/Qwen2.5-7B-Instruct": ChatModel(
        QWEN_2_5, None, "<|im_end|>", _IM, f"{_QWEN_SYSTEM}{_IM_TURN}", "Yes<|im_end|>", _IM_SYSTEM, has_tools=True
    ),
    "Qwen/Qwen3-8B": ChatModel(
        QWEN_3, None, "<|im_end|>", _IM, _IM_TURN, "<think>\n\n</think>\n\nYes<|im_end|>", _IM_SYSTEM, has_tools=True
    ),
    "google/gemma-7b-it": ChatModel(
        GEMMA, "<bos>", "<eos>", ("<start_of_turn>", "<end_of_turn>"),
        "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n", "Yes<end_of_turn>", None,
    ),
    "teknium/OpenHermes-2.5-Mistral-7B (ChatML)": ChatModel(
        CHATML, "<s>", "<|im_end|>", ("<|im_start|>",), _IM_TURN, "Yes<|im_end|>", _IM_SYSTEM
    ),
    "HuggingFaceH4/zephyr-7b-beta": ChatModel(
        ZEPHYR, "<s>", "</s>", (), "<|user|>\nHi</s>\n<|assistant|>\n", "Yes</s>",
        "<|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\n",
    ),
}  # fmt: skip
